// The forms of latent attention: how many latents there are and which heads read them. One file each in this
// folder, and their list in registry.cc.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "convert/latent/partition.h"

namespace relatent {

// A size that shows what a form costs, for `inspect`.
struct FormExample {
  std::string_view name;
  Index branches = 1;
  double part = 0;  // of a grouped-query cache, on each device when there is one for each latent
};

struct Form {
  std::string_view name;  // as --to and config.json say it
  // The latents for a number of branches, which is none where nothing was said; nothing for a number that the
  // form does not have.
  std::optional<Partition> (*partition)(std::optional<Index> branches);
  std::string_view branches;  // what to say of --branches then: "needs --branches 2 or 4"
  bool latent_source = true;  // an MLA source can become it
  bool slices = false;        // has the published variants whose slices score by themselves (--order)
  std::vector<FormExample> examples;
};

// In the order in which people are told of them.
const std::vector<const Form*>& forms();
// nullptr when there is none of that name.
const Form* find_form(std::string_view name);
std::vector<std::string> form_names();
// Form::partition of the form of that name; nothing when there is none either.
std::optional<Partition> partition_of(std::string_view form, std::optional<Index> branches);

// One file each.
const Form& mla_form();
const Form& gla_form();
const Form& tpla_form();
const Form& mlra_form();
const Form& gtpla_form();

}  // namespace relatent

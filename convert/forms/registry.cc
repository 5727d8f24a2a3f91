#include <algorithm>

#include "convert/forms/form.h"

namespace relatent {

const std::vector<const Form*>& forms() {
  static const std::vector<const Form*> all = {&mla_form(), &gla_form(), &tpla_form(), &mlra_form(),
                                               &gtpla_form()};
  return all;
}

const Form* find_form(std::string_view name) {
  const auto found =
      std::find_if(forms().begin(), forms().end(), [&](const Form* form) { return form->name == name; });
  return found == forms().end() ? nullptr : *found;
}

std::vector<std::string> form_names() {
  std::vector<std::string> out;
  for (const Form* form : forms()) {
    out.emplace_back(form->name);
  }
  return out;
}

std::optional<Partition> partition_of(std::string_view form, std::optional<Index> branches) {
  const Form* found = find_form(form);
  return found == nullptr ? std::nullopt : found->partition(branches);
}

}  // namespace relatent

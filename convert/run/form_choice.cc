#include "convert/run/form_choice.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "convert/plan/inputs.h"
#include "convert/plan/plan.h"
#include "convert/run/size_choice.h"
#include "formats/error.h"

namespace relatent {
namespace {

// Searching costs several times what the first trial does; a form that is worse than two others to begin with
// has not been seen to come first.
constexpr std::size_t searched_forms = 2;

TriedForm tried_form(const ConvertOptions& options, const SizeTrial& trial) {
  return {options.form, options.branches.value_or(1), trial};
}

void sort_by_loss(std::vector<std::pair<TriedForm, const ConvertOptions*>>& forms) {
  std::stable_sort(forms.begin(), forms.end(),
                   [](const auto& a, const auto& b) { return a.first.best.nats < b.first.best.nats; });
}

}  // namespace

std::string form_text(const TriedForm& form) {
  return form.form + "-" + std::to_string(form.branches);
}

FormChoice choose_form(const std::vector<ConvertOptions>& candidates, WorkFolder& work,
                       const FormWatch& watch) {
  FormChoice out;
  const auto hear = [&watch](const ConvertOptions& one, const SizeTrial& trial) {
    if (watch) {
      watch(tried_form(one, trial));
    }
  };
  work.run([&] {
    std::vector<std::pair<TriedForm, const ConvertOptions*>> found;
    std::optional<Error> refused;
    for (const ConvertOptions& one : candidates) {
      const auto heard = [&](const SizeTrial& trial) { hear(one, trial); };
      try {
        const ConvertInputs inputs = open_inputs(one);
        const SizeTrial first = try_first_sizes(completed(one, inputs), inputs, &work, heard);
        found.emplace_back(tried_form(one, first), &one);
      } catch (const Error& error) {
        // Sizes that one form has no room for may suit another.
        if (error.kind() != ErrorKind::usage) {
          throw;
        }
        refused = error;
      }
    }
    if (found.empty()) {
      throw Error(*refused);
    }
    sort_by_loss(found);
    for (std::size_t i = 0; i < std::min(found.size(), searched_forms); ++i) {
      auto& [form, options] = found[i];
      const auto heard = [&, one = options](const SizeTrial& trial) { hear(*one, trial); };
      const ConvertInputs inputs = open_inputs(*options);
      const SizeChoice choice = choose_sizes_by_trials(completed(*options, inputs), inputs, &work, heard);
      for (const SizeTrial& trial : choice.trials) {
        if (trial.nats < form.best.nats) {
          form.best = trial;
        }
      }
      form.searched = true;
    }
    sort_by_loss(found);
    out.options = *found.front().second;
    for (auto& [form, options] : found) {
      out.tried.push_back(std::move(form));
    }
  });
  return out;
}

}  // namespace relatent

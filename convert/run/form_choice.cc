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

// Searching costs several times what the first trial does.
constexpr std::size_t searched_forms = 2;

struct Candidate {
  TriedForm form;
  const ConvertOptions* options;
  ConvertInputs inputs;
};

TriedForm tried_form(const ConvertOptions& options, const SizeTrial& trial) {
  return {options.form, options.branches.value_or(1), trial};
}

void sort_by_loss(std::vector<Candidate>& candidates) {
  std::stable_sort(candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
    return a.form.best.nats < b.form.best.nats;
  });
}

}  // namespace

FormChoice choose_form(const std::vector<ConvertOptions>& candidates, WorkFolder& work,
                       const FormWatch& watch) {
  FormChoice out;
  const auto heard = [&watch](const ConvertOptions& one) {
    return [&watch, &one](const SizeTrial& trial) {
      if (watch) {
        watch(tried_form(one, trial));
      }
    };
  };
  work.run([&] {
    std::vector<Candidate> found;
    std::optional<Error> refused;
    bool checked = false;
    for (const ConvertOptions& one : candidates) {
      try {
        ConvertInputs inputs = open_inputs(one);
        if (!std::exchange(checked, true)) {
          check_calibration(inputs);  // reads every weight
        }
        const SizeTrial first = try_first_sizes(completed(one, inputs), inputs, &work, heard(one));
        found.push_back({tried_form(one, first), &one, std::move(inputs)});
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
      auto& [form, options, inputs] = found[i];
      const SizeChoice choice = search_sizes(completed(*options, inputs), inputs, &work, heard(*options));
      for (const SizeTrial& trial : choice.trials) {
        if (trial.nats < form.best.nats) {
          form.best = trial;
        }
      }
      form.searched = true;
    }
    sort_by_loss(found);
    out.options = *found.front().options;
    for (Candidate& candidate : found) {
      out.tried.push_back(std::move(candidate.form));
    }
  });
  return out;
}

}  // namespace relatent

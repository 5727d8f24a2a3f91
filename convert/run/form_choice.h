// Which form of latent attention a number of devices loses least with, by trials on held-out calibration
// tokens.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "convert/plan/form_candidates.h"
#include "convert/plan/options.h"
#include "convert/plan/plan.h"
#include "formats/work_folder.h"

namespace relatent {

struct TriedForm {
  std::string form;
  Index branches = 1;
  SizeTrial best;         // of the sizes that were tried
  bool searched = false;  // false: only the sizes that a search begins with were
};

struct FormChoice {
  ConvertOptions options;        // with form and branches
  std::vector<TriedForm> tried;  // the chosen one first, the others by what they lose
};

using FormWatch = std::function<void(const TriedForm&)>;

// Tries every candidate at the sizes that its search would begin with, searches the two that lose least, and
// takes the better one. Trials are recorded in the work folder, where plan_conversion for the chosen form
// finds them. watch hears of every trial.
FormChoice choose_form(const std::vector<ConvertOptions>& candidates, WorkFolder& work,
                       const FormWatch& watch);

}  // namespace relatent

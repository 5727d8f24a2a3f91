// Which form of latent attention a number of devices loses least with, by trials on held-out calibration
// tokens.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "convert/plan/options.h"
#include "convert/plan/plan.h"
#include "formats/work_folder.h"

namespace relatent {

// What ConvertOptions::form says when it is to be chosen.
inline constexpr const char* any_form_name = "auto";

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

// A form as people write it, "tpla-4".
std::string form_text(const TriedForm& form);

// For options of form "auto": the same for every form that gives each of `devices` devices one latent and
// that the engine can hold. Of forms that divide heads and latents alike only the first, as forms() has them.
// A single latent on every device is none of them: TPLA with all coordinates shared is the same and can be
// better. Throws Error (usage) when there are no devices, fewer than two, no --per-device, no calibration,
// another method than relatent, or options that belong to one form.
std::vector<ConvertOptions> form_candidates(const ConvertOptions& options);

using FormWatch = std::function<void(const TriedForm&)>;

// Tries every candidate at the sizes that its search would begin with, searches the two that lose least, and
// takes the better one. Trials are recorded in the work folder, where plan_conversion for the chosen form
// finds them. watch hears of every trial.
FormChoice choose_form(const std::vector<ConvertOptions>& candidates, WorkFolder& work,
                       const FormWatch& watch);

}  // namespace relatent

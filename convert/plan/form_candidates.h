// The forms that --to auto chooses from.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "convert/plan/options.h"

namespace relatent {

// What ConvertOptions::form says when it is to be chosen.
inline constexpr const char* any_form_name = "auto";

// A form as people write it, "tpla-4".
std::string form_text(std::string_view form, Index branches);

// For options of form "auto": the same for every form that gives each of `devices` devices one latent and
// that the engine can hold. Of forms that divide heads and latents alike only the first, as forms() has them.
// A single latent on every device is none of them: TPLA with all coordinates shared is the same and can be
// better. Throws Error (usage) when there are no devices, fewer than two, no --per-device, no calibration,
// another method than relatent, or options that belong to one form.
std::vector<ConvertOptions> form_candidates(const ConvertOptions& options);

}  // namespace relatent

// What a conversion reads, opened.
#pragma once

#include <memory>
#include <optional>

#include "convert/calibrate/calibrate.h"
#include "convert/engines/engine.h"
#include "convert/forms/form.h"
#include "convert/latent/maps.h"
#include "convert/model/model.h"
#include "convert/plan/options.h"

namespace relatent {

struct ConvertInputs {
  Model source;
  std::unique_ptr<Engine> engine;
  std::optional<CalibrationFile> calibration;
  const Form* form = nullptr;  // that is asked for
  Partition partition;         // of its latents
  LayerSet carried;            // layers that are not converted
};

// The layers of the source that are converted, in order.
inline LayerSet converted_layers(const ConvertInputs& inputs) {
  return inputs.carried.others(inputs.source.config().num_hidden_layers);
}

// Whether latents read the source's normalised heads (NormedHeads, attention.h).
bool reads_normed_heads(const ConvertInputs& inputs);

// The source's list of rotary frequencies, which they share.
const Rotary& converted_rotary(const ConvertInputs& inputs);

// Throws Error: usage when engine, form, branches, layers, the source's heads, method and calibration do not
// go together, input when the source or the calibration is not readable, when the calibration has other
// layers, hidden size or heads than the source, or when a side file is a link to elsewhere.
ConvertInputs open_inputs(const ConvertOptions& options);

// Throws Error (input) when the calibration was made from another checkpoint of the same sizes.
void check_calibration(const ConvertInputs& inputs);

// What is known of a layer's input: from the calibration, or from the norm's gain alone. The calibration's
// file is not for several threads.
Moments input_moments(const ConvertInputs& inputs, Index layer_idx);

// How many of `count` calibration sequences the fits leave for measuring: none where they are few.
Index default_held_out(Index count);

// Calibration sequences that the fits leave for measuring, and those that they may use. With a calibration
// only.
Index held_out_sequences(const ConvertOptions& options, const ConvertInputs& inputs);
Sequences fit_sequences(const ConvertOptions& options, const ConvertInputs& inputs);

}  // namespace relatent

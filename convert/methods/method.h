// How the attention of a checkpoint's layers becomes latent: one file for each method.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <vector>

#include "convert/latent/maps.h"
#include "convert/model/attention.h"
#include "convert/model/rotary.h"
#include "convert/plan/plan.h"

namespace relatent {

class ConversionMethod {
 public:
  ConversionMethod() = default;
  ConversionMethod(const ConversionMethod&) = delete;
  ConversionMethod& operator=(const ConversionMethod&) = delete;
  virtual ~ConversionMethod() = default;

  // The list of rotary frequencies that all converted layers share, or one for each of them in their order.
  // Layers that are carried are no business of a method, but of next().
  virtual std::vector<Rotary> rotaries() const = 0;

  // No layer depends on another.
  virtual bool independent() const { return true; }
  // Converts any layer when they are independent, on any thread. moments: what is known of its input. A
  // NumericalError names the layer, here and below.
  virtual LatentAttention convert(Index layer_idx, Moments moments) const = 0;
  // Otherwise: converts the next layer, from the first to the last; nothing where it is carried.
  virtual std::optional<LatentAttention> next();

  // Between two layers: keeps what the next one needs of those before it, so that another run of the same
  // plan can go on there. Throws Error (machine).
  virtual void save(const std::filesystem::path& /*path*/) const {}
  // Goes on where save() was called, or with independent layers anywhere up to `layers`; the next layer, 0
  // when there is nothing to go on from. Before the first layer only. Throws Error (machine).
  virtual Index resume(const std::filesystem::path& /*path*/, Index layers) { return layers; }

  // Engines without biases: mean square, in the layer where it is largest, of what the nearest linear map of
  // the input misses of the biases, in units of theirs.
  virtual double fold_error() const { return 0; }
};

// The method of a plan. fold: of transmla (choose_fold). Plan and inputs must outlive it.
std::unique_ptr<ConversionMethod> make_method(const ConvertPlan& plan, const ConvertInputs& inputs,
                                              std::optional<Index> fold);

// One file each.
std::unique_ptr<ConversionMethod> make_lossless(const ConvertPlan& plan, const ConvertInputs& inputs);
std::unique_ptr<ConversionMethod> make_transmla(const ConvertPlan& plan, const ConvertInputs& inputs,
                                                Index fold);
std::unique_ptr<ConversionMethod> make_weights_only(const ConvertPlan& plan, const ConvertInputs& inputs);
std::unique_ptr<ConversionMethod> make_relatent(const ConvertPlan& plan, const ConvertInputs& inputs);

// The fold with which transmla loses least on a few calibration sequences. All layers share it, because
// engines keep one list of frequencies for all of them.
Index choose_fold(const ConvertPlan& plan, const ConvertInputs& inputs);

}  // namespace relatent

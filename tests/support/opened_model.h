// Small models as files, opened and run.
#pragma once

#include <string>

#include "convert/compute/backend.h"
#include "convert/model/model.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent::testing_support {

inline Model open(const TinyModel& tiny, const TempFolder& folder, const std::string& name = "model") {
  tiny.write(folder / name);
  return Model::open(folder / name);
}

// Through all layers.
inline void run(const Model& model, Stream& stream) {
  for (Index i = 0; i < model.config().num_hidden_layers; ++i) {
    run_layer(model.layer(i), stream);
  }
}

}  // namespace relatent::testing_support

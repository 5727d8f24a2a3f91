// A layer as an engine writes it.
#pragma once

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <vector>

#include "convert/engines/engine.h"
#include "convert/model/model.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent::testing_support {

// A checkpoint whose `layers` layers are all `layer`, written by the engine into the folder beside `body`.
inline Model write_and_open(const Engine& engine, const LatentAttention& layer, const LatentShape& shape,
                            const TinyModel& body, Index layers, DType dtype, const TempFolder& folder) {
  const ModelConfig source = parse_config(body.config, "config.json");
  write_text(folder / "config.json", engine.config(body.config, source, shape, layer.rotary, dtype).dump());
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : body.tensors) {
    specs.push_back({name, tensor.dtype, tensor.shape});
  }
  for (Index i = 0; i < layers; ++i) {
    for (const TensorSpec& spec : engine.attention_tensors(source, shape, i, dtype)) {
      EXPECT_EQ(spec.dtype, dtype);
      specs.push_back(spec);
    }
  }
  CheckpointWriter writer(folder.path(), specs, 1'000'000'000);
  for (const auto& [name, tensor] : body.tensors) {
    writer.write_floats(name, tensor.values);
  }
  for (Index i = 0; i < layers; ++i) {
    engine.write_attention(layer, shape, i, dtype, writer);
  }
  // Throws when a tensor is missing; writing one that was not announced, or of another size, has thrown
  // before.
  writer.finish();
  return Model::open(folder.path());
}

// The same beside a body of these options.
inline Model write_and_open(const Engine& engine, const LatentAttention& layer, const LatentShape& shape,
                            const TinyOptions& body_options, DType dtype, const TempFolder& folder) {
  Random random(2);
  return write_and_open(engine, layer, shape, tiny_body(body_options, random), body_options.layers, dtype,
                        folder);
}

}  // namespace relatent::testing_support

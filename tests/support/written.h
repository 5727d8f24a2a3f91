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

// What the engine writes of one layer's attention, in order.
inline std::vector<ExpectedTensor> attention_tensors(const Engine& engine,
                                                     const nlohmann::ordered_json& source_config,
                                                     const ModelConfig& source, const LatentShape& shape,
                                                     Index layer_idx, DType dtype) {
  std::vector<ExpectedTensor> out;
  for (ExpectedTensor& tensor :
       expected_tensors(engine.written_config(source_config, source, shape, dtype))) {
    if (is_attention(tensor.role) && tensor.layer_idx == layer_idx) {
      EXPECT_EQ(tensor.presence, Presence::required);
      out.push_back(std::move(tensor));
    }
  }
  return out;
}

// Announces the attention of layers and writes it.
class AttentionOutput {
 public:
  AttentionOutput(const Engine& engine, const nlohmann::ordered_json& source_config,
                  const ModelConfig& source, const LatentShape& shape, Index layers, DType dtype)
      : engine_(engine), shape_(shape), dtype_(dtype) {
    for (Index i = 0; i < layers; ++i) {
      for (ExpectedTensor& tensor : attention_tensors(engine, source_config, source, shape, i, dtype)) {
        specs_.push_back({tensor.name, engine.stored_dtype(tensor.role, tensor.shape, dtype), tensor.shape});
        places_.push_back(std::move(tensor));
      }
    }
  }
  const std::vector<TensorSpec>& specs() const { return specs_; }
  void write(const LatentAttention& layer, Index layer_idx, TensorSink& out) const {
    const TensorNames names(places_);
    engine_.write_attention(layer, shape_, dtype_, LayerWriter(names, layer_idx, out));
  }

 private:
  const Engine& engine_;
  const LatentShape& shape_;
  DType dtype_;
  std::vector<TensorSpec> specs_;
  std::vector<PlacedTensor> places_;
};

// A checkpoint whose `layers` layers are all `layer`, written by the engine into the folder beside `body`.
inline Model write_and_open(const Engine& engine, const LatentAttention& layer, const LatentShape& shape,
                            const TinyModel& body, Index layers, DType dtype, const TempFolder& folder) {
  const ModelConfig source = parse_config(body.config, "config.json");
  write_text(folder / "config.json", engine.config(body.config, source, shape, layer.rotary, dtype).dump());
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : body.tensors) {
    specs.push_back({name, tensor.dtype, tensor.shape});
  }
  const AttentionOutput attention(engine, body.config, source, shape, layers, dtype);
  specs.insert(specs.end(), attention.specs().begin(), attention.specs().end());
  CheckpointWriter writer(folder.path(), specs, 1'000'000'000);
  for (const auto& [name, tensor] : body.tensors) {
    writer.write_floats(name, tensor.values);
  }
  for (Index i = 0; i < layers; ++i) {
    attention.write(layer, i, writer);
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

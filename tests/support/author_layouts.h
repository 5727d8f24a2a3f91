// Random layers in the shape of the authors' layouts, and checkpoints that an engine writes of them.
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "convert/engines/gla.h"
#include "convert/engines/mlra.h"
#include "convert/forms/form.h"
#include "convert/latent/lay_out.h"
#include "convert/model/families/family.h"
#include "convert/model/model.h"
#include "tests/support/latents.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"
#include "tests/support/written.h"

namespace relatent::testing_support {

inline Rotary plain_rotary(Index size, double base) {
  Rotary out;
  for (Index i = 0; i < size / 2; ++i) {
    out.inv_freq.push_back(
        static_cast<float>(std::pow(base, -2 * static_cast<double>(i) / static_cast<double>(size))));
  }
  return out;
}

// One of the MLRA authors' four models. No two sizes are equal where the layout leaves that open.
struct MlraSample {
  std::string form = "mlra";
  Index branches = 2;
  Index key_rank = 3;  // of forms that share keys
  Index rank = 13;     // of a group
  Index norm_coordinates = 2;
  Index hidden = 24;
  Index q_rank = 17;

  std::string model() const { return form + "_" + std::to_string(branches); }
};

inline std::vector<MlraSample> mlra_samples() {
  return {{.form = "mlra", .branches = 2},
          {.form = "mlra", .branches = 4, .rank = 15},
          {.form = "gla", .branches = 2},
          {.form = "gla", .branches = 4}};
}

inline LatentShape shape_of(const MlraSample& sample) {
  LatentShape out;
  out.form = sample.form;
  out.heads = 8;
  out.qk_nope_head_dim = 5;
  out.qk_rope_head_dim = 6;
  out.v_head_dim = 5;
  out.q_lora_rank = sample.q_rank;
  out.norm_coordinates = sample.norm_coordinates;
  const Partition partition = relatent::partition_of(sample.form, sample.branches).value();
  lay_out(partition,
          std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups),
                                  {partition.parts > 1 ? sample.key_rank : 0, sample.rank}),
          out);
  return out;
}

// As a conversion leaves it: nothing shared any more, every latent with its own norm.
inline LatentAttention random_layer(Random& random, const MlraSample& sample) {
  constexpr float eps = 1e-6F;
  const LatentShape shape = shape_of(sample);
  LatentAttention out;
  out.heads = shape.heads;
  out.nope_dim = shape.qk_nope_head_dim;
  out.rope_dim = shape.qk_rope_head_dim;
  out.v_dim = shape.v_head_dim;
  out.scale = 0.4F;  // not what the engine takes by itself
  out.q_down = random.linear(sample.q_rank, sample.hidden, false);
  out.q_norm = {random_gain(random, sample.q_rank), eps};
  out.q = random.linear(out.heads * (out.nope_dim + out.rope_dim), sample.q_rank, false);
  out.rotary_key = random.linear(out.rope_dim, sample.hidden, false);
  for (const BranchGeometry& geometry : shape.branches) {
    const Index rank = geometry.whole_rank(shape.shared_ranks) + shape.norm_coordinates;
    LatentBranch branch;
    branch.down = random.linear(rank, sample.hidden, false);
    branch.norm = {random_gain(random, rank), eps};
    branch.up = random.matrix(geometry.head_count * (out.nope_dim + out.v_dim), rank,
                              1 / std::sqrt(static_cast<double>(rank)));
    branch.first_head = geometry.first_head;
    branch.head_count = geometry.head_count;
    out.branches.push_back(std::move(branch));
  }
  out.o = random.linear(sample.hidden, out.heads * out.v_dim, false);
  out.rotary = plain_rotary(out.rope_dim, 10000);
  return out;
}

struct GlaSample {
  std::string name = "plain";
  Index rank = 15;  // of each of the two latents; the layout has 2 d - 1 = 15
  Index hidden = 24;
  std::optional<Index> q_rank = {};
  bool bias = false;
};

inline std::vector<GlaSample> gla_samples() {
  return {{},
          {.name = "biases", .bias = true},
          {.name = "narrow", .rank = 4, .bias = true},
          {.name = "compressed query", .hidden = 70, .q_rank = 63, .bias = true},
          {.name = "narrow query", .rank = 11, .q_rank = 9}};
}

inline LatentShape shape_of(const GlaSample& sample) {
  LatentShape out;
  out.form = "gla";
  out.heads = 6;
  out.qk_nope_head_dim = 8;
  out.qk_rope_head_dim = 6;
  out.v_head_dim = 8;
  out.q_lora_rank = sample.q_rank;
  out.has_q_bias = sample.bias;
  out.attention_bias = sample.bias;
  const Partition partition = relatent::partition_of("gla", 2).value();
  lay_out(partition, std::vector<GroupSizes>(2, {0, sample.rank}), out);
  return out;
}

inline LatentAttention random_layer(Random& random, const GlaSample& sample) {
  const LatentShape shape = shape_of(sample);
  LatentAttention out;
  out.heads = shape.heads;
  out.nope_dim = shape.qk_nope_head_dim;
  out.rope_dim = shape.qk_rope_head_dim;
  out.v_dim = shape.v_head_dim;
  out.scale = 0.4F;
  if (sample.q_rank) {
    out.q_down = random.linear(*sample.q_rank, sample.hidden, sample.bias);
  }
  out.q = random.linear(out.heads * (out.nope_dim + out.rope_dim), sample.q_rank.value_or(sample.hidden),
                        sample.bias);
  out.rotary_key = random.linear(out.rope_dim, sample.hidden, sample.bias);
  for (const BranchGeometry& geometry : shape.branches) {
    LatentBranch branch;
    branch.down = random.linear(geometry.rank, sample.hidden, sample.bias);
    branch.up = random.matrix(geometry.head_count * (out.nope_dim + out.v_dim), geometry.rank,
                              1 / std::sqrt(static_cast<double>(geometry.rank)));
    branch.first_head = geometry.first_head;
    branch.head_count = geometry.head_count;
    out.branches.push_back(std::move(branch));
  }
  out.o = random.linear(sample.hidden, out.heads * out.v_dim, sample.bias);
  out.rotary = plain_rotary(out.rope_dim, 500);
  return out;
}

// What surrounds the attention, under the names of the family; its config is still the source's.
inline TinyModel author_body(const Engine& engine, const TinyOptions& options) {
  Random random(options.seed);
  TinyModel plain = tiny_body(options, random);
  TinyModel out;
  out.config = plain.config;
  out.dtype = plain.dtype;
  const auto named = [](const TensorRule& rule, Index layer_idx) {
    std::string name(rule.name);
    if (const std::size_t at = name.find("{i}"); at != std::string::npos) {
      name.replace(at, 3, std::to_string(layer_idx));
    }
    return name;
  };
  for (Index i = 0; i < options.layers; ++i) {
    for (const TensorRule& rule : find_family("llama")->rules) {
      const auto found = plain.tensors.find(named(rule, i));
      for (const TensorRule& theirs : find_family(engine.family())->rules) {
        if (theirs.role == rule.role && found != plain.tensors.end()) {
          out.tensors[named(theirs, i)] = found->second;
        }
      }
    }
  }
  return out;
}

// A checkpoint whose every layer is `layer`, written by the engine with the body that its authors' models
// have.
inline Model write_and_open_authors(const Engine& engine, const LatentAttention& layer,
                                    const LatentShape& shape, const TinyOptions& options, DType dtype,
                                    const TempFolder& folder) {
  return write_and_open(engine, layer, shape, author_body(engine, options), options.layers, dtype, folder);
}

// A checkpoint in memory with random attention tensors.
inline TinyModel tiny_author_model(const Engine& engine, const LatentShape& shape, const Rotary& rotary,
                                   const TinyOptions& options) {
  TinyModel out = author_body(engine, options);
  const ModelConfig source = parse_config(out.config, "config.json");
  Random random(options.seed + 1);
  for (Index i = 0; i < options.layers; ++i) {
    for (const ExpectedTensor& spec :
         attention_tensors(engine, out.config, source, shape, i, options.dtype)) {
      Index rows = 1;
      for (std::size_t s = 0; s + 1 < spec.shape.size(); ++s) {
        rows *= spec.shape[s];
      }
      out.put(spec.name, spec.shape, random.matrix(rows, spec.shape.back()));
    }
  }
  out.config =
      nlohmann::ordered_json::parse(engine.config(out.config, source, shape, rotary, options.dtype).dump());
  return out;
}

inline TinyModel tiny_mlra_model(const MlraSample& sample = {}) {
  return tiny_author_model(*make_mlra_engine(), shape_of(sample), plain_rotary(6, 10000),
                           {.hidden = sample.hidden, .layers = 2, .heads = 8, .tied = true});
}

inline TinyModel tiny_gla_model(const GlaSample& sample = {}) {
  return tiny_author_model(*make_gla_engine(), shape_of(sample), plain_rotary(6, 500),
                           {.hidden = sample.hidden, .layers = 2, .heads = 6});
}

}  // namespace relatent::testing_support

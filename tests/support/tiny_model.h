// Checkpoints small enough to write by the dozen.
#pragma once

#include <algorithm>
#include <array>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "convert/engines/relatent.h"
#include "formats/checkpoint.h"
#include "formats/files.h"
#include "formats/npy.h"
#include "tests/support/samples.h"

namespace relatent::testing_support {

// No two sizes of a tensor are equal, so that a transposed one is noticed.
struct TinyOptions {
  std::string model_type = "llama";  // of a grouped-query family
  Index hidden = 24;
  Index layers = 3;
  Index heads = 6;
  Index kv_heads = 2;
  Index head_dim = 8;
  Index vocab = 50;
  Index intermediate = 40;
  bool q_bias = false;
  bool kv_bias = false;
  bool o_bias = false;
  bool tied = false;
  DType dtype = DType::f32;
  std::uint32_t seed = 1;
};

// A checkpoint in memory, to be altered at will before it is written.
// Moving JSON asserts, which is no exception.
// NOLINTNEXTLINE(bugprone-exception-escape)
struct TinyModel {
  struct Tensor {
    DType dtype = DType::f32;
    std::vector<std::int64_t> shape;
    std::vector<float> values;
  };

  nlohmann::ordered_json config;
  std::map<std::string, Tensor> tensors;
  DType dtype = DType::f32;

  void put(const std::string& name, const std::vector<std::int64_t>& shape, const MatrixF& values) {
    tensors[name] = {dtype, shape, {values.data(), values.data() + values.size()}};
  }
  void put(const std::string& name, const MatrixF& values) {
    put(name, {values.rows(), values.cols()}, values);
  }
  void put_vector(const std::string& name, const RowVectorF& values) { put(name, {values.size()}, values); }
  void put(const std::string& name, const Linear& linear) {
    put(name + ".weight", linear.weight);
    if (linear.bias.size() > 0) {
      put_vector(name + ".bias", linear.bias);
    }
  }

  // What CheckpointWriter would refuse (NaN) is written too.
  void write(const std::filesystem::path& folder) const {
    std::filesystem::create_directories(folder);
    write_text(folder / "config.json", config.dump(2));
    std::vector<TensorSpec> specs;
    for (const auto& [name, tensor] : tensors) {
      specs.push_back({name, tensor.dtype, tensor.shape});
    }
    CheckpointWriter writer(folder, specs, std::numeric_limits<std::uint64_t>::max());
    for (const TensorSpec& spec : specs) {
      std::vector<std::byte> bytes(spec.bytes());
      if (is_float(spec.dtype)) {
        encode_floats(spec.dtype, tensors.at(spec.name).values, bytes);
      }
      writer.write(spec.name, bytes);
    }
    writer.finish();
  }
};

inline std::string layer_name(Index layer, const std::string& rest) {
  return "model.layers." + std::to_string(layer) + "." + rest;
}

inline nlohmann::ordered_json tiny_config(const TinyOptions& options) {
  nlohmann::ordered_json config;
  config["model_type"] = options.model_type;
  config["bos_token_id"] = 0;
  config["eos_token_id"] = {1, 2};
  config["dtype"] = torch_name(options.dtype);
  config["head_dim"] = options.head_dim;
  config["hidden_act"] = "silu";
  config["hidden_size"] = options.hidden;
  config["initializer_range"] = 0.05;
  config["intermediate_size"] = options.intermediate;
  config["max_position_embeddings"] = 128;
  config["num_attention_heads"] = options.heads;
  config["num_hidden_layers"] = options.layers;
  config["num_key_value_heads"] = options.kv_heads;
  config["rms_norm_eps"] = 1e-5;
  config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", 100.0}};
  config["tie_word_embeddings"] = options.tied;
  config["vocab_size"] = options.vocab;
  return config;
}

// Everything of a model but its attention: the part that families share.
inline TinyModel tiny_body(const TinyOptions& options, Random& random) {
  TinyModel model;
  model.config = tiny_config(options);
  model.dtype = options.dtype;
  const auto gain = [&] { return RowVectorF(random.row(options.hidden, 0.2).array() + 1.0F); };
  model.put("model.embed_tokens.weight", random.matrix(options.vocab, options.hidden));
  model.put_vector("model.norm.weight", gain());
  if (!options.tied) {
    model.put("lm_head", random.linear(options.vocab, options.hidden, false));
  }
  for (Index i = 0; i < options.layers; ++i) {
    model.put_vector(layer_name(i, "input_layernorm.weight"), gain());
    model.put_vector(layer_name(i, "post_attention_layernorm.weight"), gain());
    model.put(layer_name(i, "mlp.gate_proj"), random.linear(options.intermediate, options.hidden, false));
    model.put(layer_name(i, "mlp.up_proj"), random.linear(options.intermediate, options.hidden, false));
    model.put(layer_name(i, "mlp.down_proj"), random.linear(options.hidden, options.intermediate, false));
  }
  return model;
}

// Families that have biases on q, k and v whatever the options say.
inline const std::set<std::string>& always_biased() {
  static const std::set<std::string> types = {"qwen2", "qwen2_moe", "seed_oss"};
  return types;
}

// Gemma's norms behind attention and MLP too, all of them 1 less than what they multiply by, and its keys.
inline void make_gemma(const TinyOptions& options, Random& random, TinyModel& model) {
  const auto less_one = [&] { return random.row(options.hidden, 0.2); };
  model.put_vector("model.norm.weight", less_one());
  for (Index i = 0; i < options.layers; ++i) {
    for (const char* name : {"input_layernorm.weight", "post_attention_layernorm.weight",
                             "pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"}) {
      model.put_vector(layer_name(i, name), less_one());
    }
  }
  model.config.erase("hidden_act");
  model.config["hidden_activation"] = "gelu_pytorch_tanh";
  model.config["query_pre_attn_scalar"] = 11;
  model.config["sliding_window"] = 9;
  if (options.model_type == "gemma2") {
    model.config["attn_logit_softcapping"] = 3.0;
    model.config["final_logit_softcapping"] = 5.0;
    return;
  }
  model.config["sliding_window_pattern"] = 2;
  model.config["rope_parameters"] = {
      {"full_attention", {{"rope_type", "linear"}, {"rope_theta", 100.0}, {"factor", 3.0}}},
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 50.0}}}};
}

// Families that normalise queries and keys: each head's, or (olmo2) all of them together.
inline bool normalises_heads(const std::string& model_type) {
  static const std::set<std::string> types = {"qwen3", "qwen3_moe", "gemma3_text", "olmo2"};
  return types.contains(model_type);
}

// Families whose config says whether there are biases.
inline bool says_bias(const std::string& model_type) {
  static const std::set<std::string> types = {"qwen3",   "qwen3_moe", "gemma3_text", "olmo2",
                                              "granite", "smollm3",   "glm4"};
  return types.contains(model_type);
}

// Puts the rows of several tensors into one, in order.
inline void fuse(const std::vector<std::string>& names, const std::string& into, TinyModel& model) {
  TinyModel::Tensor whole = model.tensors.at(names.front());
  whole.values.clear();
  whole.shape.front() = 0;
  for (const std::string& name : names) {
    const TinyModel::Tensor& piece = model.tensors.at(name);
    whole.shape.front() += piece.shape.front();
    whole.values.insert(whole.values.end(), piece.values.begin(), piece.values.end());
  }
  for (const std::string& name : names) {
    model.tensors.erase(name);
  }
  model.tensors[into] = std::move(whole);
}

inline void fuse_gate_and_up(Index layer, TinyModel& model) {
  const std::string mlp = layer_name(layer, "mlp.");
  fuse({mlp + "gate_proj.weight", mlp + "up_proj.weight"}, mlp + "gate_up_proj.weight", model);
}

// A norm behind attention or MLP.
inline RowVectorF behind(const TinyOptions& options, Random& random) {
  return random.row(options.hidden, 0.2).array() + 1.0F;
}

inline TinyModel tiny_model(const TinyOptions& options = {}) {
  Random random(options.seed);
  TinyModel model = tiny_body(options, random);
  const bool always = always_biased().contains(options.model_type);
  for (Index i = 0; i < options.layers; ++i) {
    const Index q = options.heads * options.head_dim;
    const Index kv = options.kv_heads * options.head_dim;
    model.put(layer_name(i, "self_attn.q_proj"), random.linear(q, options.hidden, options.q_bias || always));
    model.put(layer_name(i, "self_attn.k_proj"),
              random.linear(kv, options.hidden, options.kv_bias || always));
    model.put(layer_name(i, "self_attn.v_proj"),
              random.linear(kv, options.hidden, options.kv_bias || always));
    model.put(layer_name(i, "self_attn.o_proj"), random.linear(options.hidden, q, options.o_bias));
    if (normalises_heads(options.model_type)) {
      const bool wide = options.model_type == "olmo2";
      model.put_vector(layer_name(i, "self_attn.q_norm.weight"),
                       RowVectorF(random.row(wide ? q : options.head_dim, 0.3).array() + 1.5F));
      model.put_vector(layer_name(i, "self_attn.k_norm.weight"),
                       RowVectorF(random.row(wide ? kv : options.head_dim, 0.3).array() + 1.5F));
    }
  }
  if (says_bias(options.model_type)) {
    model.config["attention_bias"] = options.q_bias;
  }
  if (options.model_type.starts_with("gemma")) {
    make_gemma(options, random, model);
  } else if (options.model_type == "granite") {
    model.config.update({{"embedding_multiplier", 3.0},
                         {"attention_multiplier", 0.2},
                         {"residual_multiplier", 0.4},
                         {"logits_scaling", 2.5}});
  } else if (options.model_type == "smollm3") {
    // All but the second layer rotate.
    model.config["no_rope_layers"] = std::vector<int>(static_cast<std::size_t>(options.layers), 1);
    model.config["no_rope_layers"][1] = 0;
  } else if (options.model_type == "olmo2") {
    for (Index i = 0; i < options.layers; ++i) {
      model.tensors.erase(layer_name(i, "input_layernorm.weight"));
      model.put_vector(layer_name(i, "post_feedforward_layernorm.weight"), behind(options, random));
    }
  } else if (options.model_type == "glm4") {
    for (Index i = 0; i < options.layers; ++i) {
      model.put_vector(layer_name(i, "post_self_attn_layernorm.weight"), behind(options, random));
      model.put_vector(layer_name(i, "post_mlp_layernorm.weight"), behind(options, random));
      fuse_gate_and_up(i, model);
    }
  }
  return model;
}

// A phi3 checkpoint of the weights that tiny_model has; `factor` of every head rotates.
inline TinyModel tiny_phi3_model(double factor, TinyOptions options = {}) {
  options.model_type = "phi3";
  TinyModel model = tiny_model(options);
  model.config["partial_rotary_factor"] = factor;
  for (Index i = 0; i < options.layers; ++i) {
    const std::string self = layer_name(i, "self_attn.");
    fuse({self + "q_proj.weight", self + "k_proj.weight", self + "v_proj.weight"}, self + "qkv_proj.weight",
         model);
    fuse_gate_and_up(i, model);
  }
  return model;
}

// Experts from layer 1 on, eight in four groups.
inline ExpertsGeometry tiny_experts(TopkMethod method = TopkMethod::noaux_tc) {
  const bool sigmoid = method == TopkMethod::noaux_tc;
  return {.first_layer = 1,
          .count = 8,
          .shared_size = 20,
          .intermediate_size = 10,
          .per_token = 3,
          .topk_method = method,
          .groups = method == TopkMethod::greedy ? 1 : 4,
          .groups_per_token = method == TopkMethod::greedy ? 1 : 2,
          .normalised = sigmoid,
          .scale = 1.5};
}

// An MLP of `inner` numbers, its projections by Llama's or by other names.
inline void put_mlp(const std::string& name, Index inner, Index hidden, Random& random, TinyModel& model,
                    const std::array<const char*, 3>& projections = {"gate_proj", "up_proj", "down_proj"}) {
  model.put(name + projections[0], random.linear(inner, hidden, false));
  model.put(name + projections[1], random.linear(inner, hidden, false));
  model.put(name + projections[2], random.linear(hidden, inner, false));
}

inline void drop_mlp(Index layer, TinyModel& model) {
  for (const char* part : {"gate", "up", "down"}) {
    model.tensors.erase(layer_name(layer, "mlp." + std::string(part) + "_proj.weight"));
  }
}

// Experts in the place of dense MLPs.
inline void put_experts(const ExpertsGeometry& experts, const TinyOptions& body, Random& random,
                        TinyModel& model) {
  model.config["first_k_dense_replace"] = experts.first_layer;
  model.config["moe_intermediate_size"] = experts.intermediate_size;
  model.config["moe_layer_freq"] = 1;
  model.config["n_group"] = experts.groups;
  model.config["n_routed_experts"] = experts.count;
  model.config["n_shared_experts"] = experts.shared_size / experts.intermediate_size;
  model.config["norm_topk_prob"] = experts.normalised;
  model.config["num_experts_per_tok"] = experts.per_token;
  model.config["routed_scaling_factor"] = experts.scale;
  model.config["topk_group"] = experts.groups_per_token;
  model.config["topk_method"] = topk_method_name(experts.topk_method);
  for (Index i = experts.first_layer; i < body.layers; ++i) {
    drop_mlp(i, model);
    model.put(layer_name(i, "mlp.gate"), random.linear(experts.count, body.hidden, false));
    if (experts.topk_method == TopkMethod::noaux_tc) {
      model.put_vector(layer_name(i, "mlp.gate.e_score_correction_bias"), random.row(experts.count, 0.3));
    }
    for (Index e = 0; e < experts.count; ++e) {
      put_mlp(layer_name(i, "mlp.experts." + std::to_string(e) + "."), experts.intermediate_size, body.hidden,
              random, model);
    }
    put_mlp(layer_name(i, "mlp.shared_experts."), experts.shared_size, body.hidden, random, model);
  }
}

// A grouped-query model with five experts, two for each token: mixtral in every layer; qwen2_moe and
// qwen3_moe in all but layer 1, the first of them with a shared expert.
inline TinyModel tiny_mixture_model(const TinyOptions& options) {
  constexpr Index count = 5;
  TinyModel model = tiny_model(options);
  Random random(options.seed + 1);
  const bool mixtral = options.model_type == "mixtral";
  const bool shared = options.model_type == "qwen2_moe";
  const Index inner = mixtral ? options.intermediate : 10;
  model.config["num_experts_per_tok"] = 2;
  model.config[mixtral ? "num_local_experts" : "num_experts"] = count;
  if (!mixtral) {
    model.config["moe_intermediate_size"] = inner;
    model.config["mlp_only_layers"] = {1};
  }
  if (shared) {
    model.config["shared_expert_intermediate_size"] = 14;
  }
  for (Index i = 0; i < options.layers; ++i) {
    if (!mixtral && i == 1) {
      continue;
    }
    drop_mlp(i, model);
    const std::string mlp = layer_name(i, mixtral ? "block_sparse_moe." : "mlp.");
    model.put(mlp + "gate", random.linear(count, options.hidden, false));
    for (Index e = 0; e < count; ++e) {
      const std::string name = mlp + "experts." + std::to_string(e) + ".";
      if (mixtral) {
        put_mlp(name, inner, options.hidden, random, model, {"w1", "w3", "w2"});
      } else {
        put_mlp(name, inner, options.hidden, random, model);
      }
    }
    if (shared) {
      put_mlp(mlp + "shared_expert.", 14, options.hidden, random, model);
      model.put(mlp + "shared_expert_gate", random.linear(1, options.hidden, false));
    }
  }
  return model;
}

struct TinyLatentOptions {
  TinyOptions body = {};  // heads, hidden and so on; what it says of grouped-query attention is not used
  Index rank = 11;
  Index nope_dim = 5;
  Index rope_dim = 6;
  Index v_dim = 7;
  std::optional<Index> q_rank = {};
  bool attention_bias = false;
  bool interleave = true;
  std::optional<ExpertsGeometry> experts = {};
};

// A deepseek_v3 checkpoint; deepseek_v2 when its experts are chosen that way.
inline TinyModel tiny_latent_model(const TinyLatentOptions& options = {}) {
  Random random(options.body.seed);
  TinyModel model = tiny_body(options.body, random);
  const Index hidden = options.body.hidden;
  const Index heads = options.body.heads;
  model.config["model_type"] = "deepseek_v3";
  model.config["attention_bias"] = options.attention_bias;
  model.config["first_k_dense_replace"] = options.body.layers;
  model.config["num_key_value_heads"] = heads;
  model.config["kv_lora_rank"] = options.rank;
  model.config["qk_nope_head_dim"] = options.nope_dim;
  model.config["qk_rope_head_dim"] = options.rope_dim;
  model.config["v_head_dim"] = options.v_dim;
  model.config["q_lora_rank"] =
      options.q_rank ? nlohmann::ordered_json(*options.q_rank) : nlohmann::ordered_json(nullptr);
  model.config["rope_interleave"] = options.interleave;
  for (Index i = 0; i < options.body.layers; ++i) {
    const std::string self = layer_name(i, "self_attn.");
    const Index q_rows = heads * (options.nope_dim + options.rope_dim);
    if (options.q_rank) {
      model.put(self + "q_a_proj", random.linear(*options.q_rank, hidden, options.attention_bias));
      model.put_vector(self + "q_a_layernorm.weight", random.row(*options.q_rank, 0.2).array() + 1.0F);
      model.put(self + "q_b_proj", random.linear(q_rows, *options.q_rank, false));
    } else {
      model.put(self + "q_proj", random.linear(q_rows, hidden, false));
    }
    model.put(self + "kv_a_proj_with_mqa",
              random.linear(options.rank + options.rope_dim, hidden, options.attention_bias));
    model.put_vector(self + "kv_a_layernorm.weight", random.row(options.rank, 0.2).array() + 1.0F);
    model.put(self + "kv_b_proj",
              random.linear(heads * (options.nope_dim + options.v_dim), options.rank, false));
    model.put(self + "o_proj", random.linear(hidden, heads * options.v_dim, options.attention_bias));
  }
  if (options.experts) {
    put_experts(*options.experts, options.body, random, model);
    if (options.experts->topk_method != TopkMethod::noaux_tc) {
      model.config["model_type"] = "deepseek_v2";
    }
  }
  return model;
}

// Two groups of heads with two parts each, everything that a layout of latents can have; heads even.
inline LatentShape rich_shape(Index heads) {
  LatentShape shape;
  shape.form = "mlra";
  shape.heads = heads;
  shape.qk_nope_head_dim = 3;
  shape.qk_rope_head_dim = 4;
  shape.v_head_dim = 2;
  shape.kv_lora_rank = 24;
  shape.attention_bias = true;
  shape.shared_ranks = {5, 3};
  const Index half = heads / 2;
  shape.branches = {{0, half, 4, 0}, {half, half, 6, 1}, {0, half, 4, 0}, {half, half, 2, 1}};
  shape.norm = LatentNorm::replicated;
  shape.norm_rank = 7;
  return shape;
}

// A relatent checkpoint of any shape of latents; shape.heads must be body.heads.
inline TinyModel tiny_relatent_model(const LatentShape& shape, const TinyOptions& body = {}) {
  Random random(body.seed);
  TinyModel model = tiny_body(body, random);
  const std::unique_ptr<Engine> engine = make_relatent_engine();
  const ModelConfig source = parse_config(model.config, "config.json");
  for (const ExpectedTensor& tensor :
       expected_tensors(engine->written_config(model.config, source, shape, body.dtype))) {
    if (is_attention(tensor.role)) {
      const Index columns = tensor.shape.size() == 2 ? tensor.shape[1] : 1;
      model.put(tensor.name, tensor.shape, random.matrix(tensor.shape[0], columns));
    }
  }
  model.config =
      engine->config(model.config, source, shape, sample_rotary(shape.qk_rope_head_dim, 1), body.dtype);
  return model;
}

inline Sequences random_sequences(std::uint32_t seed, Index count, Index length, Index vocab) {
  std::mt19937 engine(seed);
  Sequences out{count, length, std::vector<std::int32_t>(static_cast<std::size_t>(count * length))};
  std::generate(out.tokens.begin(), out.tokens.end(),
                [&] { return static_cast<std::int32_t>(engine() % static_cast<std::uint32_t>(vocab)); });
  return out;
}

}  // namespace relatent::testing_support

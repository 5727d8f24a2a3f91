#include "convert/engines/gguf.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "convert/engines/layout.h"
#include "formats/gguf_tokenizer.h"
#include "formats/gguf_writer.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

// llama.cpp's LLAMA_FTYPE_*.
int file_type(DType dtype) {
  return dtype == DType::f32 ? 0 : dtype == DType::f16 ? 1 : 32;
}

// llama.cpp wants u32 and f32 exactly.
GgufMetadata metadata_of(const Json& config) {
  GgufMetadata out;
  for (const auto& [key, value] : config.items()) {
    if (value.is_string()) {
      out.emplace_back(key, value.get<std::string>());
    } else if (value.is_number_integer()) {
      out.emplace_back(key, value.get<std::uint32_t>());
    } else {
      out.emplace_back(key, value.get<float>());
    }
  }
  return out;
}

class GgufEngine final : public Engine {
 public:
  std::string_view name() const override { return "gguf"; }
  std::string_view family() const override { return "deepseek2"; }

  EngineTraits traits() const override {
    return {.forms = {"mla"},
            .any_frequencies = false,
            .query_bias = false,
            .normed_latent = true,
            .any_cache_shape = true,
            .linear_stand_in = true,
            .single_file = true};
  }

  DType stored_dtype(Role /*role*/, const std::vector<std::int64_t>& shape, DType wanted) const override {
    return shape.size() == 1 ? DType::f32 : wanted;
  }

  Json config(const Json& /*source_config*/, const ModelConfig& source, const LatentShape& shape,
              const Rotary& rotary, DType dtype) const override {
    const Index rank = shape.kv_lora_rank + shape.norm_coordinates;
    Json out;
    const auto put = [&](const std::string& key, const auto& value) { out["deepseek2." + key] = value; };
    out["general.architecture"] = "deepseek2";
    out["general.type"] = "model";
    out["general.file_type"] = file_type(dtype);
    put("vocab_size", source.vocab_size);
    put("context_length", source.max_position_embeddings);
    put("embedding_length", source.hidden_size);
    put("block_count", source.num_hidden_layers);
    put("leading_dense_block_count", source.num_hidden_layers);
    put("feed_forward_length", source.intermediate_size);
    // Asked for, and read by nothing where every layer is dense.
    put("expert_feed_forward_length", source.intermediate_size);
    put("expert_shared_count", 0);
    put("attention.head_count", shape.heads);
    put("attention.head_count_kv", 1);
    put("attention.layer_norm_rms_epsilon", static_cast<float>(source.rms_norm_eps));
    put("attention.q_lora_rank", shape.q_lora_rank.value_or(0));
    put("attention.kv_lora_rank", rank);
    put("attention.key_length", rank + shape.qk_rope_head_dim);
    put("attention.value_length", rank);
    put("attention.key_length_mla", shape.qk_nope_head_dim + shape.qk_rope_head_dim);
    put("attention.value_length_mla", shape.v_head_dim);
    put("rope.dimension_count", shape.qk_rope_head_dim);
    put("rope.freq_base", static_cast<float>(geometric_base(rotary)));
    return out;
  }

  std::unique_ptr<TensorSink> open_output(const OutputPlan& plan, bool reopen) const override {
    GgufMetadata metadata = metadata_of(plan.config);
    GgufMetadata tokenizer =
        plan.pre_tokenizer == "no_vocab"
            ? gguf_no_vocab()
            : gguf_tokenizer(plan.source->folder(), plan.source->config(), plan.pre_tokenizer,
                             plan.config.at("deepseek2.vocab_size").get<std::int64_t>());
    metadata.insert(metadata.end(), std::make_move_iterator(tokenizer.begin()),
                    std::make_move_iterator(tokenizer.end()));
    const FilePermissions permissions = plan.source->weight_permissions();
    if (reopen) {
      return GgufWriter::reopen(plan.path, metadata, plan.tensors, permissions);
    }
    return std::make_unique<GgufWriter>(plan.path, metadata, plan.tensors, permissions);
  }

  void write_attention(const LatentAttention& a, const LatentShape& /*shape*/, DType /*dtype*/,
                       const LayerWriter& out) const override {
    put_query_and_latent(a, out);
    const LatentBranch& branch = a.branches.front();
    const Index n = a.nope_dim;
    const Index w = a.v_dim;
    const Index rank = branch.up.cols();
    MatrixF k_b(a.heads * rank, n);
    MatrixF v_b(a.heads * w, rank);
    for (Index h = 0; h < a.heads; ++h) {
      k_b.middleRows(h * rank, rank) = branch.up.middleRows(h * (n + w), n).transpose();
      v_b.middleRows(h * w, w) = branch.up.middleRows(h * (n + w) + n, w);
    }
    out.put(Role::k_b_weight, k_b);
    out.put(Role::v_b_weight, v_b);
    out.put(Role::o_weight, a.o.weight);
  }

  std::vector<std::string> readers(const ModelConfig& /*config*/) const override {
    return {"read by llama.cpp, stock: llama-server -m FILE"};
  }
};

}  // namespace

std::unique_ptr<Engine> make_gguf_engine() {
  return std::make_unique<GgufEngine>();
}

}  // namespace relatent

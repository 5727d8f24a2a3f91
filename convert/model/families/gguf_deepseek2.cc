// llama.cpp's architecture deepseek2 as a GGUF file holds it (src/models/deepseek2.cpp,
// conversion/deepseek.py): one normalised latent, dense MLPs, kv_b_proj as two tensors, a plain list of
// rotary frequencies. No biases.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/read_latents.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

using namespace rules;  // NOLINT(google-build-using-namespace): the table below is made of them

// Per head, [n, r] transposed.
Shape k_b_shape(const ModelConfig& c, Index /*part*/) {
  return {c.num_attention_heads, c.latent->kv_lora_rank, c.latent->qk_nope_head_dim};
}

Shape v_b_shape(const ModelConfig& c, Index /*part*/) {
  return {c.num_attention_heads, c.latent->v_head_dim, c.latent->kv_lora_rank};
}

std::vector<TensorRule> deepseek2_rules() {
  return {
      {Role::embed_tokens, "token_embd.weight", required, vocab_by_hidden},
      {Role::final_norm, "output_norm.weight", required, hidden},
      // Without one the embedding is the head.
      {Role::lm_head, "output.weight", optional, vocab_by_hidden},
      {Role::input_norm, "blk.{i}.attn_norm.weight", required, hidden},
      {Role::post_attention_norm, "blk.{i}.ffn_norm.weight", required, hidden},
      {Role::gate_weight, "blk.{i}.ffn_gate.weight", required, intermediate_by_hidden},
      {Role::up_weight, "blk.{i}.ffn_up.weight", required, intermediate_by_hidden},
      {Role::down_weight, "blk.{i}.ffn_down.weight", required, hidden_by_intermediate},
      {Role::q_weight, "blk.{i}.attn_q.weight", without_q_rank, mla_q_b_shape},
      {Role::q_a_weight, "blk.{i}.attn_q_a.weight", with_q_rank, q_a_shape},
      {Role::q_a_norm, "blk.{i}.attn_q_a_norm.weight", with_q_rank, q_a_vector_shape},
      {Role::q_weight, "blk.{i}.attn_q_b.weight", with_q_rank, mla_q_b_shape},
      {Role::kv_a_weight, "blk.{i}.attn_kv_a_mqa.weight", required, kv_a_shape},
      {Role::kv_a_norm, "blk.{i}.attn_kv_a_norm.weight", required, kv_a_norm_shape},
      {Role::k_b_weight, "blk.{i}.attn_k_b.weight", required, k_b_shape},
      {Role::v_b_weight, "blk.{i}.attn_v_b.weight", required, v_b_shape},
      {Role::o_weight, "blk.{i}.attn_output.weight", required, mla_o_shape},
  };
}

DType dtype_of(const ConfigReader& in) {
  constexpr const char* key = "general.file_type";
  const Index type = in.count(key);
  if (type != 0 && type != 1 && type != 32) {
    in.complain(key, "0, 1 or 32: tensors in float32, float16 or bfloat16");
  }
  return type == 0 ? DType::f32 : type == 1 ? DType::f16 : DType::bf16;
}

void parse_deepseek2(const ConfigReader& in, ModelConfig& out) {
  out.dtype = dtype_of(in);
  out.hidden_size = in.size("deepseek2.embedding_length");
  out.num_hidden_layers = in.size("deepseek2.block_count");
  out.num_attention_heads = in.size("deepseek2.attention.head_count");
  out.intermediate_size = in.size("deepseek2.feed_forward_length");
  out.vocab_size = in.size("deepseek2.vocab_size");
  out.max_position_embeddings = in.size("deepseek2.context_length");
  out.rms_norm_eps = in.number("deepseek2.attention.layer_norm_rms_epsilon");
  if (in.has("deepseek2.expert_count") && in.count("deepseek2.expert_count") > 0) {
    in.complain("deepseek2.expert_count", "0: a model without experts");
  }
  if (in.has("deepseek2.rope.scaling.type")) {
    in.complain("deepseek2.rope.scaling.type", "no such key: a plain list of rotary frequencies");
  }
  LatentGeometry latent;
  latent.norm = LatentNorm::branch;
  latent.norm_eps = out.rms_norm_eps;
  latent.kv_lora_rank = in.size("deepseek2.attention.kv_lora_rank");
  latent.qk_rope_head_dim = in.size("deepseek2.rope.dimension_count");
  latent.qk_nope_head_dim = in.size("deepseek2.attention.key_length_mla") - latent.qk_rope_head_dim;
  latent.v_head_dim = in.size("deepseek2.attention.value_length_mla");
  if (latent.qk_nope_head_dim < 1) {
    in.complain("deepseek2.attention.key_length_mla", "more than rope.dimension_count");
  }
  if (const Index rank = in.count("deepseek2.attention.q_lora_rank"); rank > 0) {
    latent.q_lora_rank = rank;
  }
  latent.branches = {{0, out.num_attention_heads, latent.kv_lora_rank}};
  set_latent_scale(latent, 1, out);
  out.rotary = parse_rotary({{"rope_theta", in.number("deepseek2.rope.freq_base")}}, latent.qk_rope_head_dim,
                            in.path());
  out.latent = std::move(latent);
}

}  // namespace

const Family& gguf_deepseek2_family() {
  static const Family family = {.name = "deepseek2",
                                .model_type = "deepseek2",
                                .key = "general.architecture",
                                .parse = parse_deepseek2,
                                .rules = deepseek2_rules(),
                                .read_latent = read_joint_latents,
                                .models = "GGUF files of `--engine gguf`",
                                .use = FamilyUse::result};
  return family;
}

}  // namespace relatent

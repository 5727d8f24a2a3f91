// Models of the MLRA authors (engines/mlra.h): GPT-2's names for the sizes, everything else fixed in their
// code. Nothing in their files says which of their models a checkpoint is for, so the key mlra_model is ours.
#include <cmath>
#include <string>

#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/read_latents.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

using namespace rules;  // NOLINT(google-build-using-namespace): the table below is made of them

// Models of two latents name them one by one.
Presence with_two(const ModelConfig& c) {
  return required_if(c.latent->branches.size() == 2);
}
Presence with_four(const ModelConfig& c) {
  return required_if(c.latent->branches.size() == 4);
}
// Input-major: the transpose of each latent's up-projection.
Shape stacked_up_shape(const ModelConfig& c, Index /*part*/) {
  const Shape up = branch_up_shape(c, 0);
  return {branch_count(c), up[1], up[0]};
}

std::vector<TensorRule> mlra_rules() {
  return {
      {Role::embed_tokens, "transformer.wte.weight", required, vocab_by_hidden},
      {Role::final_norm, "layernorm.weight", required, hidden},
      {Role::lm_head, "lm_head.weight", head_presence, vocab_by_hidden},
      {Role::input_norm, "transformer.h.{i}.input_layernorm.weight", required, hidden},
      {Role::post_attention_norm, "transformer.h.{i}.post_attention_layernorm.weight", required, hidden},
      {Role::gate_weight, "transformer.h.{i}.mlp.c_fc1.weight", required, intermediate_by_hidden},
      {Role::up_weight, "transformer.h.{i}.mlp.c_fc2.weight", required, intermediate_by_hidden},
      {Role::down_weight, "transformer.h.{i}.mlp.c_proj.weight", required, hidden_by_intermediate},
      {Role::q_a_weight, "transformer.h.{i}.attn.q_a_proj.weight", required, q_a_shape},
      {Role::q_a_norm, "transformer.h.{i}.attn.q_a_layernorm.weight", required, q_a_vector_shape},
      {Role::q_weight, "transformer.h.{i}.attn.q_b_proj.weight", required, mla_q_b_shape},
      {Role::kv_a_weight, "transformer.h.{i}.attn.kv_a_proj_with_mqa.weight", required, kv_a_shape},
      {Role::kv_a_norm, "transformer.h.{i}.attn.kv_a_layernorm_{c}.weight", with_two, branch_norm_shape,
       branch_count},
      {Role::kv_a_norm, "transformer.h.{i}.attn.kv_a_layernorms.{b}.weight", with_four, branch_norm_shape,
       branch_count},
      {Role::kv_b_weight, "transformer.h.{i}.attn.kv_b_proj_{c}.weight", with_two, branch_up_shape,
       branch_count},
      {Role::kv_b_weight, "transformer.h.{i}.attn.kv_b_proj", with_four, stacked_up_shape},
      {Role::o_weight, "transformer.h.{i}.attn.c_proj.weight", required, mla_o_shape},
  };
}

void parse_mlra(const ConfigReader& in, ModelConfig& out) {
  parse_shared_keys(in, out);
  out.hidden_size = in.size("n_embd");
  out.num_hidden_layers = in.size("n_layer");
  out.num_attention_heads = in.size("n_head");
  out.max_position_embeddings = in.size_or("block_size", 1024);
  out.rms_norm_eps = 1e-6;
  out.tie_word_embeddings = true;
  LatentGeometry latent;
  latent.norm = LatentNorm::branch;
  const std::string model = in.text("mlra_model");
  const bool mlra = model == "mlra_2" || model == "mlra_4";
  if (!mlra && model != "gla_2" && model != "gla_4") {
    in.complain("mlra_model", "mlra_2, mlra_4, gla_2 or gla_4");
  }
  const Index count = model.back() - '0';
  latent.form = mlra ? "mlra" : "gla";
  latent.kv_lora_rank = in.size("kv_lora_rank");
  latent.qk_nope_head_dim = in.size("qk_nope_head_dim");
  latent.qk_rope_head_dim = in.size("qk_rope_head_dim");
  latent.v_head_dim = latent.qk_nope_head_dim;
  latent.q_lora_rank = in.size("q_lora_rank");
  latent.rope_interleave = false;
  const Index latents = model == "gla_2" ? 2 : 4;
  const Index parts = mlra ? count : 1;
  if (latent.kv_lora_rank % latents != 0) {
    in.complain("kv_lora_rank", "a multiple of " + std::to_string(latents));
  }
  if (out.num_attention_heads % (latents / parts) != 0) {
    in.complain("n_head", "a multiple of " + std::to_string(latents / parts));
  }
  even_branches(out.num_attention_heads, latents / parts, parts, latent);
  const auto hidden = static_cast<double>(out.hidden_size);
  const Index rank = latent.kv_lora_rank / latents;
  latent.latent_scale = std::sqrt(hidden / static_cast<double>(rank));
  latent.branch_scale = mlra ? 1 / std::sqrt(static_cast<double>(count)) : 1;
  latent.query_scale = std::sqrt(hidden / static_cast<double>(*latent.q_lora_rank));
  out.rotary = parse_rotary({{"rope_theta", 10000.0}}, latent.qk_rope_head_dim, in.path());
  set_latent_scale(latent, 1, out);
  out.latent = std::move(latent);
}

}  // namespace

const Family& mlra_family() {
  static const Family family = {.name = "mlra",
                                .model_type = "gpt2",
                                .key = "mlra_model",
                                .parse = parse_mlra,
                                .rules = mlra_rules(),
                                .read_latent = read_joint_latents,
                                .models = "the layout of the MLRA authors",
                                .use = FamilyUse::result};
  return family;
}

}  // namespace relatent

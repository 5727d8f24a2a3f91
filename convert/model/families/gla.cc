// The GLA authors' module (engines/gla.h): a Llama whose latents' sizes are fixed by its head size.
#include <string>

#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/read_latents.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

using namespace rules;  // NOLINT(google-build-using-namespace): the table below is made of them

Shape branch_up_bias_shape(const ModelConfig& c, Index part) {
  return {branch_up_shape(c, part)[0]};
}

std::vector<TensorRule> gla_rules() {
  return with_body({
      {Role::q_a_weight, "model.layers.{i}.self_attn.W_dQ.weight", required, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.W_dQ.bias", required, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_norm.weight", required, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.W_uQ_rope.weight", required, mla_q_b_shape},
      {Role::q_bias, "model.layers.{i}.self_attn.W_uQ_rope.bias", required, mla_q_bias_shape},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.W_dKV.weight", required, kv_a_shape},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.W_dKV.bias", required, kv_a_bias_shape},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_norm_{c}.weight", required, branch_norm_shape,
       branch_count},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.W_ukv_{c}.weight", required, branch_up_shape,
       branch_count},
      {Role::kv_b_bias, "model.layers.{i}.self_attn.W_ukv_{c}.bias", required, branch_up_bias_shape,
       branch_count, InLayers::all, true},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  });
}

void parse_gla(const ConfigReader& in, ModelConfig& out) {
  parse_body(in, out);
  LatentGeometry latent;
  latent.norm = LatentNorm::branch;
  latent.form = "gla";
  latent.qk_nope_head_dim = parse_head_dim(in, out);
  latent.v_head_dim = latent.qk_nope_head_dim;
  latent.qk_rope_head_dim = in.size("qk_rope_dim");
  latent.kv_lora_rank = 4 * latent.qk_nope_head_dim;
  latent.q_lora_rank = 8 * latent.qk_nope_head_dim;
  latent.attention_bias = in.flag_or("attention_bias", false);
  latent.rope_interleave = false;
  latent.norm_eps = out.rms_norm_eps;
  if (out.num_attention_heads % 2 != 0) {
    in.complain("num_attention_heads", "an even number");
  }
  even_branches(out.num_attention_heads, 2, 1, latent);
  out.rotary = parse_rotary(in.json(), latent.qk_rope_head_dim, in.path());
  set_latent_scale(latent, 1, out);
  out.latent = std::move(latent);
}

}  // namespace

const Family& gla_family() {
  static const Family family = {.name = "gla",
                                .model_type = "llama",
                                .key = "qk_rope_dim",
                                .parse = parse_gla,
                                .rules = gla_rules(),
                                .read_latent = read_joint_latents,
                                .models = "the layout of the GLA authors",
                                .use = FamilyUse::result};
  return family;
}

}  // namespace relatent

// DeepSeek-V2 and V3: one latent, normalised, that every head reads, and experts behind the first layers.
// What differs is the router, and that V2 has no rope_interleave, pairs only.
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/read_latents.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

using namespace rules;  // NOLINT(google-build-using-namespace): the table below is made of them

Shape kv_b_shape(const ModelConfig& c, Index /*part*/) {
  return {c.num_attention_heads * (c.latent->qk_nope_head_dim + c.latent->v_head_dim),
          c.latent->kv_lora_rank};
}

std::vector<TensorRule> deepseek_rules() {
  return with_experts(with_body({
      {Role::q_weight, "model.layers.{i}.self_attn.q_proj.weight", without_q_rank, mla_q_b_shape},
      {Role::q_a_weight, "model.layers.{i}.self_attn.q_a_proj.weight", with_q_rank, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.q_a_proj.bias", with_q_rank_and_bias, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_a_layernorm.weight", with_q_rank, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.q_b_proj.weight", with_q_rank, mla_q_b_shape},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight", required, kv_a_shape},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.kv_a_proj_with_mqa.bias", with_bias, kv_a_bias_shape},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_a_layernorm.weight", required, kv_a_norm_shape},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.kv_b_proj.weight", required, kv_b_shape},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  }));
}

// V3's configs often leave topk_method out.
constexpr ExpertDefaults v3_experts = {
    .topk_method = TopkMethod::noaux_tc, .sigmoid_only = true, .normalised = true};
constexpr ExpertDefaults v2_experts = {.topk_method = TopkMethod::greedy, .softmax_only = true};

LatentGeometry parse_mla(const ConfigReader& in, ModelConfig& out) {
  parse_body(in, out);
  LatentGeometry latent = parse_latent(in, out);
  latent.branches = {{0, out.num_attention_heads, latent.kv_lora_rank}};
  latent.norm = LatentNorm::branch;
  out.rotary = parse_rotary(in.json(), latent.qk_rope_head_dim, in.path());
  return latent;
}

void parse_v2(const ConfigReader& in, ModelConfig& out) {
  out.latent = parse_mla(in, out);
  out.latent->rope_interleave = true;
  out.experts = parse_experts(in, out.num_hidden_layers, v2_experts);
  if (out.experts && out.experts->normalised) {
    in.complain("norm_topk_prob", "false (what runs deepseek_v2 disagrees about true)");
  }
}

void parse_v3(const ConfigReader& in, ModelConfig& out) {
  out.latent = parse_mla(in, out);
  out.experts = parse_experts(in, out.num_hidden_layers, v3_experts);
  for (const char* key : {"num_nextn_predict_layers", "num_mtp_layers"}) {
    if (out.prediction_layers == 0 && in.has(key)) {
      out.prediction_layers = in.count(key);
    }
  }
}

}  // namespace

const Family& deepseek_v2_family() {
  static const Family family = {.name = "deepseek_v2",
                                .model_type = "deepseek_v2",
                                .key = "",
                                .parse = parse_v2,
                                .rules = deepseek_rules(),
                                .read_latent = read_joint_latents,
                                .models = "DeepSeek-V2, V2-Lite",
                                .features = "MLA; experts chosen by softmax"};
  return family;
}

const Family& deepseek_v3_family() {
  static const Family family = {
      .name = "deepseek_v3",
      .model_type = "deepseek_v3",
      .key = "",
      .parse = parse_v3,
      .rules = deepseek_rules(),
      .read_latent = read_joint_latents,
      .models = "DeepSeek-V3, R1, Kimi K2",
      .features = "MLA; experts chosen by sigmoid and bias; layers that predict further tokens are left out"};
  return family;
}

}  // namespace relatent

// Our own layout of the canonical latent form (engines/relatent.h): any branches, each map in a tensor of its
// own.
#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>

#include "convert/model/config_ranges.h"
#include "convert/model/families/family.h"
#include "convert/model/families/parse.h"
#include "convert/model/families/read_latents.h"
#include "convert/model/families/rules.h"
#include "formats/error.h"

namespace relatent {
namespace {

using namespace rules;  // NOLINT(google-build-using-namespace): the table below is made of them
using Json = ConfigReader::Json;

Presence with_branch_norm(const ModelConfig& c) {
  return required_if(c.latent->norm == LatentNorm::branch);
}

Presence with_replicated_norm(const ModelConfig& c) {
  return required_if(c.latent->norm == LatentNorm::replicated);
}

// The query is one map of the layer's input.
Presence with_q_alone(const ModelConfig& c) {
  return required_if(!c.latent->q_lora_rank.has_value() && !c.latent->normed_heads);
}

Presence with_q_alone_and_bias(const ModelConfig& c) {
  return required_if(c.latent->attention_bias && with_q_alone(c) == Presence::required);
}

Presence with_q_behind_another(const ModelConfig& c) {
  return required_if(with_q_alone(c) != Presence::required);
}

Presence with_normed_heads(const ModelConfig& c) {
  return required_if(c.latent->normed_heads.has_value());
}

Presence with_normed_heads_and_latent_bias(const ModelConfig& c) {
  return required_if(c.latent->normed_heads && c.latent->attention_bias);
}

Presence with_normed_bias(const ModelConfig& c) {
  return required_if(c.latent->normed_heads && c.latent->normed_heads->bias);
}

Index normed_q_rows(const ModelConfig& c) {
  return c.num_attention_heads * c.latent->normed_heads->head_dim;
}

Index normed_kv_rows(const ModelConfig& c) {
  return c.latent->normed_heads->inputs() / 2;
}

Shape normed_q_shape(const ModelConfig& c, Index /*part*/) {
  return {normed_q_rows(c), c.hidden_size};
}

Shape normed_q_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {normed_q_rows(c)};
}

Shape normed_kv_shape(const ModelConfig& c, Index /*part*/) {
  return {normed_kv_rows(c), c.hidden_size};
}

Shape normed_kv_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {normed_kv_rows(c)};
}

Shape q_head_norm_shape(const ModelConfig& c, Index /*part*/) {
  const NormedHeadSizes& sizes = *c.latent->normed_heads;
  return {qk_norm_size(sizes.norm, c.num_attention_heads, sizes.head_dim)};
}

Shape k_head_norm_shape(const ModelConfig& c, Index /*part*/) {
  const NormedHeadSizes& sizes = *c.latent->normed_heads;
  return {qk_norm_size(sizes.norm, sizes.num_key_value_heads, sizes.head_dim)};
}

Index shared_latent_count(const ModelConfig& c) {
  return static_cast<Index>(c.latent->shared_ranks.size());
}

Shape k_rope_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->qk_rope_head_dim, latent_inputs(c)};
}

Shape k_rope_bias_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->qk_rope_head_dim};
}

Shape kv_norm_shape(const ModelConfig& c, Index /*part*/) {
  return {c.latent->norm_rank, c.hidden_size};
}

Shape shared_shape(const ModelConfig& c, Index part) {
  return {c.latent->shared_ranks[static_cast<std::size_t>(part)], latent_inputs(c)};
}

Shape shared_bias_shape(const ModelConfig& c, Index part) {
  return {c.latent->shared_ranks[static_cast<std::size_t>(part)]};
}

Shape branch_down_shape(const ModelConfig& c, Index part) {
  return {branch_of(c, part).rank, latent_inputs(c)};
}

Shape branch_bias_shape(const ModelConfig& c, Index part) {
  return {branch_of(c, part).rank};
}

// Layers that a conversion left as they were.
Presence with_qkv_bias(const ModelConfig& c) {
  return required_if(c.gqa && c.gqa->qkv_bias);
}

Presence with_o_bias(const ModelConfig& c) {
  return required_if(c.gqa && c.gqa->o_bias);
}

std::vector<TensorRule> latent_rules() {
  return {
      {Role::normed_q_weight, "model.layers.{i}.self_attn.q_proj.weight", with_normed_heads, normed_q_shape},
      {Role::normed_q_bias, "model.layers.{i}.self_attn.q_proj.bias", with_normed_bias, normed_q_bias_shape},
      {Role::q_head_norm, "model.layers.{i}.self_attn.q_norm.weight", with_normed_heads, q_head_norm_shape},
      {Role::normed_k_weight, "model.layers.{i}.self_attn.k_proj.weight", with_normed_heads, normed_kv_shape},
      {Role::normed_k_bias, "model.layers.{i}.self_attn.k_proj.bias", with_normed_bias, normed_kv_bias_shape},
      {Role::k_head_norm, "model.layers.{i}.self_attn.k_norm.weight", with_normed_heads, k_head_norm_shape},
      {Role::normed_v_weight, "model.layers.{i}.self_attn.v_proj.weight", with_normed_heads, normed_kv_shape},
      {Role::normed_v_bias, "model.layers.{i}.self_attn.v_proj.bias", with_normed_bias, normed_kv_bias_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.q_proj.weight", with_q_alone, mla_q_b_shape},
      {Role::q_bias, "model.layers.{i}.self_attn.q_proj.bias", with_q_alone_and_bias, mla_q_bias_shape},
      {Role::q_a_weight, "model.layers.{i}.self_attn.q_a_proj.weight", with_q_rank, q_a_shape},
      {Role::q_a_bias, "model.layers.{i}.self_attn.q_a_proj.bias", with_q_rank_and_bias, q_a_vector_shape},
      {Role::q_a_norm, "model.layers.{i}.self_attn.q_a_layernorm.weight", with_q_rank, q_a_vector_shape},
      {Role::q_weight, "model.layers.{i}.self_attn.q_b_proj.weight", with_q_behind_another, mla_q_b_shape},
      {Role::q_bias, "model.layers.{i}.self_attn.q_b_proj.bias", with_normed_heads_and_latent_bias,
       mla_q_bias_shape},
      {Role::k_rope_weight, "model.layers.{i}.self_attn.k_rope_proj.weight", required, k_rope_shape},
      {Role::k_rope_bias, "model.layers.{i}.self_attn.k_rope_proj.bias", with_bias, k_rope_bias_shape},
      {Role::kv_norm_weight, "model.layers.{i}.self_attn.kv_norm_proj.weight", with_replicated_norm,
       kv_norm_shape},
      {Role::kv_shared_weight, "model.layers.{i}.self_attn.kv_shared_proj.{b}.weight", required, shared_shape,
       shared_latent_count},
      {Role::kv_shared_bias, "model.layers.{i}.self_attn.kv_shared_proj.{b}.bias", with_bias,
       shared_bias_shape, shared_latent_count, InLayers::all, true},
      {Role::kv_a_weight, "model.layers.{i}.self_attn.kv_a_proj.{b}.weight", required, branch_down_shape,
       branch_count},
      {Role::kv_a_bias, "model.layers.{i}.self_attn.kv_a_proj.{b}.bias", with_bias, branch_bias_shape,
       branch_count, InLayers::all, true},
      {Role::kv_a_norm, "model.layers.{i}.self_attn.kv_a_layernorm.{b}.weight", with_branch_norm,
       branch_norm_shape, branch_count, InLayers::all, true},
      {Role::kv_b_weight, "model.layers.{i}.self_attn.kv_b_proj.{b}.weight", required, branch_up_shape,
       branch_count, InLayers::all, true},
      {Role::o_weight, "model.layers.{i}.self_attn.o_proj.weight", required, mla_o_shape},
      {Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_bias, hidden},
  };
}

std::vector<TensorRule> relatent_rules() {
  std::vector<TensorRule> carried =
      append(with_qk_norm(grouped_query_attention(with_qkv_bias)),
             {{Role::o_bias, "model.layers.{i}.self_attn.o_proj.bias", with_o_bias, hidden}});
  std::vector<TensorRule> rules = append(with_body(in_layers(WithAttention::latent, latent_rules())),
                                         in_layers(WithAttention::grouped_query, std::move(carried)));
  return with_experts(with_norm_names(
      std::move(rules), {.mlp_input = "model.layers.{i}.post_attention_layernorm.weight",
                         .attention_output = "model.layers.{i}.attention_output_layernorm.weight",
                         .mlp_output = "model.layers.{i}.mlp_output_layernorm.weight"}));
}

// Published slices have up to 8.
constexpr std::size_t most_latents = 1024;

// What the latents read.
void parse_features(const ConfigReader& in, Index heads, LatentGeometry& latent) {
  const std::string features = in.find("latent_features") != nullptr ? in.text("latent_features") : "hidden";
  if (features == "hidden") {
    return;
  }
  if (features != "normed_heads") {
    in.complain("latent_features",
                R"("hidden", the layer's normalised input, or "normed_heads", normalised keys and values)");
  }
  NormedHeadSizes sizes;
  sizes.num_key_value_heads = in.size("num_key_value_heads");
  sizes.head_dim = in.size("normed_head_dim");
  sizes.bias = in.flag_or("normed_bias", false);
  const std::optional<QkNorm> norm = qk_norm_of(in.text("qk_norm"));
  if (!norm || *norm == QkNorm::none) {
    in.complain("qk_norm", "head or width");
  }
  sizes.norm = *norm;
  check_key_value_heads(in, sizes.num_key_value_heads, heads);
  if (latent.q_lora_rank) {
    in.complain("q_lora_rank", "null: queries act on normalised heads");
  }
  latent.normed_heads = sizes;
}

// The branches of a relatent model (engines/relatent.h writes them).
void parse_branches(const ConfigReader& in, Index heads, LatentGeometry& latent) {
  // What a later layout may say, and this reader would get wrong.
  if (in.size_or("layout_version", 1) > 2) {
    in.complain("layout_version", "1 or 2, the layouts that this version reads");
  }
  parse_features(in, heads, latent);
  latent.form = in.text("latent_form");
  latent.rope_interleave = false;
  const std::string norm_text = in.text("latent_norm");
  const std::optional<LatentNorm> norm = latent_norm_of(norm_text);
  if (!norm) {
    in.complain("latent_norm", "none, branch or replicated");
  }
  latent.norm = *norm;
  if (latent.normed_heads && latent.norm == LatentNorm::replicated) {
    in.complain("latent_norm", "none or branch, beside latent_features normed_heads");
  }
  latent.norm_rank = latent.norm == LatentNorm::replicated ? in.size("latent_norm_rank") : 0;
  Index total = 0;
  const Json* shared = in.find("latent_shared_ranks");
  if (shared == nullptr || !shared->is_array() || shared->size() > most_latents) {
    in.complain("latent_shared_ranks",
                "a list of whole numbers, " + std::to_string(most_latents) + " at most");
  }
  for (const Json& rank : *shared) {
    if (!rank.is_number_integer() || rank.get<Index>() <= 0 || rank.get<Index>() > largest_size("rank")) {
      in.complain("latent_shared_ranks", "a list of positive whole numbers");
    }
    latent.shared_ranks.push_back(rank.get<Index>());
    total += latent.shared_ranks.back();
  }
  const Json* branches = in.find("latent_branches");
  if (branches == nullptr || !branches->is_array() || branches->empty() || branches->size() > most_latents) {
    in.complain("latent_branches", "a list of latents, 1 to " + std::to_string(most_latents));
  }
  std::vector<bool> read(static_cast<std::size_t>(heads), false);
  for (const Json& entry : *branches) {
    if (!entry.is_object()) {
      in.complain("latent_branches", "a list of objects");
    }
    const ConfigReader branch(entry, in.path(), "latent_branches: ");
    BranchGeometry out;
    out.first_head = branch.count("first_head");
    out.head_count = branch.size("num_heads");
    out.rank = branch.size("rank");
    if (branch.find("shared") != nullptr) {
      out.shared = branch.count("shared");
    }
    if (out.first_head + out.head_count > heads) {
      in.complain("latent_branches", "heads below num_attention_heads = " + std::to_string(heads));
    }
    if (out.shared && *out.shared >= static_cast<Index>(latent.shared_ranks.size())) {
      in.complain("latent_branches", "\"shared\" below the length of latent_shared_ranks");
    }
    std::fill_n(read.begin() + out.first_head, out.head_count, true);
    total += out.rank;
    latent.branches.push_back(out);
  }
  if (std::find(read.begin(), read.end(), false) != read.end()) {
    in.complain("latent_branches", "a latent for every head");
  }
  if (total != latent.kv_lora_rank) {
    fail_input({in.path(), "", "kv_lora_rank", std::to_string(total) + ", the sum over latents",
                std::to_string(latent.kv_lora_rank), ""});
  }
  const auto reaches = [&](const BranchGeometry& a, const BranchGeometry& b) {
    return a.first_head == b.first_head && a.head_count == b.head_count;
  };
  for (const BranchGeometry& a : latent.branches) {
    for (const BranchGeometry& b : latent.branches) {
      if (a.shared && a.shared == b.shared && !reaches(a, b)) {
        in.complain("latent_branches", "latents that share coordinates to serve the same heads");
      }
    }
  }
}

// DeepSeek's keys, and what they cannot say: no shared experts, one with a gate, dense layers in between.
std::optional<ExpertsGeometry> parse_own_experts(const ConfigReader& in, Index num_hidden_layers) {
  std::optional<ExpertsGeometry> out = parse_experts(in, num_hidden_layers, {.shared_optional = true});
  if (!out) {
    return out;
  }
  out->dense_layers = parse_layer_list(in, "mlp_only_layers", out->first_layer + 1, num_hidden_layers);
  if (in.has("shared_expert_intermediate_size")) {
    if (out->shared_size > 0) {
      in.complain("n_shared_experts", "0 beside shared_expert_intermediate_size");
    }
    out->shared_size = in.size("shared_expert_intermediate_size");
    out->shared_gate = true;
  }
  return out;
}

// `rope_lists`, lists of rotary frequencies that layers name by their index, put into other_rotaries when
// they are named.
class RopeLists {
 public:
  explicit RopeLists(const ConfigReader& in) : in_(in) {}

  // The place in other_rotaries of a list for heads of this size.
  Index place_of(Index index, Index size, ModelConfig& out) {
    if (const auto known = places_.find({index, size}); known != places_.end()) {
      return known->second;
    }
    const Json* lists = in_.find("rope_lists");
    if (lists == nullptr || !lists->is_array() || index >= static_cast<Index>(lists->size()) ||
        !lists->at(static_cast<std::size_t>(index)).is_object()) {
      in_.complain("rope_lists", "a list of rope parameters, with one of index " + std::to_string(index) +
                                     " that a layer names");
    }
    const auto place = static_cast<Index>(out.other_rotaries.size());
    out.other_rotaries.push_back(parse_rotary(
        with_rope_parameters(in_, lists->at(static_cast<std::size_t>(index))), size, in_.path()));
    places_[{index, size}] = place;
    return place;
  }

 private:
  const ConfigReader& in_;
  std::map<std::pair<Index, Index>, Index> places_;
};

// A layer that the config lists by itself: grouped-query attention as the source had it.
void parse_layer(const ConfigReader& in, const Json& entry, RopeLists& lists, AttentionSpec& spec,
                 ModelConfig& out) {
  if (!entry.is_object()) {
    in.complain("layers", "a list of objects and nulls");
  }
  const ConfigReader layer(entry, in.path(), "layers: ");
  if (layer.text("attention") != "grouped_query") {
    layer.complain("attention", "\"grouped_query\"");
  }
  spec.kind = AttentionKind::grouped_query;
  spec.scale = static_cast<float>(layer.number("scaling"));
  if (layer.has("sliding_window")) {
    spec.window = layer.size("sliding_window");
  }
  GqaGeometry gqa;
  gqa.num_key_value_heads = layer.size("num_key_value_heads");
  gqa.head_dim = layer.size("head_dim");
  gqa.rotary_dim = gqa.head_dim;
  gqa.qkv_bias = layer.flag_or("qkv_bias", false);
  gqa.o_bias = layer.flag_or("o_bias", false);
  const std::optional<QkNorm> norm = layer.has("qk_norm") ? qk_norm_of(layer.text("qk_norm")) : QkNorm::none;
  if (!norm) {
    layer.complain("qk_norm", "none, head or width");
  }
  gqa.qk_norm = *norm;
  check_key_value_heads(layer, gqa.num_key_value_heads, out.num_attention_heads);
  if (out.gqa && *out.gqa != gqa) {
    in.complain("layers", "grouped-query layers of the same sizes and biases");
  }
  out.gqa = gqa;
  spec.rotary = lists.place_of(layer.count("rope_list"), gqa.head_dim, out);
}

// `layers`: null for a layer as the rest of the config has it.
void parse_layers(const ConfigReader& in, RopeLists& lists, ModelConfig& out) {
  const Json* layers = in.find("layers");
  if (layers == nullptr) {
    return;
  }
  if (!layers->is_array() || static_cast<Index>(layers->size()) != out.num_hidden_layers) {
    in.complain("layers", "a list with an object or null for each of the " +
                              std::to_string(out.num_hidden_layers) + " layers");
  }
  bool any_latent = false;
  for (std::size_t i = 0; i < layers->size(); ++i) {
    if (layers->at(i).is_null()) {
      any_latent = true;
    } else {
      parse_layer(in, layers->at(i), lists, out.attention[i], out);
    }
  }
  if (!any_latent) {
    in.complain("layers", "null for one layer at least, whose attention is latent");
  }
}

// `latent_rope_lists`: for every layer of latents the list by which it rotates.
void parse_latent_rope_lists(const ConfigReader& in, Index size, RopeLists& lists, ModelConfig& out) {
  const Json* named = in.find("latent_rope_lists");
  if (named == nullptr) {
    return;
  }
  if (!named->is_array() || static_cast<Index>(named->size()) != out.num_hidden_layers) {
    in.complain("latent_rope_lists",
                "a list with an index into rope_lists, or null for a layer that is not "
                "latent, for each of the " +
                    std::to_string(out.num_hidden_layers) + " layers");
  }
  for (Index i = 0; i < out.num_hidden_layers; ++i) {
    const Json& index = named->at(static_cast<std::size_t>(i));
    if (!out.is_latent(i) && index.is_null()) {
      continue;
    }
    if (!out.is_latent(i) || !index.is_number_integer() || index.get<Index>() < 0) {
      in.complain("latent_rope_lists", "an index for layer " + std::to_string(i) +
                                           (out.is_latent(i) ? "" : ", which is not latent: null"));
    }
    out.attention[static_cast<std::size_t>(i)].rotary = lists.place_of(index.get<Index>(), size, out);
  }
}

// no_rope_layers, of latent layers; the others name a list of rotary frequencies each.
void parse_unrotated_latents(const ConfigReader& in, ModelConfig& out) {
  if (!in.has("no_rope_layers")) {
    return;
  }
  std::vector<Index> latent;
  for (const Index i : parse_still_layers(in, out.num_hidden_layers)) {
    if (out.is_latent(i)) {
      latent.push_back(i);
    }
  }
  set_still_layers(latent, out);
}

// What models have beyond Llama, by the names that transformers has for it where it has one.
void parse_body_extras(const ConfigReader& in, ModelConfig& out) {
  const auto one_of = [&in](const char* key, const auto& table, auto& value) {
    if (!in.has(key)) {
      return;
    }
    const std::string found = in.text(key);
    const auto* const known =
        std::find_if(table.begin(), table.end(), [&](const auto& named) { return named.second == found; });
    if (known == table.end()) {
      std::string names;
      for (const auto& named : table) {
        names += (names.empty() ? "" : " or ") + std::string(named.second);
      }
      in.complain(key, names);
    }
    value = known->first;
  };
  one_of("hidden_activation", activations, out.activation);
  one_of("norm_placement", norm_placements, out.norms);
  out.norm_unit_offset = in.flag_or("norm_unit_offset", false);
  if (in.has("attn_logit_softcapping")) {
    out.attn_logit_softcapping = in.number("attn_logit_softcapping");
  }
  if (in.has("final_logit_softcapping")) {
    out.final_logit_softcapping = in.number("final_logit_softcapping");
  }
}

void parse_relatent(const ConfigReader& in, ModelConfig& out) {
  parse_body(in, out);
  parse_body_extras(in, out);
  LatentGeometry latent = parse_latent(in, out);
  parse_branches(in, out.num_attention_heads, latent);
  out.rotary = parse_rotary(in.json(), latent.qk_rope_head_dim, in.path());
  RopeLists lists(in);
  parse_layers(in, lists, out);
  parse_latent_rope_lists(in, latent.qk_rope_head_dim, lists, out);
  parse_unrotated_latents(in, out);
  if (in.has("first_k_dense_replace")) {
    out.experts = parse_own_experts(in, out.num_hidden_layers);
  }
  out.latent = std::move(latent);
  parse_multipliers(in, out);
}

}  // namespace

const Family& relatent_family() {
  static const Family family = {.name = "relatent",
                                .model_type = "relatent",
                                .key = "",
                                .parse = parse_relatent,
                                .rules = relatent_rules(),
                                .read_latent = read_branches,
                                .models = "what `--engine relatent` writes",
                                .use = FamilyUse::result};
  return family;
}

}  // namespace relatent

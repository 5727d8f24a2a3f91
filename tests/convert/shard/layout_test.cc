#include "convert/shard/layout.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::layer_name;
using testing_support::rich_shape;
using testing_support::TempFolder;
using testing_support::tiny_latent_model;
using testing_support::tiny_mixture_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

using Parts = std::vector<std::pair<std::int64_t, std::int64_t>>;
constexpr std::pair<std::int64_t, std::int64_t> nothing = {-1, -1};

// What each rank has of each tensor; `nothing` where it has none.
std::map<std::string, Parts> parts_of(const TinyModel& tiny, Index tp) {
  const TempFolder folder;
  tiny.write(folder.path());
  std::map<std::string, Parts> out;
  for (const ShardedTensor& tensor :
       sharded_tensors(Model::open(folder.path()), *find_shard_layout("plain"), tp)) {
    Parts& parts = out[tensor.spec.name];
    for (const std::optional<RankPart>& part : tensor.ranks) {
      parts.push_back(part ? std::pair(part->start, part->count) : nothing);
    }
  }
  return out;
}

TEST(ShardLayout, EveryRoleHasOneRule) {
  const ShardLayout* plain = find_shard_layout("plain");
  ASSERT_NE(plain, nullptr);
  for (int role = 0; role <= static_cast<int>(Role::inv_freq); ++role) {
    EXPECT_EQ(std::count_if(plain->rules.begin(), plain->rules.end(),
                            [&](const ShardRule& rule) { return static_cast<int>(rule.role) == role; }),
              1)
        << role;
  }
  EXPECT_EQ(find_shard_layout("fancy"), nullptr);
  EXPECT_EQ(known_shard_layouts(), "plain");
}

TEST(ShardLayout, GroupedQueriesByHead) {
  TinyModel tiny =
      tiny_model({.heads = 8, .kv_heads = 2, .head_dim = 4, .q_bias = true, .kv_bias = true, .o_bias = true});
  for (const char* rest : {"mlp.gate_proj.bias", "mlp.up_proj.bias"}) {
    tiny.put_vector(layer_name(1, rest), RowVectorF::Ones(40));
  }
  tiny.put_vector(layer_name(1, "mlp.down_proj.bias"), RowVectorF::Ones(24));
  tiny.put_vector(layer_name(1, "self_attn.rotary_emb.inv_freq"), RowVectorF::Ones(2));
  const auto at = [&](Index tp, const std::string& rest) {
    return parts_of(tiny, tp).at(layer_name(1, rest));
  };
  const Parts four = {{0, 8}, {8, 8}, {16, 8}, {24, 8}};
  for (const char* rest : {"self_attn.q_proj.weight", "self_attn.q_proj.bias", "self_attn.o_proj.weight"}) {
    EXPECT_EQ(at(4, rest), four) << rest;
  }
  for (const char* rest : {"self_attn.k_proj.weight", "self_attn.k_proj.bias", "self_attn.v_proj.weight",
                           "self_attn.v_proj.bias"}) {
    EXPECT_EQ(at(1, rest), (Parts{{0, 8}})) << rest;
    EXPECT_EQ(at(2, rest), (Parts{{0, 4}, {4, 4}})) << rest;
    // More ranks than key/value heads: each reads the head of its queries.
    EXPECT_EQ(at(4, rest), (Parts{{0, 4}, {0, 4}, {4, 4}, {4, 4}})) << rest;
  }
  for (const char* rest : {"mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
                           "mlp.gate_proj.bias", "mlp.up_proj.bias"}) {
    EXPECT_EQ(at(4, rest), (Parts{{0, 10}, {10, 10}, {20, 10}, {30, 10}})) << rest;
  }
  for (const char* rest : {"self_attn.o_proj.bias", "mlp.down_proj.bias"}) {
    EXPECT_EQ(at(2, rest), (Parts{{0, 24}, nothing})) << rest;
  }
  EXPECT_EQ(at(2, "input_layernorm.weight"), (Parts{{0, 24}, {0, 24}}));
  EXPECT_EQ(at(2, "self_attn.rotary_emb.inv_freq"), (Parts{{0, 2}, {0, 2}}));
  // 50 tokens over 4 ranks.
  for (const char* name : {"model.embed_tokens.weight", "lm_head.weight"}) {
    EXPECT_EQ(parts_of(tiny, 4).at(name), (Parts{{0, 12}, {12, 13}, {25, 12}, {37, 13}})) << name;
  }
}

TEST(ShardLayout, JointLatentIsOnEveryRank) {
  const auto parts = parts_of(tiny_latent_model({.q_rank = 9, .attention_bias = true}), 2);
  const auto at = [&](const std::string& rest) { return parts.at(layer_name(2, "self_attn." + rest)); };
  EXPECT_EQ(at("q_a_proj.weight"), (Parts{{0, 9}, {0, 9}}));
  EXPECT_EQ(at("q_a_proj.bias"), (Parts{{0, 9}, {0, 9}}));
  EXPECT_EQ(at("q_a_layernorm.weight"), (Parts{{0, 9}, {0, 9}}));
  EXPECT_EQ(at("q_b_proj.weight"), (Parts{{0, 33}, {33, 33}}));
  EXPECT_EQ(at("kv_a_proj_with_mqa.weight"), (Parts{{0, 17}, {0, 17}}));
  EXPECT_EQ(at("kv_a_proj_with_mqa.bias"), (Parts{{0, 17}, {0, 17}}));
  EXPECT_EQ(at("kv_a_layernorm.weight"), (Parts{{0, 11}, {0, 11}}));
  EXPECT_EQ(at("kv_b_proj.weight"), (Parts{{0, 36}, {36, 36}}));
  EXPECT_EQ(at("o_proj.weight"), (Parts{{0, 21}, {21, 21}}));
  EXPECT_EQ(at("o_proj.bias"), (Parts{{0, 24}, nothing}));
}

TEST(ShardLayout, LatentsAreWhereTheirHeadsAre) {
  const TinyModel tiny = testing_support::tiny_relatent_model(rich_shape(6), {.intermediate = 48});
  auto parts = parts_of(tiny, 4);
  const auto at = [&](const std::string& rest) { return parts.at(layer_name(0, "self_attn." + rest)); };
  // Ranks 0 and 1 have the first group's two parts, ranks 2 and 3 the second's.
  const Parts heads = {{0, 21}, {0, 21}, {21, 21}, {21, 21}};
  EXPECT_EQ(at("q_proj.weight"), heads);
  EXPECT_EQ(at("q_proj.bias"), heads);
  EXPECT_EQ(at("o_proj.weight"), (Parts{{0, 6}, {0, 6}, {6, 6}, {6, 6}}));
  EXPECT_EQ(at("o_proj.bias"), (Parts{{0, 24}, nothing, nothing, nothing}));
  EXPECT_EQ(at("k_rope_proj.bias"), (Parts{{0, 4}, {0, 4}, {0, 4}, {0, 4}}));
  EXPECT_EQ(at("kv_norm_proj.weight"), (Parts{{0, 7}, {0, 7}, {0, 7}, {0, 7}}));
  EXPECT_EQ(at("kv_shared_proj.0.weight"), (Parts{{0, 5}, {0, 5}, nothing, nothing}));
  EXPECT_EQ(at("kv_shared_proj.1.bias"), (Parts{nothing, nothing, {0, 3}, {0, 3}}));
  EXPECT_EQ(at("kv_a_proj.0.weight"), (Parts{{0, 4}, nothing, nothing, nothing}));
  EXPECT_EQ(at("kv_a_proj.1.bias"), (Parts{nothing, nothing, {0, 6}, nothing}));
  EXPECT_EQ(at("kv_a_proj.2.weight"), (Parts{nothing, {0, 4}, nothing, nothing}));
  EXPECT_EQ(at("kv_b_proj.3.weight"), (Parts{nothing, nothing, nothing, {0, 15}}));
  // Three ranks for each latent, a head each.
  parts = parts_of(tiny, 12);
  EXPECT_EQ(at("kv_b_proj.2.weight"), (Parts{nothing,
                                             nothing,
                                             nothing,
                                             {0, 5},
                                             {5, 5},
                                             {10, 5},
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing}));
  EXPECT_EQ(at("kv_a_proj.2.weight"), (Parts{nothing,
                                             nothing,
                                             nothing,
                                             {0, 4},
                                             {0, 4},
                                             {0, 4},
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing,
                                             nothing}));
}

TEST(ShardLayout, ExpertsByInnerSizeAndRoutersWhole) {
  TinyModel tiny = tiny_latent_model({.experts = testing_support::tiny_experts()});
  tiny.config["num_nextn_predict_layers"] = 1;
  tiny.put_vector("model.layers.3.enorm.weight", RowVectorF::Ones(5));
  const auto parts = parts_of(tiny, 2);
  const auto at = [&](const std::string& rest) { return parts.at(layer_name(1, "mlp." + rest)); };
  EXPECT_EQ(at("gate.weight"), (Parts{{0, 8}, {0, 8}}));
  EXPECT_EQ(at("gate.e_score_correction_bias"), (Parts{{0, 8}, {0, 8}}));
  for (const char* part : {"gate", "up", "down"}) {
    EXPECT_EQ(at("experts.5." + std::string(part) + "_proj.weight"), (Parts{{0, 5}, {5, 5}})) << part;
    EXPECT_EQ(at("shared_experts." + std::string(part) + "_proj.weight"), (Parts{{0, 10}, {10, 10}})) << part;
  }
  EXPECT_EQ(parts.at(layer_name(0, "mlp.up_proj.weight")), (Parts{{0, 20}, {20, 20}}));
  EXPECT_EQ(parts.at("model.layers.3.enorm.weight"), (Parts{{0, 5}, nothing}));
}

TEST(ShardLayout, ASharedExpertByItsOwnSizeAndItsGateWhole) {
  const auto parts = parts_of(tiny_mixture_model({.model_type = "qwen2_moe"}), 2);
  const auto at = [&](const std::string& rest) { return parts.at(layer_name(2, "mlp." + rest)); };
  EXPECT_EQ(at("gate.weight"), (Parts{{0, 5}, {0, 5}}));
  EXPECT_EQ(at("shared_expert_gate.weight"), (Parts{{0, 1}, {0, 1}}));
  for (const char* part : {"gate", "up", "down"}) {
    EXPECT_EQ(at("experts.4." + std::string(part) + "_proj.weight"), (Parts{{0, 5}, {5, 5}})) << part;
    EXPECT_EQ(at("shared_expert." + std::string(part) + "_proj.weight"), (Parts{{0, 7}, {7, 7}})) << part;
  }
  EXPECT_EQ(parts.at(layer_name(1, "mlp.up_proj.weight")), (Parts{{0, 20}, {20, 20}}));
  const auto mixtral = parts_of(tiny_mixture_model({.model_type = "mixtral"}), 2);
  EXPECT_EQ(mixtral.at(layer_name(0, "block_sparse_moe.experts.3.w2.weight")), (Parts{{0, 20}, {20, 20}}));
}

TEST(ShardLayout, TensorsInTheOrderOfTheirData) {
  const TempFolder folder;
  tiny_model().write(folder.path());
  const Model model = Model::open(folder.path());
  const std::vector<ShardedTensor> tensors = sharded_tensors(model, *find_shard_layout("plain"), 2);
  const std::vector<TensorInfo>& stored = model.folder("sharded").files().front().tensors();
  ASSERT_EQ(tensors.size(), stored.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    EXPECT_EQ(tensors[i].spec.name, stored[i].name);
    EXPECT_EQ(tensors[i].spec.shape, stored[i].shape);
  }
}

TEST(ShardLayout, PiecesOfOneTensorHaveNoFile) {
  expect_error(ErrorKind::input, {"phi3", "a tensor for each projection", "convert it first"},
               [] { parts_of(testing_support::tiny_phi3_model(1), 2); });
}

TEST(ShardLayout, SaysWhatDoesNotFit) {
  ModelConfig config;
  config.num_attention_heads = 12;
  config.intermediate_size = 1408;
  config.gqa = GqaGeometry{.num_key_value_heads = 6, .head_dim = 64, .rotary_dim = 64};
  EXPECT_EQ(why_not_sharded(config, 1), "");
  EXPECT_EQ(why_not_sharded(config, 2), "");
  EXPECT_EQ(why_not_sharded(config, 0), "there must be 1 to 512 ranks");
  EXPECT_EQ(why_not_sharded(config, 513), "there must be 1 to 512 ranks");
  EXPECT_EQ(why_not_sharded(config, 3), "intermediate_size 1408 does not divide by 3");
  EXPECT_EQ(why_not_sharded(config, 5), "num_attention_heads 12 does not divide by 5");
  EXPECT_EQ(why_not_sharded(config, 4), "num_key_value_heads 6 does not divide by 4");
  config.gqa->num_key_value_heads = 4;
  EXPECT_EQ(why_not_sharded(config, 6), "6 ranks are not a multiple of num_key_value_heads 4");
  config.gqa.reset();
  config.latent.emplace();
  config.latent->branches = {{0, 12, 4}, {0, 12, 4}};
  EXPECT_EQ(why_not_sharded(config, 4), "");
  EXPECT_NE(why_not_sharded(config, 3).find("2 latents"), std::string::npos);
  EXPECT_EQ(why_not_sharded(config, 24), "intermediate_size 1408 does not divide by 24");

  // Sizes of layers that there are.
  config.experts = testing_support::tiny_experts();
  EXPECT_EQ(why_not_sharded(config, 4), "the experts' intermediate size 10 does not divide by 4");
  config.experts->intermediate_size = 48;
  EXPECT_EQ(why_not_sharded(config, 24), "the shared experts' intermediate size 20 does not divide by 24");
  config.experts->shared_size = 48;
  EXPECT_EQ(why_not_sharded(config, 24), "intermediate_size 1408 does not divide by 24");
  config.experts->first_layer = 0;
  EXPECT_EQ(why_not_sharded(config, 24), "");

  const TempFolder folder;
  tiny_model().write(folder.path());
  const Model model = Model::open(folder.path());
  expect_error(ErrorKind::usage, {"--tp 4 does not fit this model: num_attention_heads 6"},
               [&] { sharded_tensors(model, *find_shard_layout("plain"), 4); });
}

}  // namespace
}  // namespace relatent

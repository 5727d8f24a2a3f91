#include "convert/verify/verify.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/opened_model.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::open;
using testing_support::random_sequences;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_latent_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

void ignore(Index /*done*/, Index /*all*/) {}

TEST(Verify, AgainstItselfNothingDiffers) {
  const TempFolder folder;
  const Model model = open(tiny_model({.model_type = "qwen2"}), folder, "model");
  const Sequences sequences = random_sequences(1, 4, 20, 50);
  std::vector<std::pair<Index, Index>> progress;
  const Verification found =
      verify(model, model, sequences, [&](Index done, Index all) { progress.emplace_back(done, all); });
  EXPECT_EQ(progress, (std::vector<std::pair<Index, Index>>{{1, 3}, {2, 3}, {3, 3}}));
  ASSERT_EQ(found.layers.size(), 3U);
  for (const LayerFidelity& layer : found.layers) {
    EXPECT_EQ(layer.attention_rel_error, 0);
    EXPECT_EQ(layer.residual_rel_error, 0);
  }
  EXPECT_EQ(found.logits.tokens, 4 * 19);
  EXPECT_EQ(found.logits.mean_kl, 0);
  EXPECT_EQ(found.logits.max_kl, 0);
  EXPECT_EQ(found.logits.max_abs_logit_diff, 0);
  EXPECT_EQ(found.logits.rel_logit_error, 0);
  EXPECT_EQ(found.logits.top1_agreement, 1);
  EXPECT_EQ(found.nats, 0);
  EXPECT_EQ(found.source_ppl, found.converted_ppl);
  EXPECT_NEAR(found.source_ppl, std::exp(found.logits.source_nll), 1e-12 * found.source_ppl);
  // An untrained model cannot predict.
  EXPECT_GT(found.source_ppl, 30);
}

TEST(Verify, ErrorsStandAtTheLayerThatMakesThem) {
  const TempFolder folder;
  TinyModel tiny = tiny_model({.o_bias = true});
  const Model source = open(tiny, folder, "source");
  const Sequences sequences = random_sequences(2, 3, 15, 50);
  // Layer 1 gives out half of its attention.
  for (const char* rest : {"self_attn.o_proj.weight", "self_attn.o_proj.bias"}) {
    for (float& value : tiny.tensors.at(testing_support::layer_name(1, rest)).values) {
      value *= 0.5F;
    }
  }
  const Verification found = verify(source, open(tiny, folder, "halved"), sequences, ignore);
  EXPECT_EQ(found.layers[0].attention_rel_error, 0);
  EXPECT_EQ(found.layers[0].residual_rel_error, 0);
  EXPECT_NEAR(found.layers[1].attention_rel_error, 0.5, kFloatNoise);
  EXPECT_GT(found.layers[1].residual_rel_error, 0.01);
  EXPECT_GT(found.layers[2].attention_rel_error, 0.01);
  EXPECT_GT(found.logits.rel_logit_error, 0.01);
  EXPECT_GT(found.logits.mean_kl, 0);
  EXPECT_GE(found.logits.max_kl, found.logits.mean_kl);
  EXPECT_NEAR(found.nats, std::log(found.converted_ppl / found.source_ppl), 1e-12);
  const ThreadCount one(1);
  const Verification again = verify(source, Model::open(folder / "halved"), sequences, ignore);
  EXPECT_EQ(to_json(again).dump(), to_json(found).dump());
}

TEST(Verify, EitherModelRunsItsOwnMlp) {
  const TempFolder folder;
  TinyModel tiny = tiny_model();
  const Model source = open(tiny, folder, "source");
  for (float& value : tiny.tensors.at(testing_support::layer_name(0, "mlp.down_proj.weight")).values) {
    value *= 0.5F;
  }
  const Verification found =
      verify(source, open(tiny, folder, "halved"), random_sequences(5, 2, 10, 50), ignore);
  EXPECT_EQ(found.layers[0].attention_rel_error, 0);
  EXPECT_GT(found.layers[0].residual_rel_error, 0.01);
  EXPECT_GT(found.layers[1].attention_rel_error, 0.01);
}

TEST(Verify, CountsTheCacheOfBoth) {
  const TempFolder folder;
  const Model source = open(tiny_model({.kv_heads = 3}), folder, "source");
  const Model converted = open(tiny_latent_model({.attention_bias = true}), folder, "converted");
  const Verification found = verify(source, converted, random_sequences(3, 2, 5, 50), ignore);
  // Float32, three layers; two of three heads on one of two devices, one on each of more.
  EXPECT_EQ(found.source_cache_bytes, 2 * 3 * 8 * 3 * 4);
  EXPECT_EQ(found.source_per_device, (std::array<std::optional<Index>, 4>{576, 384, 192, 192}));
  EXPECT_EQ(found.converted_cache_bytes, 17 * 3 * 4);
  EXPECT_EQ(found.converted_per_device,
            (std::array<std::optional<Index>, 4>{204, 204, std::nullopt, std::nullopt}));
  // Two unrelated models.
  EXPECT_GT(found.layers[0].attention_rel_error, 0.3);
}

TEST(Verify, RefusesModelsOfDifferentSizes) {
  const TempFolder folder;
  const Model source = open(tiny_model(), folder, "source");
  const Sequences sequences = random_sequences(4, 2, 5, 50);
  struct Case {
    TinyModel model;
    std::vector<std::string> parts;
  };
  for (const Case& test : {Case{tiny_model({.hidden = 26}), {"hidden_size", "24", "26"}},
                           Case{tiny_model({.layers = 2}), {"num_hidden_layers", "3", "2"}},
                           Case{tiny_model({.vocab = 51}), {"vocab_size", "50", "51"}}}) {
    const Model other = open(test.model, folder, "other");
    std::vector<std::string> parts = test.parts;
    parts.push_back((folder / "other").string());
    parts.push_back((folder / "source").string());
    expect_error(ErrorKind::input, parts, [&] { verify(source, other, sequences, ignore); });
  }
}

TEST(Verify, JsonHoldsEveryField) {
  Verification v;
  v.logits = {.tokens = 11,
              .non_finite = 3,
              .source_nll = 1,
              .converted_nll = 2,
              .mean_kl = 0.25,
              .max_kl = 0.5,
              .top1_agreement = 0.75,
              .max_abs_logit_diff = 3.5,
              .rel_logit_error = 0.125};
  v.source_ppl = 6.5;
  v.converted_ppl = 7.5;
  v.nats = 1.5;
  v.source_cache_bytes = 800;
  v.converted_cache_bytes = 400;
  v.source_per_device = {800, 401, 202, 103};
  v.converted_per_device = {400, 399, 398, 397};
  v.source_context_bytes = {11, 12, 13};
  v.converted_context_bytes = {5, 6, 7};
  v.layers = {{0.1, 0.2}, {0.3, 0.4}};
  const nlohmann::ordered_json expected = nlohmann::ordered_json::parse(R"({
    "source_ppl": 6.5, "converted_ppl": 7.5, "nats": 1.5, "mean_kl": 0.25, "max_kl": 0.5, "top1_agreement": 0.75,
    "max_abs_logit_diff": 3.5, "rel_logit_error": 0.125, "non_finite_positions": 3, "tokens": 11,
    "kv_bytes_per_token": {
      "source": 800, "converted": 400,
      "per_device": {"1": {"source": 800, "converted": 400}, "2": {"source": 401, "converted": 399},
                     "4": {"source": 202, "converted": 398}, "8": {"source": 103, "converted": 397}}},
    "kv_bytes_at_context": {"4096": {"source": 11, "converted": 5}, "32768": {"source": 12, "converted": 6},
                            "131072": {"source": 13, "converted": 7}},
    "layers": [{"attention_rel_error": 0.1, "residual_rel_error": 0.2},
               {"attention_rel_error": 0.3, "residual_rel_error": 0.4}]})");
  EXPECT_EQ(to_json(v), expected);
}

}  // namespace
}  // namespace relatent

#include "convert/run/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "convert/model/families/family.h"
#include "convert/verify/structure.h"
#include "examples_path.h"
#include "linalg/packed.h"
#include "tests/support/convert_fixture.h"
#include "tests/support/expect_error.h"
#include "tests/support/thread_count.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::Conversion;
using testing_support::expect_error;
using testing_support::ignore;
using testing_support::kFloatNoise;
using testing_support::layer_name;
using testing_support::random_sequences;
using testing_support::small;
using testing_support::ThreadCount;
using testing_support::tiny_mixture_model;
using testing_support::tiny_model;
using testing_support::tiny_phi3_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

using Convert = testing_support::ConvertTest;

TEST_F(Convert, MethodsHaveNames) {
  EXPECT_EQ(method_name(Method::lossless), "lossless");
  EXPECT_EQ(method_name(Method::transmla), "transmla");
  EXPECT_EQ(method_name(Method::weights_only), "weights-only");
}

TEST_F(Convert, MethodsThatNobodyNames) {
  EXPECT_EQ(chosen_method({}, true), Method::relatent);
  EXPECT_EQ(chosen_method({}, false), Method::weights_only);
  EXPECT_EQ(chosen_method(Method::relatent, false), Method::weights_only);
  for (const bool calibrated : {true, false}) {
    EXPECT_EQ(chosen_method(Method::lossless, calibrated), Method::lossless);
    EXPECT_EQ(chosen_method(Method::transmla, calibrated), Method::transmla);
    EXPECT_EQ(chosen_method(Method::weights_only, calibrated), Method::weights_only);
  }
  EXPECT_EQ(ConvertOptions{}.method, Method::weights_only);
}

TEST_F(Convert, LosslessLosesNothing) {
  const std::vector<TinyOptions> samples = {
      {.model_type = "qwen2"},         {.model_type = "qwen2", .tied = true},
      {.model_type = "mistral"},       {.heads = 4, .kv_heads = 4, .head_dim = 6},
      {.kv_heads = 1, .o_bias = true}, {.q_bias = true},
      {.kv_bias = true, .tied = true},
  };
  for (const TinyOptions& sample : samples) {
    SCOPED_TRACE(sample.model_type + " " + std::to_string(sample.kv_heads) + (sample.tied ? " tied" : ""));
    const ConvertReport report = run(write(sample));
    const Index keys = sample.kv_heads * sample.head_dim;
    EXPECT_EQ(report.kv_rank, keys);
    EXPECT_EQ(report.rope_dim, keys);
    EXPECT_EQ(report.branches, 1);
    EXPECT_EQ(report.fold, std::nullopt);
    const Verification found = verified();
    for (const LayerFidelity& layer : found.layers) {
      EXPECT_LE(layer.attention_rel_error, kFloatNoise);
      EXPECT_LE(layer.residual_rel_error, kFloatNoise);
    }
    EXPECT_LE(found.logits.rel_logit_error, kFloatNoise);
    EXPECT_LE(std::abs(found.nats), kFloatNoise);
    EXPECT_EQ(found.logits.top1_agreement, 1);
    // The constant coordinate is all that the cache grows by.
    EXPECT_EQ(found.source_cache_bytes, 2 * keys * 3 * 4);
    EXPECT_EQ(found.converted_cache_bytes, (2 * keys + 1) * 3 * 4);
  }
}

TEST_F(Convert, PartlyRotatingHeadsOfFusedProjections) {
  const TinyModel model = tiny_phi3_model(0.5, {.hidden = 40});
  const ConvertOptions options = write(model);
  const ConvertReport found = run(options);
  // 2 heads of 4 that rotate, 4 that do not and 8 values.
  EXPECT_EQ(found.rope_dim, 8);
  EXPECT_EQ(found.kv_rank, 24);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  // Gate and up are the rows of one tensor, byte for byte.
  const Checkpoint before = Checkpoint::open(source());
  const Checkpoint after = Checkpoint::open(output());
  const auto whole = before.bytes("model.layers.1.mlp.gate_up_proj.weight");
  const auto gate = after.bytes("model.layers.1.mlp.gate_proj.weight");
  const auto up = after.bytes("model.layers.1.mlp.up_proj.weight");
  ASSERT_EQ(gate.size() + up.size(), whole.size());
  EXPECT_TRUE(std::ranges::equal(gate, whole.first(gate.size())));
  EXPECT_TRUE(std::ranges::equal(up, whole.last(up.size())));

  ConvertOptions half = options;
  half.method = Method::weights_only;
  half.rank = 24;
  half.rope_dim = 8;
  run(half);  // all that there is
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  half.rope_dim = 10;
  expect_error(ErrorKind::usage, {"--rope-dim 10", "coordinates that rotate", "8"}, [&] { run(half); });
}

TEST_F(Convert, RedundantHeadsAreCachedOnce) {
  TinyModel model = tiny_model();
  for (Index i = 0; i < 3; ++i) {
    for (const char* part : {"k", "v"}) {
      std::vector<float>& values =
          model.tensors.at(layer_name(i, "self_attn." + std::string(part) + "_proj.weight")).values;
      std::copy_n(values.begin(), values.size() / 2, values.begin() + static_cast<Index>(values.size() / 2));
    }
  }
  const ConvertReport found = run(write(model));
  EXPECT_EQ(found.rope_dim, 8);
  EXPECT_EQ(found.kv_rank, 8);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
}

TEST_F(Convert, ScaledRotationIsKept) {
  TinyModel model = tiny_model({.kv_bias = true});
  model.config["rope_parameters"] = {{"rope_type", "yarn"},
                                     {"rope_theta", 100.0},
                                     {"factor", 4.0},
                                     {"original_max_position_embeddings", 32}};
  run(write(model));
  EXPECT_GT(rotary_of(Model::open(source()).attention(0)).attention_factor, 1.1F);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
}

TEST_F(Convert, HalfPrecisionIsAsGoodAsItsDtype) {
  for (const auto& [dtype, tolerance] : {std::pair{DType::bf16, 0.05}, {DType::f16, 0.005}}) {
    run(write({.model_type = "qwen2", .dtype = dtype}));
    const Verification found = verified();
    EXPECT_GT(found.logits.rel_logit_error, 0);
    EXPECT_LE(found.logits.rel_logit_error, tolerance);
    EXPECT_EQ(Model::open(output()).config().dtype, dtype);
  }
}

TEST_F(Convert, ExactSettingsOfTheOtherMethodsReturnTheSource) {
  ConvertOptions options = write({.model_type = "qwen2"});
  options.method = Method::weights_only;
  options.rank = 32;
  options.rope_dim = 16;
  run(options);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  options.calibration = calibrated();
  run(options);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);

  // TransMLA is exact where there is one group and so nothing to mix.
  options = write({.kv_heads = 1, .q_bias = true, .kv_bias = true});
  options.method = Method::transmla;
  options.calibration = calibrated();
  options.rank = 8;
  options.rope_dim = 8;
  options.fold = 1;
  EXPECT_EQ(run(options).fold, 1);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  options.q_rank = 24;  // all that 24 hidden numbers can give, but for the bias
  run(options);
  EXPECT_LE(verified().logits.rel_logit_error, 0.3);
}

TEST_F(Convert, ErrorFallsWithTheBudget) {
  ConvertOptions options = write({.model_type = "qwen2"});
  const fs::path moments = calibrated();
  for (const Method method : {Method::weights_only, Method::transmla}) {
    options.method = method;
    options.calibration = moments;
    options.rope_dim = 8;
    double before = std::numeric_limits<double>::infinity();
    for (const double budget : {0.35, 0.5, 0.75}) {
      options.kv_budget = budget;
      const ConvertReport report = run(options);
      EXPECT_EQ(report.kv_rank, static_cast<Index>(std::floor(budget * 32)) - 8 - 1);
      const Verification found = verified();
      EXPECT_LT(found.layers[0].attention_rel_error, before) << budget;
      before = found.layers[0].attention_rel_error;
      EXPECT_EQ(found.converted_cache_bytes, (report.kv_rank + 1 + 8) * 3 * 4);
    }
    options.kv_budget.reset();
  }
}

TEST_F(Convert, FoldIsTriedWhenNoneIsGiven) {
  ConvertOptions options = small(write(TinyOptions{}), Method::transmla);
  options.calibration = calibrated();
  const ConvertReport report = run(options);
  ASSERT_TRUE(report.fold);
  EXPECT_TRUE(*report.fold == 1 || *report.fold == 2 || *report.fold == 4) << *report.fold;
  const auto bytes = contents(output());
  options.fold = report.fold;
  run(options);
  EXPECT_TRUE(contents(output()) == bytes);
  options.fold = *report.fold == 1 ? 2 : 1;
  run(options);
  EXPECT_FALSE(contents(output()) == bytes);
}

TEST_F(Convert, BalanceReachesTheLatent) {
  ConvertOptions options = small(write(TinyOptions{}), Method::transmla);
  options.calibration = calibrated();
  options.fold = 1;
  std::set<std::string> seen;
  const auto weights = [&] {
    run(options);
    return contents(output()).at("model.safetensors");
  };
  seen.insert(weights());
  options.balance = 4;
  seen.insert(weights());
  options.balance = 0;
  seen.insert(weights());
  EXPECT_EQ(seen.size(), 3U);
}

TEST_F(Convert, BytesDoNotDependOnTheThreads) {
  ConvertOptions options = write({.model_type = "qwen2", .dtype = DType::bf16});
  const fs::path moments = calibrated();
  for (const Method method : {Method::lossless, Method::weights_only, Method::transmla}) {
    SCOPED_TRACE(method_name(method));
    ConvertOptions these = method == Method::lossless ? options : small(options, method);
    if (method == Method::transmla) {
      these.calibration = moments;
    }
    expect_same_bytes(these, {1, 2, 5});
  }
}

TEST_F(Convert, FitsComputeAsTheCalibrationWasMade) {
  ConvertOptions options = small(write(TinyOptions{.dtype = DType::bf16}), Method::relatent);
  options.calibration = calibrated();
  EXPECT_EQ(Conversion(options).options().relatent.compute, DType::f32);
  run(options);
  const auto plain = contents(output());
  options.compute = DType::bf16;
  if (!has_bf16_products()) {
    fs::remove_all(output());
    expect_error(ErrorKind::usage, {"--compute bfloat16", "no bfloat16 products"}, [&] { run(options); });
    GTEST_SKIP() << "this processor has no bfloat16 products";
  }
  run(options);
  const auto rounded = contents(output());
  EXPECT_FALSE(rounded == plain);
  for (const int threads : {1, 2, 3}) {
    const ThreadCount count(threads);
    run(options);
    EXPECT_TRUE(contents(output()) == rounded) << threads;
  }
  options.compute.reset();
  options.calibration = calibrated(DType::bf16);
  EXPECT_EQ(Conversion(options).options().relatent.compute, DType::bf16);
  options.compute = DType::f32;
  EXPECT_EQ(Conversion(options).options().relatent.compute, DType::f32);
}

TEST_F(Convert, MeasuresWhatItWrote) {
  ConvertOptions options = small(write(TinyOptions{}), Method::relatent);
  options.calibration = calibrated();
  const ConvertReport report = run(options);
  ASSERT_TRUE(report.measured);
  EXPECT_TRUE(report.measured->held_out);
  EXPECT_EQ(report.measured->logits.tokens, 39);
  const Sequences last = last_sequences(random_sequences(1, 12, 40, 50), 1);
  const Verification found = verify(Model::open(source()), Model::open(output()), last, ignore);
  EXPECT_NEAR(report.measured->nats(), found.nats, kFloatNoise);
  options.held_out = 0;
  EXPECT_FALSE(run(options).measured);
  // Nothing to measure on.
  EXPECT_FALSE(run(small(write(TinyOptions{}), Method::weights_only)).measured);
}

TEST_F(Convert, ExpertsAreCarriedAndPredictionLayersLeftOut) {
  TinyModel model = testing_support::tiny_latent_model({.experts = testing_support::tiny_experts()});
  model.config["num_nextn_predict_layers"] = 1;
  model.put("model.layers.3.eh_proj.weight", MatrixF::Ones(3, 7));
  model.put_vector("model.layers.3.enorm.weight", RowVectorF::Ones(5));
  ConvertOptions options = write(model);
  options.method = Method::weights_only;
  options.form = "gla";
  options.branches = 2;
  options.rank = 22;
  for (const std::optional<DType> dtype : {std::optional<DType>(), std::optional(DType::bf16)}) {
    options.dtype = dtype;
    const Conversion conversion(options);
    ASSERT_EQ(conversion.plan().left_out.size(), 1U);
    EXPECT_EQ(conversion.plan().left_out.front().rfind("model.layers.3.*: 2 tensors", 0), 0U);
    EXPECT_EQ(conversion.plan().warnings.size(), 1U);
    run(options);
    const Model converted = Model::open(output());
    EXPECT_TRUE(converted.config().has_experts(1));
    EXPECT_FALSE(converted.config().has_experts(0));
    Index experts = 0;
    for (const PlacedTensor& tensor : converted.tensors()) {
      if (tensor.name.find(".mlp.") == std::string::npos) {
        continue;
      }
      ++experts;
      const TensorSource& checkpoint = converted.checkpoint();
      // Where a token goes must not change with the dtype.
      EXPECT_EQ(checkpoint.info(tensor.name).dtype,
                tensor.role == Role::router_bias ? DType::f32 : dtype.value_or(DType::f32));
      if (!dtype || tensor.role == Role::router_bias) {
        EXPECT_TRUE(checkpoint.read_matrix(tensor.name) ==
                    conversion.source().checkpoint().read_matrix(tensor.name))
            << tensor.name;
      }
    }
    EXPECT_EQ(experts, 3 + 2 * (2 + 3 * 8 + 3));
    EXPECT_LE(verified().logits.rel_logit_error, dtype ? 0.1 : 1e-5);
  }
}

TEST_F(Convert, MixturesGoIntoTheOwnLayoutByteForByte) {
  const std::vector<std::pair<std::string, std::vector<std::pair<std::string, std::string>>>> renamed = {
      {"mixtral",
       {{"block_sparse_moe.gate.weight", "mlp.gate.weight"},
        {"block_sparse_moe.experts.4.w1.weight", "mlp.experts.4.gate_proj.weight"},
        {"block_sparse_moe.experts.4.w2.weight", "mlp.experts.4.down_proj.weight"},
        {"block_sparse_moe.experts.4.w3.weight", "mlp.experts.4.up_proj.weight"}}},
      {"qwen2_moe",
       {{"mlp.shared_expert.up_proj.weight", "mlp.shared_experts.up_proj.weight"},
        {"mlp.shared_expert_gate.weight", "mlp.shared_expert_gate.weight"},
        {"mlp.experts.3.up_proj.weight", "mlp.experts.3.up_proj.weight"}}},
      {"qwen3_moe", {{"mlp.experts.3.down_proj.weight", "mlp.experts.3.down_proj.weight"}}}};
  for (const auto& [model_type, names] : renamed) {
    ConvertOptions options = write(tiny_mixture_model({.model_type = model_type}));
    run(options);
    EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
    const Model before = Model::open(source());
    const Model after = Model::open(output());
    EXPECT_EQ(after.config().family->name, "relatent");
    std::vector<std::string> findings;
    const Structure structure = check_structure(before, after, find_report(after, findings));
    EXPECT_TRUE(findings.empty());
    EXPECT_TRUE(structure.findings.empty());
    EXPECT_EQ(structure.cast, 0);
    EXPECT_EQ(after.config().expert_layers(), before.config().expert_layers());
    for (const auto& [from, to] : names) {
      EXPECT_TRUE(std::ranges::equal(before.checkpoint().bytes(layer_name(2, from)),
                                     after.checkpoint().bytes(layer_name(2, to))))
          << to;
    }
    for (const char* form : {"gla", "tpla", "mlra"}) {
      options.form = form;
      options.branches = 2;
      run(options);
      EXPECT_LE(verified().logits.rel_logit_error, 10 * kFloatNoise) << form;
    }
  }
}

TEST_F(Convert, MixturesAreFitted) {
  for (const char* model_type : {"mixtral", "qwen2_moe", "qwen3_moe"}) {
    ConvertOptions options = small(write(tiny_mixture_model({.model_type = model_type})), Method::relatent);
    options.calibration = calibrated();
    run(options);
    EXPECT_EQ(Model::open(output()).config().latent->kv_lora_rank, 10);
    const double fitted = verified().logits.rel_logit_error;
    options.method = Method::weights_only;
    options.calibration.reset();
    run(options);
    EXPECT_LT(fitted, verified().logits.rel_logit_error);
    EXPECT_GT(fitted, 0);
  }
}

TEST_F(Convert, EnginesRefuseASourceThatTheyHaveNoPlaceFor) {
  ConvertOptions options =
      write(testing_support::tiny_latent_model({.experts = testing_support::tiny_experts()}));
  for (const char* engine : {"deepseek", "gguf"}) {
    options.engine = engine;
    expect_error(ErrorKind::usage,
                 {std::string("--engine ") + engine, "mixture of experts", "--engine relatent"},
                 [&] { Conversion{options}; });
  }
  options.engine = "transformers";
  EXPECT_EQ(open_inputs(options).engine->name(), "relatent");
}

// As a fresh model has them.
TEST_F(Convert, BiasesMayBeZero) {
  TinyModel model = tiny_model({.model_type = "qwen2"});
  for (Index i = 0; i < 3; ++i) {
    for (const char* rest : {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}) {
      auto& values = model.tensors.at(layer_name(i, rest)).values;
      std::fill(values.begin(), values.end(), 0.0F);
    }
  }
  run(write(model));
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
}

// Biases on some layers only: the target has one shape for all.
TEST_F(Convert, QueryBiasesMayBeMissingFromSomeLayers) {
  TinyModel model = tiny_model({.q_bias = true});
  model.tensors.erase(layer_name(1, "self_attn.q_proj.bias"));
  run(write(model));
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
  model = tiny_model({.q_bias = true});
  model.tensors.erase(layer_name(0, "self_attn.q_proj.bias"));
  run(write(model));
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
}

TEST_F(Convert, TrainedExampleKeepsItsPredictions) {
  ConvertOptions options;
  options.method = Method::lossless;
  options.source = RELATENT_EXAMPLES "/llama-3m";
  options.output = output();
  options.dtype = DType::f32;
  const Sequences sequences = read_sequences(RELATENT_EXAMPLES "/tokens/validation.npy", 128, 4, 4096);
  const Model before = Model::open(options.source);
  run(options);
  EXPECT_TRUE(fs::exists(output() / "tokenizer.json"));
  const Verification exact = verify(before, Model::open(output()), sequences, ignore);
  EXPECT_LE(exact.logits.rel_logit_error, kFloatNoise);
  EXPECT_LT(exact.source_ppl, 20);

  options.method = Method::weights_only;
  options.kv_budget = 0.75;
  run(options);
  const Verification smaller = verify(before, Model::open(output()), sequences, ignore);
  EXPECT_GT(smaller.logits.mean_kl, 1e-4);
  EXPECT_LT(smaller.nats, 0.5);
  EXPECT_GT(smaller.logits.top1_agreement, 0.5);
}

}  // namespace
}  // namespace relatent

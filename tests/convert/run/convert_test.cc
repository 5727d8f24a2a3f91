#include "convert/run/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "convert/verify/verify.h"
#include "examples_path.h"
#include "linalg/packed.h"
#include "tests/support/conversion.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::Conversion;
using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::layer_name;
using testing_support::random_sequences;
using testing_support::read_bytes;
using testing_support::TempFolder;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

void ignore(Index /*done*/, Index /*all*/) {}

// A source, and where its conversion goes.
class Convert : public testing::Test {
 protected:
  fs::path source() const { return folder_ / "source"; }
  fs::path output() const { return folder_ / "output"; }

  ConvertOptions write(const TinyModel& model) {
    fs::remove_all(source());
    model.write(source());
    ConvertOptions options;
    options.source = source();
    options.output = output();
    options.method = Method::lossless;
    return options;
  }
  ConvertOptions write(const TinyOptions& options) { return write(tiny_model(options)); }
  // Moments of the source as it is now.
  fs::path calibrated(DType compute = DType::f32, Index sequences = 12) const {
    fs::path path = folder_ / "moments.h5";
    calibrate(Model::open(source()), random_sequences(1, sequences, 40, 50), path, ignore, {}, compute);
    return path;
  }
  static ConvertReport run(const ConvertOptions& options) {
    fs::remove_all(options.output);
    return Conversion(options).run(ignore);
  }
  Verification verified() const {
    return verify(Model::open(source()), Model::open(output()), random_sequences(2, 4, 40, 50), ignore);
  }
  void expect_nothing_left() const {
    EXPECT_FALSE(fs::exists(output()));
    EXPECT_FALSE(fs::exists(output().string() + ".partial"));
  }
  static std::map<std::string, std::string> contents(const fs::path& folder) {
    std::map<std::string, std::string> out;
    for (const auto& entry : fs::directory_iterator(folder)) {
      out[entry.path().filename().string()] = read_bytes(entry.path());
    }
    return out;
  }

  TempFolder folder_;
};

// A small rank and a short rotary key.
ConvertOptions small(ConvertOptions options, Method method) {
  options.method = method;
  options.rank = 10;
  options.rope_dim = 8;
  return options;
}

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
    for (const double budget : {0.3, 0.5, 0.75}) {
      options.kv_budget = budget;
      const ConvertReport report = run(options);
      EXPECT_EQ(report.kv_rank, static_cast<Index>(std::floor(budget * 32)) - 8);
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
  options.balance_columns = TransmlaOptions::Columns::pca;
  seen.insert(weights());
  options.balance = 4;
  seen.insert(weights());
  options.balance = 0;
  seen.insert(weights());
  EXPECT_EQ(seen.size(), 4U);
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
    std::vector<std::map<std::string, std::string>> found;
    for (const int threads : {1, 2, 5}) {
      const ThreadCount count(threads);
      run(these);
      found.push_back(contents(output()));
    }
    EXPECT_TRUE(found[1] == found[0]);
    EXPECT_TRUE(found[2] == found[0]);
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

TEST_F(Convert, PlannedMemoryGrowsWithTheTokensOfTheFits) {
  ConvertOptions options = small(write(TinyOptions{}), Method::relatent);
  const auto planned = [&](Index sequences) {
    options.calibration = calibrated(DType::f32, sequences);
    return Conversion(options).plan().memory_bytes;
  };
  const std::uint64_t few = planned(4);
  EXPECT_GT(planned(40), few);
  // Without fits nothing is held of the tokens.
  options.method = Method::weights_only;
  EXPECT_EQ(planned(4), planned(40));
}

TEST_F(Convert, PlanIsWhatIsWritten) {
  TinyModel model = tiny_model({.model_type = "qwen2", .tied = true, .dtype = DType::bf16});
  model.put("lm_head.weight", MatrixF::Ones(50, 24));
  model.put_vector(layer_name(1, "self_attn.rotary_emb.inv_freq"), RowVectorF::Ones(4));
  // One tensor in another dtype than the rest.
  model.tensors.at("model.norm.weight").dtype = DType::f32;
  for (const std::optional<DType> dtype :
       {std::optional<DType>(), std::optional(DType::f16), std::optional(DType::f32)}) {
    ConvertOptions options = write(model);
    write_text(source() / "tokenizer.json", "{\"tokens\": []}");
    write_text(source() / "generation_config.json", "{}");
    write_text(source() / ".hidden", "no");
    options.dtype = dtype;
    std::vector<std::pair<Index, Index>> progress;
    fs::remove_all(output());
    Conversion conversion(options);
    const ConvertPlan& plan = conversion.plan();
    EXPECT_FALSE(fs::exists(output()));
    EXPECT_EQ(plan.dtype, dtype.value_or(DType::bf16));
    EXPECT_EQ(plan.shape.kv_lora_rank, 16);
    EXPECT_EQ(plan.shape.qk_rope_head_dim, 16);
    EXPECT_EQ(plan.shape.qk_nope_head_dim, 0);
    EXPECT_TRUE(plan.shape.has_q_bias);
    EXPECT_EQ(plan.source_cache_elements, 32);
    EXPECT_EQ(plan.converted_cache_elements, 33);
    EXPECT_GT(plan.memory_bytes, 0U);
    ASSERT_EQ(plan.left_out.size(), 2U);
    std::vector<std::string> left_out = plan.left_out;
    std::sort(left_out.begin(), left_out.end());
    EXPECT_EQ(left_out[0].rfind("lm_head.weight: tied", 0), 0U) << left_out[0];
    EXPECT_EQ(left_out[1].rfind(layer_name(1, "self_attn.rotary_emb.inv_freq: "), 0), 0U) << left_out[1];
    ASSERT_EQ(plan.side_files.size(), 2U);

    const ConvertReport report =
        conversion.run([&](Index done, Index all) { progress.emplace_back(done, all); });
    EXPECT_EQ(progress, (std::vector<std::pair<Index, Index>>{{1, 3}, {2, 3}, {3, 3}}));
    EXPECT_EQ(contents(output()).size(), 4U);
    EXPECT_EQ(read_bytes(output() / "tokenizer.json"), "{\"tokens\": []}");
    EXPECT_EQ(read_bytes(output() / "generation_config.json"), "{}");

    const Checkpoint written = Checkpoint::open(output());
    const Checkpoint before = Checkpoint::open(source());
    std::set<std::string> planned;
    std::uint64_t bytes = 0;
    for (const PlannedTensor& tensor : plan.tensors) {
      SCOPED_TRACE(tensor.spec.name);
      EXPECT_TRUE(planned.insert(tensor.spec.name).second);
      ASSERT_TRUE(written.contains(tensor.spec.name));
      const TensorInfo& info = written.info(tensor.spec.name);
      EXPECT_EQ(info.dtype, tensor.spec.dtype);
      EXPECT_EQ(info.shape, tensor.spec.shape);
      bytes += tensor.spec.bytes();
      const bool attention = tensor.spec.name.find("self_attn") != std::string::npos;
      EXPECT_EQ(tensor.action == TensorAction::convert, attention);
      if (attention) {
        EXPECT_EQ(tensor.spec.dtype, plan.dtype);
        EXPECT_EQ(tensor.source, "");
        continue;
      }
      EXPECT_EQ(tensor.source, tensor.spec.name);
      EXPECT_EQ(tensor.spec.dtype, dtype.value_or(before.info(tensor.source).dtype));
      if (tensor.action == TensorAction::copy) {
        EXPECT_EQ(tensor.spec.dtype, before.info(tensor.source).dtype);
        EXPECT_TRUE(std::ranges::equal(written.bytes(tensor.spec.name), before.bytes(tensor.source)));
      } else {
        EXPECT_NE(tensor.spec.dtype, before.info(tensor.source).dtype);
        const double rounding = tensor.spec.dtype == DType::f32 ? 0 : std::exp2(-11);
        EXPECT_LE(testing_support::relative_error(written.read_matrix(tensor.spec.name),
                                                  before.read_matrix(tensor.source)),
                  rounding);
      }
    }
    const std::vector<std::string> names = written.tensor_names();
    EXPECT_EQ(planned, std::set<std::string>(names.begin(), names.end()));
    EXPECT_EQ(bytes, written.tensor_bytes());
    std::uint64_t side_bytes = 0;
    for (const fs::path& file : plan.side_files) {
      side_bytes += fs::file_size(file);
    }
    EXPECT_EQ(plan.output_bytes, bytes + side_bytes);
    EXPECT_EQ(report.bytes_read, before.tensor_bytes());
    EXPECT_EQ(report.bytes_written, fs::file_size(output() / "model.safetensors"));
    EXPECT_GE(report.seconds, 0);
    EXPECT_EQ(written.config()["dtype"], torch_name(plan.dtype));
  }
}

TEST_F(Convert, EmbeddingFirstThenLayersInOrder) {
  const Conversion conversion(write(TinyOptions{}));
  const auto& tensors = conversion.plan().tensors;
  EXPECT_EQ(tensors.front().spec.name, "model.embed_tokens.weight");
  EXPECT_FALSE(tensors.front().layer_idx);
  Index before = -1;
  for (const PlannedTensor& tensor : tensors) {
    const std::size_t at = tensor.spec.name.find(".layers.");
    const Index layer =
        at != std::string::npos ? std::stoi(tensor.spec.name.substr(at + 8)) : (before < 0 ? -1 : Index{3});
    EXPECT_GE(layer, before) << tensor.spec.name;
    before = layer;
  }
  EXPECT_EQ(before, 3);
}

TEST_F(Convert, ShardsAreNoLargerThanAsked) {
  ConvertOptions options = write({.model_type = "qwen2"});
  run(options);
  const std::string whole = Checkpoint::open(output()).fingerprint();
  EXPECT_TRUE(fs::exists(output() / "model.safetensors"));
  options.max_shard_bytes = 20'000;
  const ConvertReport report = run(options);
  EXPECT_FALSE(fs::exists(output() / "model.safetensors"));
  EXPECT_TRUE(fs::exists(output() / "model.safetensors.index.json"));
  std::size_t shards = 0;
  std::uint64_t bytes = 0;
  for (const auto& entry : fs::directory_iterator(output())) {
    if (entry.path().extension() == ".safetensors") {
      ++shards;
      bytes += entry.file_size();
      // The limit is on tensors; the header comes on top.
      std::uint64_t tensors = 0;
      const SafetensorsFile file = SafetensorsFile::open(entry.path());
      for (const TensorInfo& tensor : file.tensors()) {
        tensors += tensor.bytes;
      }
      EXPECT_LE(tensors, options.max_shard_bytes);
    }
  }
  EXPECT_GT(shards, 3U);
  EXPECT_EQ(report.bytes_written, bytes);
  EXPECT_EQ(Checkpoint::open(output()).fingerprint(), whole);
  EXPECT_LE(verified().logits.rel_logit_error, kFloatNoise);
}

TEST_F(Convert, OptionsThatMakeNoSense) {
  struct Case {
    std::function<void(ConvertOptions&)> spoil;
    std::vector<std::string> parts;
    Method method = Method::weights_only;
  };
  const std::vector<Case> cases = {
      {[](ConvertOptions& o) { o.rank = 33; }, {"--rank 33", "full rank 32"}},
      {[](ConvertOptions& o) { o.rank = 0; }, {"--rank 0"}},
      {[](ConvertOptions& o) { o.rank = -5; }, {"--rank -5"}},
      {[](ConvertOptions& o) { o.rank.reset(); }, {"weights-only", "--rank or --kv-budget"}},
      {[](ConvertOptions& o) { o.kv_budget = 0.5; }, {"--rank and --kv-budget"}},
      {[](ConvertOptions& o) { o.rope_dim = 7; }, {"--rope-dim 7", "even"}},
      {[](ConvertOptions& o) { o.rope_dim = 0; }, {"--rope-dim 0"}},
      {[](ConvertOptions& o) { o.rope_dim = 18; }, {"--rope-dim 18", "16"}},
      {[](ConvertOptions& o) {
         o.rank.reset();
         o.kv_budget = 0.25;
       },
       {"--kv-budget", "no room", "8"}},
      {[](ConvertOptions& o) {
         o.rank.reset();
         o.kv_budget = 1.01;
       },
       {"--kv-budget"}},
      {[](ConvertOptions& o) {
         o.rank.reset();
         o.kv_budget = 0;
       },
       {"--kv-budget"}},
      {[](ConvertOptions& o) {
         o.rank.reset();
         o.kv_budget = std::numeric_limits<double>::quiet_NaN();
       },
       {"--kv-budget"}},
      {[](ConvertOptions& o) { o.fold = 1; }, {"--fold", "transmla"}},
      {[](ConvertOptions& o) { o.q_rank = 8; }, {"--q-rank", "transmla"}},
      {[](ConvertOptions& o) { o.engine = "paper"; }, {"--engine paper", "transformers"}},
      {[](ConvertOptions& /*o*/) {}, {"lossless", "--rank"}, Method::lossless},
      {[](ConvertOptions& o) { o.rank.reset(); }, {"lossless", "--rope-dim"}, Method::lossless},
      {[](ConvertOptions& o) {
         o.rank.reset();
         o.rope_dim.reset();
         o.kv_budget = 0.5;
       },
       {"lossless", "--kv-budget"},
       Method::lossless},
      {[](ConvertOptions& o) { o.calibration.reset(); }, {"transmla", "--calibration"}, Method::transmla},
      {[](ConvertOptions& o) { o.rank = 25; }, {"--rank 25", "full rank 24"}, Method::transmla},
      {[](ConvertOptions& o) { o.rope_dim = 6; }, {"--rope-dim 6", "does not divide"}, Method::transmla},
      {[](ConvertOptions& o) { o.rope_dim = 16; }, {"--rope-dim 16", "does not divide"}, Method::transmla},
      {[](ConvertOptions& o) { o.fold = 3; }, {"--fold 3"}, Method::transmla},
      {[](ConvertOptions& o) {
         o.rope_dim = 4;
         o.fold = 1;
       },
       {"--fold 1"},
       Method::transmla},
      {[](ConvertOptions& o) { o.q_rank = 25; }, {"--q-rank 25", "24"}, Method::transmla},
      {[](ConvertOptions& o) { o.q_rank = 0; }, {"--q-rank 0"}, Method::transmla},
  };
  const ConvertOptions options = write(TinyOptions{});
  const fs::path moments = calibrated();
  for (const Case& test : cases) {
    SCOPED_TRACE(test.parts.front());
    ConvertOptions spoilt = small(options, test.method);
    if (test.method == Method::transmla) {
      spoilt.calibration = moments;
      EXPECT_NO_THROW(Conversion{spoilt});
    }
    test.spoil(spoilt);
    expect_error(ErrorKind::usage, test.parts, [&] { Conversion{spoilt}; });
    expect_nothing_left();
  }
}

// A source that the MLRA authors' layout holds: tied, of base 10000, eight heads.
TinyModel tied_source(double base = 10000, const TinyOptions& options = {.heads = 8, .tied = true}) {
  TinyModel out = tiny_model(options);
  out.config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", base}};
  return out;
}

ConvertOptions to_mlra(ConvertOptions options, const std::string& form, Index branches) {
  options.method = Method::relatent;
  options.engine = "mlra";
  options.form = form;
  options.branches = branches;
  options.per_device = 20;
  if (form == "mlra") {
    options.key_rank = 6;
  }
  options.norm_coordinates = 4;
  return options;
}

// Two latents of any size that leaves the module room, of any base.
ConvertOptions to_gla(ConvertOptions options) {
  options.method = Method::relatent;
  options.engine = "gla";
  options.form = "gla";
  options.branches = 2;
  return options;
}

// Coordinates that a shape leaves over hold nothing and change nothing.
TEST_F(Convert, ShapesAreFilledUp) {
  const ConvertOptions source = write(TinyOptions{.model_type = "qwen2"});
  const fs::path moments = calibrated();
  for (const char* engine : {"transformers", "relatent"}) {
    SCOPED_TRACE(engine);
    ConvertOptions options = source;
    options.calibration = moments;
    options.method = Method::relatent;
    options.engine = engine;
    options.rank = 10;
    options.rope_dim = 8;
    run(options);
    const Verification narrow = verified();
    options.rope_dim.reset();
    options.shape = CacheShape{48, 8};
    const ConvertReport report = run(options);
    EXPECT_EQ(report.kv_rank, 10);
    const Model written = Model::open(output());
    EXPECT_EQ(written.config().latent->kv_lora_rank, 48);
    EXPECT_EQ(written.config().latent->qk_rope_head_dim, 8);
    const Verification wide = verified();
    EXPECT_EQ(wide.converted_cache_bytes, (48 + 8) * 3 * 4);
    EXPECT_NEAR(wide.nats, narrow.nats, kFloatNoise);
    EXPECT_NEAR(wide.logits.rel_logit_error, narrow.logits.rel_logit_error, kFloatNoise);
    // As much of it as there is to hold.
    options.rank.reset();
    EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 32);
    options.kv_budget = 0.75;
    EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 16);
    EXPECT_EQ(Conversion(options).plan().converted_cache_elements, 56);
  }
  ConvertOptions options = source;
  options.calibration = moments;
  options.method = Method::relatent;
  options.engine = "deepseek";
  options.shape = CacheShape{48, 8};
  run(options);
  EXPECT_EQ(Model::open(output()).config().latent->kv_lora_rank, 48);
  EXPECT_EQ(Conversion(options).plan().shape.norm_coordinates, 16);
}

TEST_F(Convert, ShapesThatCannotBe) {
  const ConvertOptions source = write(TinyOptions{});
  const auto refused = [&](const std::vector<std::string>& parts,
                           const std::function<void(ConvertOptions&)>& spoil) {
    ConvertOptions options = source;
    options.method = Method::weights_only;
    options.shape = CacheShape{48, 8};
    EXPECT_NO_THROW(Conversion{options});
    spoil(options);
    expect_error(ErrorKind::usage, parts, [&] { Conversion{options}; });
  };
  refused({"--shape 48+18", "at most 16"}, [](ConvertOptions& o) { o.shape = CacheShape{48, 18}; });
  refused({"--shape 48+7", "even"}, [](ConvertOptions& o) { o.shape = CacheShape{48, 7}; });
  refused({"--shape 16+8", "rank of 15"}, [](ConvertOptions& o) {
    o.shape = CacheShape{16, 8};
    o.rank = 16;
  });
  refused({"--shape 48+8", "--rope-dim 6"}, [](ConvertOptions& o) { o.rope_dim = 6; });
  refused({"--shape", "lossless"}, [](ConvertOptions& o) { o.method = Method::lossless; });
  refused({"--shape 48+8", "--to mla"}, [](ConvertOptions& o) {
    o.form = "gla";
    o.branches = 2;
  });
}

TEST_F(Convert, ShapesOfKernelsAreTheDefault) {
  ConvertOptions options = write(TinyOptions{.heads = 6, .kv_heads = 6, .head_dim = 64});
  options.method = Method::weights_only;
  const auto planned = [&] { return Conversion(options).plan(); };
  EXPECT_EQ(planned().converted_cache_elements, 576);
  EXPECT_EQ(planned().shape.kv_lora_rank, 511);
  EXPECT_TRUE(planned().warnings.empty());
  // A budget that comes near one; one that does not.
  options.kv_budget = 0.78;
  EXPECT_EQ(planned().converted_cache_elements, 576);
  options.kv_budget = 0.42;
  EXPECT_EQ(planned().converted_cache_elements, 320);
  options.kv_budget = 0.6;
  EXPECT_EQ(planned().shape.dead_coordinates, 0);
  options.kv_budget.reset();
  options.shape = CacheShape{448, 64};
  ASSERT_EQ(planned().warnings.size(), 1U);
  EXPECT_NE(planned().warnings.front().find("fits no kernel"), std::string::npos);
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

TEST_F(Convert, RotaryListsOfOneBase) {
  const auto fitted = [&](double base, std::optional<Index> rope_dim, const TinyOptions& body) {
    ConvertOptions options = to_mlra(write(tied_source(base, body)), "gla", 2);
    options.calibration = calibrated();
    options.rope_dim = rope_dim;
    options.per_device.reset();
    options.rank = 2 * 11;
    const Conversion conversion(options);
    return std::pair(conversion.plan().shape.qk_rope_head_dim, conversion.options().relatent.list_stride);
  };
  using Fit = std::pair<Index, std::optional<Index>>;
  const TinyOptions body{.heads = 8, .tied = true};
  EXPECT_EQ(fitted(1e4, {}, body), Fit(8, 1));
  EXPECT_EQ(fitted(1e4, 8, body), Fit(8, 1));
  EXPECT_EQ(fitted(1e4, 4, body), Fit(4, 2));
  EXPECT_EQ(fitted(1e4, 2, body), Fit(2, 4));
  EXPECT_EQ(fitted(1e8, {}, body), Fit(4, 1));
  EXPECT_EQ(fitted(1e8, 2, body), Fit(2, 2));
  EXPECT_EQ(fitted(1e16, {}, body), Fit(2, 1));
  // Bases are read back from float32 frequencies.
  const TinyOptions wide{.layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 128, .tied = true};
  EXPECT_EQ(fitted(1e4, {}, wide), Fit(128, 1));
  EXPECT_EQ(fitted(1e4, 32, wide), Fit(32, 4));
  EXPECT_EQ(fitted(1e8, {}, wide), Fit(64, 1));
  const auto refused = [&](double base, std::optional<Index> rope_dim,
                           const std::vector<std::string>& parts) {
    expect_error(ErrorKind::usage, parts, [&] { fitted(base, rope_dim, body); });
  };
  refused(1e4, 6, {"--engine mlra", "base 10000 only", "even divisor of 8"});
  refused(1e4, 3, {"even divisor of 8"});
  refused(1e4, 1, {"even divisor of 8"});
  refused(1e4, 0, {"even divisor of 8"});
  refused(1e4, 16, {"even divisor of 8"});
  refused(1e8, 8, {"even divisor of 4"});
  refused(100, {}, {"--engine mlra", "base 10000 only", "of base 100"});
  refused(5e5, {}, {"base 10000 only", "of base 500000"});
  refused(5e5, 8, {"base 10000 only", "of base 500000"});
  TinyModel scaled = tied_source();
  scaled.config["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 1e4}, {"factor", 4.0}};
  ConvertOptions options = to_mlra(write(scaled), "gla", 2);
  options.calibration = calibrated();
  expect_error(ErrorKind::input, {"config.json", "rope_type default", "linear"},
               [&] { Conversion{options}; });
}

TEST_F(Convert, SourcesThatTheAuthorsLayoutsCannotHold) {
  // Before any calibration is read.
  const auto early = [&](ConvertOptions options) {
    options.method = Method::weights_only;
    return options;
  };
  expect_error(ErrorKind::input,
               {"config.json", "tie_word_embeddings", "true", "--engine mlra", "found false"},
               [&] { Conversion{early(to_mlra(write(tied_source(1e4, {.heads = 8})), "mlra", 2))}; });
  const TinyModel mla = testing_support::tiny_latent_model({.body = {.tied = true}});
  expect_error(ErrorKind::usage, {"--engine mlra", "MLA source", "--engine transformers"},
               [&] { Conversion{early(to_mlra(write(mla), "mlra", 2))}; });
  expect_error(ErrorKind::usage, {"--engine gla", "MLA source", "--engine transformers"},
               [&] { Conversion{early(to_gla(write(mla)))}; });
  expect_error(ErrorKind::usage, {"--engine mlra", "only --method relatent"},
               [&] { Conversion{early(to_mlra(write(tied_source()), "mlra", 2))}; });
  // The rotary part of a lossless layer repeats the source's list for every key head.
  ConvertOptions lossless = to_gla(write(tied_source()));
  lossless.method = Method::lossless;
  expect_error(ErrorKind::usage, {"--engine gla", "--method lossless"}, [&] { Conversion{lossless}; });
  for (const char* form : {"mla", "tpla"}) {
    ConvertOptions options = write(tied_source());
    options.form = form;
    options.branches = 2;
    for (const char* engine : {"mlra", "gla"}) {
      options.engine = engine;
      expect_error(ErrorKind::usage, {"--engine " + options.engine, "no layout for --to " + options.form},
                   [&] { Conversion{options}; });
    }
  }
  const auto with_bias = tied_source(1e4, {.heads = 8, .o_bias = true, .tied = true});
  ConvertOptions biased = to_mlra(write(with_bias), "mlra", 2);
  biased.calibration = calibrated();
  expect_error(ErrorKind::input, {"o_proj.bias", "without biases"}, [&] { Conversion{biased}; });
}

TEST_F(Convert, SizesThatTheAuthorsLayoutsCannotHold) {
  const ConvertOptions source = write(tied_source());
  const fs::path moments = calibrated();
  const auto refused = [&](ConvertOptions options, const std::vector<std::string>& parts,
                           const std::function<void(ConvertOptions&)>& spoil) {
    options.calibration = moments;
    EXPECT_NO_THROW(Conversion{options});
    spoil(options);
    expect_error(ErrorKind::usage, parts, [&] { Conversion{options}; });
    expect_nothing_left();
  };
  refused(to_mlra(source, "gla", 2), {"--engine mlra", "2 or 4 latents"},
          [](ConvertOptions& o) { o.branches = 8; });
  refused(to_mlra(source, "mlra", 4), {"--engine mlra", "of one size"}, [](ConvertOptions& o) {
    o.per_device.reset();
    o.rank = 6 + 13;
  });
  refused(to_mlra(source, "mlra", 4), {"--pad-rank", "one latent"}, [](ConvertOptions& o) {
    o.norm_coordinates.reset();
    o.pad_rank = 64;
  });
  refused(to_gla(source), {"--engine gla", "--rank is at most 30"}, [](ConvertOptions& o) { o.rank = 32; });
  refused(to_gla(source), {"--engine gla", "--branches 2"}, [](ConvertOptions& o) {
    o.branches = 4;
    o.rank = 40;
  });
  refused(to_gla(source), {"--norm-coordinates", "deepseek, gguf and mlra, not to gla"},
          [](ConvertOptions& o) { o.norm_coordinates = 4; });
}

TEST_F(Convert, PlansForTheAuthorsLayouts) {
  TinyModel model = tied_source();
  ConvertOptions options = to_mlra(write(model), "mlra", 2);
  options.calibration = calibrated();
  const auto eps_warning = [](const ConvertPlan& plan) {
    std::string out;
    for (const std::string& warning : plan.warnings) {
      out += warning.find("divides every norm") != std::string::npos ? warning : "";
    }
    return out;
  };
  {
    const ConvertPlan plan = Conversion(options).plan();
    EXPECT_NE(eps_warning(plan).find("--engine mlra"), std::string::npos);
    EXPECT_NE(eps_warning(plan).find("1e-06, the source adds 1e-05"), std::string::npos) << eps_warning(plan);
    EXPECT_EQ(plan.shape.q_lora_rank, 24);
    EXPECT_EQ(plan.shape.norm_coordinates, 4);
    // Six shared and six own coordinates beside a rotary key of eight.
    EXPECT_EQ(plan.shape.kv_lora_rank, 2 * (6 + 2 * 6));
    EXPECT_EQ(plan.converted_cache_elements, 4 * (12 + 4) + 8);
    std::set<std::string> names;
    for (const PlannedTensor& tensor : plan.tensors) {
      names.insert(tensor.spec.name);
    }
    EXPECT_TRUE(names.contains("transformer.wte.weight"));
    EXPECT_TRUE(names.contains("transformer.h.2.mlp.c_proj.weight"));
    // Their loading code would draw a head anew, and with it the embedding, if none were stored.
    EXPECT_EQ(plan.tensors.back().spec.name, "lm_head.weight");
    EXPECT_EQ(plan.tensors.back().source, "model.embed_tokens.weight");
    options.norm_coordinates.reset();
    EXPECT_EQ(Conversion(options).plan().shape.norm_coordinates, 16);
  }
  model.config["rms_norm_eps"] = 1e-6;
  options = to_mlra(write(model), "mlra", 2);
  options.calibration = calibrated();
  EXPECT_EQ(eps_warning(Conversion(options).plan()), "");

  // The module's latents are full by default; its head is a tensor of its own.
  options = to_gla(write(tiny_model({.heads = 8, .tied = true})));
  options.calibration = calibrated();
  {
    const ConvertPlan plan = Conversion(options).plan();
    EXPECT_EQ(eps_warning(plan), "");
    EXPECT_EQ(plan.shape.kv_lora_rank, 30);
    EXPECT_EQ(plan.shape.qk_rope_head_dim, 8);
    EXPECT_EQ(plan.shape.q_lora_rank, std::nullopt);
    EXPECT_EQ(plan.converted_cache_elements, 4 * 8 + 8);
    EXPECT_EQ(plan.tensors.back().spec.name, "lm_head.weight");
    EXPECT_EQ(plan.tensors.back().source, "model.embed_tokens.weight");
  }
  options.rank = 12;
  options.rope_dim = 4;
  EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 12);
  EXPECT_EQ(Conversion(options).plan().converted_cache_elements, 4 * 8 + 4);
  options = to_gla(write(TinyOptions{.hidden = 72, .heads = 8}));
  options.calibration = calibrated();
  EXPECT_EQ(Conversion(options).plan().shape.q_lora_rank, 63);
}

// As the query is written.
TEST_F(Convert, TrialsCompressTheQuery) {
  ConvertOptions options = to_gla(write(TinyOptions{.hidden = 72, .heads = 8}));
  options.calibration = calibrated();
  options.per_device = 14;
  const Conversion gla(options);
  ASSERT_EQ(gla.plan().shape.q_lora_rank, 63);
  ASSERT_EQ(gla.plan().trials.size(), 1U);
  // The same sizes and rotary list in a layout whose query stays as it is.
  options.engine = "relatent";
  options.relatent.plain_list = true;
  const Conversion whole(options);
  ASSERT_EQ(whole.plan().shape.q_lora_rank, std::nullopt);
  ASSERT_EQ(whole.plan().trials.size(), 1U);
  EXPECT_EQ(whole.plan().trials.front().rank, gla.plan().trials.front().rank);
  EXPECT_NE(whole.plan().trials.front().nats, gla.plan().trials.front().nats);
}

TEST_F(Convert, WritesTheAuthorsLayouts) {
  TinyModel model = tied_source();
  model.config["rms_norm_eps"] = 1e-6;
  const ConvertOptions source = write(model);
  const fs::path moments = calibrated();
  const auto expect_planned = [&](ConvertOptions options) {
    options.calibration = moments;
    options.relatent.fit.rounds = 1;
    const ConvertPlan plan = Conversion(options).plan();
    run(options);
    const Model converted = Model::open(output());
    EXPECT_EQ(converted.tensors().size(), plan.tensors.size());
    EXPECT_EQ(converted.config().cache_elements(), plan.converted_cache_elements);
    for (const PlannedTensor& tensor : plan.tensors) {
      EXPECT_EQ(converted.checkpoint().info(tensor.spec.name).shape, tensor.spec.shape) << tensor.spec.name;
    }
    const Verification found = verified();
    EXPECT_TRUE(std::isfinite(found.nats));
    return found.logits.rel_logit_error;
  };
  for (const auto& [form, branches] : {std::pair{"mlra", 2}, {"mlra", 4}, {"gla", 2}, {"gla", 4}}) {
    SCOPED_TRACE(std::string(form) + " " + std::to_string(branches));
    const double error = expect_planned(to_mlra(source, form, branches));
    EXPECT_LE(error, 0.8);
    // The query passes a normalised latent that is the input's own.
    const Model converted = Model::open(output());
    const auto attention = std::get<LatentAttention>(converted.attention(1));
    const RowVectorF gain = Model::open(output()).input_norm(1).gain;
    EXPECT_LE(testing_support::relative_error(MatrixF(attention.q_down.weight * gain.asDiagonal()),
                                              MatrixF(MatrixF::Identity(24, 24))),
              1e-6);
    EXPECT_TRUE(attention.q_norm.gain == RowVectorF::Ones(24));
  }
  ConvertOptions gla = to_gla(source);
  const double full = expect_planned(gla);
  EXPECT_LE(full, 0.8);
  gla.rank = 4;
  gla.rope_dim = 2;
  EXPECT_GT(expect_planned(gla), full);
}

TEST_F(Convert, GainsWithoutAReciprocalAreRefused) {
  const std::string name = layer_name(1, "input_layernorm.weight");
  for (const auto& [gain, dtype] : {std::pair{0.0F, DType::f32}, {1e-6F, DType::f16}, {1e-42F, DType::f32}}) {
    TinyModel model = tied_source();
    model.tensors.at(name).values[5] = gain;
    ConvertOptions options = to_mlra(write(model), "gla", 2);
    options.calibration = calibrated();
    options.relatent.fit.rounds = 1;
    options.dtype = dtype;
    expect_error(ErrorKind::input, {name, "reciprocal", "gains that are not 0"}, [&] { run(options); });
    expect_nothing_left();
  }
}

// An MLA source of one latent stays what it is, and there is nothing to try.
TEST_F(Convert, BudgetsOfAnMlaSourceAreRefused) {
  ConvertOptions options = write(testing_support::tiny_latent_model());
  options.method = Method::relatent;
  options.calibration = calibrated();
  options.kv_budget = 0.5;
  expect_error(ErrorKind::usage, {"the source is MLA already"}, [&] { Conversion{options}; });
  options.kv_budget.reset();
  options.max_nats = 0.1;
  expect_error(ErrorKind::usage, {"the source is MLA already"}, [&] { Conversion{options}; });
}

TEST_F(Convert, SourcesThatHaveNoPlaceInTheTarget) {
  TinyModel windowed = tiny_model({.model_type = "mistral"});
  windowed.config["sliding_window"] = 64;
  expect_error(ErrorKind::input, {"config.json", "sliding_window", "64", "max_position_embeddings"},
               [&] { Conversion{write(windowed)}; });
  // A window as long as the context is none.
  windowed.config["sliding_window"] = 128;
  EXPECT_NO_THROW(Conversion{write(windowed)});

  TinyModel biased = tiny_model();
  biased.put_vector(layer_name(2, "mlp.up_proj.bias"), RowVectorF::Ones(40));
  expect_error(ErrorKind::input, {layer_name(2, "mlp.up_proj.bias"), "latent layout"},
               [&] { Conversion{write(biased)}; });

  expect_error(ErrorKind::input, {"config.json", "attention_bias", "found true"},
               [&] { Conversion{write(testing_support::tiny_latent_model({.attention_bias = true}))}; });

  // An MLA latent splits only with loss.
  expect_error(ErrorKind::usage, {"--method lossless", "MLA latent"},
               [&] { Conversion{write(testing_support::tiny_latent_model())}; });

  ConvertOptions nowhere = write(TinyOptions{});
  nowhere.source = folder_ / "missing";
  expect_error(ErrorKind::input, {"missing"}, [&] { Conversion{nowhere}; });
  nowhere.source = source();
  nowhere.calibration = folder_ / "missing.h5";
  expect_error(ErrorKind::input, {"missing.h5"}, [&] { Conversion{nowhere}; });
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

TEST_F(Convert, ExistingOutputIsNeverTouched) {
  const ConvertOptions options = write(TinyOptions{});
  fs::create_directory(output());
  write_text(output() / "precious", "data");
  expect_error(ErrorKind::usage, {output().string()}, [&] { Conversion(options).run(ignore); });
  EXPECT_EQ(contents(output()).size(), 1U);
  EXPECT_FALSE(fs::exists(output().string() + ".partial"));
}

// Stops when so many layers are converted, as a machine does.
LayerProgress failing_at(Index layers) {
  return [layers](Index done, Index) {
    if (done == layers) {
      throw Error(ErrorKind::machine, "disk full");
    }
  };
}

TEST_F(Convert, GoesOnAfterAnInterruption) {
  struct Sample {
    Method method;
    const char* form;
    bool search;
  };
  for (const Sample& sample :
       {Sample{Method::lossless, "mla", false}, Sample{Method::transmla, "mla", false},
        Sample{Method::weights_only, "mla", false}, Sample{Method::relatent, "mla", false},
        Sample{Method::relatent, "gla", true}}) {
    SCOPED_TRACE(std::string(method_name(sample.method)) + " " + sample.form);
    ConvertOptions options = write({.layers = 4, .q_bias = true});
    if (sample.method != Method::lossless && !sample.search) {
      options.rank = 10;
      options.rope_dim = 8;
    }
    options.form = sample.form;
    if (sample.search) {
      options.branches = 2;
      options.per_device = 12;
    }
    options.method = sample.method;
    if (sample.method == Method::relatent || sample.method == Method::transmla) {
      options.calibration = calibrated();
    }
    options.dtype = DType::bf16;
    options.max_shard_bytes = 20000;
    const ThreadCount one(1);
    run(options);
    const auto expected = contents(output());
    fs::remove_all(output());

    options.save.every = 0;
    for (Index layers = 1; layers <= 4; ++layers) {
      options.save.resume = false;
      expect_error(ErrorKind::machine, {"disk full", "--resume"},
                   [&] { Conversion(options, {}, layers % 2 == 0).run(failing_at(layers)); });
      EXPECT_FALSE(fs::exists(output()));
      expect_error(ErrorKind::usage, {"--resume", "output.partial"},
                   [&] { Conversion(options).run(ignore); });
      options.save.resume = true;
      ConvertOptions other = options;
      other.max_shard_bytes = 40000;
      expect_error(ErrorKind::usage, {"--max-shard-size was 20000 and is 40000 now"},
                   [&] { Conversion(other).run(ignore); });
      std::vector<Index> converted;
      std::vector<SizeTrial> tried;
      bool resumed = false;
      options.save.taken_up = [&] { resumed = true; };
      Conversion conversion(
          options, [&](const SizeTrial& trial) { tried.push_back(trial); }, true);
      EXPECT_TRUE(resumed);
      options.save.taken_up = {};
      const ConvertReport report = conversion.run([&](Index done, Index) { converted.push_back(done); });
      // What was saved is not done again: the layer at which it stopped was not, and none after it.
      EXPECT_EQ(converted.front(), layers);
      EXPECT_EQ(converted.back(), 4);
      if (sample.search && layers % 2 == 0) {
        EXPECT_TRUE(tried.empty());
        EXPECT_FALSE(conversion.plan().trials.empty());
      }
      EXPECT_TRUE(contents(output()) == expected);
      EXPECT_FALSE(fs::exists(output().string() + ".partial"));
      EXPECT_GT(report.bytes_written, 0U);
      fs::remove_all(output());
    }
  }
}

TEST_F(Convert, StartsAnewWhereShardsAreNotWhatTheJournalSays) {
  ConvertOptions options = small(write({.layers = 3}), Method::weights_only);
  run(options);
  const auto expected = contents(output());
  fs::remove_all(output());
  options.save.every = 0;
  EXPECT_THROW(Conversion(options).run(failing_at(2)), Error);
  fs::remove(output().string() + ".partial/output/model.safetensors.partial");
  options.save.resume = true;
  // Twice, so that the second run does not believe what the first journal said either.
  EXPECT_THROW(Conversion(options).run(failing_at(1)), Error);
  Conversion(options).run(ignore);
  EXPECT_TRUE(contents(output()) == expected);
}

TEST_F(Convert, ARunThatEndedAfterItsRenameIsTidiedUp) {
  ConvertOptions options = small(write({.layers = 3}), Method::weights_only);
  options.save.every = 0;
  EXPECT_THROW(Conversion(options).run(failing_at(2)), Error);
  const fs::path partial = output().string() + ".partial";
  fs::copy_file(partial / "journal", folder_ / "journal");
  options.save.resume = true;
  const ConvertReport whole = Conversion(options).run(ignore);
  fs::create_directory(partial);
  fs::copy_file(folder_ / "journal", partial / "journal");
  Journal::open(partial / "journal").append("complete", "");
  const ConvertReport report = Conversion(options, {}, true).run(ignore);
  EXPECT_EQ(report.bytes_written, whole.bytes_written);
  EXPECT_FALSE(fs::exists(partial));
}

TEST_F(Convert, CalibrationOfAnotherModelIsRefused) {
  write({.seed = 7});
  const fs::path moments = calibrated();
  ConvertOptions options = small(write({.seed = 8}), Method::transmla);
  options.calibration = moments;
  expect_error(ErrorKind::input,
               {"moments.h5", "another checkpoint", source().string(), "relatent calibrate"},
               [&] { Conversion(options).run(ignore); });
  expect_nothing_left();
}

TEST_F(Convert, WeightsThatAreNotNumbersLeaveNothingBehind) {
  const fs::path moments = [&] {
    write(TinyOptions{});
    return calibrated();
  }();
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    for (const char* rest : {"self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.q_proj.weight",
                             "self_attn.o_proj.weight"}) {
      TinyModel model = tiny_model();
      model.tensors.at(layer_name(1, rest)).values[5] = bad;
      ConvertOptions options = write(model);
      for (const Method method : {Method::lossless, Method::weights_only}) {
        SCOPED_TRACE(std::string(rest) + " " + std::string(method_name(method)));
        const ConvertOptions these = method == Method::lossless ? options : small(options, method);
        expect_error(ErrorKind::input, {"model.layers.1.self_attn."}, [&] { Conversion(these).run(ignore); });
        expect_nothing_left();
      }
    }
  }
  // Numbers that the dtype cannot hold.
  TinyModel model = tiny_model();
  model.tensors.at(layer_name(2, "mlp.up_proj.weight")).values[3] = 1e6F;
  ConvertOptions options = write(model);
  options.dtype = DType::f16;
  expect_error(ErrorKind::input, {layer_name(2, "mlp.up_proj.weight"), "too large for F16"},
               [&] { Conversion(options).run(ignore); });
  expect_nothing_left();
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

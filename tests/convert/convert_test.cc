#include "convert/convert.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "convert/verify/verify.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
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
    return options;
  }
  ConvertOptions write(const TinyOptions& options) { return write(tiny_model(options)); }
  // Moments of the source as it is now.
  fs::path calibrated() const {
    const fs::path path = folder_ / "moments.h5";
    calibrate(Model::open(source()), random_sequences(1, 12, 40, 50), path, ignore);
    return path;
  }
  ConvertReport run(const ConvertOptions& options) const {
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
    EXPECT_EQ(plan.shape.rank, 16);
    EXPECT_EQ(plan.shape.rope_dim, 16);
    EXPECT_EQ(plan.shape.nope_dim, 0);
    EXPECT_TRUE(plan.shape.has_q_bias);
    EXPECT_EQ(plan.source_cache_numbers, 32);
    EXPECT_EQ(plan.converted_cache_numbers, 33);
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
      EXPECT_EQ(tensor.fate == Fate::converted, attention);
      if (attention) {
        EXPECT_EQ(tensor.spec.dtype, plan.dtype);
        EXPECT_EQ(tensor.source, "");
        continue;
      }
      EXPECT_EQ(tensor.source, tensor.spec.name);
      EXPECT_EQ(tensor.spec.dtype, dtype.value_or(before.info(tensor.source).dtype));
      if (tensor.fate == Fate::carried) {
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
  expect_error(ErrorKind::input, {layer_name(2, "mlp.up_proj.bias"), "deepseek_v3"},
               [&] { Conversion{write(biased)}; });

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

#include "convert/plan/plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

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
using testing_support::read_bytes;
using testing_support::small;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

using Plan = testing_support::ConvertTest;

TEST_F(Plan, PlannedMemoryGrowsWithTheTokensOfTheFits) {
  // Every thread holds some, and may hide what the tokens take.
  const ThreadCount count(2);
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

// Every planned tensor is written as planned; bytes of all of them.
std::uint64_t expect_written(const ConvertPlan& plan, const Checkpoint& before, const Checkpoint& written,
                             std::optional<DType> dtype) {
  std::set<std::string> planned;
  std::uint64_t bytes = 0;
  for (const PlannedTensor& tensor : plan.tensors) {
    SCOPED_TRACE(tensor.spec.name);
    EXPECT_TRUE(planned.insert(tensor.spec.name).second);
    EXPECT_TRUE(written.contains(tensor.spec.name));
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
  return bytes;
}

TEST_F(Plan, PlanIsWhatIsWritten) {
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
    EXPECT_EQ(contents(output()).size(), 5U);
    EXPECT_EQ(read_bytes(output() / "tokenizer.json"), "{\"tokens\": []}");
    EXPECT_EQ(read_bytes(output() / "generation_config.json"), "{}");

    const Checkpoint written = Checkpoint::open(output());
    const Checkpoint before = Checkpoint::open(source());
    const std::uint64_t bytes = expect_written(plan, before, written, dtype);
    std::uint64_t side_bytes = 0;
    for (const fs::path& file : plan.side_files) {
      side_bytes += fs::file_size(file);
    }
    EXPECT_EQ(plan.output_bytes, bytes + side_bytes);
    EXPECT_EQ(report.bytes_read, before.tensor_bytes());
    EXPECT_EQ(report.bytes_written, fs::file_size(output() / "model.safetensors"));
    EXPECT_EQ(written.config()["dtype"], torch_name(plan.dtype));
  }
}

TEST_F(Plan, EmbeddingFirstThenLayersInOrder) {
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

TEST_F(Plan, ShardsAreNoLargerThanAsked) {
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

TEST_F(Plan, OptionsThatMakeNoSense) {
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

// An MLA source of one latent stays what it is, and there is nothing to try.
TEST_F(Plan, BudgetsOfAnMlaSourceAreRefused) {
  ConvertOptions options = write(testing_support::tiny_latent_model());
  options.method = Method::relatent;
  options.calibration = calibrated();
  options.kv_budget = 0.5;
  expect_error(ErrorKind::usage, {"the source is MLA already"}, [&] { Conversion{options}; });
  options.kv_budget.reset();
  options.max_nats = 0.1;
  expect_error(ErrorKind::usage, {"the source is MLA already"}, [&] { Conversion{options}; });
}

TEST_F(Plan, SourcesThatHaveNoPlaceInTheTarget) {
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

TEST_F(Plan, CalibrationOfAnotherModelIsRefused) {
  write({.seed = 7});
  const fs::path moments = calibrated();
  ConvertOptions options = small(write({.seed = 8}), Method::transmla);
  options.calibration = moments;
  expect_error(ErrorKind::input,
               {"moments.h5", "another checkpoint", source().string(), "relatent calibrate"},
               [&] { Conversion(options).run(ignore); });
  expect_nothing_left();
}

TEST_F(Plan, CalibrationOfOtherSizesIsRefusedBeforeItIsRead) {
  write({.hidden = 24, .layers = 2, .heads = 6});
  const fs::path moments = calibrated();
  const auto expect_refused = [&](const TinyOptions& other, const std::string& attribute,
                                  const char* expected, const char* found) {
    ConvertOptions options = small(write(other), Method::transmla);
    options.calibration = moments;
    expect_error(ErrorKind::input, {"moments.h5", attribute, expected, found, "relatent calibrate"},
                 [&] { Conversion{options}; });
    expect_nothing_left();
  };
  expect_refused({.hidden = 24, .layers = 3, .heads = 6}, "num_hidden_layers", "expected 3", "found 2");
  expect_refused({.hidden = 32, .layers = 2, .heads = 6}, "hidden_size", "expected 32", "found 24");
  expect_refused({.hidden = 24, .layers = 2, .heads = 4}, "num_attention_heads", "expected 4", "found 6");
}

}  // namespace
}  // namespace relatent

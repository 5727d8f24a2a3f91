// Conversions of some layers, beside which the others stay as they are.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "convert/shard/manifest.h"
#include "convert/shard/shard.h"
#include "convert/verify/structure.h"
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
using testing_support::random_sequences;
using testing_support::small;
using testing_support::ThreadCount;
using testing_support::tiny_latent_model;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

class Layers : public testing_support::ConvertTest {
 protected:
  // Tensors of a carried layer's attention are those of the source.
  void expect_carried(const LayerSet& carried) const {
    const Model from = Model::open(source());
    const Model to = Model::open(output());
    for (Index i = 0; i < from.config().num_hidden_layers; ++i) {
      EXPECT_NE(to.config().is_latent(i), carried.has(i)) << i;
    }
    Index found = 0;
    for (const PlacedTensor& tensor : from.tensors()) {
      if (!is_attention(tensor.role) || !carried.has(*tensor.layer_idx)) {
        continue;
      }
      ++found;
      ASSERT_TRUE(to.has(tensor.role, tensor.layer_idx)) << tensor.name;
      EXPECT_EQ(to.name_of(tensor.role, tensor.layer_idx), tensor.name);
      EXPECT_TRUE(
          std::ranges::equal(from.checkpoint().bytes(tensor.name), to.checkpoint().bytes(tensor.name)))
          << tensor.name;
    }
    EXPECT_GE(found, 4 * static_cast<Index>(carried.layers().size()));
    std::vector<std::string> unreadable;
    const Structure structure = check_structure(from, to, find_report(to, unreadable));
    EXPECT_TRUE(unreadable.empty());
    EXPECT_EQ(structure.findings, std::vector<std::string>{});
    EXPECT_EQ(structure.checked, structure.converted);
  }
};

TEST_F(Layers, LosslessLosesNothing) {
  struct Sample {
    TinyOptions model;
    std::string layers;
    std::string carried;
  };
  const std::vector<Sample> samples = {
      {{.layers = 4}, "1,3", "0, 2"},
      {{.model_type = "qwen2", .layers = 4, .tied = true}, "0", "1-3"},
      {{.layers = 4, .q_bias = true, .kv_bias = true, .o_bias = true}, "2-3", "0-1"},
      {{.model_type = "gemma2", .layers = 4, .tied = true}, "", "0, 2"},
      {{.model_type = "gemma2", .layers = 4, .tied = true}, "3", "0-2"},
      {{.model_type = "qwen3", .layers = 4}, "1,3", "0, 2"},
      {{.model_type = "gemma3_text", .layers = 4, .tied = true}, "", "0, 2"},
      {{.model_type = "gemma3_text", .layers = 4, .tied = true}, "1", "0, 2-3"},
  };
  for (const Sample& sample : samples) {
    for (const char* form : {"mla", "gla", "tpla"}) {
      SCOPED_TRACE(sample.model.model_type + " " + sample.layers + " " + form);
      ConvertOptions options = write(sample.model);
      options.layers = sample.layers;
      options.form = form;
      if (options.form != "mla") {
        options.branches = 2;
      }
      Conversion conversion(options);
      EXPECT_EQ(conversion.plan().carried.text(), sample.carried);
      fs::remove_all(output());
      conversion.run(ignore);
      expect_carried(conversion.plan().carried);
      const Verification found = verified();
      EXPECT_LE(found.logits.rel_logit_error, kFloatNoise);
      for (const LayerFidelity& layer : found.layers) {
        EXPECT_LE(layer.attention_rel_error, kFloatNoise);
      }
      const DeviceVerification devices =
          verify_devices(Model::open(output()), random_sequences(2, 2, 40, 50), 2, ignore);
      EXPECT_LE(devices.logits.rel_logit_error, kFloatNoise);
    }
  }
}

TEST_F(Layers, EveryMethodLeavesTheOthersAlone) {
  for (const char* type : {"llama", "gemma2", "gemma3_text"}) {
    for (const Method method : {Method::weights_only, Method::transmla, Method::relatent}) {
      if (method == Method::transmla && std::string(type) == "gemma3_text") {
        continue;  // it has no place for norms on queries and keys
      }
      SCOPED_TRACE(std::string(type) + " " + std::string(method_name(method)));
      ConvertOptions options = small(write({.model_type = type, .layers = 4, .tied = true}), method);
      options.layers = "1,3";
      options.calibration = calibrated();
      run(options);
      expect_carried(LayerSet({0, 2}));
      const std::vector<LayerFidelity> found = verified().layers;
      EXPECT_EQ(found[0].attention_rel_error, 0);
      EXPECT_EQ(found[0].residual_rel_error, 0);
      EXPECT_GT(found[1].attention_rel_error, 1e-3);
      EXPECT_LT(found[3].residual_rel_error, 1);
    }
  }
}

// What is fitted is fitted to what the other layers make of it.
TEST_F(Layers, FitsSeeTheStreamBehindCarriedLayers) {
  for (const char* type : {"llama", "gemma2", "gemma3_text"}) {
    SCOPED_TRACE(type);
    ConvertOptions options = small(write({.model_type = type, .layers = 4, .tied = true}), Method::relatent);
    options.layers = "1,3";
    options.calibration = calibrated(DType::f32, 60);
    run(options);
    const double fitted = verified().layers[3].residual_rel_error;
    options.relatent.fit.refit = false;
    run(options);
    EXPECT_LT(fitted, verified().layers[3].residual_rel_error);
  }
}

TEST_F(Layers, SizesAreTriedOnTheLayersThatAreConverted) {
  ConvertOptions options = write({.layers = 4, .heads = 4, .kv_heads = 4, .head_dim = 16});
  options.method = Method::relatent;
  options.layers = "1,2";
  options.kv_budget = 0.5;
  options.calibration = calibrated();
  std::vector<SizeTrial> tried;
  Conversion conversion(options, [&](const SizeTrial& trial) { tried.push_back(trial); });
  EXPECT_GT(tried.size(), 1U);
  conversion.run(ignore);
  expect_carried(LayerSet({0, 3}));
  EXPECT_EQ(conversion.plan().source_cache_bytes, 4U * 128 * 4);
  EXPECT_EQ(conversion.plan().converted_cache_bytes, (2U * 128 + 2 * 64) * 4);
  EXPECT_EQ(conversion.plan().converted_context_bytes.front(), 4096 * (2 * 128 + 2 * 64) * 4);
}

TEST_F(Layers, SameBytesForAnyNumberOfThreads) {
  for (const Method method : {Method::weights_only, Method::relatent}) {
    ConvertOptions options = small(write({.layers = 5, .dtype = DType::bf16}), method);
    options.layers = "0,2-3";
    options.calibration = calibrated();
    expect_same_bytes(options, {1, 2, 3});
  }
}

TEST_F(Layers, GoesOnAfterAnInterruption) {
  for (const Method method : {Method::lossless, Method::weights_only, Method::relatent}) {
    SCOPED_TRACE(std::string(method_name(method)));
    ConvertOptions options = write({.layers = 5, .q_bias = true, .kv_bias = true});
    if (method != Method::lossless) {
      options = small(std::move(options), method);
    }
    options.method = method;
    options.layers = "1-2,4";
    options.calibration = calibrated();
    options.dtype = DType::bf16;
    const ThreadCount one(1);
    run(options);
    const auto expected = contents(output());
    fs::remove_all(output());
    options.save.every = 0;
    for (Index stop = 1; stop <= 5; ++stop) {
      options.save.resume = false;
      expect_error(ErrorKind::machine, {"disk full", "--resume"}, [&] {
        Conversion(options).run([&](Index done, Index) {
          if (done == stop) {
            throw Error(ErrorKind::machine, "disk full");
          }
        });
      });
      options.save.resume = true;
      ConvertOptions other = options;
      other.layers = "1-2";
      expect_error(ErrorKind::usage, {"--layers was 1-2,4 and is 1-2 now"},
                   [&] { Conversion(other).run(ignore); });
      Conversion(options, {}, true).run(ignore);
      EXPECT_TRUE(contents(output()) == expected) << stop;
      fs::remove_all(output());
    }
  }
}

TEST_F(Layers, ShardsMergeByteForByte) {
  ConvertOptions options =
      write({.layers = 3, .heads = 4, .q_bias = true, .kv_bias = true, .o_bias = true, .dtype = DType::bf16});
  options.layers = "1";
  options.form = "tpla";
  options.branches = 2;
  run(options);
  for (const Index tp : {2, 4}) {
    const fs::path shards = folder_ / "shards";
    const fs::path merged = folder_ / "merged";
    fs::remove_all(shards);
    fs::remove_all(merged);
    write_shards({.source = output(), .output = shards, .tp = tp}, ignore);
    merge_shards(shards, merged, ignore);
    EXPECT_TRUE(contents(merged) == contents(output())) << tp;
  }
  write_shards({.source = output(), .output = folder_ / "again", .tp = 2}, ignore);
  const SafetensorsFile second = SafetensorsFile::open(folder_ / "again" / rank_file_name(1));
  // Half of the queries and one of two key/value heads; the other latent in the converted layer.
  EXPECT_EQ(second.find("model.layers.0.self_attn.q_proj.weight")->shape,
            (std::vector<std::int64_t>{16, 24}));
  EXPECT_EQ(second.find("model.layers.0.self_attn.k_proj.bias")->shape, (std::vector<std::int64_t>{8}));
  EXPECT_EQ(second.find("model.layers.0.self_attn.o_proj.bias"), nullptr);
  EXPECT_EQ(second.find("model.layers.1.self_attn.kv_a_proj.0.weight"), nullptr);
  EXPECT_NE(second.find("model.layers.1.self_attn.kv_a_proj.1.weight"), nullptr);
}

TEST_F(Layers, OtherDtypes) {
  ConvertOptions options = write({.layers = 3, .dtype = DType::f16});
  options.layers = "1";
  options.dtype = DType::bf16;
  run(options);
  const Model to = Model::open(output());
  for (const PlacedTensor& tensor : to.tensors()) {
    EXPECT_EQ(to.checkpoint().info(tensor.name).dtype, DType::bf16) << tensor.name;
  }
  std::vector<std::string> unreadable;
  EXPECT_EQ(check_structure(Model::open(source()), to, find_report(to, unreadable)).findings,
            std::vector<std::string>{});
}

TEST_F(Layers, ACarriedTensorThatWasChangedIsFound) {
  ConvertOptions options = write({.layers = 3});
  options.layers = "1";
  run(options);
  const fs::path path = output() / "model.safetensors";
  std::string file = testing_support::read_bytes(path);
  {
    const Checkpoint written = Checkpoint::open(output());
    const std::span<const std::byte> bytes = written.bytes("model.layers.2.self_attn.k_proj.weight");
    const std::string tensor(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    const std::size_t at = file.find(tensor);
    ASSERT_NE(at, std::string::npos);
    file[at] = static_cast<char>(file[at] ^ 1);
  }
  write_text(path, file);
  std::vector<std::string> unreadable;
  const Model to = Model::open(output());
  const Structure found = check_structure(Model::open(source()), to, find_report(to, unreadable));
  ASSERT_EQ(found.findings.size(), 1U);
  EXPECT_NE(found.findings.front().find("model.layers.2.self_attn.k_proj.weight is not the source's"),
            std::string::npos)
      << found.findings.front();
}

TEST_F(Layers, Refusals) {
  const auto refused = [&](const ConvertOptions& options, ErrorKind kind,
                           const std::vector<std::string>& parts) {
    expect_error(kind, parts, [&] { Conversion{options}; });
  };
  ConvertOptions options = write({.layers = 4});
  options.layers = "4";
  refused(options, ErrorKind::usage, {"--layers names layer 4", "0 to 3"});
  options.layers = "x";
  refused(options, ErrorKind::usage, {"--layers takes"});
  options.layers = "0";
  for (const char* engine : {"deepseek", "gguf"}) {
    options.engine = engine;
    refused(options, ErrorKind::usage, {"--engine " + std::string(engine), "(1-3)", "--engine relatent has"});
  }
  // All of them is what every engine holds.
  options.engine = "transformers";
  options.layers = "0-3";
  EXPECT_EQ(Conversion(options).plan().options.engine, "transformers");
  EXPECT_TRUE(Conversion(options).plan().carried.empty());

  options = write({.model_type = "gemma2", .layers = 4});
  options.layers = "1-2";
  refused(options, ErrorKind::usage, {"--layers names layer 2", "window of 9"});
  options.layers = "";
  for (const char* engine : {"deepseek", "gguf", "mlra", "gla"}) {
    options.engine = engine;
    options.form = std::string(engine) == "mlra" || std::string(engine) == "gla" ? "gla" : "mla";
    options.branches = options.form == "gla" ? std::optional<Index>(2) : std::nullopt;
    refused(options, ErrorKind::usage, {"--engine " + std::string(engine), "no place for"});
  }
  TinyModel windowed = tiny_model({.model_type = "mistral"});
  windowed.config["sliding_window"] = 64;
  refused(write(windowed), ErrorKind::input, {"sliding_window", "in every layer", "max_position_embeddings"});

  options = write(tiny_latent_model());
  options.form = "tpla";
  options.branches = 2;
  options.layers = "1";
  refused(options, ErrorKind::usage, {"--layers", "an MLA source is converted whole"});

  // A result is no source.
  options = write({.layers = 3});
  options.layers = "1";
  run(options);
  options.source = output();
  options.output = folder_ / "again";
  options.layers = "";
  refused(options, ErrorKind::input, {"layers", "a result, not a source"});
}

}  // namespace
}  // namespace relatent

// Conversions that end early, and what goes on from there.
#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
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
using testing_support::layer_name;
using testing_support::read_bytes;
using testing_support::small;
using testing_support::ThreadCount;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

using Resume = testing_support::ConvertTest;

// Stops when so many layers are converted, as a machine does.
LayerProgress failing_at(Index layers) {
  return [layers](Index done, Index) {
    if (done == layers) {
      throw Error(ErrorKind::machine, "disk full");
    }
  };
}

TEST_F(Resume, ExistingOutputIsNeverTouched) {
  const ConvertOptions options = write(TinyOptions{});
  fs::create_directory(output());
  write_text(output() / "precious", "data");
  expect_error(ErrorKind::usage, {output().string()}, [&] { Conversion(options).run(ignore); });
  EXPECT_EQ(contents(output()).size(), 1U);
  EXPECT_FALSE(fs::exists(output().string() + ".partial"));
}

TEST_F(Resume, GoesOnAfterAnInterruption) {
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

TEST_F(Resume, StartsAnewWhereShardsAreNotWhatTheJournalSays) {
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

// Flips a bit of a tensor in the file that an interrupted run left.
void damage(const fs::path& partial, const std::string& name) {
  std::string file = read_bytes(partial);
  // The header lies there whole; of the rest nobody else has an opinion yet.
  std::uint64_t header = 0;
  std::memcpy(&header, file.data(), sizeof header);
  const nlohmann::json tensors = nlohmann::json::parse(file.substr(sizeof header, header));
  const auto begin = tensors.at(name).at("data_offsets").at(0).get<std::uint64_t>();
  file[sizeof header + header + begin + 5] ^= 1;
  write_text(partial, file);
}

TEST_F(Resume, StartsAnewWhereWeightsAreNotAsTheyWereWritten) {
  for (const std::optional<DType> dtype : {std::optional<DType>(), std::optional(DType::f16)}) {
    ConvertOptions options = small(write({.layers = 3}), Method::weights_only);
    options.dtype = dtype;
    run(options);
    const auto expected = contents(output());
    options.save.every = 0;
    // Copied or cast, and converted.
    for (const std::string& name :
         {std::string("model.embed_tokens.weight"), layer_name(0, "self_attn.o_proj.weight")}) {
      SCOPED_TRACE(name);
      fs::remove_all(output());
      options.save.resume = false;
      EXPECT_THROW(Conversion(options).run(failing_at(2)), Error);
      const fs::path partial = output().string() + ".partial";
      damage(partial / "output/model.safetensors.partial", name);
      options.save.resume = true;
      Conversion(options).run(ignore);
      EXPECT_TRUE(contents(output()) == expected);
    }
  }
}

TEST_F(Resume, ARunThatEndedAfterItsRenameIsTidiedUp) {
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

TEST_F(Resume, WeightsThatAreNotNumbersLeaveNothingBehind) {
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
  // What is only copied counts as well: nobody would find out before a token reaches it.
  for (const std::string& name : {std::string("model.embed_tokens.weight"), std::string("model.norm.weight"),
                                  layer_name(2, "mlp.up_proj.weight")}) {
    TinyModel copied = tiny_model();
    copied.tensors.at(name).values[5] = std::numeric_limits<float>::infinity();
    const ConvertOptions these = write(copied);
    expect_error(ErrorKind::input, {name, "NaN or infinity"}, [&] { Conversion(these).run(ignore); });
    expect_nothing_left();
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

}  // namespace
}  // namespace relatent

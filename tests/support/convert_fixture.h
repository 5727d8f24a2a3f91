// A source model, and where its conversion goes.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "convert/run/convert.h"
#include "convert/verify/verify.h"
#include "tests/support/conversion.h"
#include "tests/support/temp_folder.h"
#include "tests/support/thread_count.h"
#include "tests/support/tiny_model.h"

namespace relatent::testing_support {

inline void ignore(Index /*done*/, Index /*all*/) {}

class ConvertTest : public testing::Test {
 protected:
  std::filesystem::path source() const { return folder_ / "source"; }
  std::filesystem::path output() const { return folder_ / "output"; }

  ConvertOptions write(const TinyModel& model) {
    std::filesystem::remove_all(source());
    model.write(source());
    ConvertOptions options;
    options.source = source();
    options.output = output();
    options.method = Method::lossless;
    return options;
  }
  ConvertOptions write(const TinyOptions& options) { return write(tiny_model(options)); }
  // Moments of the source as it is now.
  std::filesystem::path calibrated(DType compute = DType::f32, Index sequences = 12) const {
    std::filesystem::path path = folder_ / "moments.h5";
    calibrate(Model::open(source()), random_sequences(1, sequences, 40, 50), path, ignore, {}, compute);
    return path;
  }
  static ConvertReport run(const ConvertOptions& options) {
    std::filesystem::remove_all(options.output);
    return Conversion(options).run(ignore);
  }
  // The result is the same with any number of threads.
  void expect_same_bytes(const ConvertOptions& options, std::initializer_list<int> thread_counts) const {
    std::vector<std::map<std::string, std::string>> found;
    for (const int threads : thread_counts) {
      const ThreadCount count(threads);
      run(options);
      found.push_back(contents(output()));
      EXPECT_TRUE(found.back() == found.front()) << threads;
    }
  }
  Verification verified() const {
    return verify(Model::open(source()), Model::open(output()), random_sequences(2, 4, 40, 50), ignore);
  }
  void expect_nothing_left() const {
    EXPECT_FALSE(std::filesystem::exists(output()));
    EXPECT_FALSE(std::filesystem::exists(output().string() + ".partial"));
  }
  static std::map<std::string, std::string> contents(const std::filesystem::path& folder) {
    std::map<std::string, std::string> out;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      out[entry.path().filename().string()] = read_bytes(entry.path());
    }
    return out;
  }

  TempFolder folder_;
};

// A small rank and a short rotary key.
inline ConvertOptions small(ConvertOptions options, Method method) {
  options.method = method;
  options.rank = 10;
  options.rope_dim = 8;
  return options;
}

}  // namespace relatent::testing_support

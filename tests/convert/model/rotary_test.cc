#include "convert/model/rotary.h"

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <initializer_list>
#include <limits>
#include <nlohmann/json.hpp>
#include <numbers>
#include <string>
#include <string_view>
#include <vector>

#include "tests/support/expect_error.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;
using testing_support::expect_error;
using testing_support::Random;
using testing_support::rotated;

constexpr double kFloatEpsilon = std::numeric_limits<float>::epsilon();

Rotary parse(const std::string& config, Index size) {
  return parse_rotary(Json::parse(config), size, "folder/config.json");
}

TEST(Rotary, PartOfAHeadRotates) {
  const auto parse_part = [](const std::string& config, Index size, double factor, Index& rotating) {
    return parse_partial_rotary(Json::parse(config), size, factor, "folder/config.json", rotating);
  };
  Index rotating = 0;
  const Rotary found = parse_part(R"({"rope_theta": 100, "partial_rotary_factor": 0.75})", 16, 1, rotating);
  EXPECT_EQ(rotating, 12);
  EXPECT_EQ(found.rotating_pairs(), 6U);
  const Rotary whole = parse(R"({"rope_theta": 100})", 12);
  EXPECT_EQ(found.rotating().inv_freq, whole.inv_freq);
  ASSERT_EQ(found.inv_freq.size(), 8U);
  EXPECT_EQ(found.inv_freq[6], 0);
  EXPECT_EQ(found.inv_freq[7], 0);
  // What the config leaves open.
  EXPECT_EQ(parse_part("{}", 16, 0.5, rotating).rotating_pairs(), 4U);
  EXPECT_EQ(parse_part("{}", 16, 1, rotating).rotating_pairs(), 8U);
  // Rounded down, as transformers does.
  parse_part(R"({"partial_rotary_factor": 0.44})", 10, 1, rotating);
  EXPECT_EQ(rotating, 4);
  for (const char* factor : {"0.1", "0.7", "1.5", "0", "\"half\""}) {
    expect_error(ErrorKind::input, {"folder/config.json", "partial_rotary_factor"}, [&] {
      parse_part(R"({"partial_rotary_factor": )" + std::string(factor) + "}", 10, 1, rotating);
    });
  }
}

TEST(Rotary, TheContextChoosesOneOfTwoLists) {
  const Json config = Json::parse(R"({"max_position_embeddings": 64, "original_max_position_embeddings": 16,
    "rope_scaling": {"type": "su", "short_factor": [1, 2], "long_factor": [3, 4]}})");
  const auto list_for = [&](std::int64_t context) {
    return parse_rotary(with_longrope_list(config, context, "config.json"), 4, "config.json");
  };
  expect_error(ErrorKind::input, {"longrope", "different", "--context"},
               [&] { parse_rotary(config, 4, "config.json"); });
  EXPECT_EQ(list_for(16).inv_freq.front(), 1);
  EXPECT_EQ(list_for(17).inv_freq.front(), 1.0F / 3);
  // √(1 + ln 4 / ln 16), for either list.
  EXPECT_NEAR(static_cast<double>(list_for(16).attention_factor), std::sqrt(1.5), 1e-6);
  EXPECT_EQ(list_for(16).attention_factor, list_for(64).attention_factor);
  const Json plain = Json::parse(R"({"rope_theta": 100})");
  EXPECT_EQ(with_longrope_list(plain, 5, "config.json"), plain);
}

TEST(Rotary, WhatDoesNotRotateHasAFactorToo) {
  const Rotary rotary{{1, 0}, 1.5F};
  const Json written = explicit_rope_parameters(rotary, 128);
  const Rotary back = parse_rotary({{"rope_parameters", written}}, 4, "config.json");
  EXPECT_EQ(back.inv_freq.front(), 1);
  EXPECT_LT(back.inv_freq.back(), 1e-20F);
}

void expect_near_relative(const std::vector<float>& found, const std::vector<double>& expected,
                          double tolerance) {
  ASSERT_EQ(found.size(), expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    EXPECT_NEAR(static_cast<double>(found[i]) / expected[i], 1, tolerance) << i;
  }
}

struct Golden {
  std::string name;
  Index size;
  double theta;
  std::string rest;  // of the parameters
  Index max_position_embeddings;
  double attention_factor;
  std::vector<double> inv_freq;
};

// inv_freq and attention_scaling of LlamaRotaryEmbedding in transformers 5.17.0.
const std::vector<Golden>& goldens() {
  static const std::vector<Golden> all = {
      {"default",
       12,
       10000,
       "",
       2048,
       1,
       {1.0, 0.2154434472322464, 0.04641588404774666, 0.009999999776482582, 0.002154434332624078,
        0.00046415894757956266}},
      {"linear",
       12,
       10000,
       R"(, "factor": 4.0)",
       2048,
       1,
       {0.25, 0.0538608618080616, 0.011603971011936665, 0.0024999999441206455, 0.0005386085831560194,
        0.00011603973689489067}},
      {"llama3",
       16,
       500000,
       R"(, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024)",
       8192,
       1,
       {1.0, 0.193922758102417, 0.03760603070259094, 0.0013125694822520018, 0.00017677668074611574,
        3.428102354519069e-05, 6.647869668086059e-06, 1.289173155782919e-06}},
      {"yarn",
       16,
       10000,
       R"(, "factor": 4.0, "original_max_position_embeddings": 512)",
       2048,
       1.138629436111989,
       {1.0, 0.2569350600242615, 0.0625, 0.013834965415298939, 0.0024999999441206455, 0.0007905694656074047,
        0.0002500000118743628, 7.905694656074047e-05}},
      {"yarn",
       16,
       50000,
       R"(, "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2,
            "mscale": 0.707, "mscale_all_dim": 1.0, "truncate": false)",
       163840,
       0.9210423553163399,
       {1.0, 0.2586001455783844, 0.06687403470277786, 0.014454689808189869, 0.0009020168799906969,
        2.8912374546052888e-05, 7.47674403100973e-06, 1.933487055794103e-06}},
      {"longrope",
       8,
       10000,
       R"(, "factor": 4.0, "original_max_position_embeddings": 512, "short_factor": [1.0, 1.5, 2.25, 8.0],
            "long_factor": [1.0, 1.5, 2.25, 8.0])",
       2048,
       1.1055415967851334,
       {1.0, 0.06666667014360428, 0.004444444552063942, 0.0001250000059371814}},
      {"longrope",
       8,
       10000,
       R"(, "attention_factor": 1.25, "short_factor": [1.0, 1.5, 2.25, 8.0], "long_factor": [1.0, 1.5, 2.25, 8.0])",
       2048,
       1.25,
       {1.0, 0.06666667014360428, 0.004444444552063942, 0.0001250000059371814}},
  };
  return all;
}

std::string joined(std::initializer_list<std::string_view> parts) {
  std::string out;
  for (const std::string_view part : parts) {
    out += part;
  }
  return out;
}

TEST(Rotary, FrequenciesOfTransformersInEverySpelling) {
  for (const Golden& golden : goldens()) {
    SCOPED_TRACE(golden.name);
    const std::string theta = R"("rope_theta": )" + std::to_string(golden.theta);
    const std::string context =
        R"("max_position_embeddings": )" + std::to_string(golden.max_position_embeddings) + ", ";
    const auto type = [&](const char* key) {
      return std::string("\"") + key + R"(": ")" + golden.name + "\"";
    };
    const std::vector<std::string> spellings = {
        joined({"{", context, R"("rope_parameters": {)", type("rope_type"), ", ", theta, golden.rest, "}}"}),
        joined({"{", context, theta, R"(, "rope_parameters": {)", type("rope_type"), golden.rest, "}}"}),
        joined({"{", context, theta, R"(, "rope_scaling": {)", type("rope_type"), golden.rest, "}}"}),
        joined({"{", context, theta, R"(, "rope_parameters": null, "rope_scaling": {)", type("type"),
                golden.rest, "}}"}),
    };
    const Rotary first = parse(spellings.front(), golden.size);
    EXPECT_EQ(first.rope_type, golden.name);
    EXPECT_NEAR(static_cast<double>(first.attention_factor), golden.attention_factor, kFloatEpsilon);
    // Two float32 roundings, and that of the exponent, which the logarithm of the base multiplies.
    expect_near_relative(first.inv_freq, golden.inv_freq, kFloatEpsilon * (2 + std::log(golden.theta)));
    for (const std::string& spelling : spellings) {
      const Rotary found = parse(spelling, golden.size);
      EXPECT_EQ(found.inv_freq, first.inv_freq) << spelling;
      EXPECT_EQ(found.attention_factor, first.attention_factor) << spelling;
      EXPECT_EQ(found.rope_type, first.rope_type) << spelling;
    }
  }
}

TEST(Rotary, DefaultIsAGeometricList) {
  for (const Index size : {2, 12, 64, 128}) {
    for (const double theta : {100.0, 10000.0, 1e6}) {
      std::vector<double> expected;
      for (Index i = 0; i < size / 2; ++i) {
        expected.push_back(
            std::exp(-2.0 * static_cast<double>(i) / static_cast<double>(size) * std::log(theta)));
      }
      const Rotary rotary = parse(R"({"rope_theta": )" + std::to_string(theta) + "}", size);
      expect_near_relative(rotary.inv_freq, expected, kFloatEpsilon * (2 + std::log(theta)));
      EXPECT_EQ(rotary.attention_factor, 1.0F);
      EXPECT_EQ(rotary.rope_type, "default");
      // An empty scaling is none, and so is a null.
      EXPECT_EQ(parse(R"({"rope_scaling": {}, "rope_theta": )" + std::to_string(theta) + "}", size).inv_freq,
                rotary.inv_freq);
      EXPECT_EQ(
          parse(R"({"rope_scaling": null, "rope_theta": )" + std::to_string(theta) + "}", size).inv_freq,
          rotary.inv_freq);
    }
  }
  EXPECT_EQ(parse("{}", 8).inv_freq, parse(R"({"rope_theta": 10000})", 8).inv_freq);
}

// The three regimes: long wavelengths divided by the factor, short ones kept, a linear blend of both between.
TEST(Rotary, Llama3BlendsByWavelength) {
  const double factor = 8;
  const double low = 1;
  const double high = 4;
  const double original = 512;
  const Rotary plain = parse(R"({"rope_theta": 10000})", 64);
  const Rotary scaled = parse(
      R"({"rope_theta": 10000, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
          "high_freq_factor": 4, "original_max_position_embeddings": 512}})",
      64);
  std::vector<double> expected;
  int blended = 0;
  for (const float f : plain.inv_freq) {
    const double turns = original * static_cast<double>(f) / (2 * std::numbers::pi);
    const double kept = std::min(1.0, std::max(0.0, (turns - low) / (high - low)));
    blended += kept > 0 && kept < 1 ? 1 : 0;
    expected.push_back(static_cast<double>(f) * (kept + (1 - kept) / factor));
  }
  EXPECT_GT(blended, 2);
  expect_near_relative(scaled.inv_freq, expected, 16 * kFloatEpsilon);
}

TEST(Rotary, Refusals) {
  struct Case {
    std::string config;
    Index size;
    std::vector<std::string> parts;
  };
  const std::vector<Case> cases = {
      {"{}", 7, {"even", "7"}},
      {"{}", 0, {"even"}},
      {R"({"rope_scaling": {"rope_type": "dynamic", "factor": 2}})", 8, {"rope_type", "dynamic"}},
      {R"({"rope_parameters": {"rope_type": "spiral"}})", 8, {"rope_type", "spiral"}},
      {R"({"rope_parameters": {"rope_type": 5}})", 8, {"rope_type", "5"}},
      {R"({"rope_theta": "big"})", 8, {"rope_theta", "big"}},
      {R"({"rope_theta": 0})", 8, {"rope_theta"}},
      {R"({"rope_theta": -10})", 8, {"rope_theta"}},
      {R"({"rope_scaling": {"type": "linear"}})", 8, {"factor", "nothing"}},
      {R"({"rope_scaling": {"type": "linear", "factor": "2"}})", 8, {"factor", "\"2\""}},
      {R"({"rope_scaling": {"type": "linear", "factor": null}})", 8, {"factor"}},
      {R"({"rope_scaling": {"type": "llama3", "factor": 2, "high_freq_factor": 4,
           "original_max_position_embeddings": 8}})",
       8,
       {"low_freq_factor"}},
      {R"({"rope_scaling": {"type": "llama3", "factor": 2, "high_freq_factor": 4, "low_freq_factor": 1}})",
       8,
       {"original_max_position_embeddings"}},
      {R"({"rope_scaling": {"type": "yarn"}})", 8, {"factor"}},
      {R"({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": "32"}})", 8, {"beta_fast"}},
      {R"({"rope_scaling": {"type": "longrope", "factor": 2, "original_max_position_embeddings": 8,
           "short_factor": [1, 2, 3, 4]}})",
       8,
       {"longrope", "nothing"}},
      {R"({"rope_scaling": {"type": "longrope", "factor": 2, "original_max_position_embeddings": 8,
           "short_factor": [1, 2, 3], "long_factor": [1, 2, 3]}})",
       8,
       {"longrope", "4 positive numbers", "[1,2,3]"}},
      {R"({"rope_scaling": {"type": "longrope", "factor": 2, "original_max_position_embeddings": 8,
           "short_factor": [1, 2, 3, 0], "long_factor": [1, 2, 3, 0]}})",
       8,
       {"longrope", "positive"}},
      {R"({"rope_scaling": {"type": "longrope", "factor": 2, "original_max_position_embeddings": 8,
           "short_factor": [1, 2, 3, 4], "long_factor": [1, 2, 3, 5]}})",
       8,
       {"longrope", "different"}},
      {R"({"rope_scaling": {"type": "longrope", "short_factor": [1, 2, 3, 4], "long_factor": [1, 2, 3, 4]}})",
       8,
       {"original_max_position_embeddings"}},
      {R"({"partial_rotary_factor": 0.5})", 8, {"partial_rotary_factor", "0.5"}},
      {R"({"partial_rotary_factor": "half"})", 8, {"partial_rotary_factor"}},
      {R"({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}})",
       8,
       {"partial_rotary_factor"}},
      {R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})", 8, {"full_attention"}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.config);
    std::vector<std::string> parts = test.parts;
    parts.emplace_back("folder/config.json");
    expect_error(ErrorKind::input, parts, [&] { parse(test.config, test.size); });
  }
  EXPECT_NO_THROW(parse(R"({"partial_rotary_factor": 1.0})", 8));
  EXPECT_NO_THROW(parse(R"({"partial_rotary_factor": null})", 8));
}

TEST(Rotary, ExplicitParametersSurviveTheirText) {
  Random random(1);
  std::vector<Rotary> lists;
  for (const Golden& golden : goldens()) {
    lists.emplace_back();
    lists.back().inv_freq.assign(golden.inv_freq.begin(), golden.inv_freq.end());
    lists.back().attention_factor = static_cast<float>(golden.attention_factor);
  }
  Rotary wild;
  for (int i = 0; i < 2000; ++i) {
    wild.inv_freq.push_back(static_cast<float>(std::exp2(8 * random.number())));
  }
  wild.attention_factor = 0.7F;
  lists.push_back(wild);
  lists.push_back(parse(R"({"rope_theta": 500000})", 128));
  for (const Rotary& list : lists) {
    Json config;
    config["rope_parameters"] = explicit_rope_parameters(list, 777);
    EXPECT_EQ(config["rope_parameters"]["original_max_position_embeddings"], 777);
    const Rotary back = parse(config.dump(), static_cast<Index>(2 * list.inv_freq.size()));
    EXPECT_EQ(back.attention_factor, list.attention_factor);
    EXPECT_EQ(back.rope_type, "longrope");
    for (std::size_t i = 0; i < list.inv_freq.size(); ++i) {
      const float f = list.inv_freq[i];
      // One unit in the last place: not every float32 number is the rounded reciprocal of another.
      EXPECT_LE(std::abs(back.inv_freq[i] - f), std::nextafter(f, INFINITY) - f) << f;
    }
  }
}

TEST(Rotary, RotationIsComplexMultiplication) {
  Random random(2);
  const Rotary rotary = testing_support::sample_rotary(6, 1.3F);
  const Index length = 70;
  const RotaryTable table(rotary, length);
  EXPECT_TRUE(table.cos.row(0).isConstant(1.3F, 0));
  EXPECT_TRUE(table.sin.row(0).isZero(0));
  const Index first = 2;
  const Index stride = 9;
  const Index heads = 3;
  const MatrixF before = random.matrix(length, first + heads * stride + 1);
  MatrixF after = before;
  rotate_in_place(table, first, stride, heads, after);
  MatrixF untouched = after;
  for (Index h = 0; h < heads; ++h) {
    const Index at = first + h * stride;
    for (Index n = 0; n < length; ++n) {
      const VectorD expected = rotated(rotary, n, before.row(n).segment(at, 6).transpose().cast<double>());
      const VectorD found = after.row(n).segment(at, 6).transpose().cast<double>();
      EXPECT_LE((found - expected).norm(), 4 * kFloatEpsilon * expected.norm()) << n << " " << h;
    }
    untouched.middleCols(at, 6) = before.middleCols(at, 6);
  }
  EXPECT_TRUE(untouched == before);
}

TEST(Rotary, ScoresDependOnTheDistanceAlone) {
  Random random(3);
  const Rotary rotary = testing_support::sample_rotary(8, 1.5F);
  const Index length = 40;
  const RotaryTable table(rotary, length);
  const RowVectorF q = random.row(8);
  const RowVectorF k = random.row(8);
  MatrixF queries = q.replicate(length, 1);
  MatrixF keys = k.replicate(length, 1);
  rotate_in_place(table, 0, 8, 1, queries);
  rotate_in_place(table, 0, 8, 1, keys);
  const MatrixF scores = queries * keys.transpose();
  // Angles are rounded to float32, so a position n shifts a score by up to n units.
  const double tolerance =
      static_cast<double>(length) * kFloatEpsilon * 1.5 * 1.5 * static_cast<double>(q.norm() * k.norm());
  for (Index delta = 0; delta < length; ++delta) {
    double expected = 0;
    for (Index j = 0; j < 4; ++j) {
      const std::complex<double> a(q(j), q(j + 4));
      const std::complex<double> b(k(j), k(j + 4));
      const auto angle =
          static_cast<double>(rotary.inv_freq[static_cast<std::size_t>(j)] * static_cast<float>(delta));
      expected += 1.5 * 1.5 * (std::conj(a) * b * std::polar(1.0, -angle)).real();
    }
    for (Index m = delta; m < length; ++m) {
      EXPECT_NEAR(static_cast<double>(scores(m, m - delta)), expected, tolerance) << m << " " << delta;
    }
  }
}

}  // namespace
}  // namespace relatent

#include "convert/verify/conversion_report.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "formats/files.h"
#include "formats/hash.h"
#include "formats/mapped_file.h"
#include "tests/support/convert_fixture.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

using testing_support::expect_error;
using testing_support::ignore;
using testing_support::read_bytes;
using testing_support::small;
using testing_support::TempFolder;

ConversionReport example() {
  ConversionReport out;
  out.version = "relatent 1.2.3";
  out.method = "relatent";
  out.form = "mla";
  out.engine = "transformers";
  out.dtype = "BF16";
  out.source_config = "0123";
  out.files = {{"config.json", "4567"}, {"a \"name\".txt", "89ab"}};
  out.tensors = {{"model.layers.0.self_attn.o_proj.weight", "cdef"}};
  out.probe = Probe{{5, 0, 7}, 0.1, std::numeric_limits<double>::quiet_NaN(), 1.0 / 3, {{0.25, 1e-9}}};
  return out;
}

TEST(ConversionReport, ReadsWhatItWrites) {
  const TempFolder folder;
  const ConversionReport report = example();
  write_text(folder / kReportName, report.text());
  const ConversionReport found = ConversionReport::read(folder / kReportName);
  EXPECT_EQ(found.text(), report.text());
  EXPECT_EQ(found.files, report.files);
  EXPECT_EQ(found.tensors, report.tensors);
  ASSERT_TRUE(found.probe);
  EXPECT_EQ(found.probe->tokens, report.probe->tokens);
  EXPECT_EQ(found.probe->rel_logit_error, 1.0 / 3);
  EXPECT_TRUE(std::isnan(found.probe->mean_kl));
  ASSERT_EQ(found.probe->layers.size(), 1U);
  EXPECT_EQ(found.probe->layers[0].residual_rel_error, 1e-9);
}

TEST(ConversionReport, NoticesEveryChange) {
  const TempFolder folder;
  const std::string text = example().text();
  const std::filesystem::path path = folder / kReportName;
  for (std::size_t i = 0; i < text.size(); ++i) {
    std::string changed = text;
    changed[i] = changed[i] == '1' ? '2' : '1';
    write_text(path, changed);
    if (nlohmann::json::accept(changed) && nlohmann::json::parse(changed) == nlohmann::json::parse(text)) {
      continue;  // white space or a digit too small to count
    }
    EXPECT_THROW(ConversionReport::read(path), Error) << i;
  }
}

TEST(ConversionReport, SaysWhatIsWrong) {
  const TempFolder folder;
  const std::filesystem::path path = folder / kReportName;
  write_text(path, "{\"format_version\": 7}");
  expect_error(ErrorKind::input, {kReportName, "format_version", "7"}, [&] { ConversionReport::read(path); });
  write_text(path, R"({"format_version": 1, "checksum": "00"})");
  expect_error(ErrorKind::input, {kReportName, "was changed"}, [&] { ConversionReport::read(path); });
  ConversionReport long_probe = example();
  long_probe.probe->tokens.assign(static_cast<std::size_t>(probe_tokens) + 1, 3);
  write_text(path, long_probe.text());
  expect_error(ErrorKind::input, {kReportName, "tokens", "2 to 128"}, [&] { ConversionReport::read(path); });
}

TEST(ConversionReport, AProbeFitsItsModelOnly) {
  const Probe probe = {{5, 0, 7}, 0, 0, 0, {{0, 0}}};
  ModelConfig config;
  config.num_hidden_layers = 1;
  config.vocab_size = 8;
  EXPECT_TRUE(fits(probe, config));
  config.vocab_size = 7;
  EXPECT_FALSE(fits(probe, config));
  config.vocab_size = 8;
  config.num_hidden_layers = 2;
  EXPECT_FALSE(fits(probe, config));
}

class ReportOfConvert : public testing_support::ConvertTest {
 protected:
  ConversionReport report() const { return ConversionReport::read(output() / kReportName); }
};

TEST_F(ReportOfConvert, HoldsWhatWasWrittenAndMeasured) {
  ConvertOptions options = small(write(testing_support::TinyOptions{}), Method::relatent);
  options.calibration = calibrated();
  run(options);
  const ConversionReport found = report();
  EXPECT_EQ(found.method, "relatent");
  EXPECT_EQ(found.form, "mla");
  EXPECT_EQ(found.files, file_checksums(output()));
  EXPECT_TRUE(found.files.contains("config.json"));
  EXPECT_FALSE(found.files.contains(kReportName));
  const Checkpoint written = Checkpoint::open(output());
  std::size_t computed = 0;
  for (const std::string& name : written.tensor_names()) {
    const auto checksum = found.tensors.find(name);
    if (name.find("self_attn") != std::string::npos) {
      ++computed;
      ASSERT_NE(checksum, found.tensors.end()) << name;
      EXPECT_EQ(checksum->second, checksum_of(written.bytes(name))) << name;
    }
  }
  EXPECT_EQ(found.tensors.size(), computed);
  ASSERT_TRUE(found.probe);
  const Verification again =
      verify(Model::open(source()), Model::open(output()), sequence_of(*found.probe), ignore);
  ASSERT_EQ(again.layers.size(), found.probe->layers.size());
  for (std::size_t i = 0; i < again.layers.size(); ++i) {
    EXPECT_EQ(again.layers[i].attention_rel_error, found.probe->layers[i].attention_rel_error);
    EXPECT_GT(again.layers[i].attention_rel_error, 1e-3);
  }
  EXPECT_EQ(again.nats, found.probe->nats);
}

TEST_F(ReportOfConvert, HasNoProbeWithoutTokens) {
  run(write(testing_support::TinyOptions{}));
  EXPECT_FALSE(report().probe);
  EXPECT_EQ(report().method, "lossless");
}

TEST_F(ReportOfConvert, IsNotTakenAlong) {
  run(write(testing_support::TinyOptions{}));
  const std::string first = read_bytes(output() / kReportName);
  write_text(source() / kReportName, "of an earlier conversion");
  ConvertOptions options;
  options.source = source();
  options.output = output();
  options.method = Method::lossless;
  run(options);
  EXPECT_EQ(read_bytes(output() / kReportName), first);
}

}  // namespace
}  // namespace relatent

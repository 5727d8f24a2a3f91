#include "convert/verify/structure.h"

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "tests/support/convert_fixture.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::layer_name;
using testing_support::read_bytes;

// A source and its conversion.
class StructureTest : public testing_support::ConvertTest {
 protected:
  void convert(const ConvertOptions& options) {
    write_text(source() / "tokenizer.json", "{\"tokens\": []}");
    write_text(source() / "generation_config.json", "{}");
    run(options);
  }
  ConvertOptions fitted_for_deepseek(const testing_support::TinyOptions& source) {
    ConvertOptions out = testing_support::small(write(source), Method::relatent);
    out.engine = "deepseek";
    out.calibration = calibrated();
    return out;
  }
  Structure checked() const {
    const Model converted = Model::open(output());
    std::vector<std::string> unreadable;
    const std::optional<ConversionReport> report = find_report(converted, unreadable);
    Structure out = check_structure(Model::open(source()), converted, report);
    out.findings.insert(out.findings.end(), unreadable.begin(), unreadable.end());
    return out;
  }
  // Changes the bytes of one tensor of the output.
  void change(const std::string& name, const std::function<void(std::span<char>)>& spoil) const {
    const fs::path path = output() / "model.safetensors";
    std::string file = read_bytes(path);
    std::string tensor;
    {
      const Checkpoint written = Checkpoint::open(output());
      const std::span<const std::byte> bytes = written.bytes(name);
      tensor.resize(bytes.size());
      std::memcpy(tensor.data(), bytes.data(), bytes.size());
    }
    const std::size_t at = file.find(tensor);
    ASSERT_NE(at, std::string::npos);
    spoil(std::span(file).subspan(at, tensor.size()));
    write_text(path, file);
  }
  static void expect_one(const std::vector<std::string>& findings, const std::vector<std::string>& parts) {
    ASSERT_EQ(findings.size(), 1U);
    for (const std::string& part : parts) {
      EXPECT_NE(findings.front().find(part), std::string::npos) << findings.front();
    }
  }
  void expect_finding(const std::vector<std::string>& parts) const { expect_one(checked().findings, parts); }
};

TEST_F(StructureTest, ConversionsAreWhatTheyShouldBe) {
  for (const char* engine : {"transformers", "relatent", "deepseek"}) {
    for (const std::optional<DType> dtype : {std::optional<DType>(), std::optional(DType::f16)}) {
      SCOPED_TRACE(engine);
      const testing_support::TinyOptions source{.tied = true, .dtype = DType::bf16};
      ConvertOptions options =
          std::string(engine) == "deepseek" ? fitted_for_deepseek(source) : write(source);
      options.engine = engine;
      options.dtype = dtype;
      convert(options);
      const Structure found = checked();
      EXPECT_EQ(found.findings, std::vector<std::string>());
      // Embedding, final norm; two norms and an MLP of three tensors in each of three layers. One layout
      // stores the tied head too.
      const Index heads = std::string(engine) == "deepseek" ? 1 : 0;
      EXPECT_EQ(dtype ? found.cast : found.copied, 2 + 3 * 5 + heads);
      EXPECT_EQ(dtype ? found.copied : found.cast, 0);
      EXPECT_GE(found.converted, 3 * 4);
      EXPECT_EQ(found.checked, found.cast + found.converted);
      EXPECT_EQ(found.not_finite, std::vector<std::string>());
    }
  }
}

TEST_F(StructureTest, RowsThatNoTokenReachesCount) {
  const std::vector<std::string> names = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                                          layer_name(1, "mlp.up_proj.weight"),
                                          layer_name(2, "input_layernorm.weight")};
  for (const std::string& name : names) {
    SCOPED_TRACE(name);
    convert(write(testing_support::TinyOptions{}));
    change(name, [](std::span<char> bytes) { bytes[bytes.size() - 4] ^= 1; });
    expect_finding({"model.safetensors", name, "is not the source's " + name});
  }
}

TEST_F(StructureTest, EveryBitOfAConvertedTensorCounts) {
  for (const char* part : {"self_attn.o_proj.weight", "self_attn.kv_b_proj.weight"}) {
    convert(fitted_for_deepseek(testing_support::TinyOptions{}));
    const std::string name = layer_name(1, part);
    change(name, [](std::span<char> bytes) { bytes[bytes.size() / 2] ^= 1; });
    expect_finding({"model.safetensors", name, "is not what convert wrote"});
  }
}

TEST_F(StructureTest, NumbersThatAreNoneAreFoundEverywhere) {
  for (const std::string& name :
       {std::string("model.embed_tokens.weight"), layer_name(0, "self_attn.o_proj.weight")}) {
    convert(write(testing_support::TinyOptions{}));
    change(name, [](std::span<char> bytes) {
      const float infinity = std::numeric_limits<float>::infinity();
      std::memcpy(bytes.data() + 8, &infinity, sizeof infinity);
    });
    expect_one(checked().not_finite, {name, "NaN or infinity"});
    EXPECT_EQ(checked().findings.size(), 1U);
  }
}

TEST_F(StructureTest, FilesThatGoAlongAreTheSources) {
  convert(write(testing_support::TinyOptions{}));
  write_text(output() / "tokenizer.json", "{\"tokens\": [1]}");
  expect_finding({"tokenizer.json", "is not the source's"});
  write_text(output() / "tokenizer.json", "{\"tokens\": []}");
  EXPECT_TRUE(checked().findings.empty());
  fs::remove(output() / "generation_config.json");
  expect_finding({"generation_config.json", "missing"});
}

TEST_F(StructureTest, ConfigurationAndCodeAreAsWritten) {
  for (const auto& [engine, file] :
       {std::pair("relatent", "config.json"), std::pair("relatent", "modeling_relatent.py")}) {
    ConvertOptions options = write(testing_support::TinyOptions{});
    options.engine = engine;
    convert(options);
    ASSERT_TRUE(fs::exists(output() / file)) << file;
    write_text(output() / file, read_bytes(output() / file) + "\n");
    expect_finding({file, "is not what convert wrote"});
  }
  fs::remove(output() / "modeling_relatent.py");
  expect_finding({"modeling_relatent.py", "is missing"});
}

TEST_F(StructureTest, FilesThatBelongToNothingAreFound) {
  convert(write(testing_support::TinyOptions{}));
  for (const char* name : {"adapter_config.json", "pytorch_model.bin", "model-00002-of-00002.safetensors",
                           "other.py", "chat_template.jinja"}) {
    write_text(output() / name, "{}");
    expect_finding({name, "belongs to nothing"});
    fs::remove(output() / name);
  }
  write_text(output() / "notes.txt", "no engine reads it");
  EXPECT_TRUE(checked().findings.empty());
  for (const char* without : {"nothing", kReportName}) {
    fs::remove(output() / without);
    fs::create_directory(output() / "custom_generate");
    expect_finding({"custom_generate", "belongs to nothing"});
    fs::remove(output() / "custom_generate");
  }
}

// Forges the report: what it says fits its own checksum.
void forge(const fs::path& folder, const std::function<void(ConversionReport&)>& change) {
  ConversionReport report = ConversionReport::read(folder / kReportName);
  change(report);
  write_text(folder / kReportName, report.text());
}

TEST_F(StructureTest, AReportMayNotLeaveAnythingOut) {
  convert(write(testing_support::TinyOptions{}));
  const std::string report = read_bytes(output() / kReportName);
  forge(output(), [](ConversionReport& r) { r.files.erase("config.json"); });
  expect_finding({"config.json", "belongs to nothing"});
  write_text(output() / kReportName, report);
  const std::string name = layer_name(1, "self_attn.o_proj.weight");
  forge(output(), [&](ConversionReport& r) { r.tensors.erase(name); });
  expect_finding({name, "was not written by convert"});
  write_text(output() / kReportName, report);
  forge(output(), [](ConversionReport& r) { r.tensors.clear(); });
  EXPECT_GE(checked().findings.size(), 3U * 4U);
}

TEST_F(StructureTest, TypesAreAsWritten) {
  ConvertOptions options = write(testing_support::TinyOptions{.dtype = DType::bf16});
  options.dtype = DType::f16;
  convert(options);
  // The same bytes under another name: of zeros, a checksum cannot tell.
  forge(output(), [](ConversionReport& r) { r.dtype = "BF16"; });
  EXPECT_EQ(checked().findings.size(), static_cast<std::size_t>(checked().cast + checked().converted));
  // Cast without the report knowing.
  forge(output(), [](ConversionReport& r) {
    r.dtype = "F16";
    r.tensors.erase("model.embed_tokens.weight");
  });
  expect_finding({"model.embed_tokens.weight", "is not the source's"});
}

TEST_F(StructureTest, WithoutAReportTheSourceStillSpeaks) {
  convert(write(testing_support::TinyOptions{}));
  fs::remove(output() / kReportName);
  EXPECT_TRUE(checked().findings.empty());
  EXPECT_EQ(checked().checked, 0);
  write_text(output() / "pytorch_model.bin", "");
  expect_finding({"pytorch_model.bin", "belongs to nothing"});
  fs::remove(output() / "pytorch_model.bin");
  change("model.embed_tokens.weight", [](std::span<char> bytes) { bytes[0] ^= 1; });
  expect_finding({"model.embed_tokens.weight", "is not the source's"});
}

TEST_F(StructureTest, AReportOfSomethingElseIsFound) {
  convert(write(testing_support::TinyOptions{}));
  write_text(output() / kReportName, "{}");
  expect_finding({kReportName, "format_version"});
  fs::remove_all(output());
  // The same tensors from a source of another configuration.
  testing_support::TinyModel model = testing_support::tiny_model({});
  convert(write(model));
  model.config["unread"] = 1;
  write(model);
  expect_finding({"config.json", "is not the configuration that"});
}

TEST_F(StructureTest, TokenIdsAndContextAreTheSources) {
  for (const char* key : {"eos_token_id", "max_position_embeddings"}) {
    testing_support::TinyModel model = testing_support::tiny_model({});
    model.config["eos_token_id"] = 2;
    convert(write(model));
    nlohmann::ordered_json config = nlohmann::ordered_json::parse(read_bytes(output() / "config.json"));
    config[key] = 77;
    write_text(output() / "config.json", config.dump());
    const Structure found = checked();
    ASSERT_EQ(found.findings.size(), 2U);
    expect_one({found.findings.front()}, {"config.json", key, "77"});
    fs::remove(output() / kReportName);
    expect_finding({"config.json", key, "77"});
  }
}

}  // namespace
}  // namespace relatent

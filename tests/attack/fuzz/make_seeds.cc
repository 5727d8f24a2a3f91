// Writes small files of every kind, whole ones, for the fuzz targets to begin with:
//   make_seeds CONFIGS OUT
// CONFIGS is the folder of config.json files beside this source; OUT gets a folder of seeds for each target
// and, for most, a list of words.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "convert/model/config.h"
#include "convert/model/placement.h"
#include "convert/shard/manifest.h"
#include "convert/shard/shard.h"
#include "formats/checkpoint.h"
#include "formats/files.h"
#include "formats/gguf_writer.h"
#include "formats/journal.h"
#include "formats/json_text.h"
#include "formats/safetensors.h"
#include "formats/state_file.h"
#include "tests/attack/fuzz/fuzz.h"
#include "tests/attack/fuzz/stores.h"
#include "tests/support/gguf_bytes.h"

namespace relatent::fuzz {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::size_t kLargest = std::size_t{1} << 20U;

class Seeds {
 public:
  explicit Seeds(fs::path out) : out_(std::move(out)) {}
  // Where the seed of a target is to be put.
  fs::path path(const std::string& target, const std::string& name) const {
    fs::create_directories(out_ / target);
    fs::remove(out_ / target / name);
    return out_ / target / name;
  }
  void write(const std::string& target, const std::string& name, std::string_view bytes) const {
    write_text(path(target, name), bytes);
  }
  // Words of a format, from which libFuzzer takes one now and then: OUT/TARGET.dict.
  void write_words(const std::string& target, const std::set<std::string>& words) const {
    std::string text;
    for (const std::string& word : words) {
      text += '"';
      for (const char character : word) {
        constexpr std::string_view digits = "0123456789abcdef";
        const auto byte = static_cast<unsigned char>(character);
        text += {'\\', 'x', digits[byte >> 4U], digits[byte & 0xfU]};
      }
      text += "\"\n";
    }
    write_text(out_ / (target + ".dict"), text);
  }

 private:
  fs::path out_;
};

// Strings, names and numbers as JSON spells them.
void add_words(const Json& json, std::set<std::string>& words) {
  if (!json.is_structured()) {
    words.insert(json.dump());
    return;
  }
  for (const auto& [name, value] : json.items()) {
    if (json.is_object()) {
      words.insert(Json(name).dump() + ":");
    }
    add_words(value, words);
  }
}

const std::set<std::string>& json_words() {
  static const std::set<std::string> words = {"{}",
                                              "[]",
                                              "{",
                                              "}",
                                              "[",
                                              "]",
                                              ",",
                                              ":",
                                              "null",
                                              "true",
                                              "false",
                                              "0",
                                              "1",
                                              "-1",
                                              "1e999",
                                              "1e-999",
                                              "0.5",
                                              "9223372036854775807",
                                              "9223372036854775808",
                                              "18446744073709551615",
                                              "18446744073709551616",
                                              "4294967296",
                                              "2147483648",
                                              "65536",
                                              "1048576",
                                              R"("\ud800")",
                                              R"("\u0000")",
                                              "\xff",
                                              "\xc3\xa9",
                                              "\"\""};
  return words;
}

std::set<std::string> with_json(std::set<std::string> words) {
  words.insert(json_words().begin(), json_words().end());
  return words;
}

// Numbers around 1, as norms and weights may be.
std::vector<std::byte> some_values(const TensorSpec& spec) {
  std::vector<std::byte> bytes(spec.bytes());
  // A bias that no latent attention may have but as zeros.
  const bool zeros = spec.name.find("W_ukv_") != std::string::npos && spec.name.ends_with(".bias");
  if (is_float(spec.dtype) && !zeros) {
    std::vector<float> values(bytes.size() / size_of(spec.dtype));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = 1.0F + 0.125F * static_cast<float>(i % 5) * (i % 2 == 0 ? 1.0F : -1.0F);
    }
    encode_floats(spec.dtype, values, bytes);
  }
  return bytes;
}

std::string safetensors_of(const std::vector<TensorSpec>& specs,
                           const std::map<std::string, std::string>& metadata = {}) {
  return written([&](const fs::path& path) {
    SafetensorsWriter writer(path, specs, metadata);
    for (const TensorSpec& spec : specs) {
      writer.write(spec.name, some_values(spec));
    }
    writer.finish();
  });
}

// Optional tensors, of which families differ, are there or not.
std::vector<TensorSpec> specs_of(const ModelConfig& config, bool optional) {
  std::vector<TensorSpec> specs;
  for (const ExpectedTensor& tensor : stored_tensors(config)) {
    if (optional || tensor.presence == Presence::required) {
      specs.push_back({tensor.name, config.dtype, tensor.shape});
    }
  }
  return specs;
}

std::string gguf_of(const Json& config, const std::vector<TensorSpec>& specs) {
  GgufMetadata metadata;
  for (const auto& [key, value] : config.items()) {
    if (value.is_string()) {
      metadata.emplace_back(key, value.get<std::string>());
    } else if (value.is_number_float()) {
      metadata.emplace_back(key, value.get<float>());
    } else {
      metadata.emplace_back(key, value.get<std::uint32_t>());
    }
  }
  return written([&](const fs::path& path) {
    GgufWriter writer(path, metadata, specs);
    for (const TensorSpec& spec : specs) {
      writer.write(spec.name, some_values(spec));
    }
    writer.finish();
  });
}

void write_models(const Seeds& seeds, const fs::path& configs) {
  std::set<std::string> words = json_words();
  for (const auto& entry : fs::directory_iterator(configs)) {
    const std::string name = entry.path().stem().string();
    const std::string text = read_text(entry.path(), kLargest);
    const Json json = parse_json(entry.path(), text);
    add_words(json, words);
    seeds.write("config", name, text);
    seeds.write("json_text", name, text);
    const ModelConfig config = parse_config(json, entry.path());
    if (json.contains("general.architecture")) {
      seeds.write("gguf", name, gguf_of(json, specs_of(config, false)));
      continue;
    }
    for (const bool optional : {false, true}) {
      const std::string weights = safetensors_of(specs_of(config, optional));
      seeds.write("model", name + (optional ? "_all" : ""),
                  join_files({{"config.json", json.dump()}, {"model.safetensors", weights}}));
    }
  }
  for (const char* word :
       {"\"longrope\"", "\"linear\"", "\"yarn\"", "\"fp8\"",
        "\"quantization_config\":", "\"partial_rotary_factor\":", "\"mscale\":", "\"truncate\":",
        "\"rope_parameters\":", "\"layers\":", "\"num_mtp_layers\":", "\"float16\"", "\"bfloat16\"",
        "\"F16\"", "\"BF16\"", "\"F32\"", "\"I64\"", "%%%config.json\n", "%%%model.safetensors\n"}) {
    words.insert(word);
  }
  seeds.write_words("config", words);
  seeds.write_words("model", words);
  seeds.write_words("json_text", json_words());
}

void write_safetensors(const Seeds& seeds) {
  const auto put = [&](const std::string& name, const std::string& file, std::size_t data_bytes) {
    seeds.write("safetensors", name, file);
    const auto data = static_cast<std::uint32_t>(data_bytes);
    const std::string header = file.substr(kSafetensorsPrefix, file.size() - kSafetensorsPrefix - data_bytes);
    seeds.write("safetensors_header", name,
                std::string(reinterpret_cast<const char*>(&data), sizeof data) + header);
  };
  std::vector<TensorSpec> every;
  std::size_t bytes = 0;
  for (const DType dtype :
       {DType::bf16, DType::f16, DType::f32, DType::f64, DType::i8, DType::i16, DType::i32, DType::i64,
        DType::u8, DType::u16, DType::u32, DType::u64, DType::boolean, DType::f8_e4m3, DType::f8_e5m2}) {
    every.push_back({std::string(safetensors_name(dtype)), dtype, {2, 3}});
    bytes += every.back().bytes();
  }
  put("every_dtype", safetensors_of(every), bytes);
  const std::vector<TensorSpec> shapes = {
      {"scalar", DType::f32, {}}, {"none", DType::f32, {0, 4}}, {"é \"quoted\"", DType::bf16, {1, 2, 1, 3}}};
  put("shapes", safetensors_of(shapes, {{"relatent_run", "x"}, {"é", "\n"}}), 4 + 12);
  put("empty", safetensors_of({}), 0);
  std::set<std::string> words = {
      "\"dtype\":", "\"shape\":", "\"data_offsets\":", "\"__metadata__\":", "\"F4\""};
  for (const TensorSpec& spec : every) {
    words.insert("\"" + spec.name + "\"");
  }
  for (const char* target : {"safetensors", "safetensors_header"}) {
    seeds.write_words(target, with_json(words));
  }
}

void write_checkpoints(const Seeds& seeds) {
  const std::string config = R"({"model_type": "llama", "a": [1, 2.5, null, true, "é"]})";
  const std::string first = safetensors_of({{"a", DType::f32, {2, 2}}, {"b", DType::bf16, {3}}});
  const std::string second = safetensors_of({{"c", DType::f16, {1, 2, 2}}, {"d", DType::i64, {}}});
  seeds.write("checkpoint", "single",
              join_files({{"config.json", config}, {"model.safetensors", first}, {"README.md", "text"}}));
  const std::string one = "model-00001-of-00002.safetensors";
  const std::string two = "model-00002-of-00002.safetensors";
  const Json index = {{"metadata", {{"total_size", 38}}},
                      {"weight_map", {{"a", one}, {"b", one}, {"c", two}, {"d", two}}}};
  seeds.write("checkpoint", "shards",
              join_files({{"config.json", config}, {kIndexName, index.dump()}, {one, first}, {two, second}}));
  seeds.write_words("checkpoint",
                    with_json({"\"weight_map\":", "\"metadata\":", "\"" + one + "\"", "\"" + two + "\"",
                               "\"model.safetensors\"", "\"../a\"", "\"a\":", "\"b\":", "\"c\":",
                               "\"dtype\":", "\"shape\":", "\"F64\"", "\"F32\"", "%%%" + one + "\n",
                               "%%%model.safetensors\n", "%%%" + std::string(kIndexName) + "\n"}));
}

void write_tokens(const Seeds& seeds) {
  const auto npy = [](char version, const std::string& dtype, const std::string& items) {
    const auto item = static_cast<std::size_t>(dtype.back() - '0');
    std::string header = "{'descr': '" + dtype + "', 'fortran_order': False, 'shape': (" +
                         std::to_string(items.size() / item) + ",), }";
    const std::size_t width = version == 1 ? 2 : 4;
    header.append(63 - (8 + width + header.size()) % 64, ' ');
    header += '\n';
    const auto length = static_cast<std::uint32_t>(header.size());
    std::string out = "\x93NUMPY";
    out += {version, '\0'};
    return out + std::string(reinterpret_cast<const char*>(&length), width) + header + items;
  };
  const auto of = [](const auto& numbers) {
    return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(numbers[0]));
  };
  seeds.write("npy", "u2", npy(1, "<u2", of(std::vector<std::uint16_t>{0, 1, 2, 1, 0, 65535})));
  seeds.write("npy", "i4", npy(2, "<i4", of(std::vector<std::int32_t>{0, 1, 2, 1, 0})));
  seeds.write("npy", "i8", npy(3, "<i8", of(std::vector<std::int64_t>{0, 1, 2, 2147483647})));
  seeds.write_words(
      "npy", {"'descr':", "'fortran_order':", "'shape':", "True", "False", "'<u2'", "'<i4'", "'<i8'", "'>i4'",
              "(", ")", ",", "}", "\x93NUMPY", "18446744073709551615", "\xff\xff\xff\xff"});
}

void write_stores(const Seeds& seeds) {
  seeds.write("calibration_store", "newest", newest_store(2));
  // More members than lie in the header of a group.
  seeds.write("calibration_store", "layers", newest_store(12));
  // Choices of every kind of change; see calibration_contents.cc.
  for (int kind = 0; kind < 8; ++kind) {
    std::string choices;
    for (int i = 0; i < 32; ++i) {
      choices += static_cast<char>(i % 8 == 1 ? kind : i * 5);
    }
    seeds.write("calibration_contents", std::to_string(kind), choices);
  }
}

void write_gguf(const Seeds& seeds) {
  using namespace testing_support::gguf_bytes;
  Made made = good();
  seeds.write("gguf", "every_type", made.bytes());
  made.keys.push_back(key("general.alignment", 4, u32(64)));
  made.alignment = 64;
  made.tensors = {tensor("one", {3, 2}, 0, 0)};
  made.data = letters(64);
  seeds.write("gguf", "aligned", made.bytes());
  std::set<std::string> words = {"GGUF", "general.alignment", "split.count",
                                 "\xff\xff\xff\xff\xff\xff\xff\x7f"};
  for (std::uint32_t type = 0; type < 13; ++type) {
    words.insert(u32(type));
    words.insert(u64(type));
  }
  seeds.write_words("gguf", words);
}

void write_tokenizers(const Seeds& seeds) {
  const std::string byte_level = R"({"type": "ByteLevel", "add_prefix_space": false, "use_regex": true})";
  const auto tokenizer = [](const std::string& pre, const std::string& post) {
    return R"({"added_tokens": [{"id": 0, "content": "<s>", "special": true},
  {"id": 5, "content": "<tool▁call>", "special": false}, {"id": 6, "content": "<|end|>", "special": true}],
 "normalizer": null, "pre_tokenizer": )" +
           pre + R"(, "post_processor": )" + post + R"(,
 "model": {"type": "BPE", "continuing_subword_prefix": null, "end_of_word_suffix": "", "ignore_merges": false,
  "vocab": {"<s>": 0, "a": 1, "Ġ": 2, "Ġa": 3, "Ġaa": 4}, "merges": [["Ġ", "a"], "Ġa a"]}})";
  };
  seeds.write("gguf_tokenizer", "plain", join_files({{"tokenizer.json", tokenizer(byte_level, "null")}}));
  const std::string digits =
      R"({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, )" +
      byte_level + "]}";
  const std::string post =
      R"({"type": "Sequence", "processors": [{"type": "ByteLevel"}, {"type": "TemplateProcessing",
  "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}]})";
  const std::string config =
      R"({"eos_token": {"content": "<|end|>"}, "pad_token": "<s>", "unk_token": "missing", "add_bos_token": true,
 "add_eos_token": false, "chat_template": [{"name": "default", "template": "D"}]})";
  seeds.write("gguf_tokenizer", "all",
              join_files({{"tokenizer.json", tokenizer(digits, post)},
                          {"tokenizer_config.json", config},
                          {"chat_template.jinja", "{{ x }}"},
                          {"config.json", R"({"bos_token_id": 0, "eos_token_id": [6, 3], "pad_token_id": null,
 "text_config": {"unk_token_id": 1}})"}}));
  // Llama 3's and Qwen2's way of cutting text, which are told apart by their expressions.
  for (const auto& [name, count] : {std::pair("llama3", R"(\\p{N}{1,3})"), std::pair("qwen2", R"(\\p{N})")}) {
    const std::string split = R"({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex":
 "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|)" +
                              std::string(count) +
                              R"(| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"},
 "behavior": "Isolated", "invert": false}, {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})";
    seeds.write("gguf_tokenizer", name, join_files({{"tokenizer.json", tokenizer(split, "null")}}));
  }
}

void write_runs(const Seeds& seeds) {
  seeds.write("journal", "begun", written([](const fs::path& path) {
                Journal journal = Journal::create(path, {{"source", "a\tb"}, {"method", "lossless"}});
                journal.append("layer", "1");
                journal.append("layer", "2");
                journal.append("path\\", "line\nbreak");
              }));
  seeds.write_words("journal", {"relatent journal 1\n", "given ", "begun\n", "\t", "\\t", "\\n", "\n"});
  seeds.write("journal", "empty", written([](const fs::path& path) { Journal::create(path, {}); }));
  const std::vector<double> first = {1, 2, 3};
  const std::string second = "bytes";
  seeds.write(
      "state_file", "whole", written([&](const fs::path& path) {
        write_state(path, 7, {std::as_bytes(std::span(first)), std::as_bytes(std::span(second))}).commit();
      }));
}

void write_manifests(const Seeds& seeds) {
  ShardManifest manifest;
  manifest.layout = "plain";
  manifest.tp = 2;
  manifest.fingerprint = "00112233445566778899aabbccddeeff";
  manifest.weights = {{"model-00001-of-00002.safetensors", 80, R"({"a":{}}  )"},
                      {"model-00002-of-00002.safetensors", 8, "{}"}};
  manifest.index = R"({"weight_map": {"a": "model-00001-of-00002.safetensors"}})";
  manifest.copied = {{"config.json", 2, "00112233445566778899aabbccddeeff"}};
  manifest.tensors = {{{"a", DType::bf16, {4, 6}}, Split::rows, {RankPart{0, 2}, RankPart{2, 2}}},
                      {{"b", DType::f32, {4, 6}}, Split::columns, {RankPart{0, 3}, RankPart{3, 3}}},
                      {{"c", DType::f16, {4}}, Split::whole, {RankPart{0, 4}, std::nullopt}}};
  seeds.write("shard_manifest", "two", manifest.text());
  std::set<std::string> words = json_words();
  add_words(Json::parse(manifest.text()), words);
  seeds.write_words("shard_manifest", words);
  seeds.write_words("shards", words);
  manifest.index.reset();
  manifest.weights.pop_back();
  manifest.tensors.clear();
  seeds.write("shard_manifest", "single", manifest.text());
}

// Models that two ranks can share, cut.
void write_shards(const Seeds& seeds, const fs::path& configs) {
  for (const char* name : {"llama", "relatent_mlra"}) {
    const fs::path source = folder() / "source";
    const fs::path output = folder() / "output";
    for (const fs::path& path : {source, output}) {
      fs::remove_all(path);
    }
    fs::create_directory(source);
    Json json = parse_json(configs, read_text(configs / (std::string(name) + ".json"), kLargest));
    json["num_hidden_layers"] = 1;
    write_text(source / "config.json", json.dump());
    write_text(source / "README.md", "text");
    write_text(source / "model.safetensors", safetensors_of(specs_of(parse_config(json, configs), false)));
    relatent::write_shards({source, output, 2}, [](Index /*done*/, Index /*all*/) {});
    Files files;
    for (const auto& entry : fs::directory_iterator(output)) {
      files[entry.path().filename().string()] = read_text(entry.path(), kLargest);
    }
    seeds.write("shards", name, join_files(files));
    // The same with a large tensor that no rank has.
    ShardManifest manifest = ShardManifest::read(output / kShardsName);
    const std::string run = manifest.run();
    manifest.tensors.push_back({{"more", DType::u8, {std::int64_t{1} << 44U}}, Split::whole, {{}, {}}});
    const std::string header =
        R"({"more":{"dtype":"U8","shape":[17592186044416],"data_offsets":[0,17592186044416]}})";
    manifest.weights.push_back({"more.safetensors",
                                kSafetensorsPrefix + header.size() + manifest.tensors.back().spec.bytes(),
                                header});
    files[kShardsName] = manifest.text();
    for (const Index rank : {0, 1}) {
      std::string& bytes = files[rank_file_name(rank)];
      bytes.replace(bytes.find(run), run.size(), manifest.run());
    }
    seeds.write("shards", std::string(name) + "_more", join_files(files));
  }
}

}  // namespace
}  // namespace relatent::fuzz

int main(int argc, char** argv) {
  using namespace relatent;
  if (argc != 3) {
    std::fputs("make_seeds CONFIGS OUT\n", stderr);
    return 2;
  }
  try {
    const fuzz::Seeds seeds(argv[2]);
    fuzz::write_models(seeds, argv[1]);
    fuzz::write_safetensors(seeds);
    fuzz::write_checkpoints(seeds);
    fuzz::write_tokens(seeds);
    fuzz::write_stores(seeds);
    fuzz::write_gguf(seeds);
    fuzz::write_tokenizers(seeds);
    fuzz::write_runs(seeds);
    fuzz::write_manifests(seeds);
    fuzz::write_shards(seeds, argv[1]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_seeds: %s\n", error.what());
    return 1;
  }
  return 0;
}

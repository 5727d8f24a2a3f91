#include "convert/shard/shard.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "convert/model/devices.h"
#include "convert/shard/layout.h"
#include "convert/shard/manifest.h"
#include "tests/support/author_layouts.h"
#include "tests/support/expect_error.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::layer_name;
using testing_support::output_of;
using testing_support::Random;
using testing_support::read_bytes;
using testing_support::relative_error;
using testing_support::rich_shape;
using testing_support::TempFolder;
using testing_support::tiny_latent_model;
using testing_support::tiny_mixture_model;
using testing_support::tiny_model;
using testing_support::tiny_relatent_model;
using testing_support::TinyModel;

void ignore(Index /*done*/, Index /*all*/) {}

std::map<std::string, std::string> contents(const fs::path& folder) {
  std::map<std::string, std::string> out;
  for (const auto& entry : fs::directory_iterator(folder)) {
    out[entry.path().filename().string()] = read_bytes(entry.path());
  }
  return out;
}

class Shard : public testing::Test {
 protected:
  fs::path source() const { return folder_ / "source"; }
  fs::path shards() const { return folder_ / "shards"; }
  fs::path merged() const { return folder_ / "merged"; }

  void write(const TinyModel& model) const {
    fs::remove_all(source());
    model.write(source());
  }
  ShardReport cut(Index tp) const {
    fs::remove_all(shards());
    return write_shards({.source = source(), .output = shards(), .tp = tp}, ignore);
  }
  SafetensorsFile rank(Index k) const { return SafetensorsFile::open(shards() / rank_file_name(k)); }
  void expect_round_trip(Index tp) const {
    SCOPED_TRACE("tp " + std::to_string(tp));
    const ShardReport before = cut(tp);
    fs::remove_all(merged());
    const ShardReport after = merge_shards(shards(), merged(), ignore);
    EXPECT_TRUE(contents(merged()) == contents(source()));
    EXPECT_EQ(after.run, before.run);
    EXPECT_EQ(after.tp, tp);
    EXPECT_EQ(before.files.size(), static_cast<std::size_t>(tp));
    for (const WrittenFile& file : before.files) {
      EXPECT_EQ(file.bytes, fs::file_size(shards() / file.name));
    }
    for (const WrittenFile& file : after.files) {
      EXPECT_EQ(file.bytes, fs::file_size(source() / file.name));
    }
  }
  void expect_nothing_left() const {
    EXPECT_FALSE(fs::exists(shards()));
    EXPECT_FALSE(fs::exists(shards().string() + ".partial"));
  }

  TempFolder folder_;
};

MatrixF matrix(const SafetensorsFile& file, const std::string& name) {
  const TensorInfo* info = file.find(name);
  EXPECT_NE(info, nullptr) << name;
  if (info == nullptr) {
    return {};
  }
  MatrixF out(info->shape.size() == 2 ? info->shape[0] : 1, info->shape.back());
  decode_floats(info->dtype, file.bytes(*info), {out.data(), static_cast<std::size_t>(out.size())});
  return out;
}

void expect_equal(const SafetensorsFile& file, const std::string& name, const MatrixF& expected) {
  const MatrixF found = matrix(file, name);
  EXPECT_TRUE(found.rows() == expected.rows() && found.cols() == expected.cols() && found == expected)
      << name;
}

void expect_equal(const SafetensorsFile& file, const std::string& name, const Linear& expected) {
  expect_equal(file, name + ".weight", expected.weight);
  EXPECT_EQ(file.find(name + ".bias") != nullptr, expected.bias.size() > 0) << name;
  if (expected.bias.size() > 0) {
    expect_equal(file, name + ".bias", MatrixF(expected.bias));
  }
}

// A query of low rank, norms on the latents, no biases, no two latents of as many heads.
LatentShape uneven_shape() {
  LatentShape shape;
  shape.form = "gla";
  shape.heads = 8;
  shape.qk_nope_head_dim = 0;
  shape.qk_rope_head_dim = 4;
  shape.v_head_dim = 2;
  shape.kv_lora_rank = 12;
  shape.q_lora_rank = 9;
  shape.branches = {{2, 6, 5}, {0, 2, 7}};
  shape.norm = LatentNorm::branch;
  return shape;
}

TEST_F(Shard, RanksHoldThePartsOfTheCanonicalLayer) {
  for (const LatentShape& shape : {rich_shape(8), uneven_shape()}) {
    write(tiny_relatent_model(shape, {.heads = 8}));
    const Model model = Model::open(source());
    for (const Index tp : {1, 2, 4, 8}) {
      SCOPED_TRACE(shape.form + " " + std::to_string(tp));
      if (!why_not_shared(*model.config().latent, tp).empty()) {
        continue;
      }
      cut(tp);
      const std::vector<DeviceShare> shares = device_shares(*model.config().latent, tp);
      for (Index k = 0; k < tp; ++k) {
        const DeviceShare& share = shares[static_cast<std::size_t>(k)];
        const SafetensorsFile file = rank(k);
        for (Index i = 0; i < 3; ++i) {
          const std::string self = layer_name(i, "self_attn.");
          const LatentAttention part = part_of(std::get<LatentAttention>(model.attention(i)), share, k == 0);
          std::size_t tensors = 0;
          for (const TensorInfo& tensor : file.tensors()) {
            tensors += tensor.name.starts_with(self) ? 1 : 0;
          }
          if (shape.q_lora_rank) {
            expect_equal(file, self + "q_a_proj", part.q_down);
            expect_equal(file, self + "q_a_layernorm.weight", MatrixF(part.q_norm.gain));
            tensors -= 2;
          }
          expect_equal(file, self + (shape.q_lora_rank ? "q_b_proj" : "q_proj"), part.q);
          expect_equal(file, self + "k_rope_proj", part.rotary_key);
          if (part.norm_rows.size() > 0) {
            expect_equal(file, self + "kv_norm_proj.weight", part.norm_rows);
            tensors -= 1;
          }
          for (std::size_t s = 0; s < share.shared.size(); ++s) {
            expect_equal(file, self + "kv_shared_proj." + std::to_string(share.shared[s]), part.shared[s]);
          }
          for (std::size_t b = 0; b < share.branches.size(); ++b) {
            const std::string index = "." + std::to_string(share.branches[b].branch);
            const auto tensor = [&](const char* kind, const char* rest) {
              std::string out = self;
              out += kind;
              out += index;
              return out += rest;
            };
            expect_equal(file, tensor("kv_a_proj", ""), part.branches[b].down);
            expect_equal(file, tensor("kv_b_proj", ".weight"), part.branches[b].up);
            if (part.branches[b].norm.present()) {
              expect_equal(file, tensor("kv_a_layernorm", ".weight"), MatrixF(part.branches[b].norm.gain));
              tensors -= 1;
            }
          }
          expect_equal(file, self + "o_proj", part.o);
          // Nothing else.
          const std::size_t each = shape.attention_bias ? 2 : 1;
          EXPECT_EQ(tensors, each * (3 + share.shared.size() + share.branches.size()) +
                                 share.branches.size() - (shape.attention_bias && k > 0 ? 1 : 0));
        }
      }
    }
  }
}

// The outputs of grouped-query ranks add up, with key/value heads split and repeated.
TEST_F(Shard, OutputsOfRanksAddUp) {
  write(tiny_model({.heads = 8, .kv_heads = 2, .q_bias = true, .kv_bias = true, .o_bias = true}));
  const Model model = Model::open(source());
  const auto whole = std::get<GqaAttention>(model.attention(1));
  Random random(5);
  const MatrixF x = testing_support::sample_inputs(random, 12, 24);
  const MatrixF expected = output_of(whole, x);
  for (const Index tp : {1, 2, 4, 8}) {
    cut(tp);
    MatrixF sum = MatrixF::Zero(expected.rows(), expected.cols());
    for (Index k = 0; k < tp; ++k) {
      const SafetensorsFile file = rank(k);
      const auto linear = [&](const std::string& name) {
        const std::string base = layer_name(1, "self_attn." + name);
        Linear out{matrix(file, base + ".weight"), {}};
        if (file.find(base + ".bias") != nullptr) {
          out.bias = matrix(file, base + ".bias").row(0);
        }
        return out;
      };
      GqaAttention part = whole;
      part.q = linear("q_proj");
      part.k = linear("k_proj");
      part.v = linear("v_proj");
      part.o = linear("o_proj");
      part.heads = part.q.out() / part.head_dim;
      part.kv_heads = part.k.out() / part.head_dim;
      EXPECT_EQ(part.o.bias.size() > 0, k == 0);
      sum += output_of(part, x);
    }
    EXPECT_LE(relative_error(sum, expected), kFloatNoise) << tp;
  }
}

TEST_F(Shard, MergeReturnsEveryByte) {
  write(tiny_relatent_model(rich_shape(8), {.heads = 8, .dtype = DType::bf16}));
  for (const Index tp : {1, 2, 4, 8}) {
    expect_round_trip(tp);
  }
  write(tiny_relatent_model(uneven_shape(), {.heads = 8, .tied = true, .dtype = DType::f16}));
  for (const Index tp : {1, 2, 4}) {
    expect_round_trip(tp);
  }
  write(tiny_latent_model({.q_rank = 9, .attention_bias = true}));
  expect_round_trip(2);
  write(tiny_latent_model({.body = {.dtype = DType::bf16}, .experts = testing_support::tiny_experts()}));
  expect_round_trip(2);
  for (const char* model_type : {"mixtral", "qwen2_moe", "qwen3_moe"}) {
    write(tiny_mixture_model({.model_type = model_type, .dtype = DType::bf16}));
    expect_round_trip(2);
  }
  // More ranks than tokens: some have none.
  write(tiny_model({.model_type = "qwen2", .heads = 8, .vocab = 3}));
  expect_round_trip(8);
  EXPECT_EQ(rank(0).find("lm_head.weight")->shape, (std::vector<std::int64_t>{0, 24}));
}

// Latents of overlapping heads that no two of have the same: ranks share some of their heads.
TEST_F(Shard, HeadsMayOverlapBetweenRanks) {
  LatentShape shape = uneven_shape();
  shape.branches = {{0, 5, 5}, {3, 5, 7}};
  write(tiny_relatent_model(shape, {.heads = 8}));
  expect_round_trip(2);
}

TEST_F(Shard, SourcesOfAnySpelling) {
  TinyModel tiny = tiny_model({.heads = 8});
  tiny.tensors.at("model.norm.weight").dtype = DType::f64;
  tiny.tensors.at(layer_name(1, "mlp.up_proj.weight")).dtype = DType::bf16;
  write(tiny);
  write_text(source() / "tokenizer.json", "{}");
  write_text(source() / "empty.txt", "");
  write_text(source() / "code.py", std::string("\0\xff binary", 9));
  // A header with white space, metadata and names in another order than the data.
  const SafetensorsFile whole = SafetensorsFile::open(source() / "model.safetensors");
  const std::string bytes = read_bytes(source() / "model.safetensors");
  std::string header(whole.header_text());
  header.insert(1, " \n\t");
  header.replace(header.find(R"("format":"pt")"), 13, R"("note":"\u00e9\\ é","format":"pt")");
  header += "   ";
  std::string odd(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    odd[i] = static_cast<char>(header.size() >> 8 * i & 0xffU);
  }
  odd += header + bytes.substr(8 + whole.header_text().size());
  fs::remove(source() / "model.safetensors");
  write_text(source() / "model.safetensors", odd);
  for (const Index tp : {1, 2, 8}) {
    expect_round_trip(tp);
  }
  // A weight file with a name of its own, and an index as no program writes it.
  fs::rename(source() / "model.safetensors", source() / "weights.0");
  std::string map;
  for (const TensorInfo& tensor : whole.tensors()) {
    map += (map.empty() ? "\"" : ",\n\"") + tensor.name + R"(" : "weights.0")";
  }
  write_text(source() / "model.safetensors.index.json",
             "\xef\xbb\xbf { \"weight_map\": {" + map + "} } \n\n");
  for (const Index tp : {2, 4}) {
    expect_round_trip(tp);
  }
}

TEST_F(Shard, SeveralWeightFiles) {
  write(tiny_model({.heads = 8}));
  const fs::path split = folder_ / "split";
  fs::create_directory(split);
  {
    const Checkpoint whole = Checkpoint::open(source());
    std::vector<TensorSpec> specs;
    for (const std::string& name : whole.tensor_names()) {
      specs.push_back({name, whole.info(name).dtype, whole.info(name).shape});
    }
    CheckpointWriter writer(split, specs, 20'000);
    for (const TensorSpec& spec : specs) {
      writer.copy(spec.name, whole, spec.name);
    }
    writer.finish();
  }
  fs::rename(source() / "config.json", split / "config.json");
  fs::remove_all(source());
  fs::rename(split, source());
  expect_round_trip(4);
  EXPECT_GT(contents(source()).size(), 4U);
}

TEST_F(Shard, FilesSayWhatTheyAre) {
  write(tiny_model({.heads = 8}));
  write_text(source() / "tokenizer.json", "{}");
  std::vector<std::pair<Index, Index>> progress;
  const ShardReport report = write_shards({.source = source(), .output = shards(), .tp = 2},
                                          [&](Index done, Index all) { progress.emplace_back(done, all); });
  const auto all = static_cast<Index>(Checkpoint::open(source()).tensor_names().size());
  ASSERT_EQ(progress.size(), static_cast<std::size_t>(all));
  EXPECT_EQ(progress.front(), std::pair(Index{1}, all));
  EXPECT_EQ(progress.back(), std::pair(all, all));

  std::set<std::string> names;
  for (const auto& [name, bytes] : contents(shards())) {
    names.insert(name);
  }
  EXPECT_EQ(names,
            (std::set<std::string>{"config.json", "model-rank-0.safetensors", "model-rank-1.safetensors",
                                   "relatent_shards.json", "tokenizer.json"}));
  for (Index k = 0; k < 2; ++k) {
    EXPECT_EQ(rank(k).metadata(), (std::map<std::string, std::string>{{"format", "pt"},
                                                                      {"relatent_run", report.run},
                                                                      {"relatent_rank", std::to_string(k)},
                                                                      {"relatent_tp", "2"}}));
  }
  const ShardManifest manifest = ShardManifest::read(shards() / kShardsName);
  EXPECT_EQ(manifest.run(), report.run);
  EXPECT_EQ(manifest.fingerprint, Checkpoint::open(source()).fingerprint());
  EXPECT_EQ(manifest.layout, "plain");
  EXPECT_EQ(manifest.index, std::nullopt);
}

TEST_F(Shard, SameBytesEveryTime) {
  write(tiny_model({.heads = 8}));
  const std::string run = cut(4).run;
  const auto first = contents(shards());
  EXPECT_EQ(cut(4).run, run);
  EXPECT_TRUE(contents(shards()) == first);
  // Another number of ranks, another weight or another side file is another run.
  EXPECT_NE(cut(2).run, run);
  write(tiny_model({.heads = 8, .seed = 2}));
  EXPECT_NE(cut(4).run, run);
  write(tiny_model({.heads = 8}));
  EXPECT_EQ(cut(4).run, run);
  write_text(source() / "tokenizer.json", "{}");
  EXPECT_NE(cut(4).run, run);
}

// All latents in one projection, and all up-projections in one tensor.
TEST_F(Shard, RefusesJointLatents) {
  const auto refused = [&](Index tp, const std::vector<std::string>& parts) {
    expect_error(ErrorKind::input, parts, [&] { cut(tp); });
    expect_nothing_left();
  };
  for (const Index tp : {1, 2, 4}) {
    for (const testing_support::MlraSample& sample : testing_support::mlra_samples()) {
      write(testing_support::tiny_mlra_model(sample));
      refused(tp,
              {"config.json", "model_type", "expected", "each latent", "--engine relatent", "found mlra"});
    }
    write(testing_support::tiny_gla_model());
    refused(tp, {"config.json", "model_type", "expected", "each latent", "--engine relatent", "found gla"});
  }
}

TEST_F(Shard, RefusesWhatDoesNotFit) {
  write(tiny_model({.heads = 8, .intermediate = 44}));
  const auto refused = [&](ErrorKind kind, const ShardOptions& options,
                           const std::vector<std::string>& parts) {
    expect_error(kind, parts, [&] { write_shards(options, ignore); });
    expect_nothing_left();
  };
  refused(ErrorKind::usage, {source(), shards(), 3, "plain"}, {"--tp 3", "num_attention_heads 8"});
  refused(ErrorKind::usage, {source(), shards(), 8, "plain"},
          {"--tp 8", "intermediate_size 44 does not divide by 8"});
  refused(ErrorKind::usage, {source(), shards(), 0, "plain"}, {"--tp 0"});
  refused(ErrorKind::usage, {source(), shards(), 2, "fancy"}, {"--layout fancy", "plain"});
  refused(ErrorKind::input, {folder_ / "missing", shards(), 2, "plain"}, {"missing"});
  write_text(source() / kShardsName, "{}");
  refused(ErrorKind::input, {source(), shards(), 2, "plain"}, {kShardsName, "manifest"});
  fs::remove(source() / kShardsName);
  write_text(source() / "\xff.txt", "{}");
  refused(ErrorKind::input, {source(), shards(), 2, "plain"}, {".txt", "UTF-8"});
  fs::remove(source() / "\xff.txt");

  write(tiny_relatent_model(rich_shape(8), {.heads = 8}));
  refused(ErrorKind::usage, {source(), shards(), 3, "plain"}, {"--tp 3", "4 latents"});

  fs::create_directory(shards());
  write_text(shards() / "precious", "data");
  expect_error(ErrorKind::usage, {shards().string(), "exists"}, [&] {
    write_shards({source(), shards(), 2, "plain"}, ignore);
  });
  EXPECT_EQ(contents(shards()).size(), 1U);
}

}  // namespace
}  // namespace relatent

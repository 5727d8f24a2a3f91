#include "convert/plan/run_identity.h"

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::TempFolder;
using testing_support::tiny_model;

TEST(RunIdentityOfAConversion, NameEveryOptionThatDecidesTheResult) {
  const TempFolder folder;
  tiny_model().write(folder / "model");
  const Checkpoint source = Checkpoint::open(folder / "model");
  ConvertOptions options;
  options.calibration = folder.write("a.h5", "1");
  const RunIdentity before = run_identity(options, source);
  EXPECT_EQ(difference(before, run_identity(options, source)), "");
  using Change = std::function<void(ConvertOptions&)>;
  const std::vector<std::pair<std::string, Change>> changes = {
      {"--method", [](auto& o) { o.method = Method::relatent; }},
      {"--to", [](auto& o) { o.form = "gla"; }},
      {"--layers", [](auto& o) { o.layers = "0"; }},
      {"--branches", [](auto& o) { o.branches = 2; }},
      {"--key-rank", [](auto& o) { o.key_rank = 2; }},
      {"the calibration", [](auto& o) { o.calibration.reset(); }},
      {"--rank", [](auto& o) { o.rank = 2; }},
      {"--rope-dim", [](auto& o) { o.rope_dim = 2; }},
      {"--kv-budget", [](auto& o) { o.kv_budget = 0.25; }},
      {"--per-device", [](auto& o) { o.per_device = 96; }},
      {"--max-nats", [](auto& o) { o.max_nats = 0.1; }},
      {"--fold", [](auto& o) { o.fold = 2; }},
      {"--balance", [](auto& o) { o.balance = 2; }},
      {"--q-rank", [](auto& o) { o.q_rank = 2; }},
      {"--no-expected-rotation", [](auto& o) { o.relatent.expected_rotation = false; }},
      {"--no-output-metric", [](auto& o) { o.relatent.output_metric = false; }},
      {"--plain-list", [](auto& o) { o.relatent.plain_list = true; }},
      {"--one-list", [](auto& o) { o.one_list = true; }},
      {"--order", [](auto& o) { o.relatent.order = LatentOrder::pca; }},
      {"--no-query-fit", [](auto& o) { o.relatent.fit.queries = false; }},
      {"--no-key-fit", [](auto& o) { o.relatent.fit.keys = false; }},
      {"--no-refit", [](auto& o) { o.relatent.fit.refit = false; }},
      {"--compute", [](auto& o) { o.relatent.compute = DType::bf16; }},
      {"--fit-rounds", [](auto& o) { o.relatent.fit.rounds = 7; }},
      {"--fit-tokens", [](auto& o) { o.relatent.fit.tokens = 7; }},
      {"--fit-stride", [](auto& o) { o.relatent.fit.stride = 7; }},
      {"--norm-coordinates", [](auto& o) { o.norm_coordinates = 7; }},
      {"--pad-rank", [](auto& o) { o.pad_rank = 7; }},
      {"--shape",
       [](auto& o) {
         o.shape = CacheShape{512, 64};
       }},
      {"--held-out", [](auto& o) { o.held_out = 7; }},
      {"--engine", [](auto& o) { o.engine = "deepseek"; }},
      {"--pre-tokenizer", [](auto& o) { o.pre_tokenizer = "qwen2"; }},
      {"--dtype", [](auto& o) { o.dtype = DType::f16; }},
      {"--max-shard-size", [](auto& o) { o.max_shard_bytes = 7; }},
  };
  for (const auto& [name, change] : changes) {
    ConvertOptions changed = options;
    change(changed);
    const std::string differs = difference(before, run_identity(changed, source));
    EXPECT_TRUE(differs.starts_with(name + " was ")) << name << ": " << differs;
    EXPECT_EQ(differs.find(','), name == "the calibration" ? differs.find(',') : std::string::npos);
  }
  // What decides nothing.
  options.save.resume = true;
  options.save.every = 0;
  options.output = "elsewhere";
  EXPECT_EQ(difference(before, run_identity(options, source)), "");
}

}  // namespace
}  // namespace relatent

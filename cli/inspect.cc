#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "cli/commands.h"
#include "cli/progress.h"
#include "convert/model/model.h"
#include "convert/verify/verify.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string model;
  bool json = false;
};

// What one target would keep per token and layer on one of tp devices.
struct Target {
  const char* name;
  const char* note;
  Index numbers(const ModelConfig& config, Index tp) const;
  double budget;   // of the source's 2 K d; rotary size = head_dim
  Index branches;  // the latent is split over this many devices
};

Index Target::numbers(const ModelConfig& config, Index tp) const {
  const auto whole = static_cast<double>(2 * config.gqa->num_key_value_heads * config.gqa->head_dim);
  const Index rotary = config.gqa->head_dim;
  const Index rank = std::max<Index>(0, static_cast<Index>(budget * whole) - rotary);
  const Index parts = std::min(tp, branches);
  return rotary + (rank + parts - 1) / parts;
}

constexpr std::array<Target, 4> targets = {{
    {"MLA 50 %", "one latent, held by every device", 0.5, 1},
    {"MLA 25 %", "one latent, held by every device", 0.25, 1},
    {"GLA-2 50 %", "two latents, half of the heads each", 0.5, 2},
    {"MLRA-4 / TPLA-4 50 %", "four parts of a latent", 0.5, 4},
}};

Json to_json(const Model& model) {
  const ModelConfig& c = model.config();
  Json out;
  out["model_type"] = c.model_type;
  out["attention"] = c.gqa ? "gqa" : "mla";
  out["num_hidden_layers"] = c.num_hidden_layers;
  out["hidden_size"] = c.hidden_size;
  out["vocab_size"] = c.vocab_size;
  out["num_attention_heads"] = c.num_attention_heads;
  if (c.gqa) {
    out["num_key_value_heads"] = c.gqa->num_key_value_heads;
    out["head_dim"] = c.gqa->head_dim;
  } else {
    out["kv_lora_rank"] = c.latent->kv_lora_rank;
    out["qk_rope_head_dim"] = c.latent->qk_rope_head_dim;
    out["qk_nope_head_dim"] = c.latent->qk_nope_head_dim;
    out["v_head_dim"] = c.latent->v_head_dim;
  }
  out["rope_type"] = c.rotary.rope_type;
  out["dtype"] = torch_name(c.dtype);
  out["tensors"] = model.tensors().size();
  out["tensor_bytes"] = model.checkpoint().tensor_bytes();
  out["cache_bytes_per_token"] = c.cache_bytes_per_token();
  for (const Index tp : reported_tp) {
    const std::optional<Index> bytes = c.cache_bytes_per_token_on_device(tp);
    out["cache_bytes_per_token_per_device"][std::to_string(tp)] = bytes ? Json(*bytes) : Json(nullptr);
  }
  if (c.gqa) {
    const Index unit = c.num_hidden_layers * static_cast<Index>(size_of(c.dtype));
    for (const Target& target : targets) {
      for (const Index tp : reported_tp) {
        out["targets"][target.name][std::to_string(tp)] = target.numbers(c, tp) * unit;
      }
    }
  }
  return out;
}

void print_table(const Options& options, const Model& model) {
  const ModelConfig& c = model.config();
  std::printf("%s: %s, %td layers, hidden %td, vocabulary %td\n", options.model.c_str(), c.model_type.c_str(),
              c.num_hidden_layers, c.hidden_size, c.vocab_size);
  if (c.gqa) {
    std::printf("attention: GQA, %td query heads on %td key/value heads of %td\n", c.num_attention_heads,
                c.gqa->num_key_value_heads, c.gqa->head_dim);
  } else {
    std::printf("attention: MLA, %td heads, latent %td + rotary key %td, nope %td, v %td\n",
                c.num_attention_heads, c.latent->kv_lora_rank, c.latent->qk_rope_head_dim,
                c.latent->qk_nope_head_dim, c.latent->v_head_dim);
  }
  std::printf("rope: %s; %zu tensors, %s as %s\n\n", c.rotary.rope_type.c_str(), model.tensors().size(),
              bytes_text(model.checkpoint().tensor_bytes()).c_str(),
              std::string(torch_name(c.dtype)).c_str());
  std::printf("cache bytes per token and device %10s %10s %10s %10s\n", "TP 1", "TP 2", "TP 4", "TP 8");
  const auto line = [](const char* name, const auto& bytes) {
    std::printf("  %-30s", name);
    for (const Index tp : reported_tp) {
      const std::optional<Index> here = bytes(tp);
      std::printf(" %10s", here ? std::to_string(*here).c_str() : "-");
    }
    std::puts("");
  };
  line("as it is", [&](Index tp) { return c.cache_bytes_per_token_on_device(tp); });
  if (c.gqa) {
    const Index unit = c.num_hidden_layers * static_cast<Index>(size_of(c.dtype));
    for (const Target& target : targets) {
      line(target.name, [&](Index tp) { return std::optional<Index>(target.numbers(c, tp) * unit); });
    }
  }
}

int run(const Options& options) {
  const Model model = Model::open(options.model);
  if (options.json) {
    std::puts(to_json(model).dump().c_str());
  } else {
    print_table(options, model);
  }
  return 0;
}

}  // namespace

void add_inspect(CLI::App& app, Command& chosen) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("inspect", "What a checkpoint is and what its cache costs");
  command->add_option("model", options->model, "Checkpoint folder")->required();
  command->add_flag("--json", options->json, "One JSON object on stdout");
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/progress.h"
#include "convert/engines/engine.h"
#include "convert/forms/form.h"
#include "convert/latent/lay_out.h"
#include "convert/model/families/family.h"
#include "convert/model/model.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  std::string model;
  bool json = false;
};

// A form that the checkpoint could be converted to, in one size that shows what it costs.
struct Target {
  std::string name;
  const Form* form = nullptr;
  Index branches = 1;
  // Per token and layer on each device, when there is a device for each latent.
  Index rotary = 0;
  Index elements = 0;
};

std::string name_with_part(const std::string& name, Index elements, const ModelConfig& config) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%s %.4g %%", name.c_str(),
                100 * static_cast<double>(elements) / static_cast<double>(config.cache_elements()));
  return text.data();
}

// An MLA latent is divided as the published slices do.
Target target_of(const Form& form, const FormExample& example, const ModelConfig& config) {
  Target out{"", &form, example.branches};
  if (config.gqa) {
    out.elements = static_cast<Index>(example.part * static_cast<double>(config.cache_elements()));
    out.rotary = std::max<Index>(2, out.elements / 6 * 2);
  } else {
    out.rotary = config.latent->qk_rope_head_dim;
    out.elements = out.rotary + config.latent->kv_lora_rank / example.branches;
  }
  out.name = name_with_part(std::string(example.name), out.elements, config);
  return out;
}

// Of a result there is nothing more to make.
std::vector<Target> targets_of(const ModelConfig& config) {
  std::vector<Target> out;
  if (config.latent && config.latent->branches.size() != 1) {
    return out;
  }
  for (const CacheShape& shape : served_shapes) {
    if (config.gqa && shape.cache_elements() < config.cache_elements() &&
        shape.rotary <= config.gqa->num_key_value_heads * config.gqa->head_dim) {
      const std::string name = "MLA " + std::to_string(shape.latent) + "+" + std::to_string(shape.rotary);
      out.push_back({name_with_part(name, shape.cache_elements(), config), &mla_form(), 1, shape.rotary,
                     shape.cache_elements()});
    }
  }
  for (const Form* form : forms()) {
    for (const FormExample& example : form->examples) {
      if (config.gqa || form->latent_source) {
        out.push_back(target_of(*form, example, config));
      }
    }
  }
  return out;
}

// Bytes on each of tp devices; nothing where so many cannot share it.
std::optional<Index> target_bytes(const ModelConfig& config, const Target& target, Index tp) {
  const Partition partition = *target.form->partition(target.branches);
  LatentShape shape;
  shape.heads = config.num_attention_heads;
  shape.qk_rope_head_dim = target.rotary;
  const Index latent = target.elements - target.rotary;
  if (latent < 2 || partition.groups > shape.heads) {
    return std::nullopt;
  }
  const Index keys = partition.parts > 1 ? latent / 2 : 0;
  lay_out(partition,
          std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups),
                                  {keys, keys + partition.parts * (latent - keys)}),
          shape);
  ModelConfig converted = config;
  converted.gqa.reset();
  const LatentSizes& sizes = shape;
  static_cast<LatentSizes&>(converted.latent.emplace()) = sizes;
  return converted.cache_bytes_per_token_on_device(tp);
}

Json or_null(const std::optional<Index>& number) {
  return number ? Json(*number) : Json(nullptr);
}

Json to_json(const Model& model) {
  const ModelConfig& c = model.config();
  Json out;
  out["model_type"] = c.model_type;
  out["family"] = c.family->name;
  out["attention"] = c.gqa ? "gqa" : c.latent->form;
  out["num_hidden_layers"] = c.num_hidden_layers;
  out["hidden_size"] = c.hidden_size;
  out["vocab_size"] = c.vocab_size;
  out["num_attention_heads"] = c.num_attention_heads;
  if (c.gqa) {
    out["num_key_value_heads"] = c.gqa->num_key_value_heads;
    out["head_dim"] = c.gqa->head_dim;
    out["qk_norm"] = qk_norm_name(c.gqa->qk_norm);
  } else {
    out["kv_lora_rank"] = c.latent->kv_lora_rank;
    out["qk_rope_head_dim"] = c.latent->qk_rope_head_dim;
    out["qk_nope_head_dim"] = c.latent->qk_nope_head_dim;
    out["v_head_dim"] = c.latent->v_head_dim;
    out["latents"] = c.latent->branches.size();
    out["shared_ranks"] = c.latent->shared_ranks;
  }
  if (c.experts) {
    out["experts"] = {{"count", c.experts->count},
                      {"per_token", c.experts->per_token},
                      {"shared", c.experts->shared},
                      {"first_layer", c.experts->first_layer}};
  }
  out["rope_type"] = c.rotary.rope_type;
  out["dtype"] = torch_name(c.dtype);
  out["tensors"] = model.tensors().size();
  out["tensor_bytes"] = model.checkpoint().tensor_bytes();
  out["cache_bytes_per_token"] = c.cache_bytes_per_token();
  for (const Index tp : reported_tp) {
    out["cache_bytes_per_token_per_device"][std::to_string(tp)] =
        or_null(c.cache_bytes_per_token_on_device(tp));
  }
  for (const Target& target : targets_of(c)) {
    for (const Index tp : reported_tp) {
      out["targets"][target.name][std::to_string(tp)] = or_null(target_bytes(c, target, tp));
    }
  }
  out["readers"] = readers_of(c);
  return out;
}

void print_table(const Options& options, const Model& model) {
  const ModelConfig& c = model.config();
  std::printf("%s: %s, %td layers, hidden %td, vocabulary %td\n", options.model.c_str(),
              std::string(c.family->name).c_str(), c.num_hidden_layers, c.hidden_size, c.vocab_size);
  if (c.gqa) {
    std::printf("attention: GQA, %td query heads on %td key/value heads of %td%s\n", c.num_attention_heads,
                c.gqa->num_key_value_heads, c.gqa->head_dim,
                normalises_keys(c) ? ", queries and keys normalised" : "");
  } else {
    std::string form = c.latent->form;
    std::transform(form.begin(), form.end(), form.begin(),
                   [](unsigned char letter) { return std::toupper(letter); });
    const std::size_t latents = c.latent->branches.size();
    std::printf(
        "attention: %s, %td heads, %zu latent%s of %td elements in all + rotary key %td, nope %td, v %td\n",
        form.c_str(), c.num_attention_heads, latents, latents == 1 ? "" : "s", c.latent->kv_lora_rank,
        c.latent->qk_rope_head_dim, c.latent->qk_nope_head_dim, c.latent->v_head_dim);
  }
  if (c.experts) {
    std::printf("experts: %td of %td for each token and %td shared, from layer %td on\n",
                c.experts->per_token, c.experts->count, c.experts->shared, c.experts->first_layer);
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
  const std::vector<Target> targets = targets_of(c);
  for (const Target& target : targets) {
    line(target.name.c_str(), [&](Index tp) { return target_bytes(c, target, tp); });
  }
  if (!targets.empty()) {
    std::puts("(percentages: of this cache, on each device when there is one for each latent)");
  }
  for (const std::string& reader : readers_of(c)) {
    std::printf("%s\n", reader.c_str());
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

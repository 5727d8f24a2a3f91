#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <map>
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
  std::optional<Index> context;
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

// Of a result, and where every layer slides, there is nothing more to make.
std::vector<Target> targets_of(const ModelConfig& config) {
  std::vector<Target> out;
  if ((config.latent && (config.gqa || config.latent->branches.size() != 1)) ||
      config.sliding_layers().others(config.num_hidden_layers).empty()) {
    return out;
  }
  for (const CacheShape& shape : served_shapes) {
    if (config.gqa && shape.cache_elements() < config.cache_elements() &&
        shape.rotary <= config.gqa->rotating_keys()) {
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

// The checkpoint as such a target; nothing where there is no room for it. Sliding layers stay as they are.
std::optional<ModelConfig> converted_config(const ModelConfig& config, const Target& target) {
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
  const LatentSizes& sizes = shape;
  static_cast<LatentSizes&>(converted.latent.emplace()) = sizes;
  const LayerSet growing = config.sliding_layers().others(config.num_hidden_layers);
  for (const Index i : growing.layers()) {
    converted.attention[static_cast<std::size_t>(i)].kind = AttentionKind::latent;
  }
  return converted;
}

LayerSet latent_layers(const ModelConfig& config) {
  std::vector<Index> out;
  for (Index i = 0; i < config.num_hidden_layers; ++i) {
    if (config.is_latent(i)) {
      out.push_back(i);
    }
  }
  return LayerSet(std::move(out));
}

// Layers by what they are.
Json layers_json(const ModelConfig& config) {
  const LayerSet latent = latent_layers(config);
  Json out;
  out["latent"] = latent.layers();
  out["grouped_query"] = latent.others(config.num_hidden_layers).layers();
  out["sliding"] = config.sliding_layers().layers();
  out["without_rotary"] = config.still_layers().layers();
  return out;
}

Json by_context(const ModelConfig& config) {
  Json out;
  const CacheByContext bytes = config.cache_by_context();
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    out[std::to_string(reported_contexts[i])] = bytes[i];
  }
  return out;
}

Json or_null(const std::optional<Index>& number) {
  return number ? Json(*number) : Json(nullptr);
}

Json to_json(const Model& model) {
  const ModelConfig& c = model.config();
  Json out;
  out["model_type"] = c.model_type;
  out["family"] = c.family->name;
  out["attention"] = c.latent ? c.latent->form : "gqa";
  out["num_hidden_layers"] = c.num_hidden_layers;
  out["hidden_size"] = c.hidden_size;
  out["vocab_size"] = c.vocab_size;
  out["num_attention_heads"] = c.num_attention_heads;
  if (c.gqa) {
    out["num_key_value_heads"] = c.gqa->num_key_value_heads;
    out["head_dim"] = c.gqa->head_dim;
    out["rotary_dim"] = c.gqa->rotary_dim;
    out["qk_norm"] = qk_norm_name(c.gqa->qk_norm);
  }
  if (c.latent) {
    out["kv_lora_rank"] = c.latent->kv_lora_rank;
    out["qk_rope_head_dim"] = c.latent->qk_rope_head_dim;
    out["qk_nope_head_dim"] = c.latent->qk_nope_head_dim;
    out["v_head_dim"] = c.latent->v_head_dim;
    out["latents"] = c.latent->branches.size();
    out["shared_ranks"] = c.latent->shared_ranks;
  }
  out["layers"] = layers_json(c);
  if (c.experts) {
    out["experts"] = {{"count", c.experts->count},
                      {"per_token", c.experts->per_token},
                      {"intermediate_size", c.experts->intermediate_size},
                      {"shared_intermediate_size", c.experts->shared_size},
                      {"shared_gate", c.experts->shared_gate},
                      {"first_layer", c.experts->first_layer},
                      {"layers", c.expert_layers()}};
  }
  out["rope_type"] = c.rotary.rope_type;
  out["dtype"] = torch_name(c.dtype);
  out["tensors"] = model.tensors().size();
  out["tensor_bytes"] = model.checkpoint().tensor_bytes();
  out["cache_bytes_per_token"] = c.cache_bytes_per_token();
  out["cache_bytes_at_context"] = by_context(c);
  for (const Index tp : reported_tp) {
    out["cache_bytes_per_token_per_device"][std::to_string(tp)] =
        or_null(c.cache_bytes_per_token_on_device(tp));
  }
  for (const Target& target : targets_of(c)) {
    const std::optional<ModelConfig> converted = converted_config(c, target);
    for (const Index tp : reported_tp) {
      out["targets"][target.name][std::to_string(tp)] =
          or_null(converted ? converted->cache_bytes_per_token_on_device(tp) : std::nullopt);
    }
    out["targets_at_context"][target.name] = converted ? by_context(*converted) : Json(nullptr);
  }
  out["readers"] = readers_of(c);
  return out;
}

std::string shared_text(const ExpertsGeometry& experts) {
  if (experts.shared_size == 0) {
    return "none shared";
  }
  return "a shared one of " + std::to_string(experts.shared_size) +
         (experts.shared_gate ? " with a gate" : "");
}

std::string rotating_text(const GqaGeometry& gqa) {
  return gqa.rotary_dim == gqa.head_dim ? ""
                                        : ", of which " + std::to_string(gqa.rotary_dim) + " numbers rotate";
}

// Which layers are what, where they are not all alike.
void print_layers(const ModelConfig& c) {
  std::map<Index, std::vector<Index>> sliding;  // by window
  const LayerSet all_sliding = c.sliding_layers();
  for (const Index i : all_sliding.layers()) {
    sliding[*c.spec(i).window].push_back(i);
  }
  if (c.latent && c.gqa) {
    std::printf("latent layers: %s of %td\n", latent_layers(c).text().c_str(), c.num_hidden_layers);
  }
  for (const auto& [window, layers] : sliding) {
    std::printf("sliding window of %td positions: layers %s of %td\n", window,
                LayerSet(layers).text().c_str(), c.num_hidden_layers);
  }
  if (const LayerSet still = c.still_layers(); !still.empty()) {
    std::printf("no rotary embedding: layers %s of %td\n", still.text().c_str(), c.num_hidden_layers);
  }
}

// A table with a column for each of the sizes, and a line for the checkpoint and for every target; figure:
// nothing where there is none.
template <std::size_t columns, typename Figure>
void print_figures(const char* title, const std::array<std::string, columns>& heads,
                   const ModelConfig& config, const std::vector<Target>& targets, const Figure& figure) {
  std::printf("%-32s", title);
  for (const std::string& head : heads) {
    std::printf(" %10s", head.c_str());
  }
  std::puts("");
  const auto line = [&](const std::string& name, const std::optional<ModelConfig>& of) {
    std::printf("  %-30s", name.c_str());
    for (std::size_t i = 0; i < columns; ++i) {
      const std::optional<Index> here = of ? figure(*of, i) : std::nullopt;
      std::printf(" %10s", here ? std::to_string(*here).c_str() : "-");
    }
    std::puts("");
  };
  line("as it is", config);
  for (const Target& target : targets) {
    line(target.name, converted_config(config, target));
  }
}

void print_table(const Options& options, const Model& model) {
  const ModelConfig& c = model.config();
  std::printf("%s: %s, %td layers, hidden %td, vocabulary %td\n", options.model.c_str(),
              std::string(c.family->name).c_str(), c.num_hidden_layers, c.hidden_size, c.vocab_size);
  if (c.gqa) {
    std::printf("attention: GQA, %td query heads on %td key/value heads of %td%s%s\n", c.num_attention_heads,
                c.gqa->num_key_value_heads, c.gqa->head_dim, rotating_text(*c.gqa).c_str(),
                normalises_keys(c) ? ", queries and keys normalised" : "");
  }
  if (c.latent) {
    std::string form = c.latent->form;
    std::transform(form.begin(), form.end(), form.begin(),
                   [](unsigned char letter) { return std::toupper(letter); });
    const std::size_t latents = c.latent->branches.size();
    std::printf(
        "attention: %s, %td heads, %zu latent%s of %td elements in all + rotary key %td, nope %td, v %td\n",
        form.c_str(), c.num_attention_heads, latents, latents == 1 ? "" : "s", c.latent->kv_lora_rank,
        c.latent->qk_rope_head_dim, c.latent->qk_nope_head_dim, c.latent->v_head_dim);
  }
  print_layers(c);
  if (c.experts) {
    std::printf("experts: %td of %td for each token, each of %td, %s, in %td of %td layers\n",
                c.experts->per_token, c.experts->count, c.experts->intermediate_size,
                shared_text(*c.experts).c_str(), c.expert_layers(), c.num_hidden_layers);
  }
  std::printf("rope: %s; %zu tensors, %s as %s\n\n", c.rotary.rope_type.c_str(), model.tensors().size(),
              bytes_text(model.checkpoint().tensor_bytes()).c_str(),
              std::string(torch_name(c.dtype)).c_str());
  const std::vector<Target> targets = targets_of(c);
  std::array<std::string, reported_tp.size()> devices;
  std::transform(reported_tp.begin(), reported_tp.end(), devices.begin(),
                 [](Index tp) { return "TP " + std::to_string(tp); });
  print_figures("cache bytes per token and device", devices, c, targets,
                [](const ModelConfig& of, std::size_t i) {
                  return of.cache_bytes_per_token_on_device(reported_tp[i]);
                });
  std::array<std::string, reported_contexts.size()> contexts;
  std::transform(reported_contexts.begin(), reported_contexts.end(), contexts.begin(), context_text);
  print_figures("cache bytes of so many tokens", contexts, c, targets,
                [](const ModelConfig& of, std::size_t i) {
                  return std::optional(of.cache_bytes(reported_contexts[i]));
                });
  if (!targets.empty()) {
    std::printf("(percentages: of %s cache, on each device when there is one for each latent)\n",
                !c.sliding_layers().empty() ? "a converted layer's" : "this");
  }
  for (const std::string& reader : readers_of(c)) {
    std::printf("%s\n", reader.c_str());
  }
}

int run(const Options& options) {
  const Model model = Model::open(options.model, options.context);
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
  add_context_option(*command, options->context);
  command->callback([options, &chosen] { chosen = [options] { return run(*options); }; });
}

}  // namespace relatent

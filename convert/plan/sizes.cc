#include "convert/plan/sizes.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "convert/plan/checks.h"
#include "formats/error.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Key/value heads that the query heads of a group read.
Index heads_read(const Partition& partition, Index group, Index heads, const GqaGeometry& gqa) {
  const Index per_key = heads / gqa.num_key_value_heads;
  const Index first = partition.first_head(group, heads) / per_key;
  const Index last = (partition.first_head(group + 1, heads) - 1) / per_key;
  return last + 1 - first;
}

std::string rotating_in_words(const GqaGeometry& gqa) {
  return gqa.rotary_dim == gqa.head_dim
             ? "num_key_value_heads * head_dim"
             : "the coordinates that rotate, num_key_value_heads * " + std::to_string(gqa.rotary_dim);
}

// A lossless form holds what of the source is not redundant.
void choose_lossless(const ConvertOptions& options, const Partition& partition, const GqaGeometry& gqa,
                     const LosslessSizes& sizes, LatentShape& shape) {
  if (options.rank || options.rope_dim || options.kv_budget || options.per_device || options.key_rank) {
    fail_usage(
        "--method lossless fixes rank and rotary size: leave out --rank, --rope-dim, --key-rank, "
        "--per-device "
        "and --kv-budget");
  }
  shape.qk_rope_head_dim = sizes.rope_dim();
  shape.qk_nope_head_dim = gqa.head_dim - gqa.rotary_dim;
  lay_out(partition, sizes.groups, shape);
}

// Coordinates of each group's latents, from whichever option gives them.
GroupSizes choose_group(const ConvertOptions& options, const ConvertInputs& inputs, Index rope_dim) {
  const Partition& partition = inputs.partition;
  const ModelConfig& config = inputs.source.config();
  const int given = (options.rank ? 1 : 0) + (options.kv_budget ? 1 : 0) + (options.per_device ? 1 : 0);
  if (given != 1) {
    fail_usage(given == 0
                   ? "--method " + std::string(method_name(options.method)) +
                         " needs --rank or --kv-budget (or --per-device where devices split the latents)"
                   : "--rank and --kv-budget, or --per-device, all decide the size of the latents: give one");
  }
  GroupSizes out;
  if (options.relatent.order != LatentOrder::shared) {
    if (!inputs.form->slices) {
      fail_usage("--order belongs to --to tpla");
    }
    if (options.key_rank) {
      fail_usage("--key-rank belongs to --order shared, not to " +
                 std::string(order_name(options.relatent.order)));
    }
  } else if (partition.parts > 1) {
    if (!options.key_rank) {
      fail_usage("--key-rank is missing: how many coordinates the latents share");
    }
    out.key_rank = *options.key_rank;
    if (out.key_rank < 0) {
      fail_usage("--key-rank must not be negative");
    }
  } else if (options.key_rank) {
    fail_usage("--key-rank belongs to forms whose latents share their keys, tpla and mlra");
  }
  if (options.per_device) {
    const Index own = *options.per_device - rope_dim - out.key_rank - layout_elements(options, inputs);
    if (own <= 0) {
      fail_usage("--per-device " + std::to_string(*options.per_device) +
                 " leaves no room for values beside a rotary key of " + std::to_string(rope_dim) +
                 (out.key_rank > 0 ? " and shared coordinates of " + std::to_string(out.key_rank) : ""));
    }
    out.rank = out.key_rank + partition.parts * own;
    return out;
  }
  const Index layout = layout_elements(options, inputs) * partition.latents();
  const Index total =
      options.rank ? *options.rank : budget_elements(*options.kv_budget, config) - rope_dim - layout;
  if (!options.rank && total <= 0) {
    fail_usage("--kv-budget leaves no room for a latent beside a rotary key of " + std::to_string(rope_dim) +
               (layout > 0 ? " and the " + std::to_string(layout) + " that the layout needs" : ""));
  }
  if (options.rank && total % partition.groups != 0) {
    fail_usage("--rank " + std::to_string(total) + " does not divide into " +
               std::to_string(partition.groups) + " latents");
  }
  out.rank = total / partition.groups;
  if (options.relatent.order != LatentOrder::shared && out.rank % partition.parts != 0) {
    fail_usage("--rank " + std::to_string(out.rank) + " does not divide into " +
               std::to_string(partition.parts) + " slices");
  }
  if (total <= 0) {
    fail_usage("--rank " + std::to_string(total) + " must be at least 1");
  }
  if (out.rank - out.key_rank < partition.parts) {
    fail_usage("--rank " + std::to_string(total) +
               " leaves less than one coordinate for each latent beside --key-rank " +
               std::to_string(out.key_rank));
  }
  return out;
}

// An MLA source in another layout: nothing of it changes.
void keep_mla(const ConvertOptions& options, const ConvertInputs& inputs, LatentShape& shape) {
  const LatentGeometry& latent = *inputs.source.config().latent;
  if (options.rank || options.rope_dim || options.kv_budget || options.norm_coordinates || options.pad_rank) {
    fail_usage(
        "--method lossless keeps the sizes of an MLA source: leave out --rank, --rope-dim, --kv-budget, "
        "--norm-coordinates and --pad-rank");
  }
  shape.qk_nope_head_dim = latent.qk_nope_head_dim;
  shape.qk_rope_head_dim = latent.qk_rope_head_dim;
  shape.v_head_dim = latent.v_head_dim;
  shape.norm = LatentNorm::branch;
  lay_out(inputs.partition, {{0, latent.kv_lora_rank}}, shape);
}

// Sizes for an MLA source: its rotary key stays as it is.
void choose_from_mla(const ConvertOptions& options, const ConvertInputs& inputs, LatentShape& shape) {
  const Partition& partition = inputs.partition;
  const ModelConfig& config = inputs.source.config();
  const LatentGeometry& latent = *config.latent;
  if (only_relays_out(options, inputs)) {
    keep_mla(options, inputs, shape);
    return;
  }
  if (options.method == Method::transmla || options.method == Method::lossless) {
    fail_usage(
        options.method == Method::transmla
            ? "--method transmla converts grouped-query models; this one has latents already"
            : "--method lossless cannot split an MLA latent: scores and values of every head read all of it, "
              "so each device would keep the whole");
  }
  if (!inputs.form->latent_source) {
    fail_usage("the source is MLA already: give --to gla, tpla or mlra, or --method lossless with --engine " +
               join_words(engine_names([](const EngineTraits& t) { return t.normed_latent; }), "or") +
               " for another layout of it");
  }
  if (options.rope_dim && *options.rope_dim != latent.qk_rope_head_dim) {
    fail_usage("--rope-dim: an MLA source keeps its rotary key of " +
               std::to_string(latent.qk_rope_head_dim));
  }
  if (options.relatent.plain_list) {
    fail_usage("--plain-list: an MLA source keeps its own list of rotary frequencies");
  }
  shape.qk_nope_head_dim = latent.qk_nope_head_dim;
  shape.qk_rope_head_dim = latent.qk_rope_head_dim;
  shape.v_head_dim = latent.v_head_dim;
  const GroupSizes group = choose_group(options, inputs, shape.qk_rope_head_dim);
  if (options.relatent.order == LatentOrder::shared) {
    shape.norm = LatentNorm::replicated;
    shape.norm_rank = latent.kv_lora_rank;
  } else {
    shape.norm = LatentNorm::branch;
    if (group.rank != latent.kv_lora_rank) {
      fail_usage("--order " + std::string(order_name(options.relatent.order)) +
                 " slices the whole latent of " + std::to_string(latent.kv_lora_rank) + ", so each of " +
                 std::to_string(partition.parts) + " devices caches " +
                 std::to_string(latent.kv_lora_rank / partition.parts + shape.qk_rope_head_dim));
    }
  }
  if (group.rank > 2 * latent.kv_lora_rank) {
    fail_usage("latents of " + std::to_string(group.rank) +
               " coordinates for each group of heads are more than twice the "
               "source's " +
               std::to_string(latent.kv_lora_rank));
  }
  lay_out(partition, std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups), group), shape);
}

// Decides rank and rotary size from the options.
void choose_sizes(const ConvertOptions& options, const ConvertInputs& inputs,
                  const std::optional<LosslessSizes>& lossless, LatentShape& shape) {
  const Partition& partition = inputs.partition;
  const ModelConfig& config = inputs.source.config();
  if (config.latent) {
    choose_from_mla(options, inputs, shape);
    return;
  }
  const GqaGeometry& gqa = *config.gqa;
  shape.v_head_dim = gqa.head_dim;
  const Index keys = gqa.num_key_value_heads * gqa.head_dim;
  const std::string method(method_name(options.method));
  if (options.method != Method::transmla && (options.fold || options.q_rank)) {
    fail_usage("--fold and --q-rank belong to --method transmla, not to " + method);
  }
  if (options.method != Method::relatent && options.max_nats) {
    fail_usage("--kv-budget auto belongs to --method relatent, not to " + method);
  }
  if (options.method == Method::lossless) {
    choose_lossless(options, partition, gqa, *lossless, shape);
    return;
  }
  shape.qk_nope_head_dim = gqa.head_dim;
  // What never rotates needs no rotary key.
  const Index rotating = gqa.rotating_keys();
  shape.qk_rope_head_dim = options.rope_dim.value_or(gqa.rotary_dim);
  if (shape.qk_rope_head_dim <= 0 || shape.qk_rope_head_dim % 2 != 0 || shape.qk_rope_head_dim > rotating) {
    fail_usage("--rope-dim " + std::to_string(shape.qk_rope_head_dim) + " must be an even number from 2 to " +
               rotating_in_words(gqa) + " = " + std::to_string(rotating));
  }
  const GroupSizes group = choose_group(options, inputs, shape.qk_rope_head_dim);
  const Index read = readable_rank(partition, shape.heads, gqa);
  if (partition.parts > 1 && group.key_rank > read) {
    fail_usage("--key-rank " + std::to_string(group.key_rank) + " must be at most " + std::to_string(read) +
               ", all keys and values that the heads of a latent read");
  }
  const Index full = options.method == Method::transmla ? 2 * keys - shape.qk_rope_head_dim
                     : partition.parts > 1              ? 2 * keys
                                                        : read;
  if (group.rank <= 0 || group.rank > full) {
    const Index found = group.rank * partition.groups;
    fail_usage("--rank " + std::to_string(found) + " must lie between 1 and the full rank " +
               std::to_string(full * partition.groups));
  }
  lay_out(partition, std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups), group), shape);
  if (options.method == Method::transmla) {
    // The smallest fold always fits when the rotary size does.
    check_transmla(
        {shape.qk_rope_head_dim,
         options.fold.value_or(std::max<Index>(1, gqa.head_dim / shape.qk_rope_head_dim)), options.balance},
        gqa.head_dim);
  }
}

// For an engine whose list of rotary frequencies has one base: the source's frequencies that it holds. Fills
// in the rotary size and the stride of the list.
void fit_to_base(double wanted, const ConvertInputs& inputs, ConvertOptions& options) {
  const double base = geometric_base(converted_rotary(inputs).rotating());
  const Index d = inputs.source.config().gqa->rotary_dim;
  // Every s-th frequency of the source, p / 2 of them: base^(s p / d) is the list's base.
  const double product = static_cast<double>(d) * std::log(wanted) / std::log(base);
  const auto whole = static_cast<Index>(std::llround(product));
  const bool exact = std::abs(product - static_cast<double>(whole)) < 1e-6;
  if (!options.rope_dim && exact && whole % 2 == 0 && whole <= d) {
    options.rope_dim = whole;
  }
  const Index p = options.rope_dim.value_or(0);
  if (!exact || whole > d || p <= 0 || p % 2 != 0 || whole % p != 0) {
    const std::string why = "--engine " + options.engine + " has rotary frequencies of base " +
                            std::to_string(static_cast<Index>(wanted)) +
                            " only, and the source's are of base " + std::to_string(static_cast<Index>(base));
    fail_usage(
        !exact || whole > d ? why : why + ": --rope-dim must be an even divisor of " + std::to_string(whole));
  }
  options.relatent.list_stride = whole / p;
}

// A shape that kernels have, where nothing was asked for, or where a budget leaves little more than its
// numbers. A checkpoint that caches less than all of them gets none.
std::optional<CacheShape> default_shape(const ConvertOptions& options, const ModelConfig& config) {
  if (options.method == Method::lossless || options.rank || options.rope_dim || options.per_device ||
      options.max_nats || options.pad_rank) {
    return std::nullopt;
  }
  const Index numbers =
      options.kv_budget ? budget_elements(*options.kv_budget, config) : config.cache_elements() - 1;
  for (const CacheShape& shape : served_shapes) {
    const bool near = !options.kv_budget || 8 * numbers < 9 * shape.cache_elements();
    if (shape.cache_elements() <= numbers && near && shape.rotary <= config.gqa->rotating_keys()) {
      return shape;
    }
  }
  return std::nullopt;
}

// Turns the shape of the cache, given or chosen, into rotary size and rank. What the rank leaves of the
// latent is filled up by the layout.
void fit_to_shape(const ConvertInputs& inputs, ConvertOptions& options) {
  const ModelConfig& config = inputs.source.config();
  const EngineTraits traits = inputs.engine->traits();
  const bool can = inputs.partition.whole() && traits.pads_latent && config.gqa;
  if (!options.shape && can) {
    options.shape = default_shape(options, config);
  }
  if (!options.shape) {
    return;
  }
  const CacheShape shape = *options.shape;
  const std::string given = "--shape " + to_string(shape);
  if (!can) {
    fail_usage(!inputs.partition.whole()
                   ? given + " is the size of one latent, --to mla: give --per-device"
                   : given + " belongs to --engine " +
                         join_words(engine_names([](const EngineTraits& t) { return t.pads_latent; })));
  }
  if (options.method == Method::lossless) {
    fail_usage("--method lossless fixes rank and rotary size: leave out --shape");
  }
  if (options.max_nats) {
    fail_usage("--kv-budget auto chooses the sizes: leave out --shape");
  }
  if (options.pad_rank) {
    fail_usage(given + " says what the latent is padded to: leave out --pad-rank");
  }
  const Index keys = config.gqa->num_key_value_heads * config.gqa->head_dim;
  // A plain list holds each frequency of a head once.
  const Index most = traits.any_frequencies ? config.gqa->rotating_keys() : config.gqa->rotary_dim;
  if (shape.rotary % 2 != 0 || shape.rotary > most) {
    fail_usage(given + ": the rotary key must be an even number of at most " + std::to_string(most) +
               " for this checkpoint and engine");
  }
  if (options.rope_dim.value_or(shape.rotary) != shape.rotary) {
    fail_usage(given + " and --rope-dim " + std::to_string(*options.rope_dim) + " contradict each other");
  }
  options.rope_dim = shape.rotary;
  const Index own = layout_elements(options, inputs);
  const Index room = shape.latent - own;
  if (room < 1 || options.rank.value_or(1) > room) {
    fail_usage(given + " has room for a rank of " + std::to_string(std::max<Index>(0, room)) +
               " beside the " + std::to_string(own) + " coordinates that the layout needs for itself");
  }
  if (options.rank && options.kv_budget) {
    return;  // refused where sizes are chosen
  }
  if (!options.rank) {
    const Index full = 2 * keys - (options.method == Method::transmla ? shape.rotary : 0);
    options.rank = std::min(room, full);
    if (options.kv_budget) {
      options.rank =
          std::min(*options.rank, budget_elements(*options.kv_budget, config) - shape.rotary - own);
      if (*options.rank < 1) {
        fail_usage("--kv-budget leaves no room for a latent beside a rotary key of " +
                   std::to_string(shape.rotary));
      }
      options.kv_budget.reset();
    }
  }
  if (traits.normed_latent) {
    options.pad_rank = shape.latent;
    options.norm_coordinates.reset();
  }
}

// Refuses sizes that the engine cannot hold, and decides what it needs beside them.
void fit_to_engine(const ConvertOptions& options, const ModelConfig& config, const Engine& engine,
                   LatentShape& shape) {
  const EngineTraits traits = engine.traits();
  const bool plain = (options.method == Method::relatent || options.method == Method::weights_only) &&
                     has_plain_list(options, engine);
  if (config.gqa && plain && shape.qk_rope_head_dim > config.gqa->rotary_dim) {
    fail_usage("--rope-dim " + std::to_string(shape.qk_rope_head_dim) + " is more than a plain list holds, " +
               (config.gqa->rotary_dim == config.gqa->head_dim ? "head_dim = " : "what rotates of a head, ") +
               std::to_string(config.gqa->rotary_dim));
  }
  if (const std::string why = engine.why_not(config, shape); !why.empty()) {
    fail_usage("--engine " + options.engine + ": " + why);
  }
  if (options.shape && !traits.normed_latent) {
    shape.dead_coordinates = options.shape->latent - traits.own_coordinates - shape.kv_lora_rank;
  }
  if (!traits.normed_latent) {
    return;
  }
  if (config.latent) {
    return;  // its norm is the source's
  }
  shape.norm_coordinates = options.norm_coordinates.value_or(default_norm_coordinates);
  if (options.pad_rank) {
    if (*options.pad_rank < shape.kv_lora_rank) {
      fail_usage("--pad-rank " + std::to_string(*options.pad_rank) + " is below the rank " +
                 std::to_string(shape.kv_lora_rank));
    }
    shape.norm_coordinates = *options.pad_rank - shape.kv_lora_rank;
  }
}

bool any_has(const Model& source, const LayerSet& layers, Role role) {
  return std::any_of(layers.layers().begin(), layers.layers().end(),
                     [&](Index layer_idx) { return source.has(role, layer_idx); });
}

}  // namespace

Index budget_elements(double budget, const ModelConfig& config) {
  if (!(budget > 0 && budget <= 1)) {
    fail_usage("--kv-budget must lie above 0 and at most at 1");
  }
  return static_cast<Index>(std::floor(budget * static_cast<double>(config.cache_elements())));
}

Index layout_elements(const ConvertOptions& options, const ConvertInputs& inputs) {
  const EngineTraits traits = inputs.engine->traits();
  if (!inputs.source.config().gqa) {
    return 0;
  }
  return traits.normed_latent ? options.norm_coordinates.value_or(default_norm_coordinates)
                              : traits.own_coordinates;
}

ConvertOptions with_engine_sizes(const ConvertOptions& options, const ConvertInputs& inputs) {
  const ModelConfig& config = inputs.source.config();
  const Engine& engine = *inputs.engine;
  const EngineTraits traits = engine.traits();
  ConvertOptions out = options;
  if (traits.fixed_base) {
    fit_to_base(*traits.fixed_base, inputs, out);
  }
  if (!out.rank && !out.kv_budget && !out.per_device && config.gqa) {
    out.rank = engine.default_rank(config);
  }
  fit_to_shape(inputs, out);
  return out;
}

std::optional<Index> query_rank(const ConvertOptions& options, const ConvertInputs& inputs) {
  const ModelConfig& config = inputs.source.config();
  if (inputs.engine->traits().normed_query) {
    return config.hidden_size;
  }
  if (config.latent) {
    return config.latent->q_lora_rank;
  }
  return options.q_rank ? options.q_rank : inputs.engine->query_rank(config);
}

bool has_plain_list(const ConvertOptions& options, const Engine& engine) {
  return options.relatent.plain_list || !engine.traits().any_frequencies;
}

Index readable_rank(const Partition& partition, Index heads, const GqaGeometry& gqa) {
  Index least = gqa.num_key_value_heads;
  for (Index g = 0; g < partition.groups; ++g) {
    least = std::min(least, heads_read(partition, g, heads, gqa));
  }
  return 2 * least * gqa.head_dim;
}

LosslessSizes lossless_sizes(const ConvertInputs& inputs) {
  const Model& source = inputs.source;
  const auto rotating = static_cast<Index>(converted_rotary(inputs).rotating_pairs());
  const LayerSet converted = converted_layers(inputs);
  const std::vector<Index>& layers = converted.layers();
  const std::vector<LosslessSizes> each = parallel_made(layers.size(), [&](std::size_t i) {
    return lossless_sizes(maps_of(source.keys_and_values(layers[i])), rotating, inputs.partition);
  });
  return std::accumulate(each.begin() + 1, each.end(), each.front(), larger_of);
}

LatentShape choose_shape(const ConvertOptions& options, const ConvertInputs& inputs,
                         const std::optional<LosslessSizes>& lossless) {
  const Model& source = inputs.source;
  const ModelConfig& config = source.config();
  LatentShape shape;
  shape.heads = config.num_attention_heads;
  const LayerSet converted = converted_layers(inputs);
  const Index first = converted.layers().front();
  shape.has_q_bias = any_has(source, converted, Role::q_bias);
  bool biased = shape.has_q_bias || source.has(Role::k_bias, first) || source.has(Role::v_bias, first);
  if (reads_normed_heads(inputs)) {
    shape.normed_heads = {config.gqa->num_key_value_heads, config.gqa->head_dim, config.gqa->qk_norm, biased};
    if (options.q_rank) {
      fail_usage("--q-rank: queries of this checkpoint are normalised head by head, and stay as they are");
    }
    // They are those of the normed heads.
    biased = false;
    shape.has_q_bias = false;
  }
  shape.form = options.form;
  shape.residual_multiplier = config.residual_multiplier;
  shape.attention_bias = options.method != Method::lossless || biased || source.has(Role::o_bias, first);
  const bool carries_bias = any_has(source, inputs.carried, Role::q_bias) ||
                            any_has(source, inputs.carried, Role::k_bias) ||
                            any_has(source, inputs.carried, Role::v_bias);
  shape.carried = {inputs.carried, carries_bias, any_has(source, inputs.carried, Role::o_bias)};
  choose_sizes(options, inputs, lossless, shape);
  if (options.q_rank && config.gqa) {
    const Index full = std::min(config.hidden_size, shape.heads * config.gqa->head_dim);
    if (*options.q_rank <= 0 || *options.q_rank > full) {
      fail_usage("--q-rank " + std::to_string(*options.q_rank) + " must lie between 1 and the full rank " +
                 std::to_string(full));
    }
  }
  shape.q_lora_rank = query_rank(options, inputs);
  fit_to_engine(options, config, *inputs.engine, shape);
  return shape;
}

std::string unserved_shape(const ConvertOptions& options, const EngineTraits& traits) {
  if (!options.shape || traits.any_cache_shape ||
      std::find(served_shapes.begin(), served_shapes.end(), *options.shape) != served_shapes.end()) {
    return "";
  }
  return "--shape " + to_string(*options.shape) +
         " fits no kernel of vLLM, SGLang, FlashMLA or FlashInfer: 512+64 and 256+64 do";
}

}  // namespace relatent

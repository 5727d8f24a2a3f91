#include "convert/convert.h"

#include <Eigen/Dense>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>

#include "convert/engines/deepseek.h"
#include "convert/facts.h"
#include "convert/forms/mla.h"
#include "convert/forms/partition.h"
#include "convert/in_flight.h"
#include "convert/latent/lossless.h"
#include "convert/latent/transmla.h"
#include "convert/model/forward.h"
#include "convert/naming_layer.h"
#include "formats/error.h"
#include "linalg/heap.h"
#include "linalg/packed.h"

namespace relatent {
namespace {

// Distances assumed when there is no calibration, and sequences used to compare folds.
constexpr Index assumed_length = 1024;
constexpr Index fold_sequences = 8;
// Extra latent coordinates for engines that normalise the latent.
constexpr Index default_norm_coordinates = 16;
// Seconds of copying, or of converting layers that do not depend on each other, which may be lost.
constexpr double record_every = 5;

// Entries of the journal.
constexpr const char* trial_entry = "trial";
constexpr const char* fold_entry = "fold";
constexpr const char* carried_entry = "carried";
constexpr const char* layers_entry = "layers";
constexpr const char* fold_error_entry = "fold error";
constexpr const char* measured_entry = "measured";
// The file with the streams, in the work folder.
constexpr const char* state_name = "streams";

std::string text(Index n) {
  return std::to_string(n);
}

// Why a source tensor is not in the output, or nothing when it is.
std::string_view redundant(Role role, const ModelConfig& config) {
  if (role == Role::inv_freq) {
    return "a buffer that the config repeats";
  }
  if (role == Role::lm_head && config.tie_word_embeddings) {
    return "tied to the embedding by the config";
  }
  return "";
}

// Rounding a router's bias would send tokens to other experts, and engines keep it in float32 too.
DType output_dtype(Role role, DType stored, const std::optional<DType>& wanted) {
  return role == Role::router_bias ? stored : wanted.value_or(stored);
}

// Layers that predict further tokens read the stream of a model that is not there any more.
void leave_out_prediction(std::vector<PlacedTensor>& tensors, const ModelConfig& config, ConvertPlan& plan) {
  std::map<Index, Index> count;
  for (const PlacedTensor& tensor : tensors) {
    if (tensor.role == Role::prediction) {
      ++count[tensor.layer_idx];
    }
  }
  std::erase_if(tensors, [](const PlacedTensor& tensor) { return tensor.role == Role::prediction; });
  for (const auto& [layer_idx, tensors_of_layer] : count) {
    plan.left_out.push_back("model.layers." + text(layer_idx) + ".*: " + text(tensors_of_layer) +
                            " tensors of a layer that predicts further tokens, behind the " +
                            text(config.num_hidden_layers) + " layers of the model");
  }
  if (!count.empty()) {
    plan.warnings.emplace_back(
        "layers of the source that predict further tokens are left out (model.layers." +
        text(count.begin()->first) + (count.size() > 1 ? " and on" : "") + ")");
  }
}

bool is_mlp_bias(Role role) {
  return role == Role::gate_bias || role == Role::up_bias || role == Role::down_bias;
}

// Reciprocals of the input norm's gains bring its output to mean square 1, so that a query which passes a
// norm of its own comes through unchanged.
void pass_query_through_norm(const Model& source, Index layer_idx, DType dtype, LatentAttention& attention) {
  const RowVectorF gain = source.input_norm(layer_idx).gain;
  const Index hidden = gain.size();
  attention.q_down = {MatrixF::Zero(hidden, hidden), {}};
  for (Index i = 0; i < hidden; ++i) {
    // What q_b_proj undoes is the reciprocal as it is stored.
    const float down = rounded(dtype, 1 / gain(i));
    if (!std::isfinite(down) || down == 0 || !std::isfinite(1 / down)) {
      const std::string& name = source.name_of(Role::input_norm, layer_idx);
      fail_input({source.checkpoint().file_of(name).path(), name,
                  "holds a gain without a reciprocal in the output's dtype", "gains that are not 0",
                  std::to_string(gain(i)), "the engine's query always passes a norm"});
    }
    attention.q_down.weight(i, i) = down;
    attention.q.weight.col(i) /= down;
  }
  attention.q_norm = {RowVectorF::Ones(hidden), 1e-6F};
}

void check_source(const Model& source) {
  const ModelConfig& config = source.config();
  const std::filesystem::path path = source.checkpoint().config_path();
  if (config.latent && config.latent->branches.size() != 1) {
    fail_input({path, "", "latent_form", "a grouped-query or MLA model", config.latent->form,
                "a model whose latents are partitioned already is a result, not a source"});
  }
  if (config.latent && config.latent->attention_bias) {
    fail_input({path, "", "attention_bias", "false", "true",
                "the norm of a latent with biases cannot be kept when the latent is divided"});
  }
  if (config.sliding_window && *config.sliding_window < config.max_position_embeddings) {
    fail_input(
        {path, "", "sliding_window", "none, or at least max_position_embeddings",
         text(*config.sliding_window),
         "latent engines attend to every position: set max_position_embeddings to the window, within which "
         "the two are the same"});
  }
  for (const PlacedTensor& tensor : source.tensors()) {
    if (is_mlp_bias(tensor.role)) {
      fail_input({source.checkpoint().folder(), tensor.name, "has no place in a latent layout",
                  "an MLP without biases", "a bias", ""});
    }
  }
}

// Numbers per token and layer that a budget leaves.
Index budget_numbers(double budget, const ModelConfig& config) {
  if (!(budget > 0 && budget <= 1)) {
    fail_usage("--kv-budget must lie above 0 and at most at 1");
  }
  return static_cast<Index>(std::floor(budget * static_cast<double>(config.cache_numbers())));
}

// What the latents of a lossless form hold: the values that each group's heads read.
void choose_lossless(const ConvertOptions& options, const Partition& partition, const GqaGeometry& gqa,
                     LatentShape& shape) {
  if (options.rank || options.rope_dim || options.kv_budget || options.per_device || options.key_rank) {
    fail_usage(
        "--method lossless fixes rank and rotary size: leave out --rank, --rope-dim, --key-rank, "
        "--per-device "
        "and --kv-budget");
  }
  shape.rope_dim = gqa.num_key_value_heads * gqa.head_dim;
  std::vector<GroupSizes> groups;
  for (Index g = 0; g < partition.groups; ++g) {
    const Index per_key = shape.heads / gqa.num_key_value_heads;
    const Index first = partition.first_head(g, shape.heads) / per_key;
    const Index last = (partition.first_head(g + 1, shape.heads) - 1) / per_key;
    groups.push_back({0, (last + 1 - first) * gqa.head_dim});
  }
  lay_out(partition, groups, shape);
}

// Coordinates of each group's latents, from whichever option gives them.
GroupSizes choose_group(const ConvertOptions& options, const Partition& partition, const ModelConfig& config,
                        Index rope_dim) {
  const int given = (options.rank ? 1 : 0) + (options.kv_budget ? 1 : 0) + (options.per_device ? 1 : 0);
  if (given != 1) {
    fail_usage(given == 0
                   ? "--method " + std::string(method_name(options.method)) +
                         " needs --rank or --kv-budget (or --per-device where devices split the latents)"
                   : "--rank and --kv-budget, or --per-device, all decide the size of the latents: give one");
  }
  GroupSizes out;
  if (options.relatent.order != LatentOrder::shared) {
    if (options.form != "tpla") {
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
    const Index own = *options.per_device - rope_dim - out.key_rank;
    if (own <= 0) {
      fail_usage("--per-device " + text(*options.per_device) +
                 " leaves no room for values beside a rotary key of " + text(rope_dim) +
                 (out.key_rank > 0 ? " and shared coordinates of " + text(out.key_rank) : ""));
    }
    out.rank = out.key_rank + partition.parts * own;
    return out;
  }
  const Index total = options.rank ? *options.rank : budget_numbers(*options.kv_budget, config) - rope_dim;
  if (!options.rank && total <= 0) {
    fail_usage("--kv-budget leaves no room for a latent beside a rotary key of " + text(rope_dim));
  }
  if (options.rank && total % partition.groups != 0) {
    fail_usage("--rank " + text(total) + " does not divide into " + text(partition.groups) + " latents");
  }
  out.rank = total / partition.groups;
  if (options.relatent.order != LatentOrder::shared && out.rank % partition.parts != 0) {
    fail_usage("--rank " + text(out.rank) + " does not divide into " + text(partition.parts) + " slices");
  }
  if (total <= 0) {
    fail_usage("--rank " + text(total) + " must be at least 1");
  }
  if (out.rank - out.key_rank < partition.parts) {
    fail_usage("--rank " + text(total) +
               " leaves less than one coordinate for each latent beside --key-rank " + text(out.key_rank));
  }
  return out;
}

// Sizes for an MLA source: its rotary key stays as it is.
void choose_from_mla(const ConvertOptions& options, const Partition& partition, const ModelConfig& config,
                     LatentShape& shape) {
  const LatentGeometry& latent = *config.latent;
  if (options.method == Method::transmla || options.method == Method::lossless) {
    fail_usage(
        options.method == Method::transmla
            ? "--method transmla converts grouped-query models; this one has latents already"
            : "--method lossless cannot split an MLA latent: scores and values of every head read all of it, "
              "so each device would keep the whole");
  }
  if (options.form == "mla") {
    fail_usage("the source is MLA already: give --to gla, tpla or mlra");
  }
  if (options.rope_dim && *options.rope_dim != latent.qk_rope_head_dim) {
    fail_usage("--rope-dim: an MLA source keeps its rotary key of " + text(latent.qk_rope_head_dim));
  }
  if (options.relatent.plain_list) {
    fail_usage("--plain-list: an MLA source keeps its own list of rotary frequencies");
  }
  shape.nope_dim = latent.qk_nope_head_dim;
  shape.rope_dim = latent.qk_rope_head_dim;
  shape.v_dim = latent.v_head_dim;
  shape.q_rank = latent.q_lora_rank;
  const GroupSizes group = choose_group(options, partition, config, shape.rope_dim);
  if (options.relatent.order == LatentOrder::shared) {
    shape.norm = LatentNorm::replicated;
    shape.norm_rank = latent.kv_lora_rank;
  } else {
    shape.norm = LatentNorm::branch;
    if (group.rank != latent.kv_lora_rank) {
      fail_usage("--order " + std::string(order_name(options.relatent.order)) +
                 " slices the whole latent of " + text(latent.kv_lora_rank) + ", so each of " +
                 text(partition.parts) + " devices caches " +
                 text(latent.kv_lora_rank / partition.parts + shape.rope_dim));
    }
  }
  if (group.rank > 2 * latent.kv_lora_rank) {
    fail_usage("latents of " + text(group.rank) +
               " coordinates for each group of heads are more than twice the "
               "source's " +
               text(latent.kv_lora_rank));
  }
  lay_out(partition, std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups), group), shape);
}

// Decides rank and rotary size from the options.
void choose_sizes(const ConvertOptions& options, const Partition& partition, const ModelConfig& config,
                  LatentShape& shape) {
  if (config.latent) {
    choose_from_mla(options, partition, config, shape);
    return;
  }
  const GqaGeometry& gqa = *config.gqa;
  shape.v_dim = gqa.head_dim;
  const Index keys = gqa.num_key_value_heads * gqa.head_dim;
  const std::string method(method_name(options.method));
  if (options.method != Method::transmla && (options.fold || options.q_rank)) {
    fail_usage("--fold and --q-rank belong to --method transmla, not to " + method);
  }
  if (options.method != Method::relatent && options.max_nats) {
    fail_usage("--kv-budget auto belongs to --method relatent, not to " + method);
  }
  if (options.method == Method::lossless) {
    choose_lossless(options, partition, gqa, shape);
    return;
  }
  shape.nope_dim = gqa.head_dim;
  shape.rope_dim = options.rope_dim.value_or(gqa.head_dim);
  if (shape.rope_dim <= 0 || shape.rope_dim % 2 != 0 || shape.rope_dim > keys) {
    fail_usage("--rope-dim " + text(shape.rope_dim) +
               " must be an even number from 2 to num_key_value_heads * head_dim = " + text(keys));
  }
  const GroupSizes group = choose_group(options, partition, config, shape.rope_dim);
  const Index full = (options.method == Method::transmla ? 2 * keys - shape.rope_dim : 2 * keys);
  if (group.rank <= 0 || group.rank > full) {
    const Index found = group.rank * partition.groups;
    fail_usage("--rank " + text(found) + " must lie between 1 and the full rank " +
               text(full * partition.groups));
  }
  lay_out(partition, std::vector<GroupSizes>(static_cast<std::size_t>(partition.groups), group), shape);
  if (options.method == Method::transmla) {
    // The smallest fold always fits when the rotary size does.
    check_transmla({shape.rope_dim, options.fold.value_or(std::max<Index>(1, gqa.head_dim / shape.rope_dim)),
                    options.balance},
                   gqa.head_dim);
  }
  if (options.q_rank) {
    shape.q_rank = options.q_rank;
  }
}

void check_plain_rotary(const Model& source) {
  const Rotary& rotary = source.config().rotary;
  if (rotary.rope_type != "default") {
    fail_input({source.checkpoint().config_path(), "", "has no place in a plain list of rotary frequencies",
                "rope_type default", rotary.rope_type, ""});
  }
}

// For an engine whose list of rotary frequencies has one base: the source's frequencies that it holds. Fills
// in the rotary size and the stride of the list.
void fit_to_base(double wanted, const ModelConfig& config, ConvertOptions& options) {
  const double base = geometric_base(config.rotary);
  const Index d = config.gqa->head_dim;
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
                            text(static_cast<Index>(wanted)) + " only, and the source's are of base " +
                            text(static_cast<Index>(base));
    fail_usage(!exact || whole > d ? why : why + ": --rope-dim must be an even divisor of " + text(whole));
  }
  options.relatent.list_stride = whole / p;
}

std::string shape_words(const CacheShape& shape) {
  return text(shape.latent) + "+" + text(shape.rotary);
}

// A shape that kernels have, where nothing was asked for, or where a budget leaves little more than its
// numbers. A checkpoint that caches less than all of them gets none.
std::optional<CacheShape> default_shape(const ConvertOptions& options, const ModelConfig& config) {
  if (options.method == Method::lossless || options.rank || options.rope_dim || options.per_device ||
      options.max_nats || options.pad_rank) {
    return std::nullopt;
  }
  const Index numbers =
      options.kv_budget ? budget_numbers(*options.kv_budget, config) : config.cache_numbers() - 1;
  for (const CacheShape& shape : served_shapes) {
    const bool near = !options.kv_budget || 8 * numbers < 9 * shape.numbers();
    if (shape.numbers() <= numbers && near &&
        shape.rotary <= config.gqa->num_key_value_heads * config.gqa->head_dim) {
      return shape;
    }
  }
  return std::nullopt;
}

// Turns the shape of the cache, given or chosen, into rotary size and rank. What the rank leaves of the
// latent is filled up by the layout.
void fit_to_shape(const ModelConfig& config, const EngineTraits& traits, ConvertOptions& options) {
  const bool can = options.form == "mla" && traits.pads_latent && config.gqa;
  if (!options.shape && can) {
    options.shape = default_shape(options, config);
  }
  if (!options.shape) {
    return;
  }
  const CacheShape shape = *options.shape;
  const std::string given = "--shape " + shape_words(shape);
  if (!can) {
    fail_usage(options.form != "mla" ? given + " is the size of one latent, --to mla: give --per-device"
                                     : given + " belongs to --engine transformers, relatent and deepseek");
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
  const Index most = traits.any_frequencies ? keys : config.gqa->head_dim;
  if (shape.rotary % 2 != 0 || shape.rotary > most) {
    fail_usage(given + ": the rotary key must be an even number of at most " + text(most) +
               " for this checkpoint and engine");
  }
  if (options.rope_dim.value_or(shape.rotary) != shape.rotary) {
    fail_usage(given + " and --rope-dim " + text(*options.rope_dim) + " contradict each other");
  }
  options.rope_dim = shape.rotary;
  const Index own = traits.undoes_norm ? traits.own_coordinates
                                       : options.norm_coordinates.value_or(default_norm_coordinates);
  const Index room = shape.latent - own;
  if (room < 1 || options.rank.value_or(1) > room) {
    fail_usage(given + " has room for a rank of " + text(std::max<Index>(0, room)) + " beside the " +
               text(own) + " coordinates that the layout needs for itself");
  }
  if (options.rank && options.kv_budget) {
    return;  // refused where sizes are chosen
  }
  if (!options.rank) {
    const Index full = 2 * keys - (options.method == Method::transmla ? shape.rotary : 0);
    options.rank = std::min(room, full);
    if (options.kv_budget) {
      options.rank = std::min(*options.rank, budget_numbers(*options.kv_budget, config) - shape.rotary);
      if (*options.rank < 1) {
        fail_usage("--kv-budget leaves no room for a latent beside a rotary key of " + text(shape.rotary));
      }
      options.kv_budget.reset();
    }
  }
  if (!traits.undoes_norm) {
    options.pad_rank = shape.latent;
    options.norm_coordinates.reset();
  }
}

// Refuses what an engine cannot hold, whatever the sizes.
void check_engine(const ConvertOptions& options, const Model& source, const EngineTraits& traits) {
  if (!traits.latent_source && source.config().latent) {
    fail_usage("--engine " + options.engine +
               " normalises every latent on its own, which is not what an MLA source does: --engine "
               "transformers has a place for it");
  }
  if (traits.must_tie && !source.config().tie_word_embeddings) {
    fail_input({source.checkpoint().config_path(), "", "tie_word_embeddings",
                "true, since --engine " + options.engine + " has no output head of its own", "false", ""});
  }
  if (!traits.any_frequencies && options.engine != "deepseek") {
    check_plain_rotary(source);
  }
  if (traits.undoes_norm) {
    if (options.norm_coordinates || options.pad_rank) {
      fail_usage("--norm-coordinates and --pad-rank belong to --engine deepseek and mlra, not to " +
                 options.engine);
    }
    if (!traits.any_frequencies && options.method == Method::lossless) {
      fail_usage(
          "--engine " + options.engine +
          " has one plain list of rotary frequencies, and --method lossless keeps one for each key head");
    }
    return;
  }
  if (options.method != Method::relatent) {
    fail_usage("--engine " + options.engine +
               " normalises the latent and has no biases: only --method relatent fits a checkpoint to that");
  }
  check_plain_rotary(source);
  if (source.has(Role::o_bias, 0)) {
    fail_input({source.checkpoint().folder(), source.name_of(Role::o_bias, 0),
                "has no place in a layout without biases", "an o_proj without a bias", "one", ""});
  }
  if (options.pad_rank && options.form != "mla") {
    fail_usage("--pad-rank is the size of one latent, --to mla: give --norm-coordinates");
  }
  if (options.pad_rank && options.norm_coordinates) {
    fail_usage("--pad-rank decides how many coordinates are added: leave out --norm-coordinates");
  }
}

// Sizes that were asked for and that no kernel of a serving engine has.
std::string unserved_shape(const ConvertOptions& options) {
  if (!options.shape || options.engine == "relatent" ||
      std::find(served_shapes.begin(), served_shapes.end(), *options.shape) != served_shapes.end()) {
    return "";
  }
  return "--shape " + shape_words(*options.shape) +
         " fits no kernel of vLLM, SGLang, FlashMLA or FlashInfer: 512+64 and 256+64 do";
}

// Refuses sizes that the engine cannot hold, and decides what it needs beside them.
void fit_to_engine(const ConvertOptions& options, const ModelConfig& config, const Engine& engine,
                   LatentShape& shape) {
  const EngineTraits traits = engine.traits();
  const bool plain = options.relatent.plain_list || !traits.any_frequencies;
  if (options.method == Method::relatent && config.gqa && plain && shape.rope_dim > config.gqa->head_dim) {
    fail_usage("--rope-dim " + text(shape.rope_dim) +
               " is more than a plain list holds, head_dim = " + text(config.gqa->head_dim));
  }
  if (const std::string why = engine.why_not(config, shape); !why.empty()) {
    fail_usage("--engine " + options.engine + ": " + why);
  }
  if (traits.normed_query) {
    shape.q_rank = config.hidden_size;
  } else if (!shape.q_rank && config.gqa) {
    shape.q_rank = engine.query_rank(config);
  }
  if (options.shape && traits.undoes_norm) {
    shape.dead_coordinates = options.shape->latent - traits.own_coordinates - shape.rank;
  }
  if (traits.undoes_norm) {
    return;
  }
  shape.norm_coordinates = options.norm_coordinates.value_or(default_norm_coordinates);
  if (options.pad_rank) {
    if (*options.pad_rank < shape.rank) {
      fail_usage("--pad-rank " + text(*options.pad_rank) + " is below the rank " + text(shape.rank));
    }
    shape.norm_coordinates = *options.pad_rank - shape.rank;
  }
}

// Peak of one layer in flight, about. moments: there is a calibration. absorbed: queries are formed that are
// as wide as what they read.
std::uint64_t layer_memory(const ModelConfig& config, const LatentShape& shape, bool moments, bool absorbed,
                           std::uint64_t output_values) {
  const auto inputs = static_cast<std::uint64_t>(config.hidden_size) + 1;
  const auto count = static_cast<std::uint64_t>(config.num_attention_heads);
  const auto head_dim =
      static_cast<std::uint64_t>(config.gqa ? config.gqa->head_dim : shape.nope_dim + shape.rope_dim);
  const auto heads = count * head_dim;
  const auto keys = config.gqa ? static_cast<std::uint64_t>(config.gqa->num_key_value_heads) * head_dim
                               : static_cast<std::uint64_t>(config.latent->kv_lora_rank);
  const bool joint = shape.nope_dim > 0;
  // Maps as the source has them and as they are written, and the tensor that is being encoded.
  std::uint64_t out = 8 * (heads + keys) * inputs + 6 * output_values;
  // Keys and values once by themselves and twice together, and what is formed between them, in float64.
  out += joint ? 48 * keys * inputs + 200 * keys * keys : 16 * keys * (inputs + keys);
  if (moments) {
    out += (joint ? 24 : 8) * inputs * inputs;
  }
  if (absorbed) {
    const auto width = static_cast<std::uint64_t>(shape.rope_dim + shape.rank);
    out += 8 * (count * width + heads) * inputs;
  }
  return out;
}

// What the fits of one layer hold, about: the source's attention, the absorbed form and both second moments.
std::uint64_t fit_memory(const ModelConfig& config, const LatentShape& shape, const SampleSize& size) {
  const Index inputs = config.hidden_size + 1;
  const Index width = shape.rope_dim + shape.rank;
  const Index head_dim = config.gqa ? config.gqa->head_dim : shape.nope_dim + shape.rope_dim;
  const Index heads = config.num_attention_heads * head_dim;
  const Index numbers = config.num_attention_heads * width + 2 * heads + 2 * inputs;
  return static_cast<std::uint64_t>(8 * numbers * inputs) +
         QueryFit::memory(config.num_attention_heads, width, inputs, size);
}

}  // namespace

std::string_view method_name(Method method) {
  switch (method) {
    case Method::lossless:
      return "lossless";
    case Method::transmla:
      return "transmla";
    case Method::relatent:
      return "relatent";
    case Method::weights_only:
      return "weights-only";
  }
  return "";
}

Conversion::Conversion(ConvertOptions options, const SizeSearch::Watch& watch, bool claim)
    : options_(std::move(options)),
      source_(Model::open(options_.source)),
      engine_(make_engine(options_.engine, options_.form)) {
  if (!engine_) {
    bool known = false;
    for (const char* form : {"mla", "gla", "tpla", "mlra"}) {
      known = known || make_engine(options_.engine, form) != nullptr;
    }
    fail_usage(known ? "--engine " + options_.engine + " has no layout for --to " + options_.form
                     : "--engine " + options_.engine + " is not one of: " + std::string(known_engines()));
  }
  const std::optional<Partition> partition =
      partition_of(options_.form, options_.branches.value_or(options_.form == "mla" ? 1 : 0));
  if (!partition) {
    fail_usage("--to " + options_.form +
               (options_.form == "mla"    ? " has one latent: leave out --branches"
                : options_.form == "mlra" ? " needs --branches 2 or 4"
                                          : " needs --branches, at least 2"));
  }
  partition_ = *partition;
  if (options_.method == Method::transmla && options_.form != "mla") {
    fail_usage("--method transmla writes --to mla only");
  }
  if ((options_.method == Method::transmla || options_.method == Method::relatent) && !options_.calibration) {
    fail_usage("--method " + std::string(method_name(options_.method)) +
               " needs --calibration (make one with `relatent calibrate`)");
  }
  if (options_.calibration) {
    calibration_ = CalibrationFile::open(*options_.calibration);
  }
  choose_compute();
  // As they were given: planning fills in what was not.
  facts_ = facts_of(options_, source_.checkpoint());
  if (claim) {
    claim_output();
    work_->run([&] { make_plan(watch); });
  } else {
    make_plan(watch);
  }
}

void Conversion::choose_compute() {
  const bool can = has_bf16_products();
  if (options_.compute) {
    if (*options_.compute == DType::bf16 && !can) {
      fail_usage("--compute bfloat16: this processor has no bfloat16 products");
    }
    options_.relatent.compute = *options_.compute;
  } else if (can && calibration_ && calibration_->header().compute == torch_name(DType::bf16)) {
    options_.relatent.compute = DType::bf16;
  }
}

void Conversion::claim_output() {
  work_ = std::make_unique<WorkFolder>(options_.output, OutputKind::new_folder, facts_, options_.save.resume);
  if (work_->resumed() && options_.save.taken_up) {
    options_.save.taken_up();
  }
}

std::vector<SizeTrial> Conversion::recorded_trials() const {
  std::vector<SizeTrial> out;
  for (const auto& [name, value] : work_ ? work_->journal().entries() : Facts()) {
    SizeTrial trial;
    std::istringstream fields(value);
    if (name == trial_entry && fields >> trial.rope_dim >> trial.rank >> trial.key_rank >> trial.nats) {
      out.push_back(trial);
    }
  }
  return out;
}

void Conversion::search_sizes(const SizeSearch::Watch& watch) {
  const bool shared = options_.relatent.order == LatentOrder::shared;
  const bool wants_rotary =
      options_.form == "mla" && options_.kv_budget && !options_.rope_dim && !options_.rank;
  const bool wants_split =
      shared && options_.form != "mla" && options_.per_device &&
      ((source_.config().gqa && !options_.rope_dim) || (partition_.parts > 1 && !options_.key_rank));
  if (options_.max_nats && options_.form != "mla") {
    fail_usage("--kv-budget auto belongs to --to mla; for " + options_.form + " give --per-device");
  }
  if (options_.method != Method::relatent || !(wants_rotary || wants_split || options_.max_nats)) {
    return;
  }
  if (options_.max_nats && (options_.kv_budget || options_.rank || options_.rope_dim)) {
    fail_usage("--max-nats chooses the sizes: leave out --rank and --rope-dim, and give --kv-budget auto");
  }
  check_calibration();
  SizeSearch search(
      source_, [this](Index layer_idx) { return moments(layer_idx); }, fit_sequences(), relatent_options(),
      [&](const SizeTrial& trial) {
        if (work_) {
          work_->record(trial_entry, text(trial.rope_dim) + " " + text(trial.rank) + " " +
                                         text(trial.key_rank) + " " + exact_text(trial.nats));
        }
        if (watch) {
          watch(trial);
        }
      });
  search.know(recorded_trials());
  SizeTrial chosen;
  if (wants_split) {
    const std::optional<Index> rotary =
        source_.config().latent ? source_.config().latent->qk_rope_head_dim : options_.rope_dim;
    chosen = search.split_for(*options_.per_device, rotary, options_.key_rank);
    options_.rope_dim = chosen.rope_dim;
    if (partition_.parts > 1) {
      options_.key_rank = chosen.key_rank;
    }
    plan_.trials = search.trials();
    return;
  }
  if (options_.max_nats) {
    chosen = search.smallest_within(*options_.max_nats);
    if (!(chosen.nats <= *options_.max_nats)) {
      plan_.warnings.emplace_back("no cache below the source's stays within the nats asked for");
    }
  } else {
    const Index total = budget_numbers(*options_.kv_budget, source_.config()) / size_step * size_step;
    if (total < 2 * size_step) {
      fail_usage("--kv-budget leaves less than " + text(2 * size_step) +
                 " numbers: give --rope-dim and --rank for a cache that small");
    }
    chosen = search.rotary_for(total);
    options_.kv_budget.reset();
  }
  options_.rope_dim = chosen.rope_dim;
  options_.rank = chosen.rank;
  plan_.trials = search.trials();
}

RelatentOptions Conversion::relatent_options() const {
  RelatentOptions out = options_.relatent;
  out.rank = plan_.shape.rank;
  out.rope_dim = plan_.shape.rope_dim;
  const ModelConfig& config = source_.config();
  const EngineTraits traits = engine_->traits();
  out.plain_list = out.plain_list || !traits.any_frequencies;
  out.partition = partition_;
  out.key_rank = plan_.shape.shared_ranks.empty() ? 0 : plan_.shape.shared_ranks.front();
  out.query_bias = engine_->traits().query_bias;
  if (config.gqa && !traits.normed_query) {
    out.q_rank = plan_.shape.q_rank;
  }
  if (!traits.undoes_norm) {
    out.norm_coordinates = options_.norm_coordinates.value_or(default_norm_coordinates);
    out.pad_rank = options_.pad_rank;
  }
  return out;
}

Index Conversion::held_out() const {
  const Index count = calibration_->sequences().count;
  return std::min<Index>(options_.held_out.value_or(sequences_held_out(count)), count - 1);
}

Sequences Conversion::fit_sequences() const {
  Sequences out = calibration_->sequences();
  out = first_sequences(std::move(out), out.count - held_out());
  if (options_.relatent.fit.tokens > 0) {
    const Index count = std::max<Index>(1, options_.relatent.fit.tokens / out.length);
    out = first_sequences(std::move(out), count);
  }
  return out;
}

void Conversion::warn_of_few_tokens() {
  if (options_.method != Method::relatent || !options_.relatent.uses_tokens()) {
    return;
  }
  const Sequences sequences = fit_sequences();
  const Index tokens = sequences.count * sequences.length;
  const ModelConfig& config = source_.config();
  const Index value_dim = config.gqa ? config.gqa->head_dim : config.latent->v_head_dim;
  const Index wanted = 8 * std::max(config.num_attention_heads * value_dim, config.hidden_size);
  if (tokens < wanted) {
    plan_.warnings.push_back("the calibration has " + text(tokens) + " tokens and the fits want at least " +
                             text(wanted) +
                             " for this model: they are held back (larger ridges), and the "
                             "result will be worse than with more tokens");
  }
}

void Conversion::make_plan(const SizeSearch::Watch& watch) {
  check_source(source_);
  const EngineTraits traits = engine_->traits();
  check_engine(options_, source_, traits);
  if (traits.fixed_base) {
    fit_to_base(*traits.fixed_base, source_.config(), options_);
  }
  if (!options_.rank && !options_.kv_budget && !options_.per_device && source_.config().gqa) {
    options_.rank = engine_->default_rank(source_.config());
  }
  if (traits.norm_eps && *traits.norm_eps != source_.config().rms_norm_eps) {
    std::ostringstream eps;
    eps << "--engine " << options_.engine << " divides every norm by the root of its mean square plus "
        << *traits.norm_eps << ", the source adds " << source_.config().rms_norm_eps
        << ": `relatent verify` measures what that changes";
    plan_.warnings.push_back(eps.str());
  }
  warn_of_few_tokens();
  fit_to_shape(source_.config(), traits, options_);
  search_sizes(watch);
  const ModelConfig& config = source_.config();
  LatentShape& shape = plan_.shape;
  shape.heads = config.num_attention_heads;
  for (Index i = 0; i < config.num_hidden_layers; ++i) {
    shape.has_q_bias = shape.has_q_bias || source_.has(Role::q_bias, i);
  }
  shape.form = options_.form;
  if (partition_.groups > shape.heads) {
    fail_usage("--branches " + text(partition_.groups) + " is more than the model's " + text(shape.heads) +
               " heads");
  }
  shape.has_bias = options_.method != Method::lossless || shape.has_q_bias || source_.has(Role::k_bias, 0) ||
                   source_.has(Role::v_bias, 0) || source_.has(Role::o_bias, 0);
  choose_sizes(options_, partition_, config, shape);
  if (shape.q_rank && config.gqa) {
    const Index full = std::min(config.hidden_size, shape.heads * config.gqa->head_dim);
    if (*shape.q_rank <= 0 || *shape.q_rank > full) {
      fail_usage("--q-rank " + text(*shape.q_rank) + " must lie between 1 and the full rank " + text(full));
    }
  }
  fit_to_engine(options_, config, *engine_, shape);
  if (std::string warning = unserved_shape(options_); !warning.empty()) {
    plan_.warnings.push_back(std::move(warning));
  }
  plan_.dtype = options_.dtype.value_or(source_.checkpoint().info(source_.name_of(Role::o_weight, 0)).dtype);
  plan_.source_cache_numbers = config.cache_numbers();
  plan_.converted_cache_numbers = engine_->cache_numbers(shape);

  // Layer by layer, the converted attention in the place of the old one.
  std::uint64_t attention_values = 0;
  std::vector<PlacedTensor> ordered = source_.tensors();
  leave_out_prediction(ordered, config, plan_);
  const auto rank_of = [&](const PlacedTensor& t) {
    return t.layer_idx >= 0 ? t.layer_idx + 1
                            : (t.role == Role::embed_tokens ? 0 : config.num_hidden_layers + 1);
  };
  std::stable_sort(ordered.begin(), ordered.end(),
                   [&](const PlacedTensor& a, const PlacedTensor& b) { return rank_of(a) < rank_of(b); });
  Index attention_done = -1;
  for (const PlacedTensor& tensor : ordered) {
    if (is_attention(tensor.role)) {
      if (attention_done < tensor.layer_idx) {
        attention_done = tensor.layer_idx;
        std::uint64_t values = 0;
        for (TensorSpec& spec : engine_->attention_tensors(config, shape, tensor.layer_idx, plan_.dtype)) {
          values += spec.bytes() / size_of(spec.dtype);
          plan_.tensors.push_back({std::move(spec), Fate::converted, ""});
        }
        attention_values = std::max(attention_values, values);
      }
      continue;
    }
    const std::string_view reason = redundant(tensor.role, config);
    if (!reason.empty()) {
      plan_.left_out.push_back(tensor.name + ": " + std::string(reason));
      continue;
    }
    const TensorInfo& info = source_.checkpoint().info(tensor.name);
    const DType dtype = output_dtype(tensor.role, info.dtype, options_.dtype);
    plan_.tensors.push_back(
        {{engine_->carried_name(tensor.role, tensor.layer_idx, tensor.name), dtype, info.shape},
         dtype == info.dtype ? Fate::carried : Fate::recoded,
         tensor.name});
  }
  if (!traits.tied_head && config.tie_word_embeddings) {
    const std::string& embedding = source_.name_of(Role::embed_tokens, -1);
    const TensorInfo& info = source_.checkpoint().info(embedding);
    const DType dtype = options_.dtype.value_or(info.dtype);
    plan_.tensors.push_back({{"lm_head.weight", dtype, info.shape},
                             dtype == info.dtype ? Fate::carried : Fate::recoded,
                             embedding});
  }
  std::uint64_t largest_recoded = 0;
  for (const PlannedTensor& tensor : plan_.tensors) {
    plan_.output_bytes += tensor.spec.bytes();
    if (tensor.fate == Fate::recoded) {
      largest_recoded = std::max(largest_recoded, tensor.spec.bytes() / size_of(tensor.spec.dtype) * 8);
    }
  }
  plan_.side_files = source_.checkpoint().side_files();
  for (const std::filesystem::path& file : plan_.side_files) {
    plan_.output_bytes += std::filesystem::file_size(file);
  }
  const bool fits = options_.method == Method::relatent && relatent_options().uses_tokens();
  plan_.layer_bytes =
      layer_memory(config, shape, calibration_.has_value(),
                   fits || partition_.parts > 1 || config.latent.has_value(), attention_values);
  if (!fits) {
    const Index in_flight = std::min(layers_in_flight(plan_.layer_bytes), config.num_hidden_layers);
    plan_.memory_bytes = std::max(largest_recoded, static_cast<std::uint64_t>(in_flight) * plan_.layer_bytes);
    return;
  }
  const Sequences sequences = fit_sequences();
  const RelatentOptions& own = options_.relatent;
  const SampleSize size{sequences.count, sequences.length,
                        own.fit.stride_for(sequences.count * sequences.length, config.hidden_size),
                        own.compute};
  plan_.memory_bytes = std::max({largest_recoded, plan_.layer_bytes, fit_memory(config, shape, size)}) +
                       TwinStreams::memory(config, sequences, size.stride, shape.rope_dim + shape.rank);
  plan_.resume_bytes = TwinStreams::saved_bytes(config, sequences);
}

void Conversion::check_calibration() const {
  const std::string found = source_.checkpoint().fingerprint();
  if (calibration_->header().source_fingerprint != found) {
    fail_input({calibration_->path(), "", "made from another checkpoint than " + options_.source.string(),
                "fingerprint " + found, calibration_->header().source_fingerprint,
                "run `relatent calibrate` on it"});
  }
}

Moments Conversion::moments(Index layer_idx) const {
  if (calibration_) {
    return moments_of(calibration_->layer(layer_idx));
  }
  return moments_without_data(source_.input_norm(layer_idx), source_.config().num_attention_heads,
                              assumed_length);
}

LatentAttention Conversion::convert_layer(Index layer_idx, const Moments& known, Index fold) const {
  const LatentShape& shape = plan_.shape;
  const LayerMaps maps = maps_of(std::get<GqaAttention>(source_.attention(layer_idx)));
  if (options_.method == Method::lossless) {
    std::vector<JointLatent> latents;
    for (Index g = 0; g < partition_.groups; ++g) {
      const Index first = partition_.first_head(g, maps.heads);
      latents.push_back(lossless_latent(maps, first, partition_.first_head(g + 1, maps.heads) - first));
    }
    return split_values(assemble(maps, known, lossless_rotary_key(maps), latents, std::nullopt), partition_,
                        shape);
  }
  const TransmlaOptions options{shape.rope_dim, fold, options_.balance, options_.balance_columns};
  const TransmlaKey key = transmla_rotary_key(maps, known, options);
  std::optional<LowRankQuery> query;
  if (shape.q_rank) {
    query = transmla_query(maps, known, *shape.q_rank);
  }
  return assemble_mla(maps, known, key.key, transmla_latent(maps, known, key, options, shape.rank), query);
}

void Conversion::convert_independently(const ConvertLayer& convert, Index done, const Target& target) const {
  target.begin(done);
  const Index layers = source_.config().num_hidden_layers;
  std::vector<std::optional<LatentAttention>> converted(static_cast<std::size_t>(layers));
  for_layers(done, layers, layers_in_flight(plan_.layer_bytes),
             {.moments = [this](Index layer_idx) { return moments(layer_idx); },
              .body =
                  [&](Index layer_idx, Moments known) {
                    converted[static_cast<std::size_t>(layer_idx)] = convert(layer_idx, std::move(known));
                  },
              .finish =
                  [&](Index layer_idx) {
                    std::optional<LatentAttention>& layer = converted[static_cast<std::size_t>(layer_idx)];
                    target.write(layer_idx, *layer);
                    layer.reset();
                    if (layer_idx + 1 < layers) {
                      target.save(layer_idx + 1, {});
                    }
                  },
              .beside = target.carry});
}

double Conversion::convert_in_sequence(Index done, const Target& target) const {
  const bool fits = options_.method == Method::relatent;
  RelatentConversion conversion(
      source_, [this](Index layer_idx) { return moments(layer_idx); }, fits ? fit_sequences() : Sequences{},
      relatent_options());
  const Index layers = source_.config().num_hidden_layers;
  const Index first = conversion.resume(work_->file(state_name), done);
  if (conversion.independent()) {
    convert_independently(
        [&](Index layer_idx, Moments known) { return conversion.convert(layer_idx, std::move(known)); },
        first, target);
    return conversion.fold_error();
  }
  target.carry();
  target.begin(first);
  const WriteState state = [&](const std::filesystem::path& path) { conversion.save(path); };
  for (Index i = first; i < layers; ++i) {
    target.write(i, conversion.next());
    return_freed_memory();
    if (i + 1 < layers) {
      target.save(i + 1, state);
    }
  }
  return conversion.fold_error();
}

Index Conversion::choose_fold() const {
  const Index d = source_.config().gqa->head_dim;
  const Sequences sequences = first_sequences(calibration_->sequences(), fold_sequences);
  Index best = 0;
  double best_nll = 0;
  // Doubling as long as it helps, as the authors search.
  for (Index fold = std::max<Index>(1, d / plan_.shape.rope_dim); (d / 2) % fold == 0; fold *= 2) {
    Stream stream(source_, sequences);
    for (Index i = 0; i < source_.config().num_hidden_layers; ++i) {
      Layer converted = source_.layer(i);
      const LayerMaps maps = maps_of(std::get<GqaAttention>(converted.attention));
      const Moments known = moments(i);
      const RotaryKey key = transmla_rotary_key(maps, known, {plan_.shape.rope_dim, fold, 0}).key;
      // Nothing is lost but rotation: the latent is all keys and values.
      const Index keys = maps.key_dim();
      JointLatent all{MatrixD(2 * keys, maps.k.cols()), MatrixD::Zero(keys, 2 * keys),
                      MatrixD::Zero(keys, 2 * keys), VectorD::Zero(keys)};
      all.down << key.residual * maps.k, maps.v;
      all.key_up.leftCols(keys).setIdentity();
      all.value_up.rightCols(keys).setIdentity();
      converted.attention = assemble_mla(maps, known, key, all, std::nullopt);
      run_layer(converted, stream);
    }
    const double nll = compare_logits(source_, stream, source_, stream, sequences).source_nll;
    if (best != 0 && nll >= best_nll) {
      break;
    }
    best = fold;
    best_nll = nll;
  }
  return best;
}

std::unique_ptr<CheckpointWriter> Conversion::open_writer(Done& done) {
  std::vector<TensorSpec> specs;
  specs.reserve(plan_.tensors.size());
  for (const PlannedTensor& tensor : plan_.tensors) {
    specs.push_back(tensor.spec);
  }
  done = {work_->journal().last_number(carried_entry), work_->journal().last_number(layers_entry)};
  if (done.carried > 0 || done.layers > 0) {
    if (auto writer = CheckpointWriter::reopen(work_->output(), specs, options_.max_shard_bytes)) {
      return writer;
    }
    // The shards are not what the journal speaks of.
    work_->record(carried_entry, Index{0});
    work_->record(layers_entry, Index{0});
  }
  done = {};
  std::error_code none;
  std::filesystem::remove(work_->file(state_name), none);
  flush_folder(work_->file(state_name).parent_path());
  return std::make_unique<CheckpointWriter>(work_->output(), specs, options_.max_shard_bytes);
}

void Conversion::carry(CheckpointWriter& writer, Index done, const std::function<void(Index)>& saved) const {
  Index count = 0;
  for (const PlannedTensor& tensor : plan_.tensors) {
    if (tensor.fate == Fate::converted) {
      continue;
    }
    ++count;
    if (count <= done) {
      writer.mark_written(tensor.spec.name);
      continue;
    }
    if (tensor.fate == Fate::carried) {
      writer.copy(tensor.spec.name, source_.checkpoint(), tensor.source);
    } else {
      const MatrixF values = source_.checkpoint().read_matrix(tensor.source);
      writer.write_floats(tensor.spec.name, {values.data(), static_cast<std::size_t>(values.size())});
      source_.checkpoint().release(tensor.source);
    }
    saved(count);
  }
}

void Conversion::write_output(const LayerProgress& progress, ConvertReport& report) {
  const ModelConfig& config = source_.config();
  Done done;
  const std::unique_ptr<CheckpointWriter> writer = open_writer(done);

  // Tensors are carried beside the conversion, and one record must be durable before the next is begun.
  std::mutex saving;
  const auto save = [&](SaveClock& clock, const std::function<bool()>& state, const char* entry,
                        Index value) {
    const std::lock_guard lock(saving);
    clock.save([&] {
      writer->flush();
      if (!state || state()) {
        work_->record(entry, value);
      }
    });
  };
  Target target;
  SaveClock carried_clock(std::min(record_every, options_.save.every));
  target.carry = [&] {
    carry(*writer, done.carried, [&](Index count) {
      if (carried_clock.due()) {
        save(carried_clock, {}, carried_entry, count);
      }
    });
  };
  target.begin = [&](Index first) {
    for (Index i = 0; i < first; ++i) {
      for (const TensorSpec& spec : engine_->attention_tensors(config, plan_.shape, i, plan_.dtype)) {
        writer->mark_written(spec.name);
      }
    }
  };
  std::optional<Rotary> rotary;
  target.write = [&](Index layer_idx, const LatentAttention& attention) {
    if (!rotary) {
      rotary = attention.rotary;
    }
    if (engine_->traits().normed_query) {
      LatentAttention passed = attention;
      pass_query_through_norm(source_, layer_idx, plan_.dtype, passed);
      engine_->write_attention(passed, plan_.shape, layer_idx, plan_.dtype, *writer);
    } else {
      engine_->write_attention(attention, plan_.shape, layer_idx, plan_.dtype, *writer);
    }
    progress(layer_idx + 1, config.num_hidden_layers);
  };
  SaveClock state_clock(options_.save.every);
  SaveClock layer_clock(std::min(record_every, options_.save.every));
  target.save = [&](Index layers, const WriteState& state) {
    SaveClock& clock = state ? state_clock : layer_clock;
    if (!clock.due()) {
      return;
    }
    const auto write_state = [&] {
      try {
        state(work_->file(state_name));
        return true;
      } catch (const Error& error) {
        // No room for the streams: the conversion needs them only to go on from here after an interruption.
        if (error.kind() != ErrorKind::machine) {
          throw;
        }
        return false;
      }
    };
    save(clock, state ? std::function<bool()>(write_state) : nullptr, layers_entry, layers);
  };
  // One layer at least is converted again: what all layers share is learnt from it.
  const Index layers_done = std::min(done.layers, config.num_hidden_layers - 1);
  if (options_.method == Method::lossless || options_.method == Method::transmla) {
    convert_independently(
        [&, fold = report.fold.value_or(0)](Index layer_idx, const Moments& known) {
          return naming_layer(layer_idx, [&] { return convert_layer(layer_idx, known, fold); });
        },
        layers_done, target);
  } else {
    report.fold_error = convert_in_sequence(layers_done, target);
  }
  writer->finish();
  for (const std::filesystem::path& file : plan_.side_files) {
    copy_whole_file(file, work_->output() / file.filename());
  }
  write_text(
      work_->output() / "config.json",
      engine_->config(source_.checkpoint().config(), config, plan_.shape, *rotary, plan_.dtype).dump(2) +
          "\n");
  for (const ExtraFile& file : engine_->extra_files()) {
    write_text(work_->output() / file.name, std::string(file.text));
  }
  report.bytes_written = writer->bytes_written();
}

std::vector<std::string> Conversion::loss_reasons() const {
  const EngineTraits traits = engine_->traits();
  std::vector<std::string> out;
  if (options_.method != Method::relatent) {
    out.emplace_back("--method relatent loses less");
  }
  if (!traits.undoes_norm) {
    const bool biased =
        plan_.shape.has_q_bias || source_.has(Role::k_bias, 0) || source_.has(Role::v_bias, 0);
    out.push_back("--engine " + options_.engine + " has " +
                  (biased ? "no place for the biases of this checkpoint and " : "") +
                  "one plain list of rotary frequencies: --engine relatent and transformers keep more");
  }
  const double part =
      static_cast<double>(plan_.converted_cache_numbers) / static_cast<double>(plan_.source_cache_numbers);
  if (part < 1 && options_.method != Method::lossless) {
    out.push_back("the cache is " + text(std::llround(100 * part)) +
                  " % of the source's: allow it more with " +
                  (options_.form == "mla" ? "--kv-budget, --rank or --shape" : "--per-device or --rank"));
  }
  if (calibration_) {
    const Sequences sequences = calibration_->sequences();
    if (sequences.count * sequences.length < 65536) {
      out.push_back("the calibration has " + text(sequences.count * sequences.length) +
                    " tokens, and 65536 and more are better");
    }
  }
  return out;
}

void Conversion::measure_output(ConvertReport& report) const {
  const Index held = held_out();
  const Index count = held > 0 ? held : std::min<Index>(calibration_->sequences().count, 2);
  report.measured = measure(source_, work_->output(), last_sequences(calibration_->sequences(), count),
                            held > 0 && options_.method == Method::relatent);
}

void Conversion::warn_of_losses(ConvertReport& report) const {
  if (report.fold_error > 0) {
    std::ostringstream text;
    text.precision(2);
    text << "--engine " << options_.engine
         << " has no biases: those of q and v became the nearest linear map of the input, which misses up to "
         << report.fold_error << " of their mean square, and so did what the softmax feels of those of k";
    report.warnings.push_back(text.str());
  }
  if (!report.measured) {
    return;
  }
  if (std::string warning = loss_warning(*report.measured, loss_reasons()); !warning.empty()) {
    report.warnings.push_back(std::move(warning));
  }
}

ConvertReport Conversion::run(const LayerProgress& progress) {
  const auto start = std::chrono::steady_clock::now();
  if (!work_) {
    claim_output();
  }
  ConvertReport report;
  report.kv_rank = plan_.shape.rank;
  report.rope_dim = plan_.shape.rope_dim;
  report.branches = partition_.latents();
  report.bytes_read = source_.checkpoint().tensor_bytes();
  work_->run([&] {
    const Journal& journal = work_->journal();
    if (options_.method == Method::transmla) {
      report.fold = options_.fold;
      if (!report.fold && journal.last(fold_entry)) {
        report.fold = journal.last_number(fold_entry);
      }
    }
    if (work_->complete()) {
      std::istringstream(journal.last(fold_error_entry).value_or("0")) >> report.fold_error;
      report.measured = measurement_from(journal.last(measured_entry).value_or(""));
      warn_of_losses(report);
      work_->commit();
      for (const auto& entry : std::filesystem::directory_iterator(options_.output)) {
        report.bytes_written += entry.path().extension() == ".safetensors" ? entry.file_size() : 0;
      }
      return;
    }
    if (calibration_) {
      check_calibration();
    }
    if (options_.method == Method::transmla && !report.fold) {
      report.fold = choose_fold();
      work_->record(fold_entry, *report.fold);
    }
    write_output(progress, report);
    if (report.fold_error > 0) {
      work_->record(fold_error_entry, exact_text(report.fold_error));
    }
    if (calibration_ && options_.held_out.value_or(1) > 0) {
      measure_output(report);
      work_->record(measured_entry, to_text(*report.measured));
    }
    warn_of_losses(report);
    work_->commit();
  });
  work_.reset();
  report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return report;
}

}  // namespace relatent

#include "convert/plan/plan.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <string_view>
#include <tuple>

#include "convert/compute/backend.h"
#include "convert/model/families/family.h"
#include "convert/plan/checks.h"
#include "convert/plan/memory.h"
#include "convert/plan/sizes.h"
#include "formats/error.h"

namespace relatent {
namespace {

// Why a source tensor need not be in the output; empty when it must.
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

// The source's tensor `from` as the engine stores it.
PlannedTensor kept_tensor(const ConvertInputs& inputs, const ConvertOptions& options,
                          const ExpectedTensor& to, const std::string& from) {
  const TensorInfo& info = inputs.source.checkpoint().info(from);
  const DType dtype =
      inputs.engine->stored_dtype(to.role, info.shape, output_dtype(to.role, info.dtype, options.dtype));
  return {{to.name, dtype, info.shape},
          to.role,
          to.layer_idx,
          to.part,
          dtype == info.dtype ? TensorAction::copy : TensorAction::cast,
          from};
}

// Layers that predict further tokens read the stream of a model that is not there any more.
void leave_out_prediction(std::vector<PlacedTensor>& tensors, const ModelConfig& config, ConvertPlan& plan) {
  std::map<Index, Index> count;
  for (const PlacedTensor& tensor : tensors) {
    if (tensor.role == Role::prediction) {
      ++count[*tensor.layer_idx];
    }
  }
  std::erase_if(tensors, [](const PlacedTensor& tensor) { return tensor.role == Role::prediction; });
  for (const auto& [layer_idx, tensors_of_layer] : count) {
    plan.left_out.push_back("model.layers." + std::to_string(layer_idx) +
                            ".*: " + std::to_string(tensors_of_layer) +
                            " tensors of a layer that predicts further tokens, behind the " +
                            std::to_string(config.num_hidden_layers) + " layers of the model");
  }
  if (!count.empty()) {
    plan.warnings.emplace_back(
        "layers of the source that predict further tokens are left out (model.layers." +
        std::to_string(count.begin()->first) + (count.size() > 1 ? " and on" : "") + ")");
  }
}

std::string few_tokens(const ConvertOptions& options, const ConvertInputs& inputs) {
  if (options.method != Method::relatent || !options.relatent.uses_tokens()) {
    return "";
  }
  const Sequences sequences = fit_sequences(options, inputs);
  const Index tokens = sequences.count * sequences.length;
  const ModelConfig& config = inputs.source.config();
  const Index value_dim = config.gqa ? config.gqa->head_dim : config.latent->v_head_dim;
  const Index wanted = 8 * std::max(config.num_attention_heads * value_dim, config.hidden_size);
  if (tokens < wanted) {
    return "the calibration has " + std::to_string(tokens) + " tokens and the fits want at least " +
           std::to_string(wanted) +
           " for this model: they are held back (larger ridges), and the "
           "result will be worse than with more tokens";
  }
  return "";
}

// Another eps in the engine's norms than in the source's.
std::string other_eps(const ConvertOptions& options, const Model& source, const EngineTraits& traits) {
  if (!traits.norm_eps || *traits.norm_eps == source.config().rms_norm_eps) {
    return "";
  }
  std::ostringstream eps;
  eps << "--engine " << options.engine << " divides every norm by the root of its mean square plus "
      << *traits.norm_eps << ", the source adds " << source.config().rms_norm_eps
      << ": `relatent verify` measures what that changes";
  return eps.str();
}

// Which of two longrope lists the result has.
std::string one_longrope_list(const ConvertOptions& options, const Model& source) {
  const nlohmann::ordered_json& config = source.checkpoint().config();
  if (!options.context || config == with_longrope_list(config, *options.context, "")) {
    return "";
  }
  return "the result has one list of rotary frequencies, that of sequences of " +
         std::to_string(*options.context) + " tokens: give --context " + std::to_string(*options.context) +
         " to calibrate, verify and logits too";
}

// Tensors of the output that are the source's, by what they are.
using KeptTensors = std::map<std::tuple<Role, std::optional<Index>, std::optional<Index>>, ExpectedTensor>;

// A bias that only some of the layers have which stay as they are.
void refuse_missing(const ConvertInputs& inputs, const KeptTensors& kept) {
  for (const auto& [place, tensor] : kept) {
    if (is_attention(tensor.role) && tensor.presence == Presence::required &&
        !inputs.source.has(tensor.role, tensor.layer_idx, tensor.part)) {
      fail_input({inputs.source.checkpoint().path(), tensor.name, "is missing",
                  "a tensor that every layer has which stays as it is", "one that only some have",
                  "choose other layers with --layers"});
    }
  }
}

// What it costs that the engine has no norms on queries and keys.
std::string linear_stand_in_note(const ConvertOptions& options, const ConvertInputs& inputs) {
  const ModelConfig& config = inputs.source.config();
  if (!normalises_keys(config) || inputs.engine->traits().normed_heads || !inputs.calibration) {
    return "";
  }
  const Index keys = config.gqa->num_key_value_heads * config.gqa->head_dim;
  double sum = 0;
  double most = 0;
  Index worst = 0;
  const LayerSet converted = converted_layers(inputs);
  for (const Index i : converted.layers()) {
    const double error = stand_in_error(input_moments(inputs, i), keys);
    sum += error;
    if (error > most) {
      most = error;
      worst = i;
    }
  }
  std::ostringstream text;
  text.precision(2);
  text << "this checkpoint normalises its queries and keys, and --engine " << options.engine
       << " has no place for that: linear maps stand in for them, which miss "
       << sum / static_cast<double>(converted.layers().size()) << " of how the keys vary (" << most
       << " in layer " << worst << ") before the fits win some of it back; --engine relatent keeps the norms";
  return text.str();
}

// What is written, layer by layer, the attention of converted layers in the place of the old one, and what is
// left out.
// Returns the most values that the attention of one layer has.
std::uint64_t plan_tensors(const ConvertInputs& inputs, const ModelConfig& converted, ConvertPlan& plan) {
  const Model& source = inputs.source;
  const ModelConfig& config = source.config();
  const auto is_converted = [&](const PlacedTensor& tensor) {
    return is_attention(tensor.role) && !plan.carried.has(*tensor.layer_idx);
  };
  std::vector<PlacedTensor> ordered = source.tensors();
  leave_out_prediction(ordered, config, plan);
  const auto rank_of = [&](const PlacedTensor& t) {
    return t.layer_idx ? *t.layer_idx + 1 : (t.role == Role::embed_tokens ? 0 : config.num_hidden_layers + 1);
  };
  std::stable_sort(ordered.begin(), ordered.end(),
                   [&](const PlacedTensor& a, const PlacedTensor& b) { return rank_of(a) < rank_of(b); });
  KeptTensors kept;
  std::vector<std::vector<ExpectedTensor>> attention(static_cast<std::size_t>(config.num_hidden_layers));
  for (ExpectedTensor& tensor : expected_tensors(converted)) {
    if (is_converted(tensor)) {
      attention[static_cast<std::size_t>(*tensor.layer_idx)].push_back(std::move(tensor));
    } else {
      kept.emplace(std::tuple(tensor.role, tensor.layer_idx, tensor.part), std::move(tensor));
    }
  }
  refuse_missing(inputs, kept);
  std::uint64_t most = 0;
  std::optional<Index> attention_done;  // the layer whose attention is planned
  for (const PlacedTensor& tensor : ordered) {
    if (is_converted(tensor)) {
      if (!attention_done || *attention_done < tensor.layer_idx) {
        attention_done = tensor.layer_idx;
        std::uint64_t values = 0;
        for (const ExpectedTensor& to : attention[static_cast<std::size_t>(*tensor.layer_idx)]) {
          if (const std::optional<Role> role = source_role(to.role)) {
            plan.tensors.push_back(
                kept_tensor(inputs, plan.options, to, source.name_of(*role, to.layer_idx)));
            continue;
          }
          TensorSpec spec{to.name, inputs.engine->stored_dtype(to.role, to.shape, plan.dtype), to.shape};
          values += spec.bytes() / size_of(spec.dtype);
          plan.tensors.push_back(
              {std::move(spec), to.role, to.layer_idx, to.part, TensorAction::convert, ""});
        }
        most = std::max(most, values);
      }
      continue;
    }
    const std::string_view reason = redundant(tensor.role, config);
    const auto to = kept.find({tensor.role, tensor.layer_idx, tensor.part});
    if (!reason.empty()) {
      plan.left_out.push_back(tensor.name + ": " + std::string(reason));
    } else if (to == kept.end()) {
      fail_input({source.checkpoint().path(), tensor.name, "has no place in the layout",
                  "a tensor of " + std::string(converted.family->name), "one that it does not have", ""});
    } else {
      plan.tensors.push_back(kept_tensor(inputs, plan.options, to->second, tensor.name));
    }
  }
  const auto head = kept.find({Role::lm_head, {}, {}});
  if (config.tie_word_embeddings && head != kept.end() &&
      (head->second.presence == Presence::required || inputs.engine->traits().stores_tied_head)) {
    plan.tensors.push_back(
        kept_tensor(inputs, plan.options, head->second, source.name_of(Role::embed_tokens, {})));
  }
  return most;
}

// Bytes of disk and memory.
void plan_cost(const ConvertInputs& inputs, std::uint64_t attention_values, ConvertPlan& plan) {
  const Model& source = inputs.source;
  const ModelConfig& config = source.config();
  const LatentShape& shape = plan.shape;
  const ConvertOptions& options = plan.options;
  std::uint64_t largest_cast = 0;
  for (const PlannedTensor& tensor : plan.tensors) {
    plan.output_bytes += tensor.spec.bytes();
    if (tensor.action == TensorAction::cast) {
      largest_cast = std::max(largest_cast, tensor.spec.bytes() / size_of(tensor.spec.dtype) * 8);
    }
  }
  if (!inputs.engine->traits().single_file) {
    plan.side_files = source.folder("converted").side_files();
    std::erase_if(plan.side_files, [](const std::filesystem::path& file) {
      return file.filename() == kReportName;  // of an earlier conversion; this one writes its own
    });
  }
  for (const std::filesystem::path& file : plan.side_files) {
    plan.output_bytes += std::filesystem::file_size(file);
  }
  const bool fits =
      options.method == Method::relatent && relatent_options(options, inputs, shape).uses_tokens();
  plan.layer_bytes =
      layer_memory(config, shape, inputs.calibration.has_value(),
                   fits || inputs.partition.parts > 1 || config.latent.has_value(), attention_values);
  if (options.method == Method::transmla) {
    // The second calibration: its stream and what the layer reads of it.
    plan.resume_bytes = streams_disk(config, inputs.calibration->sequences()) / 2;
    plan.memory_bytes = std::max(largest_cast, plan.layer_bytes) + plan.resume_bytes;
    return;
  }
  if (!fits) {
    const Index in_flight = std::min(layers_at_once(plan.layer_bytes), config.num_hidden_layers);
    plan.memory_bytes = std::max(largest_cast, static_cast<std::uint64_t>(in_flight) * plan.layer_bytes);
    return;
  }
  const Sequences sequences = fit_sequences(options, inputs);
  const RelatentOptions& own = options.relatent;
  const SampleSize size{sequences.count, sequences.length,
                        own.fit.stride_for(sequences.count * sequences.length, config.hidden_size),
                        own.compute};
  plan.memory_bytes =
      std::max({largest_cast, plan.layer_bytes, fit_memory(config, shape, size, own.fit.output_rounds > 0)}) +
      streams_memory(config, sequences, size.stride, shape.qk_rope_head_dim + shape.kv_lora_rank);
  plan.resume_bytes = streams_disk(config, sequences);
}

}  // namespace

ConvertOptions with_compute_type(const ConvertOptions& options, const ConvertInputs& inputs) {
  const bool can = backend().has_bf16();
  ConvertOptions out = options;
  if (options.compute) {
    if (*options.compute == DType::bf16 && !can) {
      fail_usage("--compute bfloat16: this processor has no bfloat16 products");
    }
    out.relatent.compute = *options.compute;
  } else if (can && inputs.calibration && inputs.calibration->header().compute == torch_name(DType::bf16)) {
    out.relatent.compute = DType::bf16;
  }
  return out;
}

ConvertOptions completed(const ConvertOptions& options, const ConvertInputs& inputs) {
  check_source(inputs.source);
  check_engine(options, inputs);
  return with_engine_sizes(with_compute_type(options, inputs), inputs);
}

RelatentOptions relatent_options(const ConvertOptions& options, const ConvertInputs& inputs,
                                 const LatentShape& shape) {
  RelatentOptions out = options.relatent;
  out.rank = shape.kv_lora_rank;
  out.rope_dim = shape.qk_rope_head_dim;
  const ModelConfig& config = inputs.source.config();
  const EngineTraits traits = inputs.engine->traits();
  out.plain_list = has_plain_list(options, *inputs.engine);
  out.layer_lists = inputs.engine->traits().layer_frequencies && !out.plain_list && !options.one_list;
  out.partition = inputs.partition;
  out.key_rank = shape.shared_ranks.empty() ? 0 : shape.shared_ranks.front();
  out.query_bias = traits.query_bias;
  out.carried = inputs.carried;
  out.normed_heads = reads_normed_heads(inputs);
  if (config.gqa && !traits.normed_query) {
    out.q_rank = query_rank(options, inputs);
  }
  if (traits.normed_latent) {
    out.norm_coordinates = options.norm_coordinates.value_or(default_norm_coordinates);
    out.pad_rank = options.pad_rank;
  }
  return out;
}

ConvertPlan make_plan(const ConvertOptions& options, const ConvertInputs& inputs) {
  const Model& source = inputs.source;
  const Engine& engine = *inputs.engine;
  ConvertPlan plan;
  plan.options = options;
  if (options.method == Method::lossless && source.config().gqa) {
    plan.lossless = lossless_sizes(inputs);
  }
  plan.shape = choose_shape(options, inputs, plan.lossless);
  plan.carried = inputs.carried;
  for (std::string warning : {other_eps(options, source, engine.traits()), few_tokens(options, inputs),
                              one_longrope_list(options, source), unserved_shape(options, engine.traits()),
                              linear_stand_in_note(options, inputs)}) {
    if (!warning.empty()) {
      plan.warnings.push_back(std::move(warning));
    }
  }
  const ModelConfig& config = source.config();
  plan.dtype = options.dtype.value_or(source.checkpoint().info(source.name_of(Role::o_weight, 0)).dtype);
  plan.source_cache_elements = config.cache_elements();
  const ModelConfig converted =
      engine.written_config(source.checkpoint().config(), config, plan.shape, plan.dtype);
  plan.converted_cache_elements = converted.cache_elements();
  plan.source_cache_bytes = static_cast<std::uint64_t>(config.cache_bytes_per_token());
  plan.converted_cache_bytes = static_cast<std::uint64_t>(converted.cache_bytes_per_token());
  plan.source_context_bytes = config.cache_by_context();
  plan.converted_context_bytes = converted.cache_by_context();

  plan_cost(inputs, plan_tensors(inputs, converted, plan), plan);
  return plan;
}

}  // namespace relatent

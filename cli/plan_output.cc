#include "cli/plan_output.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <optional>
#include <vector>

#include "cli/progress.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

const char* action_text(TensorAction action) {
  switch (action) {
    case TensorAction::convert:
      return "converted";
    case TensorAction::copy:
      return "copied";
    case TensorAction::cast:
      return "cast";
  }
  return "";
}

// Both included.
struct Bounds {
  Index least = 0;
  Index most = 0;

  bool open() const { return least < most; }
};

Bounds bounds_of(const OpenSizes& open, Index CacheSizes::*size) {
  const auto smaller = [size](const CacheSizes& a, const CacheSizes& b) { return a.*size < b.*size; };
  const auto [least, most] = std::minmax_element(open.candidates.begin(), open.candidates.end(), smaller);
  return {*least.*size, *most.*size};
}

std::string text(const Bounds& bounds) {
  return std::to_string(bounds.least) + " to " + std::to_string(bounds.most);
}

CacheSizes planned_sizes(const ConvertPlan& plan) {
  const std::vector<Index>& shared = plan.shape.shared_ranks;
  return {plan.shape.qk_rope_head_dim, plan.shape.kv_lora_rank, shared.empty() ? 0 : shared.front()};
}

// What is said of sizes that trials choose.
struct OpenText {
  std::string open;
  std::string settled;
  std::string tried;
  std::string planned;
};

// A few pairs of one sum.
void tell_candidates(const ConvertPlan& plan, OpenText& out) {
  const CacheSizes planned = planned_sizes(plan);
  out.open = "rotary key and rank";
  out.settled =
      std::to_string(planned.rope_dim + planned.rank) + " elements per token and layer for both together";
  for (const CacheSizes& sizes : plan.open->candidates) {
    out.tried += (out.tried.empty() ? "" : ", ") + sizes_text(sizes);
  }
  if (plan.open->weights_add_one) {
    out.tried += ", and the rotary key at which frequencies cease to matter";
  }
  out.tried += "; the one that loses least on held-out calibration tokens is taken";
  // Of two the second.
  const std::size_t count = plan.open->candidates.size();
  out.planned = sizes_text(planned);
  if (count > 1) {
    out.planned += count > 2 ? ", the one in the middle" : ", the second of them";
  }
}

// The smallest cache that loses little enough.
void tell_range(const ConvertPlan& plan, OpenText& out) {
  Bounds total{plan.source_cache_elements, plan.source_cache_elements};
  for (const CacheSizes& sizes : plan.open->candidates) {
    total.least = std::min(total.least, sizes.rope_dim + sizes.rank);
  }
  const std::string limit = "at most " + number_text("%g", *plan.options.max_nats) + " nats";
  out.open = "rotary key and rank";
  out.settled = "the loss, " + limit;
  out.tried = "caches of " + text(total) + " elements per token and layer in steps of " +
              std::to_string(plan.open->step) + ", by halving that range; the smallest that loses " + limit +
              " is taken";
  out.planned = sizes_text(planned_sizes(plan)) + ", the one that is tried first";
}

// What fills the cache of a device.
void tell_split(const ConvertPlan& plan, OpenText& out) {
  const CacheSizes planned = planned_sizes(plan);
  const Bounds rotary = bounds_of(*plan.open, &CacheSizes::rope_dim);
  const Bounds keys = bounds_of(*plan.open, &CacheSizes::key_rank);
  out.settled = std::to_string(*plan.options.per_device) + " elements per token and layer on each device";
  if (rotary.open()) {
    out.open = "rotary key";
    out.tried = "rotary keys of " + text(rotary);
  } else {
    out.settled += ", of them a rotary key of " + std::to_string(planned.rope_dim);
  }
  if (keys.open()) {
    out.open += (out.open.empty() ? "" : " and ") + std::string("shared coordinates");
    out.tried += (out.tried.empty() ? "" : " and ") + text(keys) + " shared coordinates";
  } else if (planned.key_rank > 0) {
    out.settled += ", of them " + std::to_string(planned.key_rank) + " shared coordinates";
  }
  out.tried += " in steps of " + std::to_string(plan.open->step) +
               ", as long as a step loses less on held-out calibration tokens";
  out.planned = sizes_text(planned) + ", the one that is tried first";
}

OpenText open_text(const ConvertPlan& plan) {
  OpenText out;
  if (plan.open->all_tried) {
    tell_candidates(plan, out);
  } else if (plan.options.max_nats) {
    tell_range(plan, out);
  } else {
    tell_split(plan, out);
  }
  out.open += "; `convert` chooses by trials, which read every weight, and a dry run makes none";
  return out;
}

Json sizes_json(const CacheSizes& sizes) {
  return {{"rope_dim", sizes.rope_dim}, {"kv_rank", sizes.rank}, {"key_rank", sizes.key_rank}};
}

Json open_json(const ConvertPlan& plan) {
  const OpenSizes& open = *plan.open;
  const OpenText words = open_text(plan);
  Json out = {{"not_chosen_yet", words.open},
              {"settled", words.settled},
              {"to_be_tried", words.tried},
              {"planned_here", words.planned}};
  const auto put = [&](const char* name, Index CacheSizes::*size) {
    const Bounds bounds = bounds_of(open, size);
    out[name] = bounds.most > 0 ? Json{{"least", bounds.least}, {"most", bounds.most}} : Json(nullptr);
  };
  put("rope_dim", &CacheSizes::rope_dim);
  put("kv_rank", &CacheSizes::rank);
  put("key_rank", &CacheSizes::key_rank);
  out["candidates"] = Json(nullptr);
  out["weights_add_one"] = open.weights_add_one;
  if (open.all_tried) {
    out["candidates"] = Json::array();
    for (const CacheSizes& sizes : open.candidates) {
      out["candidates"].push_back(sizes_json(sizes));
    }
  }
  return out;
}

void print_sizes(const ConvertPlan& plan) {
  if (plan.open) {
    const OpenText words = open_text(plan);
    std::printf("not chosen yet: %s\n", words.open.c_str());
    std::printf("  settled: %s\n", words.settled.c_str());
    std::printf("  to be tried: %s\n", words.tried.c_str());
    std::printf("  planned here: %s\n", words.planned.c_str());
  }
  if (!plan.carried.empty()) {
    std::printf("layers that are carried as they are: %s\n", plan.carried.text().c_str());
  }
  std::printf("cache per token and layer: %td elements, source %td (%.1f %%)\n",
              plan.converted_cache_elements, plan.source_cache_elements,
              100.0 * static_cast<double>(plan.converted_cache_elements) /
                  static_cast<double>(plan.source_cache_elements));
  std::printf("cache per token: %llu bytes, source %llu\n",
              static_cast<unsigned long long>(plan.converted_cache_bytes),
              static_cast<unsigned long long>(plan.source_cache_bytes));
  for (std::size_t i = 0; i < reported_contexts.size(); ++i) {
    std::printf("cache of %s tokens: %td bytes, source %td\n", context_text(reported_contexts[i]).c_str(),
                plan.converted_context_bytes[i], plan.source_context_bytes[i]);
  }
}

}  // namespace

std::string sizes_text(const CacheSizes& sizes) {
  return "rotary " + std::to_string(sizes.rope_dim) + " + latents " + std::to_string(sizes.rank) +
         (sizes.key_rank > 0 ? " (" + std::to_string(sizes.key_rank) + " of them shared)" : "");
}

void print_plan(const ConvertPlan& plan) {
  std::size_t widest = 0;
  for (const PlannedTensor& tensor : plan.tensors) {
    widest = std::max(widest, tensor.spec.name.size());
  }
  for (const PlannedTensor& tensor : plan.tensors) {
    std::printf("%-*s  %-16s %-5s %12llu  %s\n", static_cast<int>(widest), tensor.spec.name.c_str(),
                shape_text(tensor.spec.shape).c_str(),
                std::string(safetensors_name(tensor.spec.dtype)).c_str(),
                static_cast<unsigned long long>(tensor.spec.bytes()), action_text(tensor.action));
  }
  for (const std::string& name : plan.left_out) {
    std::printf("left out: %s\n", name.c_str());
  }
  for (const std::filesystem::path& file : plan.side_files) {
    std::printf("copied as it is: %s\n", file.filename().c_str());
  }
  print_sizes(plan);
  const std::string resume = plan.resume_bytes == 0
                                 ? ""
                                 : ", " + bytes_text(plan.resume_bytes) + " more while it runs for --resume,";
  std::printf("needs %s of disk%s and about %s of memory\n", bytes_text(plan.output_bytes).c_str(),
              resume.c_str(), bytes_text(plan.memory_bytes).c_str());
}

nlohmann::ordered_json plan_json(const ConvertPlan& plan) {
  Json out;
  out["method"] = method_name(plan.options.method);
  out["kv_rank"] = plan.shape.kv_lora_rank;
  out["rope_dim"] = plan.shape.qk_rope_head_dim;
  out["cache_elements_per_token_and_layer"] = {{"source", plan.source_cache_elements},
                                               {"converted", plan.converted_cache_elements}};
  out["cache_bytes_per_token"] = {{"source", plan.source_cache_bytes},
                                  {"converted", plan.converted_cache_bytes}};
  out["cache_bytes_at_context"] = context_json(plan.source_context_bytes, plan.converted_context_bytes);
  out["carried_layers"] = plan.carried.layers();
  out["open_sizes"] = plan.open ? open_json(plan) : Json(nullptr);
  out["tensors"] = Json::array();
  for (const PlannedTensor& tensor : plan.tensors) {
    out["tensors"].push_back({{"name", tensor.spec.name},
                              {"shape", tensor.spec.shape},
                              {"dtype", safetensors_name(tensor.spec.dtype)},
                              {"bytes", tensor.spec.bytes()},
                              {"action", action_text(tensor.action)}});
  }
  out["left_out"] = plan.left_out;
  out["side_files"] = Json::array();
  for (const std::filesystem::path& file : plan.side_files) {
    out["side_files"].push_back(file.filename().string());
  }
  out["disk_bytes"] = plan.output_bytes;
  out["resume_bytes"] = plan.resume_bytes;
  out["memory_bytes_estimate"] = plan.memory_bytes;
  return out;
}

}  // namespace relatent

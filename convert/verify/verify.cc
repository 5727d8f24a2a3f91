#include "convert/verify/verify.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "convert/compute/backend.h"
#include "convert/model/devices.h"
#include "convert/model/families/family.h"
#include "formats/error.h"

namespace relatent {
namespace {

double relative(double diff_squared, double source_squared) {
  return source_squared > 0 ? std::sqrt(diff_squared / source_squared) : std::sqrt(diff_squared);
}

void check_same(const Model& source, const Model& converted, const char* key, Index expected, Index found) {
  if (expected != found) {
    fail_input({converted.checkpoint().config_path(), "", key,
                std::to_string(expected) + " as in " + source.checkpoint().config_path().string(),
                std::to_string(found), ""});
  }
}

nlohmann::ordered_json or_null(const std::optional<Index>& number) {
  return number ? nlohmann::ordered_json(*number) : nlohmann::ordered_json(nullptr);
}

}  // namespace

std::vector<Verification> verify(const Model& source, const Model& converted,
                                 const std::vector<Sequences>& runs, const LayerProgress& progress) {
  const ModelConfig& a = source.config();
  const ModelConfig& b = converted.config();
  check_same(source, converted, "hidden_size", a.hidden_size, b.hidden_size);
  check_same(source, converted, "num_hidden_layers", a.num_hidden_layers, b.num_hidden_layers);
  check_same(source, converted, "vocab_size", a.vocab_size, b.vocab_size);
  std::vector<Verification> out(runs.size());
  std::vector<Stream> source_streams;
  std::vector<Stream> converted_streams;
  source_streams.reserve(runs.size());
  converted_streams.reserve(runs.size());
  for (const Sequences& sequences : runs) {
    source_streams.emplace_back(source, sequences);
    converted_streams.emplace_back(converted, sequences);
  }
  for (Index i = 0; i < a.num_hidden_layers; ++i) {
    const Layer expected = backend().load_layer(source, i, DType::f32);
    const Layer actual = backend().load_layer(converted, i, DType::f32);
    for (std::size_t run = 0; run < runs.size(); ++run) {
      const LayerDifference found =
          backend().run_side_by_side(expected, source_streams[run], actual, converted_streams[run]);
      out[run].layers.push_back({relative(found.attention, found.attention_source),
                                 relative(found.residual, found.residual_source)});
    }
    if (progress) {
      progress(i + 1, a.num_hidden_layers);
    }
  }
  for (std::size_t run = 0; run < runs.size(); ++run) {
    Verification& v = out[run];
    v.logits =
        backend().compare_logits(source, source_streams[run], converted, converted_streams[run], runs[run]);
    v.source_ppl = std::exp(v.logits.source_nll);
    v.converted_ppl = std::exp(v.logits.converted_nll);
    v.nats = v.logits.converted_nll - v.logits.source_nll;
    v.source_cache_bytes = a.cache_bytes_per_token();
    v.converted_cache_bytes = b.cache_bytes_per_token();
    v.source_context_bytes = a.cache_by_context();
    v.converted_context_bytes = b.cache_by_context();
    for (std::size_t i = 0; i < reported_tp.size(); ++i) {
      v.source_per_device[i] = a.cache_bytes_per_token_on_device(reported_tp[i]);
      v.converted_per_device[i] = b.cache_bytes_per_token_on_device(reported_tp[i]);
    }
  }
  return out;
}

Verification verify(const Model& source, const Model& converted, const Sequences& sequences,
                    const LayerProgress& progress) {
  return verify(source, converted, std::vector<Sequences>{sequences}, progress).front();
}

DeviceVerification verify_devices(const Model& converted, const Sequences& sequences, Index tp,
                                  const LayerProgress& progress) {
  const ModelConfig& config = converted.config();
  if (!config.latent) {
    fail_usage("--tp runs latent models device by device, and " + converted.checkpoint().path().string() +
               " is " + std::string(config.family->name));
  }
  const std::vector<DeviceShare> shares = device_shares(*config.latent, tp);
  DeviceVerification out;
  out.tp = tp;
  for (const DeviceShare& share : shares) {
    Index elements = 0;
    for (Index i = 0; i < config.num_hidden_layers; ++i) {
      elements += config.is_latent(i) ? share.cache_elements(*config.latent) : config.gqa->cache_elements(tp);
    }
    out.cache_bytes_per_token.push_back(elements * static_cast<Index>(size_of(config.dtype)));
  }
  Stream whole(converted, sequences);
  Stream split = whole;
  for (Index i = 0; i < config.num_hidden_layers; ++i) {
    const Layer layer = backend().load_layer(converted, i, DType::f32);
    run_layer(layer, whole);
    const auto* latent = std::get_if<LatentAttention>(&layer.attention);
    if (latent == nullptr) {
      run_layer(layer, split);
      progress(i + 1, config.num_hidden_layers);
      continue;
    }
    std::vector<LatentAttention> parts;
    parts.reserve(shares.size());
    for (const DeviceShare& share : shares) {
      parts.push_back(part_of(*latent, share, parts.empty()));
    }
    backend().add_attention(layer.input_norm, parts, layer.attention_output_norm, split);
    backend().add_mlp(layer, split);
    progress(i + 1, config.num_hidden_layers);
  }
  out.logits = backend().compare_logits(converted, whole, converted, split, sequences);
  return out;
}

nlohmann::ordered_json to_json(const std::vector<LayerFidelity>& layers) {
  nlohmann::ordered_json out = nlohmann::ordered_json::array();
  for (const LayerFidelity& layer : layers) {
    out.push_back({{"attention_rel_error", layer.attention_rel_error},
                   {"residual_rel_error", layer.residual_rel_error}});
  }
  return out;
}

nlohmann::ordered_json to_json(const DeviceVerification& v) {
  return {{"tp", v.tp},
          {"rel_logit_error", v.logits.rel_logit_error},
          {"non_finite_positions", v.logits.non_finite},
          {"max_abs_logit_diff", v.logits.max_abs_logit_diff},
          {"kv_bytes_per_token", v.cache_bytes_per_token}};
}

nlohmann::ordered_json to_json(const Verification& v) {
  nlohmann::ordered_json out;
  out["source_ppl"] = v.source_ppl;
  out["converted_ppl"] = v.converted_ppl;
  out["nats"] = v.nats;
  out["mean_kl"] = v.logits.mean_kl;
  out["max_kl"] = v.logits.max_kl;
  out["top1_agreement"] = v.logits.top1_agreement;
  out["max_abs_logit_diff"] = v.logits.max_abs_logit_diff;
  out["rel_logit_error"] = v.logits.rel_logit_error;
  out["non_finite_positions"] = v.logits.non_finite;
  out["tokens"] = v.logits.tokens;
  auto& cache = out["kv_bytes_per_token"];
  cache["source"] = v.source_cache_bytes;
  cache["converted"] = v.converted_cache_bytes;
  for (std::size_t i = 0; i < reported_tp.size(); ++i) {
    const std::string tp = std::to_string(reported_tp[i]);
    cache["per_device"][tp] = {{"source", or_null(v.source_per_device[i])},
                               {"converted", or_null(v.converted_per_device[i])}};
  }
  out["kv_bytes_at_context"] = context_json(v.source_context_bytes, v.converted_context_bytes);
  out["layers"] = to_json(v.layers);
  return out;
}

}  // namespace relatent

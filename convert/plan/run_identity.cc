#include "convert/plan/run_identity.h"

#include <concepts>

#include "formats/file_identity.h"
#include "formats/resume.h"

namespace relatent {
namespace {

std::string words(bool value) {
  return value ? "yes" : "no";
}

std::string words(double value) {
  return exact_text(value);
}

std::string words(std::integral auto value) {
  return std::to_string(value);
}

std::string words(std::string_view value) {
  return std::string(value);
}

std::string words(DType value) {
  return std::string(torch_name(value));
}

std::string words(const CacheShape& value) {
  return to_string(value);
}

template <typename Value>
std::string words(const std::optional<Value>& value) {
  return value ? words(*value) : "not given";
}

void add_inputs(const ConvertOptions& options, const Checkpoint& source, RunIdentity& out) {
  out.emplace_back("the calibration",
                   options.calibration ? file_identity(*options.calibration) : "not given");
  add_source_identity(source, out);
}

}  // namespace

RunIdentity run_identity(const ConvertOptions& options, const Checkpoint& source) {
  RunIdentity out = program_identity();
  const auto add = [&out](const char* name, const auto& value) { out.emplace_back(name, words(value)); };
  add("--method", method_name(options.method));
  add("--to", std::string_view(options.form));
  add("--layers", std::string_view(options.layers));
  add("--branches", options.branches);
  add("--devices", options.devices);
  add("--context", options.context);
  add("--key-rank", options.key_rank);
  add("--rank", options.rank);
  add("--rope-dim", options.rope_dim);
  add("--kv-budget", options.kv_budget);
  add("--per-device", options.per_device);
  add("--max-nats", options.max_nats);
  add("--fold", options.fold);
  add("--balance", options.balance);
  add("--q-rank", options.q_rank);
  add("--norm-coordinates", options.norm_coordinates);
  add("--pad-rank", options.pad_rank);
  add("--shape", options.shape);
  add("--engine", std::string_view(options.engine));
  add("--pre-tokenizer", std::string_view(options.pre_tokenizer));
  add("--dtype", options.dtype);
  add("--max-shard-size", options.max_shard_bytes);
  add("--held-out", options.held_out);
  const RelatentOptions& own = options.relatent;
  add("--no-expected-rotation", !own.expected_rotation);
  add("--no-output-metric", !own.output_metric);
  add("--plain-list", own.plain_list);
  add("--one-list", options.one_list);
  add("--order", order_name(own.order));
  add("value weight", own.value_weight);
  const FitOptions& fit = own.fit;
  add("--no-query-fit", !fit.queries);
  add("--no-key-fit", !fit.keys);
  add("--no-refit", !fit.refit);
  add("--compute", own.compute);
  add("--fit-rounds", fit.rounds);
  add("--output-rounds", fit.output_rounds);
  add("--fit-tokens", fit.tokens);
  add("--fit-stride", fit.stride);
  add("fit steps", fit.steps);
  add("queries per unknown", fit.queries_per_unknown);
  add("query ridge", fit.query_ridge);
  add("key ridge", fit.key_ridge);
  add("output ridge", fit.output_ridge);
  add("score weight", fit.score_weight);
  add_inputs(options, source, out);
  return out;
}

void require_unchanged_inputs(const RunIdentity& before, const ConvertOptions& options,
                              const Checkpoint& source) {
  RunIdentity now;
  add_inputs(options, source, now);
  require_unchanged(before, now);
}

}  // namespace relatent

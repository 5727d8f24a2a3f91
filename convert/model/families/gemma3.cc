// Gemma 3 without its vision: five sliding layers for each that sees every position, a list of rotary
// frequencies for either kind, and norms on each head's queries and keys.
#include "convert/model/families/family.h"
#include "convert/model/families/gemma.h"
#include "convert/model/families/rules.h"

namespace relatent {
namespace {

using Json = ConfigReader::Json;

// The rope parameters of a type of layers, as Gemma3TextConfig has them: by type in `rope_parameters`, or in
// the older keys.
Json rope_of_type(const ConfigReader& in, const char* type, const char* theta_key, double theta,
                  bool scaled) {
  Json out = {{"rope_type", "default"}};
  if (const Json* by_type = in.find("rope_parameters"); by_type != nullptr) {
    if (!by_type->is_object()) {
      in.complain("rope_parameters", "an object with one for full_attention and one for sliding_attention");
    }
    if (const auto found = by_type->find(type); found != by_type->end() && !found->is_null()) {
      if (!found->is_object()) {
        in.complain("rope_parameters", "an object for " + std::string(type));
      }
      out = *found;
    }
  }
  if (const Json* scaling = scaled ? in.find("rope_scaling") : nullptr; scaling != nullptr) {
    if (!scaling->is_object()) {
      in.complain("rope_scaling", "null or an object");
    }
    out.update(*scaling);
  }
  if (!out.contains("rope_theta")) {
    out["rope_theta"] = in.number_or(theta_key, theta);
  }
  return out;
}

void parse_gemma3(const ConfigReader& in, ModelConfig& out) {
  const Json full = with_rope_parameters(in, rope_of_type(in, "full_attention", "rope_theta", 1e6, true));
  const Json sliding =
      with_rope_parameters(in, rope_of_type(in, "sliding_attention", "rope_local_base_freq", 1e4, false));
  const char* pattern =
      in.has("_sliding_window_pattern") ? "_sliding_window_pattern" : "sliding_window_pattern";
  parse_gemma(ConfigReader(full, in.path()), {.full_every = in.size_or(pattern, 6)}, out);
  out.gqa->qk_norm = QkNorm::head;
  out.other_rotaries = {parse_rotary(sliding, out.gqa->head_dim, in.path())};
  for (AttentionSpec& spec : out.attention) {
    if (spec.window) {
      spec.rotary = 0;
    }
  }
}

}  // namespace

const Family& gemma3_family() {
  static const Family family = {.name = "gemma3_text",
                                .model_type = "gemma3_text",
                                .key = "",
                                .parse = parse_gemma3,
                                .rules = rules::with_qk_norm(gemma_rules()),
                                .models = "Gemma 3 (text)",
                                .features =
                                    "five of six layers slide; two rotary bases; norms on every head's "
                                    "queries and keys, and behind the blocks"};
  return family;
}

}  // namespace relatent

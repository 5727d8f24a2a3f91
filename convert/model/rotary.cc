#include "convert/model/rotary.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numbers>

#include "convert/model/config_ranges.h"
#include "convert/model/config_reader.h"
#include "formats/error.h"

namespace relatent {
namespace {

using Json = nlohmann::ordered_json;

// Before a key, in complaints.
constexpr const char* rope_words = "rope parameter ";
constexpr const char* original_context = "original_max_position_embeddings";
// Of longrope, below the end of its range.
constexpr float largest_factor = 1e22F;

struct RopeSource {
  const ConfigReader& parameters;
  const ConfigReader& config;
};

// base^(-2i/p)
std::vector<double> geometric(double base, Index p) {
  std::vector<double> out(static_cast<std::size_t>(p / 2));
  for (Index i = 0; i < p / 2; ++i) {
    // transformers forms the exponent in float32.
    const double exponent = static_cast<float>(2 * i) / static_cast<float>(p);
    out[static_cast<std::size_t>(i)] =
        1.0 / static_cast<double>(static_cast<float>(std::pow(base, exponent)));
  }
  return out;
}

void apply_llama3(const RopeSource& rope, std::vector<double>& freq) {
  const double factor = rope.parameters.number("factor");
  const double low = rope.parameters.number("low_freq_factor");
  const double high = rope.parameters.number("high_freq_factor");
  const double original = rope.parameters.number("original_max_position_embeddings");
  if (high <= low) {
    rope.parameters.complain("high_freq_factor", "more than low_freq_factor");
  }
  for (double& f : freq) {
    const double wavelength = 2 * std::numbers::pi / f;
    if (wavelength > original / low) {
      f /= factor;
    } else if (wavelength >= original / high) {
      const double smooth = (original / wavelength - low) / (high - low);
      f = (1 - smooth) * f / factor + smooth * f;
    }
  }
}

double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

// YaRN (Peng et al., 2023), as transformers computes it; returns the attention factor.
double apply_yarn(const RopeSource& rope, double base, Index p, std::vector<double>& freq) {
  const double factor = rope.parameters.number("factor");
  const double original =
      rope.parameters.number_or("original_max_position_embeddings",
                                static_cast<double>(rope.config.size_or("max_position_embeddings", 2048)));
  const double fast = rope.parameters.number_or("beta_fast", 32);
  const double slow = rope.parameters.number_or("beta_slow", 1);
  if (fast <= slow) {
    rope.parameters.complain("beta_fast", "more than beta_slow (32 and 1 where they are not given)");
  }
  // The logarithm of the base divides.
  if (base == 1) {
    rope.parameters.complain("rope_theta", "more than 1, as yarn has it");
  }
  const auto dim_of = [&](double rotations) {
    return static_cast<double>(p) * std::log(original / (rotations * 2 * std::numbers::pi)) /
           (2 * std::log(base));
  };
  double low = dim_of(fast);
  double high = dim_of(slow);
  if (rope.parameters.flag_or("truncate", true)) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, static_cast<double>(p - 1));
  if (low == high) {
    high += 0.001;
  }
  for (std::size_t i = 0; i < freq.size(); ++i) {
    const double ramp = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    freq[i] = freq[i] / factor * ramp + freq[i] * (1 - ramp);
  }
  if (rope.parameters.has("attention_factor")) {
    return rope.parameters.number("attention_factor");
  }
  const double mscale = rope.parameters.number_or("mscale", 0);
  const double all_dim = rope.parameters.number_or("mscale_all_dim", 0);
  if (mscale != 0 && all_dim != 0) {
    return yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim);
  }
  return yarn_mscale(factor, 1);
}

// Phi-3's configs say it outside the rope parameters, which counts for more where both do.
const ConfigReader& original_context_reader(const RopeSource& rope) {
  return rope.config.has(original_context) ? rope.config : rope.parameters;
}

double apply_longrope(const RopeSource& rope, std::vector<double>& freq) {
  // Their products with any base stay in float32.
  constexpr NumberRange range = {1e-22, 1e22};
  const auto is_factor = [&](const Json& v) { return v.is_number() && range.holds(v.get<double>()); };
  const Json* short_list = rope.parameters.find("short_factor");
  const Json* long_list = rope.parameters.find("long_factor");
  for (const Json* list : {short_list, long_list}) {
    if (list == nullptr || !list->is_array() || list->size() != freq.size() ||
        !std::all_of(list->begin(), list->end(), is_factor)) {
      rope.parameters.complain(list == short_list ? "short_factor" : "long_factor",
                               "the longrope factors, a list of " + std::to_string(freq.size()) +
                                   " positive numbers from 1e-22 to 1e22");
    }
  }
  if (*short_list != *long_list) {
    fail_input({rope.config.path(), "", "longrope with different short and long factors",
                "one list of frequencies", "a list that changes with the sequence length",
                "--context says for which length, and so which of the two"});
  }
  for (std::size_t i = 0; i < freq.size(); ++i) {
    const float ext = short_list->at(i).get<float>();
    // The product and the reciprocal are float32 in transformers.
    freq[i] = 1.0F / (ext * static_cast<float>(1.0 / freq[i]));
  }
  if (rope.parameters.has("attention_factor")) {
    return rope.parameters.number("attention_factor");
  }
  const ConfigReader& said_by = original_context_reader(rope);
  const double original = said_by.number(original_context);
  if (original < 2) {
    said_by.complain(original_context, "at least 2, whose logarithm divides");
  }
  const double extended = rope.config.has("max_position_embeddings")
                              ? static_cast<double>(rope.config.size("max_position_embeddings"))
                              : original;
  const double factor = rope.parameters.number_or("factor", extended / original);
  return factor <= 1 ? 1.0 : std::sqrt(1 + std::log(factor) / std::log(original));
}

// The frequencies of vectors of size rotary_dim; found: what rope_parameters_of gives.
Rotary parse_list(const Json& config, const Json& found, Index rotary_dim,
                  const std::filesystem::path& config_path) {
  if (rotary_dim <= 0 || rotary_dim % 2 != 0) {
    fail_input({config_path, "", "rotary size", "an even positive number", std::to_string(rotary_dim), ""});
  }
  const ConfigReader in(config, config_path);
  const ConfigReader parameters(found, config_path, rope_words);
  const RopeSource rope{parameters, in};
  const double base = parameters.number_or("rope_theta", 10000.0);

  Rotary out;
  out.rope_type = rope_type_of(found, config_path);
  std::vector<double> freq = geometric(base, rotary_dim);
  double attention_factor = 1;
  if (out.rope_type == "linear") {
    const double factor = rope.parameters.number("factor");
    for (double& f : freq) {
      f /= factor;
    }
  } else if (out.rope_type == "llama3") {
    apply_llama3(rope, freq);
  } else if (out.rope_type == "yarn") {
    attention_factor = apply_yarn(rope, base, rotary_dim, freq);
  } else if (out.rope_type == "longrope") {
    attention_factor = apply_longrope(rope, freq);
  } else if (out.rope_type != "default") {
    fail_input(
        {config_path, "", "rope_type", "default, linear, llama3, yarn or longrope", out.rope_type, ""});
  }
  out.attention_factor = static_cast<float>(attention_factor);
  out.inv_freq.assign(freq.begin(), freq.end());
  return out;
}

}  // namespace

Json rope_parameters_of(const Json& config, const std::filesystem::path& config_path) {
  const ConfigReader in(config, config_path);
  Json out = Json::object();
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const Json* found = in.find(key);
    if (found == nullptr) {
      continue;
    }
    if (!found->is_object()) {
      in.complain(key, "null or an object");
    }
    if (!found->empty()) {
      out = *found;
    }
  }
  for (const auto& [key, value] : out.items()) {
    if (value.is_object()) {
      fail_input({config_path, "", "rope parameters per layer type", "one set for all layers",
                  "a set for " + key, ""});
    }
  }
  for (const char* key : {"rope_theta", "partial_rotary_factor"}) {
    if (in.has(key) && !ConfigReader(out, config_path).has(key)) {
      out[key] = *in.find(key);
    }
  }
  return out;
}

std::string rope_type_of(const Json& parameters, const std::filesystem::path& config_path) {
  const ConfigReader in(parameters, config_path, rope_words);
  for (const char* key : {"rope_type", "type"}) {
    if (in.has(key)) {
      const std::string found = in.text(key);
      return found == "su" ? "longrope" : found;  // as the first Phi-3 checkpoints call it
    }
  }
  return "default";
}

std::size_t Rotary::rotating_pairs() const {
  return inv_freq.size() - static_cast<std::size_t>(std::count(inv_freq.begin(), inv_freq.end(), 0.0F));
}

Rotary Rotary::rotating() const {
  Rotary out = *this;
  std::erase(out.inv_freq, 0.0F);
  return out;
}

Rotary parse_rotary(const Json& config, Index rotary_dim, const std::filesystem::path& config_path) {
  const Json found = rope_parameters_of(config, config_path);
  const ConfigReader parameters(found, config_path, rope_words);
  if (parameters.number_or("partial_rotary_factor", 1) != 1) {
    parameters.complain("partial_rotary_factor", "1 (every coordinate rotated)");
  }
  return parse_list(config, found, rotary_dim, config_path);
}

Rotary parse_partial_rotary(const Json& config, Index head_dim, double factor,
                            const std::filesystem::path& config_path, Index& rotary_dim) {
  const Json found = rope_parameters_of(config, config_path);
  const ConfigReader parameters(found, config_path, rope_words);
  factor = parameters.number_or("partial_rotary_factor", factor);
  rotary_dim = static_cast<Index>(static_cast<double>(head_dim) * factor);
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > head_dim || (head_dim - rotary_dim) % 2 != 0) {
    parameters.complain("partial_rotary_factor",
                        "a part of head_dim = " + std::to_string(head_dim) + " that is even, as the rest is");
  }
  Rotary out = parse_list(config, found, rotary_dim, config_path);
  out.inv_freq.resize(static_cast<std::size_t>(head_dim / 2), 0.0F);
  return out;
}

Json with_longrope_list(const Json& config, std::int64_t context, const std::filesystem::path& config_path) {
  const Json found = rope_parameters_of(config, config_path);
  if (rope_type_of(found, config_path) != "longrope") {
    return config;
  }
  const ConfigReader in(config, config_path);
  const ConfigReader parameters(found, config_path, rope_words);
  const double original =
      original_context_reader({parameters, in}).number_or(original_context, static_cast<double>(context));
  const char* chosen = static_cast<double>(context) > original ? "long_factor" : "short_factor";
  Json out = config;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    const bool has_both =
        in.has(key) && out[key].contains("short_factor") && out[key].contains("long_factor");
    if (has_both) {
      const Json list = out[key][chosen];
      out[key]["short_factor"] = list;
      out[key]["long_factor"] = list;
    }
  }
  return out;
}

Json explicit_rope_parameters(const Rotary& rotary, std::int64_t max_position_embeddings) {
  std::vector<float> factors;
  factors.reserve(rotary.inv_freq.size());
  for (const float f : rotary.inv_freq) {
    if (f == 0) {
      factors.push_back(largest_factor);  // turns no position that there is by what float32 can tell from 0
      continue;
    }
    // Of the float32 numbers around 1/f, the one whose float32 reciprocal comes closest to f.
    const float guess = 1.0F / f;
    float best = guess;
    for (const float candidate : {std::nextafter(guess, 0.0F), std::nextafter(guess, INFINITY)}) {
      if (std::abs(1.0F / candidate - f) < std::abs(1.0F / best - f)) {
        best = candidate;
      }
    }
    factors.push_back(best);
  }
  Json out;
  out["rope_type"] = "longrope";
  out["rope_theta"] = 1.0;
  out["factor"] = 1.0;
  out["attention_factor"] = rotary.attention_factor;
  out["original_max_position_embeddings"] = max_position_embeddings;
  out["short_factor"] = factors;
  out["long_factor"] = factors;
  return out;
}

double geometric_base(const Rotary& rotary) {
  const auto pairs = static_cast<double>(rotary.inv_freq.size());
  if (rotary.inv_freq.empty() || std::abs(rotary.inv_freq.front() - 1.0F) > 1e-6F ||
      rotary.attention_factor != 1.0F) {
    throw std::invalid_argument("the rotary frequencies do not start at 1");
  }
  if (rotary.inv_freq.size() == 1) {
    return 10000;  // base^0, whatever the base
  }
  // The slowest frequency tells most: θ = base^(-2 (p/2 - 1) / p).
  const auto slowest = static_cast<double>(rotary.inv_freq.back());
  double base = std::pow(slowest, -pairs / (pairs - 1));
  // Frequencies are float32; a base that is a whole number to their precision is that number.
  if (std::abs(base - std::round(base)) < 4e-7 * base) {
    base = std::round(base);
  }
  for (std::size_t i = 0; i < rotary.inv_freq.size(); ++i) {
    const double wanted = std::pow(base, -static_cast<double>(i) / pairs);
    if (std::abs(static_cast<double>(rotary.inv_freq[i]) - wanted) > 2e-6 * wanted) {
      throw std::invalid_argument("the rotary frequencies are not geometric");
    }
  }
  return base;
}

RotaryTable::RotaryTable(const Rotary& rotary, Index length)
    : cos(length, static_cast<Index>(rotary.inv_freq.size())),
      sin(length, static_cast<Index>(rotary.inv_freq.size())) {
  for (Index n = 0; n < length; ++n) {
    for (Index j = 0; j < cos.cols(); ++j) {
      const float angle = static_cast<float>(n) * rotary.inv_freq[static_cast<std::size_t>(j)];
      cos(n, j) = static_cast<float>(std::cos(static_cast<double>(angle))) * rotary.attention_factor;
      sin(n, j) = static_cast<float>(std::sin(static_cast<double>(angle))) * rotary.attention_factor;
    }
  }
}

void rotate_in_place(const RotaryTable& table, Index first, Index stride, Index heads, MatrixF& x) {
  const Index half = table.cos.cols();
  for (Index n = 0; n < x.rows(); ++n) {
    const float* cos = table.cos.row(n).data();
    const float* sin = table.sin.row(n).data();
    for (Index h = 0; h < heads; ++h) {
      float* re = x.row(n).data() + first + h * stride;
      float* im = re + half;
      for (Index j = 0; j < half; ++j) {
        const float a = re[j];
        const float b = im[j];
        re[j] = a * cos[j] - b * sin[j];
        im[j] = b * cos[j] + a * sin[j];
      }
    }
  }
}

}  // namespace relatent

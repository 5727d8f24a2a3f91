// Rotary position embedding: where its frequencies come from and how they are applied.
//
// Half-split convention throughout: pair j of a vector of size p is (j, j + p/2), read as one complex number.
// Position n multiplies pair j by attention_factor * exp(i * n * inv_freq[j]).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "linalg/matrix.h"

namespace relatent {

// Engines hold frequencies and angles in float32, and models were trained that way, so these are float32 too.
struct Rotary {
  // [p/2], radians per position. Pairs of frequency 0 do not rotate, and come behind those that do.
  std::vector<float> inv_freq;
  float attention_factor = 1.0F;
  std::string rope_type = "default";

  std::size_t rotating_pairs() const;
  // The list without its zeros.
  Rotary rotating() const;
};

// What a config says of its rotary embedding, in one object: `rope_scaling` or, where that is empty,
// `rope_parameters`, and the `rope_theta` and `partial_rotary_factor` that stand beside them. Throws Error
// (input) where they are no objects or differ by layer.
nlohmann::ordered_json rope_parameters_of(const nlohmann::ordered_json& config,
                                          const std::filesystem::path& config_path);

// The `rope_type` of such an object, or the older `type`; "default" without either.
std::string rope_type_of(const nlohmann::ordered_json& parameters, const std::filesystem::path& config_path);

// Reads the rotary embedding of a config for vectors of size p = rotary_dim. Types: default, linear, llama3,
// yarn, longrope with equal short and long lists; formulas as in transformers' modeling_rope_utils. Throws
// Error (input) on another type, an odd rotary_dim, or a number that is missing or out of its range
// (config_ranges.h), naming config_path.
Rotary parse_rotary(const nlohmann::ordered_json& config, Index rotary_dim,
                    const std::filesystem::path& config_path);

// The same of heads of which the leading part `partial_rotary_factor` rotates (where the config says nothing,
// `factor`): the list of that part, then zeros for the rest. rotary_dim: its size, head_dim * factor rounded
// down.
Rotary parse_partial_rotary(const nlohmann::ordered_json& config, Index head_dim, double factor,
                            const std::filesystem::path& config_path, Index& rotary_dim);

// The config with the one longrope list that sequences of `context` tokens are rotated by in the place of
// both: the short one up to original_max_position_embeddings, then the long one. Others as they are.
nlohmann::ordered_json with_longrope_list(const nlohmann::ordered_json& config, std::int64_t context,
                                          const std::filesystem::path& config_path);

// The `rope_parameters` that make transformers use exactly this list: type longrope with rope_theta 1, so
// that every factor is the reciprocal of its frequency. A plain geometric list is not recognised here.
nlohmann::ordered_json explicit_rope_parameters(const Rotary& rotary, std::int64_t max_position_embeddings);

// The base whose plain list base^(-2i/p) is the rotary's. Throws std::invalid_argument when the list is not
// geometric or does not start at 1.
double geometric_base(const Rotary& rotary);

// Cosines and sines for positions 0 ... length - 1, attention factor included.
struct RotaryTable {
  MatrixF cos;  // [length, p/2]
  MatrixF sin;  // [length, p/2]
  RotaryTable() = default;
  RotaryTable(const Rotary& rotary, Index length);
};

// Rotates `heads` vectors of size p lying at columns first + h * stride ... + p of each row of x; row =
// position.
void rotate_in_place(const RotaryTable& table, Index first, Index stride, Index heads, MatrixF& x);

}  // namespace relatent

#include "convert/model/layer_reader.h"

#include <memory>
#include <span>
#include <utility>

#include "formats/error.h"
#include "formats/safetensors.h"
#include "linalg/layouts.h"
#include "linalg/stages.h"

namespace relatent {

MatrixF LayerReader::matrix(Role role, std::optional<Index> part) const {
  const Stage stage("read weights");
  const std::string& name = name_of(role, part);
  MatrixF out = source_.read_matrix(name);
  source_.release(name);
  if (!all_finite(out)) {
    fail(role, part, "holds a value that is not finite", "finite weights", "NaN or infinity", "");
  }
  return out;
}

RowVectorF LayerReader::vector_or_empty(Role role, std::optional<Index> part) const {
  return has(role, part) ? RowVectorF(matrix(role, part).row(0)) : RowVectorF();
}

Linear LayerReader::linear(Role weight, Role bias, std::optional<Index> part) const {
  return {matrix(weight, part), vector_or_empty(bias, part)};
}

Linear LayerReader::packed(Role weight, Role bias, std::optional<Index> part) const {
  const std::string& name = name_of(weight, part);
  const TensorInfo& info = source_.info(name);
  if (info.dtype != DType::bf16) {
    Linear out = linear(weight, bias, part);
    out.pack();
    return out;
  }
  const Stage stage("read weights");
  const std::span<const std::byte> bytes = source_.bytes(name);
  if (!all_finite_bf16(bytes)) {
    fail(weight, part, "holds a value that is not finite", "finite weights", "NaN or infinity", "");
  }
  Linear out{{},
             vector_or_empty(bias, part),
             std::make_shared<const PackedWeight>(bytes, info.shape.at(0), info.shape.at(1))};
  source_.release(name);
  return out;
}

RmsNorm LayerReader::norm(Role role) const {
  RowVectorF gain = vector_or_empty(role);
  if (config_.norm_unit_offset) {
    gain.array() += 1;
  }
  return {std::move(gain), static_cast<float>(config_.rms_norm_eps)};
}

RmsNorm LayerReader::latent_norm(Role role, std::optional<Index> part) const {
  return {vector_or_empty(role, part), static_cast<float>(config_.latent->norm_eps)};
}

void LayerReader::fail(Role role, std::optional<Index> part, const std::string& problem,
                       const std::string& expected, const std::string& found,
                       const std::string& next_step) const {
  const std::string& name = name_of(role, part);
  fail_input({source_.path_of(name), name, problem, expected, found, next_step});
}

}  // namespace relatent

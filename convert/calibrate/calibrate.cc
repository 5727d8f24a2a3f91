#include "convert/calibrate/calibrate.h"

#include <Eigen/Dense>
#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "convert/model/forward.h"
#include "formats/error.h"
#include "linalg/moments.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Tokens whose normed inputs are held before they are folded into the moments. A fixed number, so that sums
// are formed in the same order for any thread count.
constexpr Index batch_tokens = 8192;

LayerMoments observe_layer(const Layer& layer, Stream& stream) {
  const RotaryTable table(rotary_of(layer.attention), stream.length());
  const Index heads = std::visit([](const auto& kind) { return kind.heads; }, layer.attention);
  const Index hidden = stream.hidden().cols();
  const Index length = stream.length();
  const Index batch = std::max<Index>(1, batch_tokens / length);
  LayerMoments out;
  out.tokens = stream.count() * length;
  out.second_moment = MatrixD::Zero(hidden, hidden);
  out.mean = VectorD::Zero(hidden);
  out.distance_mass = MatrixD::Zero(heads, length);
  MatrixF inputs(std::min(batch, stream.count()) * length, hidden);
  for (Index first = 0; first < stream.count(); first += batch) {
    const Index count = std::min(batch, stream.count() - first);
    std::vector<DistanceMass> mass(static_cast<std::size_t>(count), {MatrixD::Zero(heads, length)});
    parallel_for(static_cast<std::size_t>(count), [&](std::size_t i) {
      const auto s = static_cast<Index>(i);
      const MatrixF x = normed(layer.input_norm, stream.sequence(first + s));
      inputs.middleRows(s * length, length) = x;
      const MatrixF mixed =
          std::visit([&](const auto& kind) { return mix_heads(kind, x, table, &mass[i]); }, layer.attention);
      stream.sequence(first + s) += output_projection(layer.attention)(mixed);
      add_mlp(layer, stream.sequence(first + s));
    });
    add_second_moment(inputs.topRows(count * length), out.second_moment);
    out.mean += inputs.topRows(count * length).cast<double>().colwise().sum().transpose();
    for (const DistanceMass& m : mass) {
      out.distance_mass += m.sum;
    }
  }
  const auto tokens = static_cast<double>(out.tokens);
  out.second_moment /= tokens;
  mirror_lower(out.second_moment);
  out.mean /= tokens;
  out.distance_mass /= tokens;
  return out;
}

}  // namespace

void calibrate(const Model& model, const Sequences& sequences, const std::filesystem::path& output,
               const LayerProgress& progress, DType compute) {
  const ModelConfig& config = model.config();
  CalibrationHeader header;
  header.source_fingerprint = model.checkpoint().fingerprint();
  header.source_config = model.checkpoint().config().dump();
  header.model_type = config.model_type;
  header.hidden_size = config.hidden_size;
  header.num_hidden_layers = config.num_hidden_layers;
  header.num_attention_heads = config.num_attention_heads;
  CalibrationWriter writer(output, header, sequences);
  Stream stream(model, sequences);
  for (Index i = 0; i < config.num_hidden_layers; ++i) {
    Layer layer = model.layer(i);
    if (compute == DType::bf16) {
      use_bf16_products(layer);
    }
    writer.add_layer(observe_layer(layer, stream));
    progress(i + 1, config.num_hidden_layers);
  }
  writer.finish();
}

}  // namespace relatent

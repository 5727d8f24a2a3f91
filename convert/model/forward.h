// The forward pass over many sequences, layer by layer, so that one layer's weights are all that is ever in
// memory.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "convert/model/model.h"
#include "formats/npy.h"
#include "linalg/matrix.h"

namespace relatent {

// Called after each layer with (layers done, layers in all).
using LayerProgress = std::function<void(Index, Index)>;

// The residual stream of all sequences at one depth: [count * length, hidden], sequences one after another.
class Stream {
 public:
  Stream(const Model& model, const Sequences& sequences);
  Index count() const { return count_; }
  Index length() const { return length_; }
  MatrixF& hidden() { return hidden_; }
  const MatrixF& hidden() const { return hidden_; }
  // The rows of one sequence.
  auto sequence(Index i) { return hidden_.middleRows(i * length_, length_); }
  auto sequence(Index i) const { return hidden_.middleRows(i * length_, length_); }

 private:
  Index count_;
  Index length_;
  MatrixF hidden_;
};

// x = norm(h) for the rows of one sequence.
MatrixF normed(const RmsNorm& norm, const Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>& hidden);

// What the attention of a layer adds to the rows of one sequence: o(heads(norm h)).
MatrixF attention_output(const RmsNorm& input_norm, const Attention& attention,
                         const Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>& hidden,
                         const RotaryTable& table);
MatrixF attention_output(const RmsNorm& input_norm, const LatentAttention& attention,
                         const Eigen::Ref<const MatrixF, 0, Eigen::OuterStride<>>& hidden,
                         const RotaryTable& table);

// h += down(silu(gate(norm h)) * up(norm h)), and what the experts of norm h add, where there are some.
void add_mlp(const MlpHalf& half, Eigen::Ref<MatrixF, 0, Eigen::OuterStride<>> hidden);

// Moves a stream through one layer.
void run_layer(const Layer& layer, Stream& stream);

// All logits of one sequence: [length, vocab].
MatrixF logits_of(const Model& model, const Stream& stream, Index sequence);

// Next-token statistics of one model, or of two side by side, over all sequences: a sequence's last position
// predicts nothing. Logits are formed a slice of the vocabulary at a time and never stored.
struct LogitComparison {
  std::int64_t tokens = 0;  // predictions scored
  double source_nll = 0;    // mean negative log likelihood, nats
  double converted_nll = 0;
  double mean_kl = 0;  // KL(source ‖ converted), nats, over all positions
  double max_kl = 0;
  double top1_agreement = 0;  // share of positions with the same most likely token
  double max_abs_logit_diff = 0;
  double rel_logit_error = 0;  // ‖converted - source‖ / ‖source‖ over all logits
};
LogitComparison compare_logits(const Model& source, const Stream& source_stream, const Model& converted,
                               const Stream& converted_stream, const Sequences& sequences);

}  // namespace relatent

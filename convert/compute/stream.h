// What the layers of a model change: the residual stream.
#pragma once

#include "convert/model/model.h"
#include "formats/npy.h"
#include "linalg/matrix.h"

namespace relatent {

// The residual stream of all sequences at one depth: [count * length, hidden], sequences one after another.
class Stream {
 public:
  // At the first layer's input: the embeddings of the tokens.
  Stream(const Model& model, const Sequences& sequences)
      : count_(sequences.count), length_(sequences.length), hidden_(model.embed(sequences.tokens)) {}
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

}  // namespace relatent

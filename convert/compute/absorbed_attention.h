// A latent attention layer with everything absorbed: the working form of the fits.
#pragma once

#include <array>
#include <vector>

#include "convert/model/rotary.h"
#include "linalg/matrix.h"

namespace relatent {

// Some of a group's own coordinates, which one branch holds.
struct LatentPart {
  Index first = 0;  // among the group's coordinates
  Index rank = 0;
  Index query = 0;  // its rows of a head's query start here; shared + rank of them
};

// Heads that read the same latent coordinates. Each of its parts is a branch that forms scores of its own
// from the shared coordinates and the part's.
struct LatentGroup {
  Index first_head = 0;
  Index head_count = 0;
  Index first = 0;   // of its coordinates among all latent coordinates
  Index rank = 0;    // shared ones first, then the parts' in order
  Index shared = 0;  // coordinates that every part reads
  std::vector<LatentPart> parts;

  Index width(const LatentPart& part) const { return shared + part.rank; }
  // Rows of a head's query.
  Index query_rows() const { return parts.back().query + width(parts.back()); }
};

// An engine divides the latent by its root mean square. Its coordinates may be scaled freely (undone in the
// up-projection), and a few may be added that nothing reads, so what it divides by is ρ = √(Σ_j s_j² y_j²)
// with y = [c; extra x̃] and any s.
struct NormCompletion {
  MatrixD extra;  // [e, D + 1] of mean square 1 at most: the linear map nearest to 1, then leading directions
  VectorD square;  // [r + e], s_j² > 0
  // The first row of extra as fitted to either half of the inputs alone, [D + 1] each; empty where nothing is
  // near to 1.
  std::array<VectorD, 2> constant_of_half{};

  bool present() const { return square.size() > 0; }
};

// One layer on inputs x̃ = [x; 1]; for head h and part b of its group
//   z_b = [RoPE(k^R); c_shared; c_b],  [k^R; c] = key x̃  (c / ρ where there is one),
//   u_hb = [RoPE(u^R_h); u^N_hb],  [u^R_h; u^N_h1; ...] = query[h] x̃, x̃ or what a low-rank query leaves of
//   it, out = Σ_h O_h value_up[h] (Σ_n softmax_n(u_hb · z_b,n) c_gn, every c under its own part's weights,
//   the shared ones under the first's) + o_bias
// A score is bilinear in (query, key), so either is a least-squares problem given the other.
struct AbsorbedAttention {
  Index nope_dim = 0;               // content coordinates per head that the written form has room for
  double scale = 0;                 // softmax scale of the written form; already in `query`
  float softcap = 0;                // of scores, as attention.h has it; the fits compare them without it
  Rotary rotary;                    // p/2 frequencies
  MatrixD key;                      // [p + r, D + 1]
  std::vector<LatentGroup> groups;  // of heads in order
  std::vector<MatrixD> query;       // per head [p + Σ_b (shared + part), Q + 1]
  std::vector<MatrixD> value_up;    // per head [w, group's rank]
  MatrixD o;                        // [D, H w]
  VectorD o_bias;                   // [D]
  NormCompletion norm;              // with one group of one part only
  // Or ρ(x) = √(mean((norm_rows x)²) + norm_eps), which does not depend on `key`.
  MatrixF norm_rows;  // [norm rank, D]
  float norm_eps = 0;

  Index heads() const { return static_cast<Index>(value_up.size()); }
  Index rope_dim() const { return 2 * static_cast<Index>(rotary.inv_freq.size()); }
  Index rank() const { return key.rows() - rope_dim(); }
  Index width() const { return key.rows(); }
  Index v_dim() const { return value_up.front().rows(); }
  auto latent() const { return key.bottomRows(rank()); }
  auto latent_of(const LatentGroup& group) const {
    return key.middleRows(rope_dim() + group.first, group.rank);
  }
};

}  // namespace relatent

#include "convert/compute/cpu/output_curvature.h"

#include <Eigen/Dense>
#include <utility>
#include <vector>

#include "convert/compute/cpu/latent_norm.h"
#include "linalg/decompose.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Every how many-th query of a block is looked at.
constexpr Index curvature_rows = 8;

// How the output of one sequence curves with a head's query, [width, width], and Σ_n p².
struct Curvature {
  std::vector<MatrixD> moment;
  std::vector<double> mass_square;
  Index rows = 0;
};

Curvature curvature(const OutputLayer& layer, Index s, const MatrixF& z, const HeadChunk& chunk,
                    const std::vector<MatrixF>& roots) {
  const LatentGroup& group = *chunk.group;
  const Index p = layer.attention.rope_dim();
  const Heads heads = chunk.heads;
  const Index width = chunk.queries.width;
  Curvature out{std::vector<MatrixD>(static_cast<std::size_t>(heads.count), MatrixD::Zero(width, width)),
                std::vector<double>(static_cast<std::size_t>(heads.count), 0)};
  const MatrixF whole = queries_of(layer.sample, s, chunk.queries, layer.rotations);
  const double share = 1 / static_cast<double>(group.parts.size());
  MatrixF queries;
  MatrixF weights;
  MatrixF slope;
  for (std::size_t b = 0; b < group.parts.size(); ++b) {
    const OutputPart read = layer.part(chunk, b, z, whole);
    const Index own = group.width(read.part);
    for (const Block& block : blocks_of(layer.sample, s)) {
      stack_heads(read.asked, block, heads.count, queries);
      layer.weights_of(queries, read.keys.topRows(block.columns), block, weights, slope);
      for (Index row = s % curvature_rows; row < block.rows; row += curvature_rows) {
        out.rows += b == 0 ? 1 : 0;
        for (Index i = 0; i < heads.count; ++i) {
          const auto at = static_cast<std::size_t>(i);
          const VectorF weight = weights.row(i * block.rows + row);
          MatrixF latent = read.content.topRows(block.columns);
          latent.rowwise() -= RowVectorF(weight.transpose() * latent);
          if (slope.size() > 0) {
            latent.array().colwise() *= slope.row(i * block.rows + row).transpose().array();
          }
          latent.array().colwise() *= weight.array();
          const MatrixF cross = latent.transpose() * read.keys.topRows(block.columns);
          const MatrixF seen =
              roots[static_cast<std::size_t>(heads.first + i)].middleCols(read.first, read.count) * cross;
          const MatrixD square = (seen.transpose() * seen).cast<double>();
          out.moment[at].topLeftCorner(p, p) += square.topLeftCorner(p, p);
          out.moment[at].block(read.part.query, read.part.query, own, own) +=
              square.bottomRightCorner(own, own);
          out.mass_square[at] += share * static_cast<double>(weight.squaredNorm());
        }
      }
    }
  }
  return out;
}

}  // namespace

std::vector<ScoreSide> output_curvature(const OutputLayer& layer) {
  const auto heads = static_cast<std::size_t>(layer.attention.heads());
  const Index w = layer.attention.v_dim();
  const std::vector<MatrixF> roots = parallel_made(heads, [&](std::size_t h) {
    const MatrixD o = layer.attention.o.middleCols(static_cast<Index>(h) * w, w);
    return MatrixF(symmetric_root(o.transpose() * o, 0).root.cast<float>() * layer.value_up[h]);
  });
  Systems moment;
  for (const MatrixD& query : layer.attention.query) {
    moment.emplace_back(MatrixD::Zero(query.rows(), query.rows()));
  }
  VectorD mass_square = VectorD::Zero(layer.attention.heads());
  double count = 0;
  for (Index s = 0; s < layer.sample.count; s += moment_sequences) {
    const MatrixF x = layer.sample.inputs(s);
    const MatrixF z = keys_of(x, layer.key, latent_shrink(layer.attention, x), layer.rotations.all,
                              layer.attention.rope_dim());
    std::vector<Curvature> found(layer.chunks.size());
    parallel_for(layer.chunks.size(),
                 [&](std::size_t c) { found[c] = curvature(layer, s, z, layer.chunks[c], roots); });
    for (std::size_t c = 0; c < layer.chunks.size(); ++c) {
      for (Index i = 0; i < layer.chunks[c].heads.count; ++i) {
        const auto h = static_cast<std::size_t>(layer.chunks[c].heads.first + i);
        moment[h] += found[c].moment[static_cast<std::size_t>(i)];
        mass_square(layer.chunks[c].heads.first + i) += found[c].mass_square[static_cast<std::size_t>(i)];
      }
    }
    count += static_cast<double>(found.front().rows);
  }
  mass_square /= count;
  std::vector<ScoreSide> out = parallel_made(heads, [&](std::size_t h) {
    MatrixD mean = moment[h] / count;
    average_pairs(mean, layer.attention.rope_dim());
    return score_side(std::move(mean));
  });
  out.push_back(score_side(key_curvature(layer.sample, layer.attention,
                                         mass_square.cwiseProduct(layer.sample.value_spread), mass_square)));
  return out;
}

}  // namespace relatent

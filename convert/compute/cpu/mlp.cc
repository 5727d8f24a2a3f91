#include "convert/compute/cpu/mlp.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numbers>
#include <numeric>
#include <span>
#include <utility>

#include "convert/compute/cpu/products.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Rows that go through an MLP at once: between its products a row is several times as wide.
constexpr Index rows_at_once = 256;
constexpr Index columns_at_once = 256;
// Numbers of the weights of experts that are in memory at once, of more than one expert.
constexpr Index widened_numbers = Index{1} << 26U;

// Calls body(first, count) in parallel for slices of [0, rows).
template <typename Body>
void for_slices(Index rows, const Body& body) {
  const Index slices = (rows + rows_at_once - 1) / rows_at_once;
  parallel_for(static_cast<std::size_t>(slices), [&](std::size_t s) {
    const Index first = static_cast<Index>(s) * rows_at_once;
    body(first, std::min(rows_at_once, rows - first));
  });
}

// Indices of the k largest values, in order.
std::vector<Index> largest(const RowVectorF& values, Index k) {
  std::vector<Index> out(static_cast<std::size_t>(values.size()));
  std::iota(out.begin(), out.end(), Index{0});
  std::partial_sort(out.begin(), out.begin() + k, out.end(), [&](Index a, Index b) {
    return values(a) > values(b) || (values(a) == values(b) && a < b);
  });
  out.resize(static_cast<std::size_t>(k));
  std::sort(out.begin(), out.end());
  return out;
}

// By what a group of experts is chosen.
float group_score(TopkMethod method, const RowVectorF& scores) {
  if (method != TopkMethod::noaux_tc) {
    return scores.maxCoeff();
  }
  const std::vector<Index> best = largest(scores, 2);
  return scores(best.front()) + scores(best.back());
}

// Takes the experts of all but the best groups out of the choice.
void limit_groups(const ExpertsGeometry& geometry, RowVectorF& scores) {
  const Index size = geometry.count / geometry.groups;
  RowVectorF of_group(geometry.groups);
  for (Index g = 0; g < geometry.groups; ++g) {
    of_group(g) = group_score(geometry.topk_method, scores.segment(g * size, size));
  }
  RowVectorF limited = RowVectorF::Constant(scores.size(), -std::numeric_limits<float>::infinity());
  for (const Index g : largest(of_group, geometry.groups_per_token)) {
    limited.segment(g * size, size) = scores.segment(g * size, size);
  }
  scores = std::move(limited);
}

// One token, from what the router says of each expert.
std::vector<Choice> choose(const Experts& experts, const RowVectorF& logits) {
  const ExpertsGeometry& geometry = experts.geometry;
  RowVectorF scores;
  if (geometry.topk_method == TopkMethod::noaux_tc) {
    scores = 1.0F / (1.0F + (-logits.array()).exp());
  } else {
    scores = (logits.array() - logits.maxCoeff()).exp();
    scores /= scores.sum();
  }
  RowVectorF for_choice = scores;
  if (experts.bias.size() > 0) {
    for_choice += experts.bias;
  }
  if (geometry.groups_per_token < geometry.groups) {
    limit_groups(geometry, for_choice);
  }
  std::vector<Choice> out;
  float sum = 0;
  for (const Index expert : largest(for_choice, geometry.per_token)) {
    out.push_back({expert, scores(expert)});
    sum += scores(expert);
  }
  // The 1e-20 is transformers'.
  const float factor = static_cast<float>(geometry.scale) / (geometry.normalised ? sum + 1e-20F : 1.0F);
  for (Choice& choice : out) {
    choice.weight *= factor;
  }
  return out;
}

// The rows that come to one expert.
struct Visits {
  struct Visit {
    Index row = 0;
    float weight = 0;
  };
  Index expert = 0;
  std::vector<Visit> rows;
};

// Of every expert that some row comes to.
std::vector<Visits> visits_of(const std::vector<std::vector<Choice>>& chosen) {
  std::map<Index, std::vector<Visits::Visit>> by_expert;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    for (const Choice& choice : chosen[i]) {
      by_expert[choice.expert].push_back({static_cast<Index>(i), choice.weight});
    }
  }
  std::vector<Visits> out;
  for (auto& [expert, rows] : by_expert) {
    out.push_back({expert, std::move(rows)});
  }
  return out;
}

// How many of the next experts are read together: their weights and what they add to rows of x stay small. No
// function of the number of threads, but of nothing that a sum depends on either.
std::size_t experts_at_once(const ExpertsGeometry& geometry, std::span<const Visits> next, const MatrixF& x) {
  const Index weights = 3 * geometry.intermediate_size * x.cols();
  Index rows = 0;
  std::size_t out = 0;
  while (out < next.size()) {
    rows += static_cast<Index>(next[out].rows.size());
    if (out > 0 && (rows > x.rows() || static_cast<Index>(out + 1) * weights > widened_numbers)) {
      break;
    }
    ++out;
  }
  return out;
}

// Some rows of one of the experts that were read.
struct Slice {
  std::size_t expert = 0;  // counted among them
  Index first = 0;         // row in what all of them add
  std::span<const Visits::Visit> rows;
};

std::vector<Slice> slices_of(std::span<const Visits> visits) {
  std::vector<Slice> out;
  Index first = 0;
  for (std::size_t e = 0; e < visits.size(); ++e) {
    std::span<const Visits::Visit> rest = visits[e].rows;
    while (!rest.empty()) {
      const std::size_t count = std::min(rest.size(), static_cast<std::size_t>(rows_at_once));
      out.push_back({e, first, rest.first(count)});
      rest = rest.subspan(count);
      first += static_cast<Index>(count);
    }
  }
  return out;
}

// out += what these experts add, in their order for every row.
void add_visits(const Experts& experts, std::span<const Visits> visits, const MatrixF& x, MatrixF& out) {
  const std::vector<Mlp> read =
      parallel_made(visits.size(), [&](std::size_t e) { return experts.expert(visits[e].expert); });
  const std::vector<Slice> slices = slices_of(visits);
  const Slice& last = slices.back();
  MatrixF added(last.first + static_cast<Index>(last.rows.size()), x.cols());
  parallel_for(slices.size(), [&](std::size_t s) {
    const Stage stage("experts");
    const Slice& slice = slices[s];
    MatrixF rows(static_cast<Index>(slice.rows.size()), x.cols());
    for (Index i = 0; i < rows.rows(); ++i) {
      rows.row(i) = x.row(slice.rows[static_cast<std::size_t>(i)].row);
    }
    const Mlp& expert = read[slice.expert];
    added.middleRows(slice.first, rows.rows()) = product(expert.down, gated(expert, rows));
  });
  // By columns, so that no two threads add to the same numbers.
  const auto pieces = static_cast<std::size_t>((x.cols() + columns_at_once - 1) / columns_at_once);
  parallel_for(pieces, [&](std::size_t piece) {
    const Index column = static_cast<Index>(piece) * columns_at_once;
    const Index width = std::min(columns_at_once, x.cols() - column);
    for (const Slice& slice : slices) {
      for (std::size_t i = 0; i < slice.rows.size(); ++i) {
        out.row(slice.rows[i].row).segment(column, width) +=
            slice.rows[i].weight * added.row(slice.first + static_cast<Index>(i)).segment(column, width);
      }
    }
  });
}

// x / 2 (1 + tanh(√(2/π) (x + 0.044715 x³))), as transformers' gelu_pytorch_tanh.
void gelu_tanh(MatrixF& x) {
  constexpr float inner = std::numbers::sqrt2_v<float> * std::numbers::inv_sqrtpi_v<float>;
  // In rows, so that what is formed between stays small.
  for (Index i = 0; i < x.rows(); ++i) {
    auto row = x.row(i).array();
    row *= 0.5F * (1.0F + (inner * (row + 0.044715F * row.cube())).tanh());
  }
}

void activate(Activation activation, MatrixF& x) {
  switch (activation) {
    case Activation::silu:
      x.array() /= 1.0F + (-x.array()).exp();
      return;
    case Activation::gelu_tanh:
      gelu_tanh(x);
      return;
  }
}

}  // namespace

MatrixF gated(const Mlp& mlp, const MatrixF& x) {
  MatrixF out = product(mlp.gate, x);
  activate(mlp.activation, out);
  out.array() *= product(mlp.up, x).array();
  return out;
}

MatrixF shared_output(const MlpHalf& half, const MatrixF& x) {
  const Stage stage("MLP");
  MatrixF out(x.rows(), half.mlp.down.out());
  for (Index first = 0; first < x.rows(); first += rows_at_once) {
    const Index count = std::min(rows_at_once, x.rows() - first);
    out.middleRows(first, count) = product(half.mlp.down, gated(half.mlp, x.middleRows(first, count)));
  }
  if (half.experts && half.experts->shared_gate.size() > 0) {
    const VectorF gate = x * half.experts->shared_gate.transpose();
    out.array().colwise() /= 1.0F + (-gate.array()).exp();
  }
  return out;
}

std::vector<std::vector<Choice>> choose_experts(const Experts& experts, const MatrixF& x) {
  std::vector<std::vector<Choice>> out(static_cast<std::size_t>(x.rows()));
  for_slices(x.rows(), [&](Index first, Index count) {
    const MatrixF logits = x.middleRows(first, count) * experts.router.transpose();
    for (Index i = 0; i < count; ++i) {
      out[static_cast<std::size_t>(first + i)] = choose(experts, logits.row(i));
    }
  });
  return out;
}

MatrixF mix_experts(const Experts& experts, const MatrixF& x) {
  const std::vector<Visits> all = visits_of(choose_experts(experts, x));
  MatrixF out = MatrixF::Zero(x.rows(), x.cols());
  for (std::size_t first = 0; first < all.size();) {
    const std::size_t count = experts_at_once(experts.geometry, std::span(all).subspan(first), x);
    add_visits(experts, std::span(all).subspan(first, count), x, out);
    first += count;
  }
  return out;
}

}  // namespace relatent

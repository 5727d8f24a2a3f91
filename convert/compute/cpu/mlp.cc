#include "convert/compute/cpu/mlp.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "convert/compute/cpu/products.h"

namespace relatent {
namespace {

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

}  // namespace

MatrixF swiglu(const Mlp& mlp, const MatrixF& x) {
  MatrixF out = product(mlp.gate, x);
  const MatrixF factor = product(mlp.up, x);
  out.array() = out.array() / (1.0F + (-out.array()).exp()) * factor.array();
  return out;
}

std::vector<std::vector<Choice>> choose_experts(const Experts& experts, const MatrixF& x) {
  const MatrixF logits = x * experts.router.transpose();
  std::vector<std::vector<Choice>> out;
  for (Index i = 0; i < x.rows(); ++i) {
    out.push_back(choose(experts, logits.row(i)));
  }
  return out;
}

MatrixF mix_experts(const Experts& experts, const MatrixF& x) {
  struct Visit {
    Index row = 0;
    float weight = 0;
  };
  std::vector<std::vector<Visit>> visits(static_cast<std::size_t>(experts.geometry.count));
  const std::vector<std::vector<Choice>> chosen = choose_experts(experts, x);
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    for (const Choice& choice : chosen[i]) {
      visits[static_cast<std::size_t>(choice.expert)].push_back({static_cast<Index>(i), choice.weight});
    }
  }
  MatrixF out = MatrixF::Zero(x.rows(), x.cols());
  for (std::size_t e = 0; e < visits.size(); ++e) {
    if (visits[e].empty()) {
      continue;
    }
    MatrixF rows(static_cast<Index>(visits[e].size()), x.cols());
    for (std::size_t i = 0; i < visits[e].size(); ++i) {
      rows.row(static_cast<Index>(i)) = x.row(visits[e][i].row);
    }
    const Mlp expert = experts.expert(static_cast<Index>(e));
    const MatrixF added = product(expert.down, swiglu(expert, rows));
    for (std::size_t i = 0; i < visits[e].size(); ++i) {
      out.row(visits[e][i].row) += visits[e][i].weight * added.row(static_cast<Index>(i));
    }
  }
  return out;
}

}  // namespace relatent

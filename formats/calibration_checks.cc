#include "formats/calibration_checks.h"

namespace relatent {
namespace {

// How far rounding may carry sums over tokens from what must hold of them.
constexpr double kRounding = 1e-6;

// What is wrong with a second moment and the mean beside it, as a clause; empty when nothing is.
std::string why_no_moment(const MatrixD& second, const VectorD& mean, const std::string& second_name,
                          const std::string& mean_name) {
  if (second != second.transpose()) {
    return second_name + " is not symmetric";
  }
  const VectorD limit = second.diagonal() * (1 + kRounding);
  if (limit.size() > 0 && limit.minCoeff() < 0) {
    return second_name + " has a negative diagonal";
  }
  // |E[x_i x_j]|² <= E[x_i²] E[x_j²], and E[x_i]² <= E[x_i²].
  for (Index j = 0; j < second.cols(); ++j) {
    if ((second.col(j).array().square() > limit.array() * limit(j)).any()) {
      return second_name + " has an entry above what its diagonal allows";
    }
  }
  if ((mean.array().square() > limit.array()).any()) {
    return mean_name + " is above what " + second_name + " allows";
  }
  return "";
}

// layer_moments: has normed_heads.
std::string why_no_normed_heads(const LayerMoments& layer_moments) {
  const NormedHeadMoments& moments = *layer_moments.normed_heads;
  std::string wrong =
      why_no_moment(moments.feature_moment, moments.feature_mean, "feature_moment", "feature_mean");
  const Index d = moments.query_moment.cols();
  const Index queries = moments.query_moment.rows();
  VectorD square(moments.cross.rows());
  square.tail(square.size() - queries) = moments.feature_moment.diagonal().head(square.size() - queries);
  for (Index first = 0; first < queries && wrong.empty(); first += d) {
    const MatrixD of_head = moments.query_moment.middleRows(first, d);
    wrong = why_no_moment(of_head, moments.query_mean.segment(first, d), "query_moment", "query_mean");
    square.segment(first, d) = of_head.diagonal();
  }
  for (Index j = 0; j < moments.cross.cols() && wrong.empty(); ++j) {
    VectorD limit = square * (1 + kRounding);
    limit.head(queries) *= layer_moments.second_moment(j, j);
    limit.tail(limit.size() - queries) *= layer_moments.received_moment(j, j);
    if ((moments.cross.col(j).array().square() > limit.array()).any()) {
      wrong = "normed_cross has an entry above what the second moments allow";
    }
  }
  return wrong;
}

}  // namespace

std::string why_no_moments(const LayerMoments& moments) {
  std::string wrong = why_no_moment(moments.second_moment, moments.mean, "second_moment", "mean");
  if (wrong.empty()) {
    wrong = why_no_moment(moments.received_moment, moments.received_mean, "received_moment", "received_mean");
  }
  if (!wrong.empty()) {
    return wrong;
  }
  if (moments.distance_mass.minCoeff() < 0 || moments.distance_mass.rowwise().sum().maxCoeff() > 1 + 1e-3) {
    return "distance_mass has a row that is no distribution";
  }
  // Of weights that sum to 1.
  if (moments.mass_square.minCoeff() <= 0 || moments.mass_square.maxCoeff() > 1 + kRounding) {
    return "mass_square has a number that is no mean square of shares";
  }
  if (moments.score_effect.minCoeff() < 0) {
    return "score_effect has a negative number";
  }
  return moments.normed_heads ? why_no_normed_heads(moments) : "";
}

}  // namespace relatent

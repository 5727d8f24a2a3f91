#include "convert/compute/cpu/mlp.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <mutex>
#include <numeric>
#include <set>
#include <utility>
#include <vector>

#include "convert/compute/cpu/products.h"
#include "tests/support/reference.h"
#include "tests/support/samples.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::apply;
using testing_support::kFloatNoise;
using testing_support::position_of;
using testing_support::Random;
using testing_support::relative_error;
using testing_support::tiny_experts;

constexpr Index hidden = 12;

Experts random_experts(const ExpertsGeometry& geometry, Random& random) {
  std::vector<Mlp> weights;
  for (Index e = 0; e < geometry.count; ++e) {
    weights.push_back({random.linear(geometry.intermediate_size, hidden, false),
                       random.linear(geometry.intermediate_size, hidden, false),
                       random.linear(hidden, geometry.intermediate_size, false)});
  }
  Experts out{geometry, random.linear(geometry.count, hidden, false).weight, {}, {}, [weights](Index e) {
                return weights.at(static_cast<std::size_t>(e));
              }};
  if (geometry.topk_method == TopkMethod::noaux_tc) {
    out.bias = random.row(geometry.count, 0.3);
  }
  return out;
}

// Repeatedly takes the largest value.
std::set<Index> best_of(VectorD values, Index k) {
  std::set<Index> out;
  for (Index i = 0; i < k; ++i) {
    Index at = 0;
    values.maxCoeff(&at);
    values(at) = -std::numeric_limits<double>::infinity();
    out.insert(at);
  }
  return out;
}

// One token's weights of all experts, in double precision.
VectorD weights_by_the_book(const Experts& experts, const VectorD& x) {
  const ExpertsGeometry& g = experts.geometry;
  const bool sigmoid = g.topk_method == TopkMethod::noaux_tc;
  VectorD scores = experts.router.cast<double>() * x;
  for (double& score : scores) {
    score = sigmoid ? 1 / (1 + std::exp(-score)) : std::exp(score);
  }
  if (!sigmoid) {
    scores /= scores.sum();
  }
  VectorD choice = scores;
  if (sigmoid) {
    choice += experts.bias.transpose().cast<double>();
  }
  const Index size = g.count / g.groups;
  VectorD groups(g.groups);
  for (Index i = 0; i < g.groups; ++i) {
    VectorD group = choice.segment(i * size, size);
    std::sort(group.begin(), group.end(), std::greater<>());
    groups(i) = sigmoid ? group(0) + group(1) : group(0);
  }
  const std::set<Index> kept = best_of(groups, g.groups_per_token);
  for (Index e = 0; e < g.count; ++e) {
    choice(e) = kept.contains(e / size) ? choice(e) : -std::numeric_limits<double>::infinity();
  }
  VectorD out = VectorD::Zero(g.count);
  for (const Index e : best_of(choice, g.per_token)) {
    out(e) = scores(e);
  }
  return out * g.scale / (g.normalised ? out.sum() : 1.0);
}

std::vector<ExpertsGeometry> geometries() {
  std::vector<ExpertsGeometry> out = {tiny_experts(TopkMethod::greedy),
                                      tiny_experts(TopkMethod::group_limited_greedy), tiny_experts()};
  out.push_back(tiny_experts());
  out.back().normalised = false;
  out.back().groups_per_token = 4;
  out.push_back(tiny_experts());
  out.back().groups = out.back().groups_per_token = 1;
  out.back().per_token = 8;
  return out;
}

TEST(Mlp, EveryTokenGetsItsExpertsByTheBook) {
  for (const ExpertsGeometry& geometry : geometries()) {
    SCOPED_TRACE(std::string(topk_method_name(geometry.topk_method)));
    Random random(4);
    const Experts experts = random_experts(geometry, random);
    const MatrixF x = random.matrix(60, hidden);
    const std::vector<std::vector<Choice>> chosen = choose_experts(experts, x);
    const MatrixF mixed = mix_experts(experts, x);
    ASSERT_EQ(chosen.size(), 60U);
    MatrixD expected = MatrixD::Zero(60, hidden);
    for (Index n = 0; n < 60; ++n) {
      const VectorD weights = weights_by_the_book(experts, position_of(x, n));
      const std::vector<Choice>& here = chosen[static_cast<std::size_t>(n)];
      ASSERT_EQ(here.size(), static_cast<std::size_t>(geometry.per_token));
      VectorD found = VectorD::Zero(geometry.count);
      for (std::size_t i = 0; i < here.size(); ++i) {
        EXPECT_TRUE(i == 0 || here[i - 1].expert < here[i].expert);
        found(here[i].expert) = static_cast<double>(here[i].weight);
      }
      EXPECT_LE(relative_error(found, weights), kFloatNoise);
      for (Index e = 0; e < geometry.count; ++e) {
        const Mlp mlp = experts.expert(e);
        const VectorD gate = apply(mlp.gate, position_of(x, n));
        const VectorD up = apply(mlp.up, position_of(x, n));
        const VectorD inner = gate.array() / (1 + (-gate.array()).exp()) * up.array();
        expected.row(n) += weights(e) * apply(mlp.down, inner).transpose();
      }
    }
    EXPECT_LE(relative_error(mixed, expected), kFloatNoise);
  }
}

TEST(Mlp, TheBiasChoosesAndDoesNotWeigh) {
  Random random(5);
  ExpertsGeometry geometry = tiny_experts();
  geometry.normalised = false;
  geometry.scale = 1;
  Experts experts = random_experts(geometry, random);
  experts.router.setZero();
  experts.bias = RowVectorF::Zero(8);
  // Of equal scores the first: groups 0 and 1, and their first three experts.
  const MatrixF x = random.matrix(1, hidden);
  const auto indices = [&] {
    std::vector<Index> out;
    const std::vector<std::vector<Choice>> chosen = choose_experts(experts, x);
    for (const Choice& choice : chosen.front()) {
      EXPECT_EQ(choice.weight, 0.5F);
      out.push_back(choice.expert);
    }
    return out;
  };
  EXPECT_EQ(indices(), (std::vector<Index>{0, 1, 2}));
  // The largest bias stands in a group whose two best are together below those of others.
  experts.bias << 0.9F, -1, 0.2F, 0.2F, 0, 0, 0.3F, 0.4F;
  EXPECT_EQ(indices(), (std::vector<Index>{2, 6, 7}));
  EXPECT_EQ(experts.bias.size(), geometry.count);
}

TEST(Mlp, ReadsOnlyExpertsThatAreChosen) {
  Random random(6);
  Experts experts = random_experts(tiny_experts(), random);
  std::vector<Index> read;
  std::mutex reading;
  const auto all = experts.expert;
  experts.expert = [&](Index e) {
    const std::lock_guard lock(reading);
    read.push_back(e);
    return all(e);
  };
  const MatrixF x = random.matrix(1, hidden);
  mix_experts(experts, x);
  const std::vector<std::vector<Choice>> chosen = choose_experts(experts, x);
  std::vector<Index> expected;
  for (const Choice& choice : chosen.front()) {
    expected.push_back(choice.expert);
  }
  std::sort(read.begin(), read.end());
  EXPECT_EQ(read, expected);

  // Once for all rows, more than go through an expert together.
  read.clear();
  mix_experts(experts, random.matrix(700, hidden));
  std::sort(read.begin(), read.end());
  EXPECT_EQ(read, (std::vector<Index>{0, 1, 2, 3, 4, 5, 6, 7}));
}

// A softmax over (log 1, log 2, log 3, log 4): 0.1, 0.2, 0.3, 0.4.
TEST(Mlp, WeightsOfASoftmaxRouterWorkedByHand) {
  Experts experts;
  experts.geometry = {.count = 4, .intermediate_size = 1, .per_token = 2};
  experts.router = MatrixF(4, 1);
  experts.router << 0, std::log(2.0F), std::log(3.0F), std::log(4.0F);
  const MatrixF x = MatrixF::Ones(1, 1);
  const auto weights = [&] {
    const std::vector<std::vector<Choice>> chosen = choose_experts(experts, x);
    EXPECT_EQ(chosen.front()[0].expert, 2);
    EXPECT_EQ(chosen.front()[1].expert, 3);
    return std::pair(chosen.front()[0].weight, chosen.front()[1].weight);
  };
  EXPECT_NEAR(weights().first, 0.3F, 1e-6F);
  EXPECT_NEAR(weights().second, 0.4F, 1e-6F);
  experts.geometry.normalised = true;
  EXPECT_NEAR(weights().first, 3.0F / 7, 1e-6F);
  EXPECT_NEAR(weights().second, 4.0F / 7, 1e-6F);
}

TEST(Mlp, TheSharedGateWeighsEveryRow) {
  Random random(7);
  MlpHalf half;
  half.mlp = {random.linear(9, hidden, false), random.linear(9, hidden, false),
              random.linear(hidden, 9, false)};
  const MatrixF x = random.matrix(300, hidden);
  const MatrixF plain = shared_output(half, x);
  EXPECT_LE(relative_error(plain, product(half.mlp.down, gated(half.mlp, x))), kFloatNoise);
  half.experts = random_experts(tiny_experts(), random);
  EXPECT_TRUE(shared_output(half, x) == plain);
  half.experts->shared_gate = random.row(hidden, 1);
  const MatrixF weighed = shared_output(half, x);
  for (Index i = 0; i < x.rows(); ++i) {
    const float gate = 1 / (1 + std::exp(-x.row(i).dot(half.experts->shared_gate)));
    EXPECT_LE(relative_error(weighed.row(i), plain.row(i) * gate), kFloatNoise);
  }
  half.mlp = {};
  EXPECT_EQ(shared_output(half, x).size(), 0);
}

}  // namespace
}  // namespace relatent

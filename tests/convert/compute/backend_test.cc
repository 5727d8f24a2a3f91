#include "convert/compute/backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "convert/calibrate/calibrate.h"
#include "convert/compute/cpu/cpu_backend.h"
#include "convert/verify/verify.h"
#include "tests/support/conversion.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::Conversion;
using testing_support::random_sequences;
using testing_support::read_bytes;
using testing_support::TempFolder;
using testing_support::tiny_model;

// The CPU, and the names of the operations that were asked of it.
class Recording final : public Backend {
 public:
  explicit Recording(std::set<std::string>& asked) : asked_(asked) {}

  std::string_view name() const override { return "recording"; }
  bool has_bf16() const override { return cpu("has_bf16").has_bf16(); }
  Layer load_layer(const Model& model, Index layer_idx, DType compute) const override {
    return cpu("load_layer").load_layer(model, layer_idx, compute);
  }
  MlpHalf load_mlp(const Model& model, Index layer_idx, DType compute) const override {
    return cpu("load_mlp").load_mlp(model, layer_idx, compute);
  }
  void add_attention(const AttentionHalf& half, Stream& stream) const override {
    cpu("add_attention").add_attention(half, stream);
  }
  void add_attention(const RmsNorm& input_norm, std::span<const LatentAttention> parts,
                     const RmsNorm& output_norm, Stream& stream) const override {
    cpu("add_attention of parts").add_attention(input_norm, parts, output_norm, stream);
  }
  void add_mlp(const MlpHalf& half, Stream& stream) const override { cpu("add_mlp").add_mlp(half, stream); }
  LayerMoments observe(const Layer& layer, Stream& stream, bool last) const override {
    return cpu("observe").observe(layer, stream, last);
  }
  LayerDifference run_side_by_side(const Layer& source, Stream& source_stream, const Layer& converted,
                                   Stream& converted_stream) const override {
    return cpu("run_side_by_side").run_side_by_side(source, source_stream, converted, converted_stream);
  }
  MatrixF logits(const Model& model, const Stream& stream, Index sequence) const override {
    return cpu("logits").logits(model, stream, sequence);
  }
  LogitComparison compare_logits(const Model& source, const Stream& source_stream, const Model& converted,
                                 const Stream& converted_stream, const Sequences& sequences) const override {
    return cpu("compare_logits")
        .compare_logits(source, source_stream, converted, converted_stream, sequences);
  }
  AttentionSample sample_attention(const AttentionHalf& source, const MatrixF& value_map,
                                   const SampleOptions& options, Stream& source_stream,
                                   const Stream& converted_stream) const override {
    return cpu("sample_attention")
        .sample_attention(source, value_map, options, source_stream, converted_stream);
  }
  HeadOutputs head_outputs(const RmsNorm& input_norm, const LatentAttention& attention,
                           const RmsNorm& output_norm, const Stream& source_stream,
                           const Stream& converted_stream) const override {
    return cpu("head_outputs")
        .head_outputs(input_norm, attention, output_norm, source_stream, converted_stream);
  }
  void add_outputs(const Linear& o, const MatrixF& head_outputs, const RmsNorm& output_norm,
                   Stream& stream) const override {
    cpu("add_outputs").add_outputs(o, head_outputs, output_norm, stream);
  }
  std::unique_ptr<QueryProblems> query_problems(const AttentionSample& sample, double ridge) const override {
    return cpu("query_problems").query_problems(sample, ridge);
  }
  std::unique_ptr<FitProblem> key_problem(const AttentionSample& sample, const AbsorbedAttention& attention,
                                          double ridge, double score_weight) const override {
    return cpu("key_problem").key_problem(sample, attention, ridge, score_weight);
  }
  std::unique_ptr<OutputProblem> output_problem(const AttentionSample& sample,
                                                const AbsorbedAttention& attention, double query_ridge,
                                                double key_ridge) const override {
    return cpu("output_problem").output_problem(sample, attention, query_ridge, key_ridge);
  }
  std::uint64_t query_fit_bytes(Index heads, Index width, Index inputs,
                                const SampleSize& size) const override {
    return cpu("query_fit_bytes").query_fit_bytes(heads, width, inputs, size);
  }
  std::uint64_t output_fit_bytes(Index heads, Index width, const FitInputs& inputs,
                                 const SampleSize& size) const override {
    return cpu("output_fit_bytes").output_fit_bytes(heads, width, inputs, size);
  }
  MeanMoments mean_moments(const MatrixF& inputs, Index first, Index count) const override {
    return cpu("mean_moments").mean_moments(inputs, first, count);
  }
  SquareMoments square_moments(const MatrixF& map, const std::optional<CoordinateByHalf>& by_half,
                               const VectorD& least, const MatrixF& inputs) const override {
    return cpu("square_moments").square_moments(map, by_half, least, inputs);
  }
  Eigenpairs<MatrixD> symmetric_eigenpairs(const MatrixD& a, std::optional<Index> k) const override {
    return cpu("symmetric_eigenpairs").symmetric_eigenpairs(a, k);
  }
  Eigenpairs<MatrixC> hermitian_eigenpairs(const MatrixC& a, std::optional<Index> k) const override {
    return cpu("hermitian_eigenpairs").hermitian_eigenpairs(a, k);
  }
  SymmetricRoot symmetric_root(const MatrixD& a, double floor) const override {
    return cpu("symmetric_root").symmetric_root(a, floor);
  }
  MatrixD ridge_solve(const MatrixD& a, const MatrixD& b, double ridge) const override {
    return cpu("ridge_solve").ridge_solve(a, b, ridge);
  }

 private:
  const Backend& cpu(const char* operation) const {
    const std::lock_guard lock(guard_);
    asked_.insert(operation);
    return *cpu_;
  }

  std::unique_ptr<const Backend> cpu_ = make_cpu_backend();
  mutable std::mutex guard_;
  std::set<std::string>& asked_;
};

// Uses that backend for as long as it lives.
class Recorded {
 public:
  Recorded() { set_backend(std::make_unique<Recording>(asked_)); }
  Recorded(const Recorded&) = delete;
  Recorded& operator=(const Recorded&) = delete;
  ~Recorded() { set_backend(nullptr); }

  // Since it was last asked.
  std::set<std::string> asked() { return std::exchange(asked_, {}); }

 private:
  std::set<std::string> asked_;
};

using Names = std::set<std::string>;

void ignore(Index /*done*/, Index /*all*/) {}

bool contains(const Names& found, const Names& expected) {
  return std::includes(found.begin(), found.end(), expected.begin(), expected.end());
}

TEST(Backend, IsTheCpuUnlessAnotherIsSet) {
  EXPECT_EQ(backend().name(), "cpu");
  {
    const Recorded recorded;
    EXPECT_EQ(backend().name(), "recording");
  }
  EXPECT_EQ(backend().name(), "cpu");
}

// What a command does with tokens is asked of the backend, whichever that is, and the result is its result.
TEST(Backend, DoesAllWorkOnTokens) {
  const TempFolder folder;
  tiny_model({}).write(folder / "source");
  const Model source = Model::open(folder / "source");
  const Sequences sequences = random_sequences(1, 12, 40, 50);
  calibrate(source, sequences, folder / "plain.h5", ignore);
  ConvertOptions options;
  options.source = folder / "source";
  options.calibration = folder / "plain.h5";
  options.method = Method::relatent;
  options.rank = 10;
  options.rope_dim = 8;
  options.output = folder / "plain";
  Conversion(options).run(ignore);

  Recorded recorded;
  calibrate(source, sequences, folder / "recorded.h5", ignore);
  EXPECT_EQ(recorded.asked(), Names({"load_layer", "observe"}));
  EXPECT_EQ(read_bytes(folder / "recorded.h5"), read_bytes(folder / "plain.h5"));

  options.output = folder / "recorded";
  Conversion(options).run(ignore);
  const Names converting = recorded.asked();
  EXPECT_TRUE(
      contains(converting, {"load_mlp", "add_mlp", "sample_attention", "query_problems", "key_problem",
                            "head_outputs", "add_outputs", "symmetric_eigenpairs", "hermitian_eigenpairs",
                            "symmetric_root", "ridge_solve", "compare_logits"}));
  EXPECT_EQ(read_bytes(folder / "recorded" / "model.safetensors"),
            read_bytes(folder / "plain" / "model.safetensors"));

  const Model converted = Model::open(folder / "recorded");
  verify(source, converted, sequences, ignore);
  EXPECT_EQ(recorded.asked(), Names({"load_layer", "run_side_by_side", "compare_logits"}));
  verify_devices(converted, sequences, 2, ignore);
  EXPECT_EQ(recorded.asked(),
            Names({"load_layer", "add_attention", "add_attention of parts", "add_mlp", "compare_logits"}));

  options.relatent.fit.output_rounds = 1;
  options.output = folder / "by output";
  Conversion(options).run(ignore);
  EXPECT_TRUE(contains(recorded.asked(), {"output_problem", "output_fit_bytes"}));

  options.engine = "deepseek";
  options.output = folder / "normed";
  Conversion(options).run(ignore);
  EXPECT_TRUE(contains(recorded.asked(), {"mean_moments", "square_moments"}));
}

}  // namespace
}  // namespace relatent

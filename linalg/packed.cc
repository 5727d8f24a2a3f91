#include "linalg/packed.h"

#include <stdexcept>
#include <string>
#include <utility>

#ifdef RELATENT_ONEDNN
#include <dnnl.hpp>
#endif

namespace relatent {

#ifdef RELATENT_ONEDNN

// oneDNN's OpenMP would start threads of its own in each of ours. A build of it without OpenMP lacks the
// switch, hence the weak declaration.
extern "C" void omp_set_num_threads(int threads) __attribute__((weak));

namespace {

using dnnl::memory;

const dnnl::engine& cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// Rows of x that the blocked layout of the weight is chosen for; any other number works with it too.
constexpr Index usual_rows = 1024;

// With `any` the library chooses how the weight is blocked.
dnnl::matmul::primitive_desc product(Index rows, Index in, Index out, const memory::desc* blocked) {
  const memory::desc x(memory::dims{rows, in}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc weight(memory::dims{in, out}, memory::data_type::bf16, memory::format_tag::any);
  const memory::desc y(memory::dims{rows, out}, memory::data_type::f32, memory::format_tag::ab);
#if DNNL_VERSION_MAJOR >= 3
  return {cpu(), x, blocked != nullptr ? *blocked : weight, y};
#else
  return {dnnl::matmul::desc(x, blocked != nullptr ? *blocked : weight, y), cpu()};
#endif
}

memory given(const memory::dims& size, memory::data_type type, const memory::dims& steps,
             const void* values) {
  // The library takes no pointer to const, and only reads through this one.
  return {memory::desc(size, type, steps), cpu(),
          const_cast<void*>(values)};  // NOLINT(cppcoreguidelines-pro-type-const-cast)
}

void stay_on_this_thread() {
  if (omp_set_num_threads != nullptr) {
    omp_set_num_threads(1);
  }
}

}  // namespace

struct PackedWeight::Blocked {
  memory weight;
};

bool has_bf16_products() {
  static const bool known = [] {
    // Bits, and a processor that can do more has all of those that one which can do less has.
    const auto wanted = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
    return (static_cast<unsigned>(dnnl::get_effective_cpu_isa()) & wanted) == wanted;
  }();
  return known;
}

void PackedWeight::block(const void* values, DType type, Index out_step, Index in_step) {
  if (!has_bf16_products()) {
    throw std::logic_error("PackedWeight: this processor has no bfloat16 products");
  }
  blocked_ = std::make_unique<Blocked>();
  stay_on_this_thread();
  memory source = given({in_, out_}, type == DType::bf16 ? memory::data_type::bf16 : memory::data_type::f32,
                        {in_step, out_step}, values);
  blocked_->weight = memory(product(usual_rows, in_, out_, nullptr).weights_desc(), cpu());
  dnnl::stream stream(cpu());
  dnnl::reorder(source, blocked_->weight).execute(stream, source, blocked_->weight);
  stream.wait();
}

MatrixF PackedWeight::multiply(Index rows, const float* x, Index row_step, Index in_step) const {
  stay_on_this_thread();
  MatrixF y(rows, out_);
  if (y.size() == 0) {
    return y;
  }
  const memory::desc layout = blocked_->weight.get_desc();
  const dnnl::matmul::primitive_desc description = product(rows, in_, out_, &layout);
  memory source = given({rows, in_}, memory::data_type::f32, {row_step, in_step}, x);
  memory rounded(description.src_desc(), cpu());
  memory target(description.dst_desc(), cpu(), y.data());
  dnnl::stream stream(cpu());
  dnnl::reorder(source, rounded).execute(stream, source, rounded);
  dnnl::matmul(description)
      .execute(stream,
               {{DNNL_ARG_SRC, rounded}, {DNNL_ARG_WEIGHTS, blocked_->weight}, {DNNL_ARG_DST, target}});
  stream.wait();
  return y;
}

#else

struct PackedWeight::Blocked {};

bool has_bf16_products() {
  return false;
}

void PackedWeight::block(const void* /*values*/, DType /*type*/, Index /*out_step*/, Index /*in_step*/) {
  throw std::logic_error("PackedWeight: built without oneDNN");
}

MatrixF PackedWeight::multiply(Index /*rows*/, const float* /*x*/, Index /*row_step*/,
                               Index /*in_step*/) const {
  return {};
}

#endif

PackedWeight::PackedWeight(Index out, Index in) : out_(out), in_(in) {}

PackedWeight::PackedWeight(const MatrixF& weight) : PackedWeight(weight.rows(), weight.cols()) {
  block(weight.data(), DType::f32, in_, 1);
}

PackedWeight::PackedWeight(std::span<const std::byte> bf16, Index out, Index in) : PackedWeight(out, in) {
  if (out < 0 || in < 0 || bf16.size() != 2 * static_cast<std::size_t>(out * in)) {
    throw std::invalid_argument("PackedWeight: " + std::to_string(bf16.size()) + " bytes for " +
                                std::to_string(out) + " x " + std::to_string(in));
  }
  block(bf16.data(), DType::bf16, in_, 1);
}

PackedWeight PackedWeight::of_transposed(const Rows& weight) {
  PackedWeight packed(weight.cols(), weight.rows());
  packed.block(weight.data(), DType::f32, 1, weight.outerStride());
  return packed;
}

MatrixF PackedWeight::operator()(const Rows& x) const {
  if (x.cols() != in_) {
    throw std::invalid_argument("PackedWeight: rows of " + std::to_string(x.cols()) + " for a weight of " +
                                std::to_string(in_));
  }
  return multiply(x.rows(), x.data(), x.outerStride(), 1);
}

MatrixF PackedWeight::times_transposed(const Rows& x) const {
  if (x.rows() != in_) {
    throw std::invalid_argument("PackedWeight: columns of " + std::to_string(x.rows()) + " for a weight of " +
                                std::to_string(in_));
  }
  return multiply(x.cols(), x.data(), 1, x.outerStride());
}

PackedWeight::PackedWeight(PackedWeight&&) noexcept = default;
PackedWeight& PackedWeight::operator=(PackedWeight&&) noexcept = default;
PackedWeight::~PackedWeight() = default;

ProductMap::ProductMap(MatrixF map, DType compute) {
  if (compute == DType::bf16) {
    packed_.emplace(map);
  } else {
    map_ = std::move(map);
  }
}

MatrixF ProductMap::operator()(const PackedWeight::Rows& x) const {
  if (packed_) {
    return (*packed_)(x);
  }
  MatrixF out(x.rows(), map_.rows());
  out.noalias() = x * map_.transpose();
  return out;
}

}  // namespace relatent

#include "linalg/packed.h"

#include <stdexcept>
#include <string>

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

memory given(const memory::dims& size, memory::data_type type, memory::format_tag order, const void* values) {
  // The library takes no pointer to const, and only reads through this one.
  return {memory::desc(size, type, order), cpu(),
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

PackedWeight::PackedWeight(const MatrixF& weight) : out_(weight.rows()), in_(weight.cols()) {
  block(weight.data(), false);
}

PackedWeight::PackedWeight(std::span<const std::byte> bf16, Index out, Index in) : out_(out), in_(in) {
  if (out < 0 || in < 0 || bf16.size() != 2 * static_cast<std::size_t>(out * in)) {
    throw std::invalid_argument("PackedWeight: " + std::to_string(bf16.size()) + " bytes for " +
                                std::to_string(out) + " x " + std::to_string(in));
  }
  block(bf16.data(), true);
}

void PackedWeight::block(const void* values, bool is_bf16) {
  if (!has_bf16_products()) {
    throw std::logic_error("PackedWeight: this processor has no bfloat16 products");
  }
  blocked_ = std::make_unique<Blocked>();
  stay_on_this_thread();
  // Row-major [out, in] is column-major [in, out].
  memory source = given({in_, out_}, is_bf16 ? memory::data_type::bf16 : memory::data_type::f32,
                        memory::format_tag::ba, values);
  blocked_->weight = memory(product(usual_rows, in_, out_, nullptr).weights_desc(), cpu());
  dnnl::stream stream(cpu());
  dnnl::reorder(source, blocked_->weight).execute(stream, source, blocked_->weight);
  stream.wait();
}

MatrixF PackedWeight::operator()(const MatrixF& x) const {
  if (x.cols() != in_) {
    throw std::invalid_argument("PackedWeight: rows of " + std::to_string(x.cols()) + " for a weight of " +
                                std::to_string(in_));
  }
  stay_on_this_thread();
  MatrixF y(x.rows(), out_);
  if (y.size() == 0) {
    return y;
  }
  const memory::desc layout = blocked_->weight.get_desc();
  const dnnl::matmul::primitive_desc description = product(x.rows(), in_, out_, &layout);
  memory source = given({x.rows(), in_}, memory::data_type::f32, memory::format_tag::ab, x.data());
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

PackedWeight::PackedWeight(const MatrixF& weight) : out_(weight.rows()), in_(weight.cols()) {
  block(weight.data(), false);
}

PackedWeight::PackedWeight(std::span<const std::byte> bf16, Index out, Index in) : out_(out), in_(in) {
  block(bf16.data(), true);
}

void PackedWeight::block(const void* /*values*/, bool /*is_bf16*/) {
  throw std::logic_error("PackedWeight: built without oneDNN");
}

MatrixF PackedWeight::operator()(const MatrixF& /*x*/) const {
  return {};
}

#endif

PackedWeight::~PackedWeight() = default;

}  // namespace relatent

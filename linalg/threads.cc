#include "linalg/threads.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <vector>

#include "linalg/stages.h"

// OpenBLAS keeps a thread pool of its own; one thread per call keeps results independent of our thread count.
// Another BLAS may not have the switch, hence the weak declaration.
extern "C" {
void openblas_set_num_threads(int threads) __attribute__((weak));
// Its own, and visible: the buffers of which every call takes one.
void* blas_memory_alloc(int kind) __attribute__((weak));
void blas_memory_free(void* buffer) __attribute__((weak));
}

namespace relatent {
namespace {

// Of OpenBLAS's buffers on the processors of today, whose builds for all of them have the largest.
constexpr std::size_t kBlasBuffer = std::size_t{128} << 20U;

int g_threads = 0;
thread_local bool t_inside_piece = false;

// Marks this thread as working on a piece for as long as it lives.
class InsidePiece {
 public:
  InsidePiece() : before_(t_inside_piece) { t_inside_piece = true; }
  InsidePiece(const InsidePiece&) = delete;
  InsidePiece& operator=(const InsidePiece&) = delete;
  ~InsidePiece() { t_inside_piece = before_; }

 private:
  bool before_;
};

// Nothing where no limit stands between OpenBLAS and its buffers.
std::optional<std::uint64_t> blas_address_limit() {
  rlimit limit{};
  const bool limited = openblas_set_num_threads != nullptr && ::getrlimit(RLIMIT_AS, &limit) == 0 &&
                       limit.rlim_cur != RLIM_INFINITY;
  return limited ? std::optional<std::uint64_t>(limit.rlim_cur) : std::nullopt;
}

void make_blas_serial() {
  static const bool done = [] {
    if (openblas_set_num_threads != nullptr) {
      openblas_set_num_threads(1);
    }
    return true;
  }();
  (void)done;
}

// BLAS is called before any parallel_for too, so the switch is thrown at load time.
[[maybe_unused]] const bool g_blas_is_serial = (make_blas_serial(), true);

}  // namespace

void set_num_threads(int threads) {
  make_blas_serial();
  g_threads = std::max(threads, 0);
}

void restart_without_blas_threads(char** arguments) {
  constexpr const char* kName = "OPENBLAS_NUM_THREADS";
  const char* const value = std::getenv(kName);
  if (!blas_address_limit() || (value != nullptr && std::string_view(value) == "1") ||
      ::setenv(kName, "1", 1) != 0) {
    return;
  }
  std::error_code unknown;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", unknown);
  if (!unknown) {
    ::execv(program.c_str(), arguments);
  }
}

std::string why_blas_would_hang(int threads) {
  const std::optional<std::uint64_t> limit = blas_address_limit();
  if (!limit) {
    return "";
  }
  // One by one, as OpenBLAS takes them, without touching any.
  std::vector<void*> probes;
  for (int i = 0; i < threads; ++i) {
    void* probe = ::mmap(nullptr, kBlasBuffer, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (probe == MAP_FAILED) {  // NOLINT(performance-no-int-to-ptr): the macro's own cast
      break;
    }
    probes.push_back(probe);
  }
  const bool enough = probes.size() == static_cast<std::size_t>(std::max(threads, 0));
  for (void* probe : probes) {
    ::munmap(probe, kBlasBuffer);
  }
  if (enough) {
    return "";
  }
  return "the limit on address space (ulimit -v) of " + std::to_string(*limit >> 20U) +
         " MiB is too small: besides all else OpenBLAS needs " + std::to_string(kBlasBuffer >> 20U) +
         " MiB for each of " + std::to_string(threads) +
         (threads == 1 ? " thread (raise the limit)" : " threads (raise the limit, or give fewer --threads)");
}

void take_blas_buffers(int threads) {
  if (!blas_address_limit() || blas_memory_alloc == nullptr || blas_memory_free == nullptr) {
    return;
  }
  std::vector<void*> buffers(static_cast<std::size_t>(std::max(threads, 0)));
  for (void*& buffer : buffers) {
    buffer = blas_memory_alloc(1);
  }
  for (void* buffer : buffers) {
    blas_memory_free(buffer);  // OpenBLAS keeps them for later calls
  }
}

int num_threads() {
  if (g_threads > 0) {
    return g_threads;
  }
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

void parallel_for(std::size_t pieces, const std::function<void(std::size_t)>& body) {
  make_blas_serial();
  const std::size_t workers = std::min<std::size_t>(static_cast<std::size_t>(num_threads()), pieces);
  if (workers <= 1 || t_inside_piece) {
    const InsidePiece inside;
    for (std::size_t i = 0; i < pieces; ++i) {
      body(i);
    }
    return;
  }
  std::atomic<std::size_t> next{0};
  std::mutex guard;
  std::exception_ptr first_failure;
  const auto work = [&] {
    const InsidePiece inside;
    for (std::size_t i = next.fetch_add(1); i < pieces; i = next.fetch_add(1)) {
      try {
        body(i);
      } catch (...) {
        const std::scoped_lock lock(guard);
        if (!first_failure) {
          first_failure = std::current_exception();
        }
        next = pieces;
      }
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(workers - 1);
  for (std::size_t i = 1; i < workers; ++i) {
    threads.emplace_back([&work, name = Stage::current()] {
      std::optional<Stage> stage;
      if (name != nullptr) {
        stage.emplace(name);
      }
      work();
    });
  }
  work();
  for (std::thread& thread : threads) {
    thread.join();
  }
  if (first_failure) {
    std::rethrow_exception(first_failure);
  }
}

}  // namespace relatent

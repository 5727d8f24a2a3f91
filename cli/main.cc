#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "cli/commands.h"
#include "formats/error.h"
#include "formats/process.h"
#include "linalg/decompose.h"
#include "linalg/heap.h"
#include "linalg/threads.h"

namespace {

constexpr int exit_failed = 1;  // what was verified is beyond its limit
constexpr int exit_usage = 2;
constexpr int exit_input = 3;
constexpr int exit_machine = 4;
constexpr int exit_bug = 70;

int complain(int code, const char* sentence) {
  std::fprintf(stderr, "relatent: %s\n", sentence);
  return code;
}

// What should never have been thrown.
int blame_ourselves(const char* what) {
  std::fprintf(stderr,
               "relatent: this is a fault of relatent " RELATENT_VERSION
               ", not of yours: %s; please report it with the command and the source's config.json\n",
               what);
  return exit_bug;
}

template <typename Command>
int guarded(const Command& command) noexcept {
  try {
    return command();
  } catch (const relatent::Error& error) {
    return complain(error.exit_code(), error.what());
  } catch (const relatent::NumericalError& error) {
    return complain(exit_input, error.what());
  } catch (const std::bad_alloc&) {
    return complain(exit_machine, "out of memory");
  } catch (const std::logic_error& error) {
    return blame_ourselves(error.what());
  } catch (const std::exception& error) {
    return complain(exit_machine, error.what());
  }
}

void require_blas_memory(int threads) {
  if (const std::string problem = relatent::why_blas_would_hang(threads); !problem.empty()) {
    std::_Exit(complain(exit_machine, problem.c_str()));
  }
}

int run(int argc, char** argv) {
  CLI::App app(
      "relatent rewrites pretrained GQA checkpoints into latent attention, offline, and proves how close "
      "they are");
  app.set_version_flag("--version", "relatent " RELATENT_VERSION);
  app.require_subcommand(1);
  int threads = 0;
  app.add_option("--threads", threads, "Threads to use (default: all cores); results do not depend on it")
      ->check(CLI::Range(1, 1024));
  app.fallthrough();
  relatent::Command chosen;
  relatent::add_families(app, chosen);
  relatent::add_inspect(app, chosen);
  relatent::add_calibrate(app, chosen);
  relatent::add_convert(app, chosen);
  relatent::add_shard(app, chosen);
  relatent::add_logits(app, chosen);
  relatent::add_verify(app, chosen);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // --help and --version arrive here too, with code 0.
    return error.get_exit_code() == 0 ? app.exit(error) : complain(exit_usage, error.what());
  }
  relatent::set_num_threads(threads);
  require_blas_memory(relatent::num_threads());
  relatent::take_blas_buffers(relatent::num_threads());
  return chosen();
}

}  // namespace

int main(int argc, char** argv) {
  relatent::restart_without_blas_threads(argv);
  relatent::keep_freed_memory();
  const int code = guarded([&] {
    relatent::prepare_process();
    require_blas_memory(1);  // even --help ends only when OpenBLAS does
    return run(argc, argv);
  });
  const int printed = guarded([] {
    relatent::finish_stdout();
    return 0;
  });
  // What was complained about already goes first.
  return code > exit_failed ? code : std::max(code, printed);
}

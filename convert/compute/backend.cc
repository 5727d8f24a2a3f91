#include "convert/compute/backend.h"

#include <utility>

#include "convert/compute/cpu/cpu_backend.h"

namespace relatent {
namespace {

std::unique_ptr<const Backend>& current() {
  static std::unique_ptr<const Backend> chosen = make_cpu_backend();
  return chosen;
}

}  // namespace

const Backend& backend() {
  return *current();
}

void set_backend(std::unique_ptr<const Backend> chosen) {
  current() = chosen ? std::move(chosen) : make_cpu_backend();
}

}  // namespace relatent

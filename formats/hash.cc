#include "formats/hash.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <stdexcept>

#include "formats/error.h"

namespace relatent {

struct Hasher::State {
  State() : xxh(XXH3_createState()) {
    if (xxh == nullptr || XXH3_128bits_reset(xxh) == XXH_ERROR) {
      XXH3_freeState(xxh);
      throw Error(ErrorKind::machine, "out of memory for a checksum");
    }
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() { XXH3_freeState(xxh); }

  XXH3_state_t* xxh;
};

Hasher::Hasher() : state_(std::make_unique<State>()) {}
Hasher::~Hasher() = default;

void Hasher::add(std::span<const std::byte> bytes) {
  if (XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size()) == XXH_ERROR) {
    throw std::logic_error("XXH3_128bits_update refused its input");
  }
}

void Hasher::add_number(std::uint64_t number) {
  add(std::as_bytes(std::span(&number, 1)));
}

void Hasher::add_text(std::string_view text) {
  add_number(text.size());
  add(std::as_bytes(std::span<const char>(text)));
}

std::string Hasher::hexadecimal() const {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh));
  static constexpr std::string_view kDigits = "0123456789abcdef";
  std::string text;
  for (const unsigned char byte : canonical.digest) {
    text += kDigits[byte >> 4U];
    text += kDigits[byte & 0xfU];
  }
  return text;
}

std::string checksum_of(std::span<const std::byte> bytes) {
  Hasher hasher;
  hasher.add(bytes);
  return hasher.hexadecimal();
}

}  // namespace relatent

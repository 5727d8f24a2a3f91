// GGUF files put together by hand, so that tests do not take the writer's word for what a file holds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace relatent::testing_support::gguf_bytes {

// A number as it lies in a file.
template <typename T>
std::string raw(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(T)};
}

inline std::string u32(std::uint32_t value) {
  return raw(value);
}

inline std::string u64(std::uint64_t value) {
  return raw(value);
}

inline std::string text(const std::string& value) {
  return u64(value.size()) + value;
}

// An entry of the metadata: `type` is the number of its type, `value` the bytes after that.
inline std::string key(const std::string& name, std::uint32_t type, const std::string& value) {
  return text(name) + u32(type) + value;
}

// A tensor info; dims are fastest first, as the file has them.
inline std::string tensor(const std::string& name, const std::vector<std::uint64_t>& dims, std::uint32_t type,
                          std::uint64_t offset) {
  std::string out = text(name) + u32(static_cast<std::uint32_t>(dims.size()));
  for (const std::uint64_t dimension : dims) {
    out += u64(dimension);
  }
  return out + u32(type) + u64(offset);
}

// A whole file; data is put behind the padding of the header.
struct Made {
  std::uint32_t version = 3;
  // The initialisers let a caller name only the parts it has.
  std::vector<std::string> keys = {};
  std::vector<std::string> tensors = {};
  std::string data = {};
  std::size_t alignment = 32;

  std::string header() const {
    std::string out = "GGUF" + u32(version) + u64(tensors.size()) + u64(keys.size());
    for (const std::vector<std::string>* list : {&keys, &tensors}) {
      for (const std::string& entry : *list) {
        out += entry;
      }
    }
    return out;
  }

  std::string bytes() const {
    std::string out = header();
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data;
  }
};

// Bytes that differ from their neighbours.
inline std::string letters(std::size_t count) {
  std::string out(count, '\0');
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = static_cast<char>('a' + i % 26);
  }
  return out;
}

// A value of every type, and tensors of every type.
inline Made good() {
  return {.keys = {key("general.architecture", 8, text("deepseek2")), key("a.u8", 0, raw(std::uint8_t{200})),
                   key("a.i8", 1, raw(std::int8_t{-100})), key("a.u16", 2, raw(std::uint16_t{60000})),
                   key("a.i16", 3, raw(std::int16_t{-30000})), key("a.u32", 4, u32(4'000'000'000U)),
                   key("a.i32", 5, raw(-2'000'000'000)), key("a.f32", 6, raw(0.25F)),
                   key("a.bool", 7, raw(std::uint8_t{1})), key("a.u64", 10, u64(~std::uint64_t{0})),
                   key("a.i64", 11, raw(std::numeric_limits<std::int64_t>::min())),
                   key("a.f64", 12, raw(1e300)), key("b.empty", 9, u32(8) + u64(0)),
                   key("b.strings", 9, u32(8) + u64(2) + text("Ġa") + text("")),
                   key("b.i32", 9, u32(5) + u64(3) + raw(1) + raw(-2) + raw(3)),
                   key("b.f32", 9, u32(6) + u64(1) + raw(-1.5F)), key("b.u32", 9, u32(4) + u64(1) + u32(7)),
                   key("b.bool", 9, u32(7) + u64(2) + std::string("\1\0", 2))},
          .tensors = {tensor("token_embd.weight", {3, 2}, 0, 0), tensor("norm", {5}, 1, 32),
                      tensor("four", {1, 2, 3, 4}, 30, 64)},
          .data = letters(24) + std::string(8, '\0') + letters(10) + std::string(22, '\0') + letters(48)};
}

}  // namespace relatent::testing_support::gguf_bytes

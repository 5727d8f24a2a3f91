#include "tests/attack/fuzz/fuzz.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>
#include <system_error>

#include "formats/tensor_file.h"
#include "linalg/dtype.h"
#include "linalg/threads.h"

// libFuzzer's, in the programs that have it.
extern "C" [[gnu::weak]] std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size,
                                                      std::size_t max_size);

namespace relatent::fuzz {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr std::string_view kMark = "%%%";
// More data than a tensor of a fuzzed header is worth.
constexpr std::uint64_t kMostData = std::uint64_t{1} << 17U;

// Inputs are small, and threads would only make the order of errors differ from run to run.
[[maybe_unused]] const bool kOneThread = [] {
  set_num_threads(1);
  return true;
}();

void remove_folder() {
  std::error_code ignored;
  fs::remove_all(folder(), ignored);
}

fs::path make_folder() {
  const char* named = std::getenv("RELATENT_FUZZ_FOLDER");
  const fs::path place = named != nullptr                         ? fs::path(named)
                         : ::access("/dev/shm", W_OK | X_OK) == 0 ? fs::path("/dev/shm")
                                                                  : fs::temp_directory_path();
  std::string pattern = (place / "relatent-fuzz-XXXXXX").string();
  require(::mkdtemp(pattern.data()) != nullptr, "cannot make " + pattern);
  return pattern;
}

// Bytes of a tensor as a header describes it; nothing when it describes none.
std::optional<std::uint64_t> bytes_of(const Json& tensor) {
  const auto dtype_name = tensor.find("dtype");
  const auto shape = tensor.find("shape");
  if (dtype_name == tensor.end() || !dtype_name->is_string() || shape == tensor.end() || !shape->is_array()) {
    return std::nullopt;
  }
  const std::optional<DType> dtype = dtype_from_safetensors(dtype_name->get<std::string>());
  std::vector<std::int64_t> sizes;
  for (const Json& size : *shape) {
    if (!size.is_number_unsigned()) {
      return std::nullopt;
    }
    sizes.push_back(size.get<std::int64_t>());
  }
  return dtype ? dense_bytes(*dtype, sizes) : std::nullopt;
}

}  // namespace

void require(bool holds, const std::string& what) {
  if (!holds) {
    std::fprintf(stderr, "\nFINDING: %s\n", what.c_str());
    std::abort();
  }
}

const fs::path& folder() {
  static const fs::path path = [] {
    fs::path made = make_folder();
    static_cast<void>(std::atexit(remove_folder));
    return made;
  }();
  return path;
}

fs::path put(const std::string& name, std::string_view bytes) {
  fs::path path = folder() / name;
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  require(fd >= 0 && ::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()),
          "cannot write " + path.string() + ": " + std::generic_category().message(errno));
  ::close(fd);
  return path;
}

void touch(std::span<const std::byte> bytes) {
  unsigned sum = 0;
  for (const std::byte byte : bytes) {
    sum += static_cast<unsigned>(byte);
  }
  // Keeps the loop, whose result nobody wants.
  asm volatile("" : : "r"(sum));
}

void touch(std::string_view text) {
  touch(std::as_bytes(std::span(text)));
}

void check_error(const Error& error, bool usage) {
  const std::string sentence = error.what();
  static const bool say = std::getenv("RELATENT_FUZZ_SAY") != nullptr;
  if (say) {
    std::fprintf(stderr, "refused: %s\n", sentence.c_str());
  }
  require(error.kind() == ErrorKind::input || (usage && error.kind() == ErrorKind::usage),
          "an error of kind " + std::to_string(error.exit_code()) + ": " + sentence);
  const auto breaks = [](char character) { return static_cast<unsigned char>(character) < 0x20; };
  require(std::none_of(sentence.begin(), sentence.end(), breaks), "more than a line: " + sentence);
  require(usage || sentence.starts_with(folder().string()), "a sentence without the file: " + sentence);
}

Files split_files(std::string_view input, const std::vector<std::string>& names) {
  Files files;
  std::size_t at = input.find(kMark);
  while (at != std::string_view::npos) {
    const std::size_t begin = at + kMark.size();
    at = input.find(kMark, begin);
    const std::string_view part = input.substr(begin, at == std::string_view::npos ? at : at - begin);
    const std::size_t end = part.find('\n');
    if (end == std::string_view::npos) {
      continue;
    }
    const std::string name(part.substr(0, end));
    if (std::find(names.begin(), names.end(), name) != names.end()) {
      files[name] = part.substr(end + 1);
    }
  }
  return files;
}

std::string join_files(const Files& files) {
  std::string out;
  for (const auto& [name, bytes] : files) {
    out += kMark;
    out += name;
    out += '\n';
    out += bytes;
  }
  return out;
}

std::string repaired_safetensors(std::string_view file) {
  constexpr std::size_t prefix = 8;
  const std::size_t last = file.rfind('}');
  if (last == std::string_view::npos || last < prefix) {
    return std::string(file);
  }
  std::string header(file.substr(prefix, last + 1 - prefix));
  std::string data(file.substr(last + 1));
  if (Json json = Json::parse(header, nullptr, false); json.is_object()) {
    std::uint64_t end = 0;
    for (const auto& [name, tensor] : json.items()) {
      const std::optional<std::uint64_t> bytes =
          name != "__metadata__" && tensor.is_object() ? bytes_of(tensor) : std::nullopt;
      if (bytes && *bytes <= kMostData - end) {
        tensor["data_offsets"] = {end, end + *bytes};
        end += *bytes;
      }
    }
    data.resize(end);
    header = json.dump();
  }
  std::uint64_t length = header.size();
  std::string out(prefix, '\0');
  std::memcpy(out.data(), &length, prefix);
  return out + header + data;
}

std::string mutated(std::string_view text, std::size_t max_size) {
  std::string out(std::max(max_size, text.size()), '\0');
  std::copy(text.begin(), text.end(), out.begin());
  out.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(out.data()), text.size(), out.size()));
  return out;
}

std::size_t hand_over(std::string_view text, std::uint8_t* data, std::size_t max_size) {
  const std::size_t size = std::min(text.size(), max_size);
  std::memcpy(data, text.data(), size);
  return size;
}

}  // namespace relatent::fuzz

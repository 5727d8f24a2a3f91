#include "tests/attack/fuzz/fuzz.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
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
// Of a safetensors file: the length of its header.
constexpr std::size_t kPrefix = 8;
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

// What a number, or anything, may turn into.
Json some_value(std::minstd_rand& random) {
  static const std::vector<Json> values = {nullptr,
                                           true,
                                           false,
                                           0,
                                           1,
                                           2,
                                           3,
                                           -1,
                                           0.5,
                                           1e300,
                                           -0.0,
                                           1U << 16U,
                                           1U << 20U,
                                           std::int64_t{1} << 31U,
                                           std::int64_t{1} << 32U,
                                           std::numeric_limits<std::int64_t>::max(),
                                           std::numeric_limits<std::int64_t>::min(),
                                           std::uint64_t{1} << 63U,
                                           std::numeric_limits<std::uint64_t>::max(),
                                           "",
                                           "\u00e9",
                                           std::string("\0", 1),
                                           Json::array(),
                                           Json::object(),
                                           Json::array({nullptr, 1})};
  return values[random() % values.size()];
}

// The value and all inside of it.
void collect(Json& value, std::vector<Json*>& all) {
  all.push_back(&value);
  if (value.is_structured()) {
    for (Json& inside : value) {
      collect(inside, all);
    }
  }
}

void remove_one(Json& from, std::size_t at) {
  if (from.is_array()) {
    from.erase(at);
  } else {
    auto& members = from.get_ref<Json::object_t&>();
    members.erase(members.begin() + static_cast<std::ptrdiff_t>(at));
  }
}

void change_json(Json& root, std::size_t max_size, std::minstd_rand& random) {
  std::vector<Json*> all;
  collect(root, all);
  Json& chosen = *all[random() % all.size()];
  const Json other = *all[random() % all.size()];
  switch (random() % 6) {
    case 0:
      chosen = some_value(random);
      break;
    case 1:
      chosen = other;
      break;
    case 2:
      if (chosen.is_structured() && !chosen.empty()) {
        remove_one(chosen, random() % chosen.size());
      }
      break;
    case 3:
      if (chosen.is_array()) {
        for (std::size_t copies = random() % 8; copies > 0; --copies) {
          chosen.push_back(other);
        }
      }
      break;
    case 4:
      if (chosen.is_number_integer()) {
        const auto value = chosen.get<std::uint64_t>();
        const std::array<std::uint64_t, 5> near = {value + 1, value - 1, value * 2, value / 2, ~value + 1};
        chosen = near[random() % near.size()];
      } else if (chosen.is_number_float()) {
        chosen = chosen.get<double>() * (random() % 2 == 0 ? 1e3 : -0.1);
      } else if (chosen.is_string()) {
        chosen = mutated(chosen.get<std::string>(), std::min<std::size_t>(max_size, 64));
      }
      break;
    default:
      if (chosen.is_object() && !chosen.empty()) {
        // The name of one for the value of another.
        auto& members = chosen.get_ref<Json::object_t&>();
        const auto member = [&] {
          return members.begin() + static_cast<std::ptrdiff_t>(random() % members.size());
        };
        std::swap(member()->second, member()->second);
      }
      break;
  }
}

// A safetensors file whose header is JSON, with the length and the data that this header asks for; other
// bytes as they are.
std::string repaired(std::string_view file) {
  const std::size_t last = file.rfind('}');
  if (last == std::string_view::npos || last < kPrefix) {
    return std::string(file);
  }
  std::string header(file.substr(kPrefix, last + 1 - kPrefix));
  std::string data(file.substr(last + 1));
  if (Json json = any_json(header); json.is_object()) {
    std::uint64_t end = 0;
    for (auto& [name, tensor] : json.items()) {
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
  std::string out(kPrefix, '\0');
  std::memcpy(out.data(), &length, kPrefix);
  return out + header + data;
}

}  // namespace

void require(bool holds, const std::string& what) {
  if (!holds) {
    std::fprintf(stderr, "\nFINDING: %s\n", what.c_str());
    std::abort();
  }
}

const fs::path& folder() {
  // Never destroyed: it is removed when objects already are.
  static const fs::path& path = *[] {
    static_cast<void>(std::atexit(remove_folder));
    return new fs::path(make_folder());
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

void put_files(const Files& files, const std::vector<std::string>& names) {
  for (const std::string& name : names) {
    if (const auto found = files.find(name); found != files.end()) {
      put(name, found->second);
    } else {
      std::filesystem::remove(folder() / name);
    }
  }
}

Json any_json(std::string_view text) {
  constexpr int deepest = 80;
  return Json::parse(
      text, [](int depth, Json::parse_event_t /*event*/, Json& /*value*/) { return depth < deepest; }, false);
}

std::string mutated(std::string_view text, std::size_t max_size) {
  std::string out(std::max(max_size, text.size()), '\0');
  std::copy(text.begin(), text.end(), out.begin());
  out.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(out.data()), text.size(), out.size()));
  return out;
}

std::string mutated_json(std::string_view text, std::size_t max_size, unsigned seed) {
  std::minstd_rand random(seed);
  Json json = random() % 3 == 0 ? Json() : any_json(text);
  if (!json.is_structured()) {
    return mutated(text, max_size);
  }
  for (std::size_t changes = 1 + random() % 3; changes > 0; --changes) {
    change_json(json, max_size, random);
  }
  std::string out = json.dump(-1, ' ', false, Json::error_handler_t::replace);
  return out.size() <= max_size ? out : mutated(text, max_size);
}

std::string mutated_safetensors(std::string_view file, std::size_t max_size, unsigned seed) {
  std::string out;
  const std::size_t last = file.rfind('}');
  if (seed % 2 == 0 && last != std::string_view::npos && last >= kPrefix) {
    out = file.substr(0, kPrefix);
    out += mutated_json(file.substr(kPrefix, last + 1 - kPrefix), max_size, seed);
    out += file.substr(last + 1);
  } else {
    out = mutated(file, max_size);
  }
  return repairs(seed) ? repaired(out) : out;
}

std::string mutated_files(std::string_view input, const std::vector<std::string>& names, std::size_t max_size,
                          unsigned seed) {
  Files files = split_files(input, names);
  if (seed % 4 == 0 || files.empty()) {
    return mutated(input, max_size);
  }
  auto& [name, bytes] = *std::next(files.begin(), static_cast<std::ptrdiff_t>(seed / 4 % files.size()));
  if (name.ends_with(".json")) {
    bytes = mutated_json(bytes, max_size, seed);
  } else if (name.ends_with(".safetensors")) {
    bytes = mutated_safetensors(bytes, max_size, seed);
  } else {
    bytes = mutated(bytes, max_size);
  }
  return join_files(files);
}

std::size_t hand_over(std::string_view text, std::uint8_t* data, std::size_t max_size) {
  const std::size_t size = std::min(text.size(), max_size);
  std::memcpy(data, text.data(), size);
  return size;
}

std::size_t mutate_files(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed,
                         const std::vector<std::string>& names) {
  return hand_over(mutated_files(text_of(data, size), names, max_size, seed), data, max_size);
}

}  // namespace relatent::fuzz

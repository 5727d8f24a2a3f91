#include "formats/gguf_source.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <type_traits>

#include "formats/error.h"
#include "formats/json_text.h"

namespace relatent {
namespace {

template <typename Value>
struct IsList : std::false_type {};
template <typename Value>
struct IsList<std::vector<Value>> : std::true_type {};

}  // namespace

GgufSource::GgufSource(GgufFile file) : file_(std::move(file)), config_(nlohmann::ordered_json::object()) {
  for (const auto& [key, value] : file_.metadata()) {
    std::visit(
        [&, &name = key](const auto& held) {
          if constexpr (!IsList<std::decay_t<decltype(held)>>::value) {
            config_[name] = held;
          }
        },
        value);
  }
}

// What reports and fingerprints are to hold.
void GgufSource::require_utf8() const {
  for (const auto& [key, value] : file_.metadata()) {
    const auto* text = std::get_if<std::string>(&value);
    if (!is_utf8(key) || (text != nullptr && !is_utf8(*text))) {
      fail_input({.file = path(),
                  .problem = "key \"" + key.substr(0, 200) + "\"",
                  .expected = "UTF-8",
                  .found = "other bytes"});
    }
  }
  for (const GgufTensor& tensor : file_.tensors()) {
    if (!is_utf8(tensor.name)) {
      fail_input({.file = path(),
                  .tensor = tensor.name,
                  .problem = "its name",
                  .expected = "UTF-8",
                  .found = "other bytes"});
    }
  }
}

GgufSource GgufSource::open(const std::filesystem::path& path) {
  GgufFile file = GgufFile::open(path);
  if (const auto* parts = file.find_as<std::uint16_t>("split.count"); parts != nullptr && *parts > 1) {
    fail_input({path, "", "is one of several files", "a whole model",
                "one of " + std::to_string(*parts) + " parts", "merge them with llama-gguf-split --merge"});
  }
  GgufSource out(std::move(file));
  out.require_utf8();
  return out;
}

bool GgufSource::is_one(const std::filesystem::path& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    return false;
  }
  std::array<char, 4> magic{};
  std::ifstream(path, std::ios::binary).read(magic.data(), magic.size());
  return std::string_view(magic.data(), magic.size()) == "GGUF";
}

std::vector<std::string> GgufSource::tensor_names() const {
  std::vector<std::string> out;
  for (const GgufTensor& tensor : file_.tensors()) {
    out.push_back(tensor.name);
  }
  std::sort(out.begin(), out.end());
  return out;
}

const TensorInfo& GgufSource::info(const std::string& name) const {
  const GgufTensor* tensor = file_.find_tensor(name);
  if (tensor == nullptr) {
    fail_input({.file = path(), .tensor = name, .problem = "there is no such tensor"});
  }
  return *tensor;
}

const std::filesystem::path& GgufSource::path_of(const std::string& name) const {
  static_cast<void>(info(name));  // complains about an unknown name
  return path();
}

}  // namespace relatent

#include "convert/verify/structure.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <span>
#include <system_error>
#include <utility>

#include "formats/checkpoint.h"
#include "formats/error.h"
#include "formats/files.h"
#include "formats/hash.h"
#include "formats/mapped_file.h"
#include "formats/safetensors.h"
#include "linalg/dtype.h"
#include "linalg/stages.h"
#include "linalg/threads.h"

namespace relatent {
namespace {

// Numbers that are looked at together, while a processor's cache still has them.
constexpr std::size_t numbers_at_once = std::size_t{1} << 16U;
// What a conversion has no reason to change.
constexpr std::array<const char*, 4> kept_keys = {"bos_token_id", "eos_token_id", "pad_token_id",
                                                  "max_position_embeddings"};
// How names of files end that one engine or another loads unasked.
constexpr std::array<const char*, 9> loaded_endings = {".safetensors", ".bin",  ".pt",    ".pth",  ".gguf",
                                                       ".index.json",  ".json", ".jinja", ".model"};
// Those of them that a source without a report may have put there itself.
constexpr std::array<const char*, 3> side_endings = {".json", ".jinja", ".model"};

// The bytes of a tensor that should be another one's.
struct Origin {
  DType dtype = DType::f32;
  std::span<const std::byte> bytes;
};

// What one pass over a tensor shows.
struct Look {
  bool finite = true;
  bool same = false;     // byte for byte the origin's
  bool cast = false;     // the origin's numbers in another dtype
  std::string checksum;  // where it was wanted
};

// Whether these numbers are what casting those of the origin gives.
bool is_cast(const Origin& from, std::size_t first, DType dtype, std::span<const std::byte> to) {
  const std::size_t count = to.size() / size_of(dtype);
  std::vector<float> numbers(count);
  std::vector<std::byte> encoded(to.size());
  decode_floats(from.dtype, from.bytes.subspan(first * size_of(from.dtype), count * size_of(from.dtype)),
                numbers);
  static_cast<void>(encode_floats(dtype, numbers, encoded));
  return std::memcmp(encoded.data(), to.data(), to.size()) == 0;
}

Look look_at(DType dtype, std::span<const std::byte> bytes, const std::optional<Origin>& origin,
             bool with_checksum) {
  Look out;
  const std::size_t count = bytes.size() / size_of(dtype);
  const bool comparable = origin && origin->bytes.size() / size_of(origin->dtype) == count;
  out.same = comparable && origin->dtype == dtype;
  out.cast = comparable && !out.same && is_float(origin->dtype) && is_float(dtype);
  Hasher hasher;
  for (std::size_t first = 0; first < count; first += numbers_at_once) {
    const std::size_t begin = first * size_of(dtype);
    const std::span<const std::byte> some =
        bytes.subspan(begin, std::min(numbers_at_once, count - first) * size_of(dtype));
    out.finite = all_finite(dtype, some) && out.finite;
    out.same = out.same && std::memcmp(some.data(), origin->bytes.data() + begin, some.size()) == 0;
    out.cast = out.cast && is_cast(*origin, first, dtype, some);
    if (with_checksum) {
      hasher.add(some);
    }
  }
  if (with_checksum) {
    out.checksum = hasher.hexadecimal();
  }
  return out;
}

// What of the source the tensor is; none for what convert computed. The attention of grouped-query layers
// beside latent ones is the source's; where there are no latent ones, nothing says what it was to be.
std::optional<Role> origin_role(const PlacedTensor& tensor, const Model& converted) {
  if (!is_attention(tensor.role)) {
    return source_role(tensor.role);
  }
  if (!converted.config().latent) {
    return std::nullopt;
  }
  return converted.config().is_latent(*tensor.layer_idx) ? source_role(tensor.role) : tensor.role;
}

// The source's tensor that this one is, whatever it is called.
std::optional<std::string> origin_of(const PlacedTensor& tensor, const Model& source,
                                     const Model& converted) {
  const std::optional<Role> role = origin_role(tensor, converted);
  if (!role) {
    return std::nullopt;
  }
  if (source.has(*role, tensor.layer_idx, tensor.part)) {
    return source.name_of(*role, tensor.layer_idx, tensor.part);
  }
  // A tied head that a layout stores.
  return tensor.role == Role::lm_head ? std::optional(source.name_of(Role::embed_tokens, {})) : std::nullopt;
}

// Counts one tensor of the converted checkpoint and says what is wrong with it.
void check_tensor(const PlacedTensor& tensor, const Model& source, const Model& converted,
                  const std::optional<ConversionReport>& report, Structure& out) {
  const TensorSource& files = converted.checkpoint();
  const std::optional<std::string> origin_name = origin_of(tensor, source, converted);
  std::optional<Origin> origin;
  if (origin_name) {
    const TensorSource& from = source.checkpoint();
    origin = Origin{from.info(*origin_name).dtype, from.bytes(*origin_name)};
  }
  const DType dtype = files.info(tensor.name).dtype;
  const bool known = report && report->tensors.contains(tensor.name);
  const Look found = look_at(dtype, files.bytes(tensor.name), origin, known);
  files.release(tensor.name);
  if (origin_name) {
    source.checkpoint().release(*origin_name);
  }
  const auto complain = [&](std::vector<std::string>& list, const std::string& wrong) {
    list.push_back(files.path_of(tensor.name).string() + ": tensor " + tensor.name + " " + wrong);
  };
  if (!found.finite) {
    complain(out.not_finite, "holds NaN or infinity");
  }
  const bool as_written = known && found.checksum == report->tensors.at(tensor.name);
  if (known && !as_written) {
    complain(out.findings, "is not what convert wrote");
  } else if (known && safetensors_name(dtype) != report->dtype) {
    complain(out.findings,
             "is stored as " + std::string(safetensors_name(dtype)) + ", and convert wrote " + report->dtype);
  }
  if (!origin_role(tensor, converted)) {
    ++out.converted;
    if (report && !known) {
      complain(out.findings, "was not written by convert");
    }
  } else if (!origin_name) {
    complain(out.findings, "is no tensor of the source");
  } else if (!found.same && (!found.cast || (report && !known))) {
    complain(out.findings, "is not the source's " + *origin_name);
  }
  out.copied += found.same ? 1 : 0;
  out.cast += found.cast ? 1 : 0;
  out.checked += as_written ? 1 : 0;
}

// Tokenizer, chat template and whatever else goes along.
void check_side_files(const Checkpoint& from, const Checkpoint& to, const std::set<std::string>& names,
                      std::vector<std::string>& findings) {
  for (const std::string& name : names) {
    const std::filesystem::path copy = to.path() / name;
    if (name == kReportName) {
      continue;
    }
    if (!std::filesystem::exists(copy)) {
      findings.push_back(copy.string() + ": is missing; the source has it");
      continue;
    }
    const MappedFile a = MappedFile::open(from.path() / name);
    const MappedFile b = MappedFile::open(copy);
    if (!std::ranges::equal(a.bytes(), b.bytes())) {
      findings.push_back(copy.string() + ": is not the source's");
    }
  }
}

// Configuration and code as convert left them.
void check_written_files(const Checkpoint& from, const Checkpoint& to,
                         const std::set<std::string>& side_files, const ConversionReport& report,
                         std::vector<std::string>& findings) {
  const std::map<std::string, std::string> found = file_checksums(to.path(), side_files);
  for (const auto& [name, checksum] : report.files) {
    const auto there = found.find(name);
    if (side_files.contains(name)) {
      continue;  // it was compared with the source's
    }
    if (there == found.end()) {
      findings.push_back((to.path() / name).string() + ": is missing; convert wrote it");
    } else if (there->second != checksum) {
      findings.push_back((to.path() / name).string() + ": is not what convert wrote");
    }
  }
  if (checksum_of(from.config_path()) != report.source_config) {
    findings.push_back(from.config_path().string() + ": is not the configuration that " + to.path().string() +
                       " was converted from");
  }
}

template <typename Endings>
bool ends_with_any(const std::string& name, const Endings& endings) {
  return std::any_of(endings.begin(), endings.end(),
                     [&](const char* ending) { return name.ends_with(ending); });
}

// Files beside the checkpoint that some engine would load although they belong to nothing.
void check_strays(const Checkpoint& to, const std::set<std::string>& side_files,
                  const std::optional<ConversionReport>& report, std::vector<std::string>& findings) {
  std::set<std::string> known = side_files;
  known.insert(kReportName);
  for (const SafetensorsFile& file : to.files()) {
    known.insert(file.path().filename().string());
  }
  if (!report) {
    known.insert("config.json");
    if (to.index_path()) {
      known.insert(to.index_path()->filename().string());
    }
  }
  if (report) {
    for (const auto& [name, checksum] : report->files) {
      known.insert(name);
    }
  }
  for (const std::filesystem::path& entry : entries_of(to.path())) {
    const std::string name = entry.filename().string();
    const bool adapter = name.starts_with("adapter_");
    const bool loaded = ends_with_any(name, loaded_endings) || (report && name.ends_with(".py"));
    const bool harmless =
        !report && !adapter && !name.ends_with(".index.json") && ends_with_any(name, side_endings);
    // transformers takes generation code and chat templates out of folders.
    std::error_code unreadable;
    const bool folder = std::filesystem::is_directory(entry, unreadable) &&
                        (report || name == "custom_generate" || name == "additional_chat_templates");
    if (!name.starts_with('.') && (folder || (loaded && !harmless)) && !known.contains(name)) {
      findings.push_back(entry.string() + ": belongs to nothing here, and an engine may load it");
    }
  }
}

void check_config(const Model& source, const Model& converted, std::vector<std::string>& findings) {
  const nlohmann::ordered_json& from = source.checkpoint().config();
  const nlohmann::ordered_json& to = converted.checkpoint().config();
  for (const char* key : kept_keys) {
    if (from.contains(key) && to.contains(key) && from[key] != to[key]) {
      findings.push_back(converted.checkpoint().config_path().string() + ": " + key + " is " +
                         to[key].dump() + ", the source's " + from[key].dump());
    }
  }
}

}  // namespace

std::optional<ConversionReport> find_report(const Model& converted, std::vector<std::string>& findings) {
  const auto* folder = dynamic_cast<const Checkpoint*>(&converted.checkpoint());
  if (folder == nullptr || !std::filesystem::exists(folder->path() / kReportName)) {
    return std::nullopt;
  }
  try {
    return ConversionReport::read(folder->path() / kReportName);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::input) {
      throw;
    }
    findings.emplace_back(error.what());
    return std::nullopt;
  }
}

Structure check_structure(const Model& source, const Model& converted,
                          const std::optional<ConversionReport>& report) {
  const Stage stage("files");
  const std::vector<PlacedTensor>& tensors = converted.tensors();
  std::vector<Structure> found(tensors.size());
  parallel_for(tensors.size(),
               [&](std::size_t i) { check_tensor(tensors[i], source, converted, report, found[i]); });
  Structure out;
  std::set<std::string> names;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    names.insert(tensors[i].name);
    out.copied += found[i].copied;
    out.cast += found[i].cast;
    out.converted += found[i].converted;
    out.checked += found[i].checked;
    for (auto [from, to] :
         {std::pair(&found[i].findings, &out.findings), std::pair(&found[i].not_finite, &out.not_finite)}) {
      to->insert(to->end(), from->begin(), from->end());
    }
  }
  for (const auto& [name, checksum] : report ? report->tensors : std::map<std::string, std::string>{}) {
    if (!names.contains(name)) {
      out.findings.push_back(converted.checkpoint().path().string() + ": tensor " + name +
                             " is missing; convert wrote it");
    }
  }
  const auto* from = dynamic_cast<const Checkpoint*>(&source.checkpoint());
  const auto* to = dynamic_cast<const Checkpoint*>(&converted.checkpoint());
  if (from != nullptr && to != nullptr) {
    std::set<std::string> side_files;
    for (const std::filesystem::path& file : from->linked_side_files()) {
      side_files.insert(file.filename().string());
    }
    check_side_files(*from, *to, side_files, out.findings);
    check_config(source, converted, out.findings);
    if (report) {
      check_written_files(*from, *to, side_files, *report, out.findings);
    }
    check_strays(*to, side_files, report, out.findings);
  }
  return out;
}

}  // namespace relatent

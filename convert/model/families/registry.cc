#include <algorithm>

#include "convert/model/families/family.h"
#include "formats/error.h"

namespace relatent {

const std::vector<const Family*>& families() {
  static const std::vector<const Family*> all = {
      &llama_family(),         &mistral_family(),  &qwen2_family(),   &qwen3_family(),
      &seed_oss_family(),      &phi3_family(),     &glm4_family(),    &smollm3_family(),
      &granite_family(),       &olmo2_family(),    &mixtral_family(), &qwen2_moe_family(),
      &qwen3_moe_family(),     &gemma2_family(),   &gemma3_family(),  &deepseek_v2_family(),
      &deepseek_v3_family(),   &relatent_family(), &mlra_family(),    &gla_family(),
      &gguf_deepseek2_family()};
  return all;
}

const Family& family_of(const ConfigReader& in) {
  // A GGUF file says it by another name.
  const char* said_by = in.has("general.architecture") ? "general.architecture" : "model_type";
  const std::string model_type = in.text(said_by);
  const Family* found = nullptr;
  for (const Family* family : families()) {
    const bool mine = family->key.empty() || in.has(std::string(family->key).c_str());
    if (family->model_type == model_type && mine && (found == nullptr || found->key.empty())) {
      found = family;
    }
  }
  if (found == nullptr) {
    fail_input({in.path(), "", said_by, "one of " + known_families(), "\"" + model_type + "\"", ""});
  }
  return *found;
}

const Family* find_family(std::string_view name) {
  const auto found = std::find_if(families().begin(), families().end(),
                                  [&](const Family* family) { return family->name == name; });
  return found == families().end() ? nullptr : *found;
}

std::string known_families() {
  std::string out;
  for (const Family* family : families()) {
    out += (out.empty() ? "" : ", ") + std::string(family->model_type);
    if (!family->key.empty()) {
      out += " (with the key " + std::string(family->key) + ")";
    }
  }
  return out;
}

}  // namespace relatent

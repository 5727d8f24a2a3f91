#include "convert/engines/engine.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <utility>

#include "convert/engines/deepseek.h"
#include "convert/engines/gguf.h"
#include "convert/engines/gla.h"
#include "convert/engines/mlra.h"
#include "convert/engines/relatent.h"
#include "convert/engines/transformers.h"
#include "convert/model/families/family.h"
#include "formats/files.h"

namespace relatent {
namespace {

std::vector<std::unique_ptr<Engine>> all_engines() {
  std::vector<std::unique_ptr<Engine>> out;
  out.push_back(make_transformers_engine());
  out.push_back(make_relatent_engine());
  out.push_back(make_deepseek_engine());
  out.push_back(make_gguf_engine());
  out.push_back(make_mlra_engine());
  out.push_back(make_gla_engine());
  return out;
}

// Weights, and when they are complete what goes beside them.
class FolderSink final : public TensorSink {
 public:
  FolderSink(std::unique_ptr<CheckpointWriter> writer, const OutputPlan& plan, std::vector<ExtraFile> extra)
      : writer_(std::move(writer)),
        folder_(plan.path),
        config_(plan.config),
        config_permissions_(permissions_of(plan.source->config_path())),
        side_files_(plan.side_files),
        extra_(std::move(extra)) {}

  void write_floats(const std::string& name, std::span<const float> values) override {
    writer_->write_floats(name, values);
  }
  void copy(const std::string& name, const Checkpoint& source, const std::string& source_name) override {
    writer_->copy(name, source, source_name);
  }
  void mark_written(const std::string& name) override { writer_->mark_written(name); }
  std::string checksum(const std::string& name) const override { return writer_->checksum(name); }
  std::string stored_checksum(const std::string& name) const override {
    return writer_->stored_checksum(name);
  }
  void flush() override { writer_->flush(); }
  std::uint64_t bytes_written() const override { return writer_->bytes_written(); }

  void finish() override {
    writer_->finish();
    for (const std::filesystem::path& file : side_files_) {
      copy_whole_file(file, folder_ / file.filename());
    }
    write_text(folder_ / "config.json", config_.dump(2) + "\n", config_permissions_);
    for (const ExtraFile& file : extra_) {
      write_text(folder_ / file.name, std::string(file.text));
    }
  }

 private:
  std::unique_ptr<CheckpointWriter> writer_;
  std::filesystem::path folder_;
  nlohmann::ordered_json config_;
  FilePermissions config_permissions_;
  std::vector<std::filesystem::path> side_files_;
  std::vector<ExtraFile> extra_;
};

}  // namespace

std::string to_string(const CacheShape& shape) {
  return std::to_string(shape.latent) + "+" + std::to_string(shape.rotary);
}

void Engine::put_layer_rotaries(const std::vector<Rotary>& /*rotaries*/, const ModelConfig& /*source*/,
                                const LatentShape& /*shape*/, nlohmann::ordered_json& /*config*/) const {
  throw std::logic_error("Engine: the layers share their rotary frequencies");
}

std::string Engine::why_not_source(const ModelConfig& source) const {
  if (source.residual_multiplier != 1 || source.logits_scaling != 1) {
    return "its layout has no place for a residual_multiplier or logits_scaling";
  }
  if (!source.still_layers().empty()) {
    return "its layout has no place for layers without a rotary embedding (" + source.still_layers().text() +
           ")";
  }
  if (source.experts) {
    return "its layout has no place for a mixture of experts";
  }
  if (source.activation != Activation::silu) {
    return "its layout has no place for an activation other than silu";
  }
  if (source.norms != NormPlacement::before) {
    return "its layout has no place for norms behind attention and MLP";
  }
  if (source.norm_unit_offset) {
    return "its layout has no place for norms that multiply by 1 + their weight";
  }
  if (source.embedding_multiplier != 1) {
    return "its layout has no place for multiplied embeddings";
  }
  if (source.attn_logit_softcapping || source.final_logit_softcapping) {
    return "its layout has no place for capped scores or logits";
  }
  if (normalises_keys(source) && !traits().linear_stand_in) {
    return "its layout has no place for norms on queries and keys";
  }
  return "";
}

ModelConfig Engine::written_config(const nlohmann::ordered_json& source_config, const ModelConfig& source,
                                   const LatentShape& shape, DType dtype) const {
  const std::filesystem::path nowhere = "config.json";
  const Rotary plain = parse_rotary({{"rope_theta", 10000.0}}, shape.qk_rope_head_dim, nowhere);
  return parse_config(config(source_config, source, shape, plain, dtype), nowhere);
}

std::unique_ptr<TensorSink> Engine::open_output(const OutputPlan& plan, bool reopen) const {
  const FilePermissions permissions = plan.source->weight_permissions();
  std::unique_ptr<CheckpointWriter> writer =
      reopen ? CheckpointWriter::reopen(plan.path, plan.tensors, plan.max_shard_bytes, permissions)
             : std::make_unique<CheckpointWriter>(plan.path, plan.tensors, plan.max_shard_bytes, permissions);
  return writer ? std::make_unique<FolderSink>(std::move(writer), plan, extra_files()) : nullptr;
}

std::unique_ptr<Engine> make_engine(std::string_view name, std::string_view form, const ModelConfig* source,
                                    bool carries) {
  for (std::unique_ptr<Engine>& engine : all_engines()) {
    if (engine->name() != name) {
      continue;
    }
    const EngineTraits traits = engine->traits();
    const bool has_form = traits.forms.empty() ||
                          std::find(traits.forms.begin(), traits.forms.end(), form) != traits.forms.end();
    if (traits.instead.empty()) {
      return has_form ? std::move(engine) : nullptr;
    }
    const bool holds =
        (source == nullptr || engine->why_not_source(*source).empty()) && (!carries || traits.layer_kinds);
    return has_form && holds ? std::move(engine) : make_engine(traits.instead, form, source, carries);
  }
  return nullptr;
}

std::vector<std::string> engine_names(bool (*has)(const EngineTraits&)) {
  std::vector<std::string> out;
  for (const std::unique_ptr<Engine>& engine : all_engines()) {
    if (has == nullptr || has(engine->traits())) {
      out.emplace_back(engine->name());
    }
  }
  return out;
}

std::vector<std::string> readers_of(const ModelConfig& config) {
  std::vector<std::string> out;
  for (const std::unique_ptr<Engine>& engine : all_engines()) {
    if (engine->family() == config.family->name) {
      const std::vector<std::string> lines = engine->readers(config);
      out.insert(out.end(), lines.begin(), lines.end());
    }
  }
  return out;
}

}  // namespace relatent

// What is planned is what is written is what is placed when it is read back: every engine, form and family.
#include <gtest/gtest.h>

#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "convert/calibrate/calibrate.h"
#include "convert/forms/form.h"
#include "convert/model/families/family.h"
#include "formats/error.h"
#include "tests/support/conversion.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

using testing_support::Conversion;
using testing_support::random_sequences;
using testing_support::TempFolder;
using testing_support::tiny_latent_model;
using testing_support::tiny_model;
using testing_support::TinyModel;

void ignore(Index /*done*/, Index /*all*/) {}

// Sizes that fit the form and the engine for the checkpoints below.
ConvertOptions options_for(const Form& form, const std::string& engine, bool latent_source) {
  ConvertOptions out;
  out.method = Method::relatent;
  out.form = form.name;
  out.engine = engine;
  out.pre_tokenizer = engine == "gguf" ? "no_vocab" : "";
  out.relatent.fit.rounds = 1;
  if (&form == &mla_form()) {
    out.rank = 12;
  } else {
    out.branches = engine == "gla" ? 2 : 4;
    out.rank = 12;
    if (out.form != "gla") {
      out.key_rank = 4;
    }
  }
  if (!latent_source) {
    out.rope_dim = 4;
  }
  return out;
}

TEST(Walk, PlannedIsWrittenIsPlaced) {
  struct Source {
    std::string name;
    TinyModel model;
  };
  std::vector<Source> sources;
  for (const char* type : {"llama", "mistral", "qwen2"}) {
    for (const bool tied : {false, true}) {
      sources.push_back(
          {std::string(type) + (tied ? ", tied" : ""),
           tiny_model(
               {.model_type = type, .layers = 2, .heads = 8, .kv_heads = 2, .head_dim = 8, .tied = tied})});
    }
  }
  // The only base that the MLRA authors' code has.
  for (Source& source : sources) {
    source.model.config["rope_parameters"]["rope_theta"] = 10000.0;
  }
  sources.push_back({"deepseek_v3", tiny_latent_model()});
  std::map<std::string, int> converted;
  for (const Source& source : sources) {
    const TempFolder folder;
    source.model.write(folder / "source");
    const Model before = Model::open(folder / "source");
    calibrate(before, random_sequences(1, 4, 40, 50), folder / "moments.h5", ignore);
    for (const std::string& engine : engine_names()) {
      for (const Form* form : forms()) {
        SCOPED_TRACE(source.name + " " + engine + " " + std::string(form->name));
        ConvertOptions options = options_for(*form, engine, before.config().latent.has_value());
        options.source = folder / "source";
        options.output = folder / ("out " + source.name + engine + std::string(form->name));
        options.calibration = folder / "moments.h5";
        std::optional<Conversion> conversion;
        try {
          conversion.emplace(options);
        } catch (const Error&) {
          continue;  // by name, which other tests look at; the table below says how many are left
        }
        conversion->run(ignore);
        const Model after = Model::open(options.output);
        std::map<std::string, const PlannedTensor*> planned;
        for (const PlannedTensor& tensor : conversion->plan().tensors) {
          EXPECT_TRUE(planned.emplace(tensor.spec.name, &tensor).second) << tensor.spec.name;
        }
        EXPECT_EQ(after.tensors().size(), planned.size());
        for (const PlacedTensor& tensor : after.tensors()) {
          ASSERT_TRUE(planned.contains(tensor.name)) << tensor.name;
          const PlannedTensor& plan = *planned.at(tensor.name);
          EXPECT_EQ(tensor.role, plan.role) << tensor.name;
          EXPECT_EQ(tensor.layer_idx, plan.layer_idx) << tensor.name;
          EXPECT_EQ(tensor.part, plan.part) << tensor.name;
          EXPECT_EQ(after.checkpoint().info(tensor.name).shape, plan.spec.shape) << tensor.name;
          EXPECT_EQ(after.checkpoint().info(tensor.name).dtype, plan.spec.dtype) << tensor.name;
        }
        EXPECT_EQ(after.config().family->name, make_engine(engine, form->name)->family());
        EXPECT_EQ(after.config().cache_elements(), conversion->plan().converted_cache_elements);
        ++converted[engine];
      }
    }
  }
  // Nothing fell out of the walk unseen.
  const std::map<std::string, int> expected = {{"transformers", 34}, {"relatent", 34}, {"deepseek", 6},
                                               {"gguf", 6},          {"mlra", 6},      {"gla", 6}};
  EXPECT_EQ(converted, expected);
}

TEST(Walk, EveryEngineIsReadByAFamilyOfTheList) {
  std::set<std::string_view> names;
  for (const std::string& name : engine_names()) {
    bool found = false;
    for (const Form* form : forms()) {
      if (const auto engine = make_engine(name, form->name); engine != nullptr) {
        found = true;
        EXPECT_NE(find_family(engine->family()), nullptr) << name;
      }
    }
    EXPECT_TRUE(found) << name;
  }
}

}  // namespace
}  // namespace relatent

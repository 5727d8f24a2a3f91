// Sources and calibrations that say less than they have numbers: published models are full of them. Every
// method and form converts them or refuses them in a sentence.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "convert/run/convert.h"
#include "convert/verify/verify.h"
#include "formats/error.h"
#include "linalg/decompose.h"
#include "tests/support/conversion.h"
#include "tests/support/temp_folder.h"
#include "tests/support/tiny_model.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::Conversion;
using testing_support::layer_name;
using testing_support::random_sequences;
using testing_support::TempFolder;
using testing_support::tiny_model;
using testing_support::TinyModel;

constexpr Index kVocab = 50;
constexpr Index kLength = 40;

void ignore(Index /*done*/, Index /*all*/) {}

struct Spoiled {
  std::string name;
  std::function<void(TinyModel&)> spoil;
  bool constant_tokens = false;
};

// Rows [from, from + count) become those at `to`.
void copy_rows(TinyModel& model, const std::string& name, std::size_t from, std::size_t to,
               std::size_t count) {
  TinyModel::Tensor& tensor = model.tensors.at(name);
  const std::size_t columns = tensor.shape.size() > 1 ? static_cast<std::size_t>(tensor.shape[1]) : 1;
  for (std::size_t i = 0; i < count * columns; ++i) {
    tensor.values[to * columns + i] = tensor.values[from * columns + i];
  }
}

void fill(TinyModel& model, const std::string& name, float value) {
  std::vector<float>& values = model.tensors.at(name).values;
  std::fill(values.begin(), values.end(), value);
}

const std::vector<Spoiled>& spoiled() {
  static const std::vector<Spoiled> all = {
      {"duplicated heads",
       [](TinyModel& model) {
         for (Index i = 0; i < 3; ++i) {
           for (const char* rest : {"self_attn.k_proj", "self_attn.v_proj"}) {
             copy_rows(model, layer_name(i, rest) + std::string(".weight"), 0, 8, 8);
             copy_rows(model, layer_name(i, rest) + std::string(".bias"), 0, 8, 8);
           }
         }
       }},
      {"a layer of zeros",
       [](TinyModel& model) {
         for (const char* rest : {"q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias",
                                  "v_proj.weight", "v_proj.bias", "o_proj.weight"}) {
           fill(model, layer_name(1, std::string("self_attn.") + rest), 0);
         }
       }},
      {"an input norm of zeros",
       [](TinyModel& model) { fill(model, layer_name(0, "input_layernorm.weight"), 0); }},
      {"huge key biases", [](TinyModel& model) { fill(model, layer_name(2, "self_attn.k_proj.bias"), 300); }},
      {"a huge channel",
       [](TinyModel& model) {
         TinyModel::Tensor& embedding = model.tensors.at("model.embed_tokens.weight");
         for (std::size_t i = 0; i < embedding.values.size(); i += 24) {
           embedding.values[i] = 1000;
         }
       }},
      {"a calibration of one token", [](TinyModel&) {}, true},
  };
  return all;
}

struct Target {
  std::string name;
  std::function<void(ConvertOptions&)> choose;
};

std::vector<Target> targets() {
  std::vector<Target> out;
  const auto add = [&](const std::string& name, std::function<void(ConvertOptions&)> choose) {
    out.push_back({name, std::move(choose)});
  };
  const auto sizes = [](ConvertOptions& o) {
    o.rank = 10;
    o.rope_dim = 8;
  };
  add("lossless", [](ConvertOptions& o) { o.method = Method::lossless; });
  for (const Method method : {Method::transmla, Method::relatent, Method::weights_only}) {
    add(std::string(method_name(method)), [=](ConvertOptions& o) {
      o.method = method;
      sizes(o);
    });
  }
  add("more rank than there is", [](ConvertOptions& o) {
    o.method = Method::relatent;
    o.rank = 32;
    o.rope_dim = 16;
  });
  add("relatent, own layout", [=](ConvertOptions& o) {
    o.method = Method::relatent;
    o.engine = "relatent";
    sizes(o);
  });
  add("a shape", [](ConvertOptions& o) {
    o.method = Method::relatent;
    o.shape = CacheShape{48, 8};
  });
  for (const Index extra : {4, 16}) {
    add("deepseek, " + std::to_string(extra), [=](ConvertOptions& o) {
      o.method = Method::relatent;
      o.engine = "deepseek";
      o.norm_coordinates = extra;
      sizes(o);
    });
  }
  for (const std::string form : {"gla", "tpla", "mlra"}) {
    for (const Method method : {Method::lossless, Method::relatent, Method::weights_only}) {
      add(form + " " + std::string(method_name(method)), [=](ConvertOptions& o) {
        o.method = method;
        o.form = form;
        o.branches = 2;
        if (method != Method::lossless) {
          o.rope_dim = 8;
          o.rank = 20;
          if (form != "gla") {
            o.key_rank = 4;
          }
        }
      });
    }
  }
  for (const LatentOrder order : {LatentOrder::pca, LatentOrder::hadamard}) {
    add("tpla " + std::string(order_name(order)), [=](ConvertOptions& o) {
      o.method = Method::relatent;
      o.form = "tpla";
      o.branches = 2;
      o.relatent.order = order;
      o.rope_dim = 8;
      o.rank = 16;
    });
  }
  return out;
}

class Degenerate : public testing::TestWithParam<Spoiled> {};

TEST_P(Degenerate, ConvertsOrIsRefusedInASentence) {
  const TempFolder folder;
  TinyModel model = tiny_model({.model_type = "qwen2"});
  GetParam().spoil(model);
  model.write(folder / "source");
  Sequences tokens = random_sequences(1, 12, kLength, kVocab);
  if (GetParam().constant_tokens) {
    std::fill(tokens.tokens.begin(), tokens.tokens.end(), 7);
  }
  calibrate(Model::open(folder / "source"), tokens, folder / "moments.h5", ignore);
  const Sequences validation = random_sequences(2, 2, kLength, kVocab);
  for (const Target& target : targets()) {
    SCOPED_TRACE(target.name);
    fs::remove_all(folder / "output");
    ConvertOptions options;
    options.source = folder / "source";
    options.output = folder / "output";
    options.calibration = folder / "moments.h5";
    target.choose(options);
    try {
      Conversion(options).run(ignore);
    } catch (const Error& error) {
      EXPECT_NE(error.kind(), ErrorKind::machine) << error.what();
      EXPECT_FALSE(fs::exists(folder / "output"));
      continue;
    } catch (const NumericalError& error) {
      ADD_FAILURE() << error.what();
      continue;
    }
    const Verification found =
        verify(Model::open(folder / "source"), Model::open(folder / "output"), validation, ignore);
    EXPECT_TRUE(std::isfinite(found.nats));
    if (options.method == Method::lossless) {
      EXPECT_LE(std::abs(found.nats), 1e-4);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Degenerate, testing::ValuesIn(spoiled()), [](const auto& tested) {
  std::string out = tested.param.name;
  std::replace(out.begin(), out.end(), ' ', '_');
  return out;
});

}  // namespace
}  // namespace relatent

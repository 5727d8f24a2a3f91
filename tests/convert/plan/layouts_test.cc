// Shapes and settings that the layouts of serving engines and authors can hold.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "tests/support/convert_fixture.h"
#include "tests/support/expect_error.h"

namespace relatent {
namespace {

namespace fs = std::filesystem;
using testing_support::Conversion;
using testing_support::expect_error;
using testing_support::kFloatNoise;
using testing_support::layer_name;
using testing_support::tiny_model;
using testing_support::TinyModel;
using testing_support::TinyOptions;

using PlanForLayouts = testing_support::ConvertTest;

// A source that the MLRA authors' layout holds: tied, of base 10000, eight heads.
TinyModel tied_source(double base = 10000, const TinyOptions& options = {.heads = 8, .tied = true}) {
  TinyModel out = tiny_model(options);
  out.config["rope_parameters"] = {{"rope_type", "default"}, {"rope_theta", base}};
  return out;
}

ConvertOptions to_mlra(ConvertOptions options, const std::string& form, Index branches) {
  options.method = Method::relatent;
  options.engine = "mlra";
  options.form = form;
  options.branches = branches;
  options.per_device = 20;
  if (form == "mlra") {
    options.key_rank = 6;
  }
  options.norm_coordinates = 4;
  return options;
}

// Two latents of any size that leaves the module room, of any base.
ConvertOptions to_gla(ConvertOptions options) {
  options.method = Method::relatent;
  options.engine = "gla";
  options.form = "gla";
  options.branches = 2;
  return options;
}

// Coordinates that a shape leaves over hold nothing and change nothing.
TEST_F(PlanForLayouts, ShapesAreFilledUp) {
  const ConvertOptions source = write(TinyOptions{.model_type = "qwen2"});
  const fs::path moments = calibrated();
  for (const char* engine : {"transformers", "relatent"}) {
    SCOPED_TRACE(engine);
    ConvertOptions options = source;
    options.calibration = moments;
    options.method = Method::relatent;
    options.engine = engine;
    options.rank = 10;
    options.rope_dim = 8;
    run(options);
    const Verification narrow = verified();
    options.rope_dim.reset();
    options.shape = CacheShape{48, 8};
    const ConvertReport report = run(options);
    EXPECT_EQ(report.kv_rank, 10);
    const Model written = Model::open(output());
    EXPECT_EQ(written.config().latent->kv_lora_rank, 48);
    EXPECT_EQ(written.config().latent->qk_rope_head_dim, 8);
    const Verification wide = verified();
    EXPECT_EQ(wide.converted_cache_bytes, (48 + 8) * 3 * 4);
    EXPECT_NEAR(wide.nats, narrow.nats, kFloatNoise);
    EXPECT_NEAR(wide.logits.rel_logit_error, narrow.logits.rel_logit_error, kFloatNoise);
    // As much of it as there is to hold.
    options.rank.reset();
    EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 32);
    options.kv_budget = 0.75;
    const Index constant = std::string(engine) == "transformers" ? 1 : 0;
    EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 16 - constant);
    EXPECT_EQ(Conversion(options).plan().converted_cache_elements, 56);
  }
  ConvertOptions options = source;
  options.calibration = moments;
  options.method = Method::relatent;
  options.engine = "deepseek";
  options.shape = CacheShape{48, 8};
  run(options);
  EXPECT_EQ(Model::open(output()).config().latent->kv_lora_rank, 48);
  EXPECT_EQ(Conversion(options).plan().shape.norm_coordinates, 16);
}

TEST_F(PlanForLayouts, ShapesThatCannotBe) {
  const ConvertOptions source = write(TinyOptions{});
  const auto refused = [&](const std::vector<std::string>& parts,
                           const std::function<void(ConvertOptions&)>& spoil) {
    ConvertOptions options = source;
    options.method = Method::weights_only;
    options.shape = CacheShape{48, 8};
    EXPECT_NO_THROW(Conversion{options});
    spoil(options);
    expect_error(ErrorKind::usage, parts, [&] { Conversion{options}; });
  };
  refused({"--shape 48+18", "at most 16"}, [](ConvertOptions& o) { o.shape = CacheShape{48, 18}; });
  refused({"--shape 48+7", "even"}, [](ConvertOptions& o) { o.shape = CacheShape{48, 7}; });
  refused({"--shape 16+8", "rank of 15"}, [](ConvertOptions& o) {
    o.shape = CacheShape{16, 8};
    o.rank = 16;
  });
  refused({"--shape 48+8", "--rope-dim 6"}, [](ConvertOptions& o) { o.rope_dim = 6; });
  refused({"--shape", "lossless"}, [](ConvertOptions& o) { o.method = Method::lossless; });
  refused({"--shape 48+8", "--to mla"}, [](ConvertOptions& o) {
    o.form = "gla";
    o.branches = 2;
  });
}

TEST_F(PlanForLayouts, ShapesOfKernelsAreTheDefault) {
  ConvertOptions options = write(TinyOptions{.heads = 6, .kv_heads = 6, .head_dim = 64});
  options.method = Method::weights_only;
  const auto planned = [&] { return Conversion(options).plan(); };
  EXPECT_EQ(planned().converted_cache_elements, 576);
  EXPECT_EQ(planned().shape.kv_lora_rank, 511);
  EXPECT_TRUE(planned().warnings.empty());
  // A budget that comes near one; one that does not.
  options.kv_budget = 0.78;
  EXPECT_EQ(planned().converted_cache_elements, 576);
  options.kv_budget = 0.42;
  EXPECT_EQ(planned().converted_cache_elements, 320);
  options.kv_budget = 0.6;
  EXPECT_EQ(planned().shape.dead_coordinates, 0);
  options.kv_budget.reset();
  options.shape = CacheShape{448, 64};
  ASSERT_EQ(planned().warnings.size(), 1U);
  EXPECT_NE(planned().warnings.front().find("fits no kernel"), std::string::npos);
}

TEST_F(PlanForLayouts, RotaryListsOfOneBase) {
  const auto fitted = [&](double base, std::optional<Index> rope_dim, const TinyOptions& body) {
    ConvertOptions options = to_mlra(write(tied_source(base, body)), "gla", 2);
    options.calibration = calibrated();
    options.rope_dim = rope_dim;
    options.per_device.reset();
    options.rank = 2 * 11;
    const Conversion conversion(options);
    return std::pair(conversion.plan().shape.qk_rope_head_dim, conversion.options().relatent.list_stride);
  };
  using Fit = std::pair<Index, std::optional<Index>>;
  const TinyOptions body{.heads = 8, .tied = true};
  EXPECT_EQ(fitted(1e4, {}, body), Fit(8, 1));
  EXPECT_EQ(fitted(1e4, 8, body), Fit(8, 1));
  EXPECT_EQ(fitted(1e4, 4, body), Fit(4, 2));
  EXPECT_EQ(fitted(1e4, 2, body), Fit(2, 4));
  EXPECT_EQ(fitted(1e8, {}, body), Fit(4, 1));
  EXPECT_EQ(fitted(1e8, 2, body), Fit(2, 2));
  EXPECT_EQ(fitted(1e16, {}, body), Fit(2, 1));
  // Bases are read back from float32 frequencies.
  const TinyOptions wide{.layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 128, .tied = true};
  EXPECT_EQ(fitted(1e4, {}, wide), Fit(128, 1));
  EXPECT_EQ(fitted(1e4, 32, wide), Fit(32, 4));
  EXPECT_EQ(fitted(1e8, {}, wide), Fit(64, 1));
  const auto refused = [&](double base, std::optional<Index> rope_dim,
                           const std::vector<std::string>& parts) {
    expect_error(ErrorKind::usage, parts, [&] { fitted(base, rope_dim, body); });
  };
  refused(1e4, 6, {"--engine mlra", "base 10000 only", "even divisor of 8"});
  refused(1e4, 3, {"even divisor of 8"});
  refused(1e4, 1, {"even divisor of 8"});
  refused(1e4, 0, {"even divisor of 8"});
  refused(1e4, 16, {"even divisor of 8"});
  refused(1e8, 8, {"even divisor of 4"});
  refused(100, {}, {"--engine mlra", "base 10000 only", "of base 100"});
  refused(5e5, {}, {"base 10000 only", "of base 500000"});
  refused(5e5, 8, {"base 10000 only", "of base 500000"});
  TinyModel scaled = tied_source();
  scaled.config["rope_parameters"] = {{"rope_type", "linear"}, {"rope_theta", 1e4}, {"factor", 4.0}};
  ConvertOptions options = to_mlra(write(scaled), "gla", 2);
  options.calibration = calibrated();
  expect_error(ErrorKind::input, {"config.json", "rope_type default", "linear"},
               [&] { Conversion{options}; });
}

TEST_F(PlanForLayouts, SourcesThatTheAuthorsLayoutsCannotHold) {
  // Before any calibration is read.
  const auto early = [&](ConvertOptions options) {
    options.method = Method::weights_only;
    return options;
  };
  expect_error(ErrorKind::input,
               {"config.json", "tie_word_embeddings", "true", "--engine mlra", "found false"},
               [&] { Conversion{early(to_mlra(write(tied_source(1e4, {.heads = 8})), "mlra", 2))}; });
  const TinyModel mla = testing_support::tiny_latent_model({.body = {.tied = true}});
  expect_error(ErrorKind::usage, {"--engine mlra", "MLA source", "--engine transformers"},
               [&] { Conversion{early(to_mlra(write(mla), "mlra", 2))}; });
  expect_error(ErrorKind::usage, {"--engine gla", "MLA source", "--engine transformers"},
               [&] { Conversion{early(to_gla(write(mla)))}; });
  expect_error(ErrorKind::usage, {"--engine mlra", "only --method relatent"},
               [&] { Conversion{early(to_mlra(write(tied_source()), "mlra", 2))}; });
  // The rotary part of a lossless layer repeats the source's list for every key head.
  ConvertOptions lossless = to_gla(write(tied_source()));
  lossless.method = Method::lossless;
  expect_error(ErrorKind::usage, {"--engine gla", "--method lossless"}, [&] { Conversion{lossless}; });
  for (const char* form : {"mla", "tpla"}) {
    ConvertOptions options = write(tied_source());
    options.form = form;
    options.branches = 2;
    for (const char* engine : {"mlra", "gla"}) {
      options.engine = engine;
      expect_error(ErrorKind::usage, {"--engine " + options.engine, "no layout for --to " + options.form},
                   [&] { Conversion{options}; });
    }
  }
  const auto with_bias = tied_source(1e4, {.heads = 8, .o_bias = true, .tied = true});
  ConvertOptions biased = to_mlra(write(with_bias), "mlra", 2);
  biased.calibration = calibrated();
  expect_error(ErrorKind::input, {"o_proj.bias", "without biases"}, [&] { Conversion{biased}; });
}

TEST_F(PlanForLayouts, SizesThatTheAuthorsLayoutsCannotHold) {
  const ConvertOptions source = write(tied_source());
  const fs::path moments = calibrated();
  const auto refused = [&](ConvertOptions options, const std::vector<std::string>& parts,
                           const std::function<void(ConvertOptions&)>& spoil) {
    options.calibration = moments;
    EXPECT_NO_THROW(Conversion{options});
    spoil(options);
    expect_error(ErrorKind::usage, parts, [&] { Conversion{options}; });
    expect_nothing_left();
  };
  refused(to_mlra(source, "gla", 2), {"--engine mlra", "2 or 4 latents"},
          [](ConvertOptions& o) { o.branches = 8; });
  refused(to_mlra(source, "mlra", 4), {"--engine mlra", "of one size"}, [](ConvertOptions& o) {
    o.per_device.reset();
    o.rank = 6 + 13;
  });
  refused(to_mlra(source, "mlra", 4), {"--pad-rank", "one latent"}, [](ConvertOptions& o) {
    o.norm_coordinates.reset();
    o.pad_rank = 64;
  });
  refused(to_gla(source), {"--engine gla", "--rank is at most 30"}, [](ConvertOptions& o) { o.rank = 32; });
  refused(to_gla(source), {"--engine gla", "--branches 2"}, [](ConvertOptions& o) {
    o.branches = 4;
    o.rank = 40;
  });
  refused(to_gla(source), {"--norm-coordinates", "deepseek, gguf and mlra, not to gla"},
          [](ConvertOptions& o) { o.norm_coordinates = 4; });
}

TEST_F(PlanForLayouts, PlansForTheAuthorsLayouts) {
  TinyModel model = tied_source();
  ConvertOptions options = to_mlra(write(model), "mlra", 2);
  options.calibration = calibrated();
  const auto eps_warning = [](const ConvertPlan& plan) {
    std::string out;
    for (const std::string& warning : plan.warnings) {
      out += warning.find("divides every norm") != std::string::npos ? warning : "";
    }
    return out;
  };
  {
    const ConvertPlan plan = Conversion(options).plan();
    EXPECT_NE(eps_warning(plan).find("--engine mlra"), std::string::npos);
    EXPECT_NE(eps_warning(plan).find("1e-06, the source adds 1e-05"), std::string::npos) << eps_warning(plan);
    EXPECT_EQ(plan.shape.q_lora_rank, 24);
    EXPECT_EQ(plan.shape.norm_coordinates, 4);
    // Of 20 on each device: a rotary key of eight, six shared coordinates, two own and four for the norm.
    EXPECT_EQ(plan.shape.kv_lora_rank, 2 * (6 + 2 * 2));
    EXPECT_EQ(plan.converted_cache_elements, 4 * (8 + 4) + 8);
    std::set<std::string> names;
    for (const PlannedTensor& tensor : plan.tensors) {
      names.insert(tensor.spec.name);
    }
    EXPECT_TRUE(names.contains("transformer.wte.weight"));
    EXPECT_TRUE(names.contains("transformer.h.2.mlp.c_proj.weight"));
    // Their loading code would draw a head anew, and with it the embedding, if none were stored.
    EXPECT_EQ(plan.tensors.back().spec.name, "lm_head.weight");
    EXPECT_EQ(plan.tensors.back().source, "model.embed_tokens.weight");
    options.norm_coordinates.reset();
    EXPECT_EQ(Conversion(options).plan().shape.norm_coordinates, 2);
  }
  model.config["rms_norm_eps"] = 1e-6;
  options = to_mlra(write(model), "mlra", 2);
  options.calibration = calibrated();
  EXPECT_EQ(eps_warning(Conversion(options).plan()), "");

  // The module's latents are full by default; its head is a tensor of its own.
  options = to_gla(write(tiny_model({.heads = 8, .tied = true})));
  options.calibration = calibrated();
  {
    const ConvertPlan plan = Conversion(options).plan();
    EXPECT_EQ(eps_warning(plan), "");
    EXPECT_EQ(plan.shape.kv_lora_rank, 30);
    EXPECT_EQ(plan.shape.qk_rope_head_dim, 8);
    EXPECT_EQ(plan.shape.q_lora_rank, std::nullopt);
    EXPECT_EQ(plan.converted_cache_elements, 4 * 8 + 8);
    EXPECT_EQ(plan.tensors.back().spec.name, "lm_head.weight");
    EXPECT_EQ(plan.tensors.back().source, "model.embed_tokens.weight");
  }
  options.rank = 12;
  options.rope_dim = 4;
  EXPECT_EQ(Conversion(options).plan().shape.kv_lora_rank, 12);
  EXPECT_EQ(Conversion(options).plan().converted_cache_elements, 4 * 8 + 4);
  options = to_gla(write(TinyOptions{.hidden = 72, .heads = 8}));
  options.calibration = calibrated();
  EXPECT_EQ(Conversion(options).plan().shape.q_lora_rank, 63);
}

TEST_F(PlanForLayouts, WritesTheAuthorsLayouts) {
  TinyModel model = tied_source();
  model.config["rms_norm_eps"] = 1e-6;
  const ConvertOptions source = write(model);
  const fs::path moments = calibrated();
  const auto expect_planned = [&](ConvertOptions options) {
    options.calibration = moments;
    options.relatent.fit.rounds = 1;
    const ConvertPlan plan = Conversion(options).plan();
    run(options);
    const Model converted = Model::open(output());
    EXPECT_EQ(converted.tensors().size(), plan.tensors.size());
    EXPECT_EQ(converted.config().cache_elements(), plan.converted_cache_elements);
    for (const PlannedTensor& tensor : plan.tensors) {
      EXPECT_EQ(converted.checkpoint().info(tensor.spec.name).shape, tensor.spec.shape) << tensor.spec.name;
    }
    const Verification found = verified();
    EXPECT_TRUE(std::isfinite(found.nats));
    return found.logits.rel_logit_error;
  };
  for (const auto& [form, branches] : {std::pair{"mlra", 2}, {"mlra", 4}, {"gla", 2}, {"gla", 4}}) {
    SCOPED_TRACE(std::string(form) + " " + std::to_string(branches));
    const double error = expect_planned(to_mlra(source, form, branches));
    EXPECT_LE(error, 0.8);
    // The query passes a normalised latent that is the input's own.
    const Model converted = Model::open(output());
    const auto attention = std::get<LatentAttention>(converted.attention(1));
    const RowVectorF gain = Model::open(output()).input_norm(1).gain;
    EXPECT_LE(testing_support::relative_error(MatrixF(attention.q_down.weight * gain.asDiagonal()),
                                              MatrixF(MatrixF::Identity(24, 24))),
              1e-6);
    EXPECT_TRUE(attention.q_norm.gain == RowVectorF::Ones(24));
  }
  ConvertOptions gla = to_gla(source);
  const double full = expect_planned(gla);
  EXPECT_LE(full, 0.8);
  gla.rank = 4;
  gla.rope_dim = 2;
  EXPECT_GT(expect_planned(gla), full);
}

TEST_F(PlanForLayouts, GainsWithoutAReciprocalAreRefused) {
  const std::string name = layer_name(1, "input_layernorm.weight");
  for (const auto& [gain, dtype] : {std::pair{0.0F, DType::f32}, {1e-6F, DType::f16}, {1e-42F, DType::f32}}) {
    TinyModel model = tied_source();
    model.tensors.at(name).values[5] = gain;
    ConvertOptions options = to_mlra(write(model), "gla", 2);
    options.calibration = calibrated();
    options.relatent.fit.rounds = 1;
    options.dtype = dtype;
    expect_error(ErrorKind::input, {name, "reciprocal", "gains that are not 0"}, [&] { run(options); });
    expect_nothing_left();
  }
}

// As the query is written.
TEST_F(PlanForLayouts, TrialsCompressTheQuery) {
  ConvertOptions options = to_gla(write(TinyOptions{.hidden = 72, .heads = 8}));
  options.calibration = calibrated();
  options.per_device = 14;
  const Conversion gla(options);
  ASSERT_EQ(gla.plan().shape.q_lora_rank, 63);
  ASSERT_EQ(gla.plan().trials.size(), 1U);
  // The same sizes and rotary list in a layout whose query stays as it is.
  options.engine = "relatent";
  options.relatent.plain_list = true;
  const Conversion whole(options);
  ASSERT_EQ(whole.plan().shape.q_lora_rank, std::nullopt);
  ASSERT_EQ(whole.plan().trials.size(), 1U);
  EXPECT_EQ(whole.plan().trials.front().rank, gla.plan().trials.front().rank);
  EXPECT_NE(whole.plan().trials.front().nats, gla.plan().trials.front().nats);
}

}  // namespace
}  // namespace relatent

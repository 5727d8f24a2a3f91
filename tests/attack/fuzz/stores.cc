#include "tests/attack/fuzz/stores.h"

#include "formats/calibration_store.h"
#include "formats/hdf5.h"
#include "tests/attack/fuzz/fuzz.h"

namespace relatent::fuzz {
namespace {

CalibrationHeader some_header(std::int64_t layers) {
  return {.source_fingerprint = "00112233445566778899aabbccddeeff",
          .source_config = R"({"model_type": "llama"})",
          .model_type = "llama",
          .hidden_size = 3,
          .num_hidden_layers = layers,
          .num_attention_heads = 2,
          .compute = "float32"};
}

LayerMoments some_moments() {
  LayerMoments moments;
  moments.tokens = 8;
  moments.second_moment = MatrixD::Identity(3, 3) * 2 + MatrixD::Ones(3, 3) * 0.5;
  moments.mean = VectorD::Constant(3, 0.25);
  moments.distance_mass = MatrixD::Constant(2, 4, 0.25);
  return moments;
}

Sequences some_sequences() {
  return {.count = 2, .length = 4, .tokens = {1, 2, 3, 4, 5, 6, 7, 8}};
}

void write_first_version(const std::filesystem::path& path) {
  using hdf5::Handle;
  const hdf5::LibraryLock lock;
  const hdf5::Writing writing(path);
  const CalibrationHeader header = some_header(2);
  const Handle file = writing.create_file();
  writing.add_text(file.get(), "format", "relatent-calibration");
  writing.add_number(file.get(), "format_version", 1);
  writing.add_text(file.get(), "source_fingerprint", header.source_fingerprint);
  writing.add_text(file.get(), "source_config", header.source_config);
  writing.add_text(file.get(), "model_type", header.model_type);
  writing.add_number(file.get(), "hidden_size", header.hidden_size);
  writing.add_number(file.get(), "num_hidden_layers", header.num_hidden_layers);
  writing.add_number(file.get(), "num_attention_heads", header.num_attention_heads);
  writing.add_text(file.get(), "compute", header.compute);
  const auto put = [&](hid_t parent, const char* name, hid_t stored, hid_t type,
                       const std::vector<std::int64_t>& shape, const void* values) {
    const Handle dataset = writing.add_dataset(parent, name, {stored, "", shape}, {}, "");
    writing.require(H5Dwrite(dataset.get(), type, H5S_ALL, H5S_ALL, H5P_DEFAULT, values) >= 0, name);
  };
  put(file.get(), "tokens", H5T_STD_I32LE, H5T_NATIVE_INT32, {2, 4}, some_sequences().tokens.data());
  const Handle layers = writing.add_group(file.get(), "layers");
  const LayerMoments moments = some_moments();
  for (const char* name : {"00000", "00001"}) {
    const Handle layer = writing.add_group(layers.get(), name);
    writing.add_number(layer.get(), "tokens", moments.tokens);
    const auto put_floats = [&](const char* what, const std::vector<std::int64_t>& shape,
                                const double* values) {
      put(layer.get(), what, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, shape, values);
    };
    // The first is symmetric, the last constant: the order of their numbers does not matter.
    put_floats("second_moment", {3, 3}, moments.second_moment.data());
    put_floats("mean", {3}, moments.mean.data());
    put_floats("distance_mass", {2, 4}, moments.distance_mass.data());
  }
}

}  // namespace

std::string newest_store(std::int64_t layers) {
  return written([&](const std::filesystem::path& path) {
    CalibrationWriter writer(path, some_header(layers), some_sequences());
    for (std::int64_t i = 0; i < layers; ++i) {
      writer.add_layer(some_moments());
    }
    writer.finish();
  });
}

std::string first_version_store() {
  return written(write_first_version);
}

void touch_store(const std::filesystem::path& path) {
  reads([&] {
    const CalibrationFile file = CalibrationFile::open(path);
    const CalibrationHeader& header = file.header();
    touch(header.source_config);
    reads([&] {
      const Sequences sequences = file.sequences();
      for (const std::int32_t token : sequences.tokens) {
        require(token >= 0, "a negative token");
      }
    });
    for (std::int64_t i = 0; i < header.num_hidden_layers; ++i) {
      reads([&] {
        const LayerMoments moments = file.layer(i);
        require(moments.tokens > 0, "moments of no tokens");
        require(moments.second_moment.allFinite() && moments.mean.allFinite() &&
                    moments.distance_mass.allFinite(),
                "moments that are no numbers");
      });
    }
  });
}

}  // namespace relatent::fuzz

// libhdf5 loses the memory of an object header that turns out wrong; nobody else could free it.
extern "C" const char*
__lsan_default_suppressions();  // NOLINT(bugprone-reserved-identifier): LeakSanitizer's name
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libhdf5";
}  // NOLINT: as above

#include "tests/attack/fuzz/stores.h"

#include <array>

#include "formats/calibration_store.h"
#include "formats/hash.h"
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
  moments.received_moment = moments.second_moment;
  moments.received_mean = moments.mean;
  moments.distance_mass = MatrixD::Constant(2, 4, 0.25);
  moments.mass_square = VectorD::Constant(2, 0.5);
  moments.score_effect = VectorD::Constant(2, 3);
  return moments;
}

Sequences some_sequences() {
  return {.count = 2, .length = 4, .tokens = {1, 2, 3, 4, 5, 6, 7, 8}};
}

constexpr std::array<const char*, 7> kLayerDatasets = {"second_moment", "mean",          "received_moment",
                                                       "received_mean", "distance_mass", "mass_square",
                                                       "score_effect"};

// The checksum of a dataset's bytes, which it is given.
std::string stamp(const hdf5::Reading& reading, const hdf5::Writing& writing, hid_t parent,
                  const char* name) {
  using hdf5::Handle;
  const Handle dataset = reading.dataset(parent, name, name);
  const Handle type(H5Dget_type(dataset.get()), H5Tclose);
  const Handle space(H5Dget_space(dataset.get()), H5Sclose);
  const hssize_t elements = H5Sget_simple_extent_npoints(space.get());
  if (elements < 0 || elements > 4096) {
    return "";
  }
  std::vector<std::byte> bytes(static_cast<std::size_t>(elements) * H5Tget_size(type.get()));
  H5Dread(dataset.get(), type.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, bytes.data());
  H5Adelete(dataset.get(), "checksum");
  std::string out = checksum_of(bytes);
  writing.add_text(dataset.get(), "checksum", out);
  return out;
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

void bind_again(hid_t file, const std::filesystem::path& path) {
  reads([&] {
    const hdf5::Reading reading(path, std::filesystem::file_size(path));
    const hdf5::Writing writing(path);
    Hasher bound;
    for (const char* name : {"source_fingerprint", "source_config", "model_type", "compute"}) {
      bound.add_text(reading.text(file, name));
    }
    for (const char* name :
         {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"}) {
      bound.add_number(static_cast<std::uint64_t>(reading.number(file, name, 0)));
    }
    bound.add_text(stamp(reading, writing, file, "tokens"));
    for (const char* name : {"layers/00000", "layers/00001"}) {
      const hdf5::Handle layer(H5Gopen2(file, name, H5P_DEFAULT), H5Gclose);
      bound.add_number(static_cast<std::uint64_t>(reading.number(layer.get(), "tokens", 0)));
      for (const char* dataset : kLayerDatasets) {
        bound.add_text(stamp(reading, writing, layer.get(), dataset));
      }
    }
    H5Adelete(file, "checksum");
    writing.add_text(file, "checksum", bound.hexadecimal());
  });
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

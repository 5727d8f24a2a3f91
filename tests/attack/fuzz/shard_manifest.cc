// The manifest of shards (convert/shard/manifest.h). A checksum guards it, which the mutator puts right
// again.
#include <nlohmann/json.hpp>

#include "convert/shard/manifest.h"
#include "formats/hash.h"
#include "tests/attack/fuzz/fuzz.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace relatent;
  const std::filesystem::path path = fuzz::put(kShardsName, fuzz::text_of(data, size));
  fuzz::reads([&] {
    const ShardManifest manifest = ShardManifest::read(path);
    for (const WeightFile& file : manifest.weights) {
      fuzz::require(is_plain_name(file.name), "a weight file outside of the folder");
    }
    for (const CopiedFile& file : manifest.copied) {
      fuzz::require(is_plain_name(file.name), "a copied file outside of the folder");
    }
    for (const ShardedTensor& tensor : manifest.tensors) {
      for (Index rank = 0; rank < manifest.tp; ++rank) {
        if (tensor.part(rank) && dense_bytes(tensor.spec.dtype, tensor.spec.shape)) {
          static_cast<void>(shape_of(tensor.slice(rank), tensor.spec.shape));
          static_cast<void>(runs_of(tensor.slice(rank), tensor.spec.dtype, tensor.spec.shape));
        }
      }
    }
    // Keys that nobody reads are lost, the rest comes back.
    const ShardManifest again = ShardManifest::read(fuzz::put("again.json", manifest.text()));
    fuzz::require(again.text() == manifest.text(), "another manifest the second time");
    fuzz::require(again.run() == manifest.run(), "another run the second time");
  });
  return 0;
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
  using namespace relatent;
  std::string out = fuzz::mutated_json(fuzz::text_of(data, size), max_size, seed);
  nlohmann::ordered_json json = fuzz::any_json(out);
  if (fuzz::repairs(seed) && json.is_object()) {
    json.erase("run");
    Hasher hasher;
    hasher.add_text(json.dump());
    json["run"] = hasher.hexadecimal();
    out = json.dump();
  }
  return fuzz::hand_over(out, data, max_size);
}

// Small calibration stores, and all that can be asked of one.
#pragma once

#include <hdf5.h>

#include <cstdint>
#include <filesystem>
#include <string>

namespace relatent::fuzz {

// The bytes of a store as it is written today.
std::string newest_store(std::int64_t layers);
// Makes the checksums of an open store of two layers those of what it holds now, as far as there is
// something.
void bind_again(hid_t file, const std::filesystem::path& path);

// Reads everything of a store, as fuzz::reads does.
void touch_store(const std::filesystem::path& path);

}  // namespace relatent::fuzz

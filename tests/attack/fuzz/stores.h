// Small calibration stores, and all that can be asked of one.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

namespace relatent::fuzz {

// The bytes of a store as it is written today.
std::string newest_store(std::int64_t layers);
// Of version 1, which has no checksums of its data.
std::string first_version_store();

// Reads everything of a store, as fuzz::reads does.
void touch_store(const std::filesystem::path& path);

}  // namespace relatent::fuzz

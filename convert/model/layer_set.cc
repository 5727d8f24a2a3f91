#include "convert/model/layer_set.h"

#include <algorithm>
#include <charconv>
#include <optional>
#include <utility>

#include "formats/error.h"

namespace relatent {
namespace {

std::optional<Index> number_of(std::string_view text) {
  Index out = 0;
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), out);
  return status == std::errc() && end == text.data() + text.size() ? std::optional(out) : std::nullopt;
}

}  // namespace

LayerSet::LayerSet(std::vector<Index> layers) : layers_(std::move(layers)) {
  std::sort(layers_.begin(), layers_.end());
  layers_.erase(std::unique(layers_.begin(), layers_.end()), layers_.end());
}

LayerSet LayerSet::parse(std::string_view option, const std::string& text, Index layers) {
  std::vector<Index> out;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string_view part = std::string_view(text).substr(begin, end - begin);
    const std::size_t dash = part.find('-');
    const std::optional<Index> first = number_of(part.substr(0, dash));
    const std::optional<Index> last =
        dash == std::string_view::npos ? first : number_of(part.substr(dash + 1));
    if (!first || !last || *first < 0 || *last < *first) {
      fail_usage(std::string(option) + " takes layers and ranges of them, like 0-5,8, not \"" + text + "\"");
    }
    if (*last >= layers) {
      fail_usage(std::string(option) + " names layer " + std::to_string(*last) +
                 " of a model whose layers are 0 to " + std::to_string(layers - 1));
    }
    for (Index i = *first; i <= *last; ++i) {
      out.push_back(i);
    }
    begin = end + 1;
  }
  return LayerSet(std::move(out));
}

bool LayerSet::has(Index layer_idx) const {
  return std::binary_search(layers_.begin(), layers_.end(), layer_idx);
}

Index LayerSet::before(Index layer_idx) const {
  return std::lower_bound(layers_.begin(), layers_.end(), layer_idx) - layers_.begin();
}

LayerSet LayerSet::others(Index layers) const {
  std::vector<Index> out;
  for (Index i = 0; i < layers; ++i) {
    if (!has(i)) {
      out.push_back(i);
    }
  }
  return LayerSet(std::move(out));
}

std::string LayerSet::text() const {
  std::string out;
  for (std::size_t first = 0; first < layers_.size();) {
    std::size_t last = first;
    while (last + 1 < layers_.size() && layers_[last + 1] == layers_[last] + 1) {
      ++last;
    }
    out += (out.empty() ? "" : ", ") + std::to_string(layers_[first]);
    if (last > first) {
      out += "-" + std::to_string(layers_[last]);
    }
    first = last + 1;
  }
  return out;
}

}  // namespace relatent

// The sizes of a converted layer.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "convert/model/config.h"

namespace relatent {

// What can be said of a converted layer before any weight is read; the same for all layers.
struct LatentShape {
  std::string form = "mla";  // mla, gla, tpla or mlra
  Index heads = 0;
  Index nope_dim = 0;
  Index rope_dim = 0;
  Index v_dim = 0;
  Index rank = 0;               // all distinct latent coordinates together, without what an engine adds
  std::optional<Index> q_rank;  // of a low-rank query, likewise
  bool has_q_bias = false;
  bool has_bias = false;       // any bias, of q, keys, values or o_proj
  Index norm_coordinates = 0;  // extra latent coordinates of an engine without biases, each branch
  // Coordinates of the latent that hold nothing, so that a kernel finds the size it wants; MLA only.
  Index dead_coordinates = 0;
  // How the latent is divided; one branch without shared coordinates for MLA.
  std::vector<Index> shared_ranks;
  std::vector<BranchGeometry> branches;
  LatentNorm norm = LatentNorm::none;
  Index norm_rank = 0;

  // The part that decides what devices hold.
  LatentGeometry geometry() const;
};

}  // namespace relatent

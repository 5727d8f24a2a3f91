#include "convert/model/latent_shape.h"

namespace relatent {

LatentGeometry LatentShape::geometry() const {
  LatentGeometry out;
  out.form = form;
  out.kv_lora_rank = rank;
  out.qk_nope_head_dim = nope_dim;
  out.qk_rope_head_dim = rope_dim;
  out.v_head_dim = v_dim;
  out.q_lora_rank = q_rank;
  out.attention_bias = has_bias;
  out.shared_ranks = shared_ranks;
  out.branches = branches;
  out.norm = norm;
  out.norm_rank = norm_rank;
  return out;
}

}  // namespace relatent

// The canonical latent form as it is, plain MLA and the forms that no engine knows: model_type `relatent`,
// one tensor for each map of attention.h, and beside the weights the code that Hugging Face transformers runs
// them with (trust_remote_code). vLLM reads it through the plug-in in engines/vllm. Latents are stored as
// they are, so nothing has to be undone.
//
// config.json says layout_version and latent_features. "hidden": latents read the layer's normalised input
// x. "normed_heads", for a source with norms on queries and keys: they read f(x) = [norm(k_proj x); v_proj
// x], and the query of head h its own d numbers of norm(q_proj x); the keys num_key_value_heads,
// normed_head_dim (d), normed_bias and qk_norm ("head" or "width") say the rest. Readers refuse what they do
// not know.
//
// `layers`, where it is there, is a list with null for every layer of that latent attention (without it all
// of them are) and an object for every layer that was carried as it was:
//   {"attention": "grouped_query", "num_key_value_heads", "head_dim", "qkv_bias", "o_bias": sizes and biases,
//    "qk_norm": "none", "head" or "width", "scaling": of q·k before the softmax, "sliding_window": positions
//    that a query sees, its own included, or null, "rope_list": index into `rope_lists`, the rope parameters
//    of such layers}
// with the tensors q_proj, k_proj, v_proj and o_proj, q_norm and k_norm, as Llama and Qwen3 have them.
//
// `latent_rope_lists`, where it is there (layout_version 2, which is 1 otherwise), names for every layer of
// latents the one of `rope_lists` that it rotates by, and null for the others; without it they rotate by
// rope_parameters.
//
// What the model has beyond Llama, each with Llama's behaviour for a default: hidden_activation (silu or
// gelu_pytorch_tanh), norm_placement (before attention and MLP, behind, or both; those behind are
// attention_output_layernorm and mlp_output_layernorm), norm_unit_offset (norms but those on latents multiply
// by 1 + their weight), embedding_multiplier (of the embeddings, in the weights' dtype),
// attn_logit_softcapping and final_logit_softcapping (x becomes cap tanh(x / cap)).
//
// Under model.layers.{i}.self_attn., with D = hidden_size, n = qk_nope_head_dim, p = qk_rope_head_dim, w =
// v_head_dim, r_b = (shared rank) + (own rank) of latent b, h_b its heads; biases where attention_bias:
//   q_proj.weight [H(n+p), D], .bias; or q_a_proj.weight [a, D], .bias, q_a_layernorm.weight [a],
//   q_b_proj.weight [H(n+p), a]          per head n content rows, then p rotary rows (half-split)
// of normed heads instead, with K = num_key_value_heads, the first five as the source has them:
//   q_proj.weight [H d, D], q_norm.weight [d or H d], k_proj.weight [K d, D], k_norm.weight [d or K d],
//   v_proj.weight [K d, D], .bias where normed_bias; q_b_proj.weight [H(n+p), d], .bias
// and in what follows 2 K d in the place of D, but in the last line:
//   k_rope_proj.weight [p, D], .bias     half-split
//   kv_norm_proj.weight [norm rank, D]   where latent_norm is replicated
//   kv_shared_proj.{s}.weight [r_s, D], .bias
//   kv_a_proj.{b}.weight [own rank, D], .bias
//   kv_a_layernorm.{b}.weight [r_b]      where latent_norm is branch
//   kv_b_proj.{b}.weight [h_b(n+w), r_b] per head n key rows, then w value rows; columns: shared, then own
//   o_proj.weight [D, H w], .bias
//
// MLPs and experts keep the names and shapes that the source has. A config with first_k_dense_replace has
// experts from that layer on and says the rest in DeepSeek's keys, topk_method always among them.
//
// residual_multiplier and logits_scaling are Granite's, 1 where they are absent: folded into down_proj and
// the head they would change tensors that are carried byte for byte.
#pragma once

#include <memory>

#include "convert/engines/engine.h"

namespace relatent {

std::unique_ptr<Engine> make_relatent_engine();

}  // namespace relatent

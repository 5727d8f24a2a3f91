"""Attention over cached latents, and over cached keys and values.

Of each token a layer caches one rotary key, which all heads share, and latents. A branch serves a
range of heads: from its latent c, a head forms content keys and values by two matrices of its own,

    score = (n + p)^-1/2 (rotary query . rotary key + content query . (key matrix) c)
    output = softmax(scores) (value matrix) c

Heads that several branches serve add up their outputs. For a single new token the matrices move to
the query and to the mixed latents, so nothing is expanded per head and cached position.

Layers that a conversion left as they were are grouped-query attention, with a sliding window or
without, and cache keys and values.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import Cache

from .configuration_relatent import RelatentConfig
from .layers_relatent import RelatentRMSNorm, capped, inverse_rms, make_norm, normed_runs

LATENT_NORM_EPS = 1e-6


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns pairs (i, i + size / 2) of the last dimension; in float32, returned as x's type."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Of queries that are the first positions: [queries, keys], true where a key is seen."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()


def attention_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, cap: float | None
) -> torch.Tensor:
    """The softmax of scaled scores, formed in float32."""
    scores = capped(scores, cap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)


class RelatentAttention(nn.Module):
    def __init__(self, config: RelatentConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.scaling = (self.nope_dim + self.rope_dim) ** -0.5
        self.branches = config.latent_branches
        shared_ranks = config.latent_shared_ranks
        # Of the latent numbers in the cache.
        self.split_sizes = shared_ranks + [branch["rank"] for branch in self.branches]

        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.num_heads * (self.nope_dim + self.rope_dim)
        # What latents and rotary keys are projections of.
        inputs = hidden
        self.normed_heads = config.latent_features == "normed_heads"
        if self.normed_heads:
            head = config.normed_head_dim
            queries, keys = self.num_heads * head, config.num_key_value_heads * head
            inputs = 2 * keys
            self.q_proj = nn.Linear(hidden, queries, bias=config.normed_bias)
            self.k_proj = nn.Linear(hidden, keys, bias=config.normed_bias)
            self.v_proj = nn.Linear(hidden, keys, bias=config.normed_bias)
            wide = config.qk_norm == "width"
            self.q_norm = make_norm(config, queries if wide else head)
            self.k_norm = make_norm(config, keys if wide else head)
            # The map of every head's own normalised query.
            self.q_b_proj = nn.Linear(head, query_size, bias=bias)
        elif config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, query_size, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RelatentRMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        self.k_rope_proj = nn.Linear(inputs, self.rope_dim, bias=bias)
        if config.latent_norm == "replicated":
            self.kv_norm_proj = nn.Linear(hidden, config.latent_norm_rank, bias=False)
        self.kv_shared_proj = nn.ModuleList(
            nn.Linear(inputs, rank, bias=bias) for rank in shared_ranks
        )
        self.kv_a_proj = nn.ModuleList(
            nn.Linear(inputs, branch["rank"], bias=bias) for branch in self.branches
        )
        ranks = [
            branch["rank"] + (0 if branch.get("shared") is None else shared_ranks[branch["shared"]])
            for branch in self.branches
        ]
        if config.latent_norm == "branch":
            self.kv_a_layernorm = nn.ModuleList(
                RelatentRMSNorm(rank, LATENT_NORM_EPS) for rank in ranks
            )
        self.kv_b_proj = nn.ModuleList(
            nn.Linear(rank, branch["num_heads"] * (self.nope_dim + self.v_dim), bias=False)
            for branch, rank in zip(self.branches, ranks, strict=True)
        )
        self.o_proj = nn.Linear(self.num_heads * self.v_dim, hidden, bias=bias)

    def query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[batch, length, hidden] -> [batch, heads, length, n + p]"""
        if self.normed_heads:
            maps = self.q_b_proj.weight.unflatten(0, (self.num_heads, -1))
            heads = normed_runs(self.q_norm, self.q_proj(x)).unflatten(-1, (self.num_heads, -1))
            query = torch.einsum("blhd,hsd->blhs", heads, maps).flatten(2)
            if self.q_b_proj.bias is not None:
                query = query + self.q_b_proj.bias
        elif self.config.q_lora_rank is None:
            query = self.q_proj(x)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        query = query.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        content, rotary = query.split((self.nope_dim, self.rope_dim), dim=-1)
        return torch.cat((content, rotate(rotary, cos[:, None], sin[:, None])), dim=-1)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """What latents and rotary keys are projections of: [batch, length, inputs]"""
        if not self.normed_heads:
            return x
        return torch.cat((normed_runs(self.k_norm, self.k_proj(x)), self.v_proj(x)), dim=-1)

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """The latent numbers that the cache holds: [batch, length, sum of split_sizes]

        They are normalised, save for those that several branches normalise in their own way.
        """
        parts = [project(x) for project in self.kv_shared_proj]
        for index, project in enumerate(self.kv_a_proj):
            own = project(x)
            if self.config.latent_norm == "branch" and self.branches[index].get("shared") is None:
                own = self.kv_a_layernorm[index](own)
            parts.append(own)
        latents = torch.cat(parts, dim=-1)
        if self.config.latent_norm == "replicated":
            shrink = inverse_rms(self.kv_norm_proj(x), LATENT_NORM_EPS)
            latents = (latents.float() * shrink).to(latents.dtype)
        return latents

    def branch_latent(self, cached: tuple[torch.Tensor, ...], index: int) -> torch.Tensor:
        """What the heads of a branch read, from the parts of the cached latents."""
        shared = self.branches[index].get("shared")
        own = cached[len(self.kv_shared_proj) + index]
        if shared is None:
            return own
        latent = torch.cat((cached[shared], own), dim=-1)
        return self.kv_a_layernorm[index](latent) if self.config.latent_norm == "branch" else latent

    def attend_expanded(
        self,
        query: torch.Tensor,
        rotary_key: torch.Tensor,
        latent: torch.Tensor,
        up: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """With keys and values per head: cheap for many queries at once.

        query [batch, heads, queries, n + p], rotary_key [batch, keys, p],
        latent [batch, keys, rank], up [heads, n + w, rank] -> [batch, heads, queries, w]
        """
        if mask is None:
            # The queries are the first positions; what a static cache holds beyond is empty.
            length = query.shape[2]
            rotary_key, latent = rotary_key[:, :length], latent[:, :length]
        heads = up.shape[0]
        expanded = functional.linear(latent, up.flatten(0, 1)).unflatten(-1, (heads, -1))
        content_key, value = expanded.transpose(1, 2).split((self.nope_dim, self.v_dim), dim=-1)
        rotary_key = rotary_key[:, None].expand(-1, heads, -1, -1)
        # Kernels that do not keep all scores want values of the keys' size.
        padding = max(0, query.shape[-1] - self.v_dim)
        out = functional.scaled_dot_product_attention(
            query,
            torch.cat((content_key, rotary_key), dim=-1),
            functional.pad(value, (0, padding)),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scaling,
        )
        return out[..., : self.v_dim]

    def attend_absorbed(
        self,
        query: torch.Tensor,
        rotary_key: torch.Tensor,
        latent: torch.Tensor,
        up: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same with queries moved into the latent space: reads the cache as it is.

        Without a mask every query sees every key.
        """
        heads, queries = query.shape[1:3]
        content, rotary = query.split((self.nope_dim, self.rope_dim), dim=-1)
        key_map, value_map = up.split((self.nope_dim, self.v_dim), dim=1)
        content = torch.matmul(content, key_map)  # [batch, heads, queries, rank]
        # All heads read the same keys, so they are as good as further queries.
        scores = torch.matmul(content.flatten(1, 2), latent.transpose(1, 2))
        scores = scores + torch.matmul(rotary.flatten(1, 2), rotary_key.transpose(1, 2))
        scores = scores.unflatten(1, (heads, queries)) * self.scaling
        weights = attention_weights(scores, mask, self.config.attn_logit_softcapping)
        mixed = torch.matmul(weights.flatten(1, 2), latent).unflatten(1, (heads, queries))
        return torch.matmul(mixed, value_map.transpose(1, 2))

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        cos, sin = position_embeddings
        query = self.query(x, cos, sin)
        features = self.features(x)
        rotary_key = rotate(self.k_rope_proj(features), cos, sin)
        latents = self.latents(features)
        if cache is not None:
            # One head whose keys are the latents and whose values are the rotary keys.
            latents, rotary_key = cache.update(
                latents[:, None], rotary_key[:, None], self.layer_idx
            )
            latents, rotary_key = latents[:, 0], rotary_key[:, 0]
        cached = latents.split(self.split_sizes, dim=-1)

        # What caps scores needs all of them, as eager attention does.
        absorb = (
            query.shape[2] == 1
            or self.config._attn_implementation == "eager"
            or self.config.attn_logit_softcapping is not None
        )
        if absorb and attention_mask is None and query.shape[2] > 1:
            attention_mask = causal_mask(query.shape[2], latents.shape[1], query.device)
        attend = self.attend_absorbed if absorb else self.attend_expanded
        out = query.new_zeros(*query.shape[:3], self.v_dim)
        for index, branch in enumerate(self.branches):
            first, count = branch["first_head"], branch["num_heads"]
            out[:, first : first + count] += attend(
                query[:, first : first + count],
                rotary_key,
                self.branch_latent(cached, index),
                self.kv_b_proj[index].weight.unflatten(0, (count, -1)),
                attention_mask,
            )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class RelatentGroupedQueryAttention(nn.Module):
    """A layer's attention as it was before the conversion."""

    def __init__(self, config: RelatentConfig, layer_idx: int):
        super().__init__()
        layer = config.layers[layer_idx]
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = layer["num_key_value_heads"]
        self.scaling = layer["scaling"]
        hidden, head_dim = config.hidden_size, layer["head_dim"]
        queries, keys = self.num_heads * head_dim, self.num_key_value_heads * head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=layer["qkv_bias"])
        self.k_proj = nn.Linear(hidden, keys, bias=layer["qkv_bias"])
        self.v_proj = nn.Linear(hidden, keys, bias=layer["qkv_bias"])
        self.o_proj = nn.Linear(queries, hidden, bias=layer["o_bias"])
        self.q_norm, self.k_norm = None, None
        if layer["qk_norm"] != "none":
            wide = layer["qk_norm"] == "width"
            self.q_norm = make_norm(config, queries if wide else head_dim)
            self.k_norm = make_norm(config, keys if wide else head_dim)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """query [batch, heads, queries, d], key, value [batch, heads, keys, d] -> as query"""
        length = query.shape[2]
        if mask is None and length > 1:
            # The queries are the first positions; what a static cache holds beyond is empty.
            key, value = key[:, :, :length], value[:, :, :length]
        cap = self.config.attn_logit_softcapping
        if cap is None and self.config._attn_implementation != "eager":
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=mask is None and length > 1,
                scale=self.scaling,
            )
        if mask is None and length > 1:
            mask = causal_mask(length, length, query.device)
        scores = torch.matmul(query, key.transpose(2, 3)) * self.scaling
        return torch.matmul(attention_weights(scores, mask, cap), value)

    def forward(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        cos, sin = (table[:, None] for table in position_embeddings)

        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.q_norm is not None:
            query, key = normed_runs(self.q_norm, query), normed_runs(self.k_norm, key)

        def heads(numbers: torch.Tensor, count: int) -> torch.Tensor:
            return numbers.unflatten(-1, (count, -1)).transpose(1, 2)

        query = rotate(heads(query, self.num_heads), cos, sin)
        key = rotate(heads(key, self.num_key_value_heads), cos, sin)
        value = heads(value, self.num_key_value_heads)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        readers = self.num_heads // self.num_key_value_heads
        key, value = (t.repeat_interleave(readers, dim=1) for t in (key, value))
        out = self.attend(query, key, value, attention_mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))

"""Latent attention of one device, on one cache of vLLM per layer.

The device's cache entry holds the latents that its branches read, each once, and the rotary key.
A head of a branch is a head of its own to the kernels: its rows of kv_b_proj are zero outside the
coordinates that the branch reads, so its scores and its softmax are those of the branch. What the
branches of a head read is added up before o_proj.
"""

import torch
from torch import nn
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear

from .backend import choose_backend
from .configuration import RelatentConfig
from .loading import Copy, Index, Place
from .rotary import rotate
from .sharing import device_shares, latent_layout

LATENT_NORM_EPS = 1e-6


def inverse_rms(x: torch.Tensor) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last dimension, in float32."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + LATENT_NORM_EPS)


def normed_runs(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalises every run of the norm's size: [tokens, width] -> [tokens, width]"""
    size = norm.weight.shape[0]
    return norm(x.reshape(-1, size)).view(x.shape)


def rows(first: int, count: int) -> Index:
    return (slice(first, first + count),)


class RelatentAttention(nn.Module):
    """One device's share of a layer's attention; the outputs of all devices are summed."""

    def __init__(self, config: RelatentConfig, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        self.config = config
        self.nope_dim = config.qk_nope_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.v_dim = config.v_head_dim
        self.tp_rank = get_tensor_model_parallel_rank()
        self._share_with_other_devices(get_tensor_model_parallel_world_size())
        self._refuse_divided_contexts(vllm_config.parallel_config)

        hidden, bias = config.hidden_size, config.attention_bias
        query_size = self.share.num_heads * (self.nope_dim + self.rope_dim)
        # What latents and rotary keys are projections of.
        self.inputs = hidden
        self.normed_heads = config.latent_features == "normed_heads"
        if self.normed_heads:
            self._make_normed_heads(prefix)
        elif config.q_lora_rank is None:
            self.q_proj = linear(hidden, query_size, bias, f"{prefix}.q_proj")
        else:
            self.q_a_proj = linear(hidden, config.q_lora_rank, bias, f"{prefix}.q_a_proj")
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = linear(config.q_lora_rank, query_size, False, f"{prefix}.q_b_proj")
        # Everything that a token's key side needs comes from one product: latents, rotary key and
        # the rows that a replicated norm is formed of.
        norm_rank = config.latent_norm_rank if config.latent_norm == "replicated" else 0
        self.key_sizes = [self.layout.size, self.rope_dim, norm_rank]
        self.kv_a_proj = linear(self.inputs, sum(self.key_sizes), bias, f"{prefix}.kv_a_proj")
        if config.latent_norm == "branch":
            self.kv_a_layernorm = nn.Parameter(torch.ones(self.layout.size), requires_grad=False)
        virtual_heads = sum(part.num_heads for part in self.share.branches)
        self.kv_b_proj = linear(
            self.layout.size,
            virtual_heads * (self.nope_dim + self.v_dim),
            False,
            f"{prefix}.kv_b_proj",
        )
        self.o_proj = linear(self.share.num_heads * self.v_dim, hidden, bias, f"{prefix}.o_proj")
        cache_config = vllm_config.cache_config
        self.attn = MLAAttention(
            num_heads=virtual_heads,
            scale=(self.nope_dim + self.rope_dim) ** -0.5,
            qk_nope_head_dim=self.nope_dim,
            qk_rope_head_dim=self.rope_dim,
            v_head_dim=self.v_dim,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=self.layout.size,
            kv_b_proj=self.kv_b_proj,
            cache_config=cache_config,
            prefix=f"{prefix}.attn",
            attn_backend=choose_backend(
                self.layout.size + self.rope_dim,
                virtual_heads,
                "auto" if cache_config is None else cache_config.cache_dtype,
            ),
        )
        self._number_virtual_heads()

    def _make_normed_heads(self, prefix: str) -> None:
        """The source's projections: queries of this device's heads, all keys and values.

        A norm over the whole width of the queries needs them all.
        """
        config = self.config
        hidden, head, bias = config.hidden_size, config.normed_head_dim, config.normed_bias
        wide = config.qk_norm == "width"
        self.query_heads = config.num_attention_heads if wide else self.share.num_heads
        queries, keys = self.query_heads * head, config.num_key_value_heads * head
        self.inputs = 2 * keys
        self.q_proj = linear(hidden, queries, bias, f"{prefix}.q_proj")
        self.k_proj = linear(hidden, keys, bias, f"{prefix}.k_proj")
        self.v_proj = linear(hidden, keys, bias, f"{prefix}.v_proj")
        self.q_norm = RMSNorm(queries if wide else head, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(keys if wide else head, eps=config.rms_norm_eps)
        # Maps of every head's own query: no linear layer, whose weight vLLM may pack away.
        size = (self.nope_dim + self.rope_dim) * self.share.num_heads
        self.q_b_weight = nn.Parameter(torch.empty(size, head), requires_grad=False)
        if config.attention_bias:
            self.q_b_bias = nn.Parameter(torch.empty(size), requires_grad=False)

    def _share_with_other_devices(self, tp_size: int) -> None:
        branches, shared_ranks = self.config.latent_branches, self.config.latent_shared_ranks
        shares = device_shares(branches, tp_size)
        size = max(share.latent_numbers(branches, shared_ranks) for share in shares)
        self.share = shares[self.tp_rank]
        self.layout = latent_layout(self.share, branches, shared_ranks, size)
        readers = [branches[part.branch].get("shared") for part in self.share.branches]
        if self.config.latent_norm == "branch" and any(
            shared is not None and readers.count(shared) > 1 for shared in readers
        ):
            raise ValueError(
                f"tensor parallel size {tp_size} does not fit this model: latents that are "
                "normalised together with what they share need a device each"
            )

    def _refuse_divided_contexts(self, parallel_config: ParallelConfig) -> None:
        """vLLM divides positions between devices on the assumption that all cache the same."""
        sizes = (
            parallel_config.decode_context_parallel_size,
            parallel_config.prefill_context_parallel_size,
        )
        if max(sizes) > 1 and len(self.config.latent_branches) > 1:
            raise ValueError(
                "context parallelism was asked for, and the devices of this model cache different "
                "latents"
            )

    def _number_virtual_heads(self) -> None:
        """Which of the device's heads every head of its branches is."""
        numbers = [
            part.first_head - self.share.first_head + head
            for part in self.share.branches
            for head in range(part.num_heads)
        ]
        self.heads_are_plain = numbers == list(range(self.share.num_heads))
        self.register_buffer("head_numbers", torch.tensor(numbers), persistent=False)

    def query(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] -> [tokens, heads of the branches, n + p]"""
        if self.normed_heads:
            heads = normed_runs(self.q_norm, self.q_proj(x)[0])
            heads = heads.unflatten(-1, (self.query_heads, -1))
            if self.query_heads != self.share.num_heads:
                heads = heads.narrow(1, self.share.first_head, self.share.num_heads)
            maps = self.q_b_weight.unflatten(0, (self.share.num_heads, -1))
            query = torch.einsum("thd,hsd->ths", heads, maps).flatten(1)
            if self.config.attention_bias:
                query = query + self.q_b_bias
        elif self.config.q_lora_rank is None:
            query, _ = self.q_proj(x)
        else:
            compressed, _ = self.q_a_proj(x)
            query, _ = self.q_b_proj(self.q_a_layernorm(compressed))
        query = query.unflatten(-1, (self.share.num_heads, -1))
        content, rotary = query.split((self.nope_dim, self.rope_dim), dim=-1)
        query = torch.cat((content, rotate(rotary, cos[:, None], sin[:, None])), dim=-1)
        return query if self.heads_are_plain else query.index_select(1, self.head_numbers)

    def cache_entry(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, hidden] -> latents [tokens, latents], rotary key [tokens, 1, p]"""
        features = x
        if self.normed_heads:
            keys = normed_runs(self.k_norm, self.k_proj(x)[0])
            features = torch.cat((keys, self.v_proj(x)[0]), dim=-1)
        latents, rotary_key, norm_rows = self.kv_a_proj(features)[0].split(self.key_sizes, dim=-1)
        if self.config.latent_norm == "replicated":
            latents = (latents.float() * inverse_rms(norm_rows)).to(latents.dtype)
        elif self.config.latent_norm == "branch":
            latents = self.normalise(latents)
        return latents.contiguous(), rotate(rotary_key, cos, sin)[:, None]

    def normalise(self, latents: torch.Tensor) -> torch.Tensor:
        """Every branch's latent by itself: [tokens, latents] -> [tokens, latents]"""
        parts = []
        for part in self.share.branches:
            spans = self.layout.parts_of(part.branch, self.config.latent_branches[part.branch])
            latent = latents[:, spans[0].start : spans[-1].stop]
            parts.append((latent.float() * inverse_rms(latent)).to(latent.dtype))
        used = sum(part.shape[-1] for part in parts)
        return self.kv_a_layernorm * torch.cat((*parts, latents[:, used:]), dim=-1)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [tokens, hidden], cos and sin [tokens, p / 2] -> [tokens, hidden]"""
        query = self.query(x, cos, sin)
        latents, rotary_key = self.cache_entry(x, cos, sin)
        tokens, virtual_heads = query.shape[:2]
        read = self.attn(
            query, latents, rotary_key, output_shape=(tokens, virtual_heads * self.v_dim)
        )
        if not self.heads_are_plain:
            summed = read.new_zeros(tokens, self.share.num_heads, self.v_dim)
            summed.index_add_(1, self.head_numbers, read.unflatten(-1, (virtual_heads, -1)))
            read = summed.flatten(1)
        out, _ = self.o_proj(read)
        return tensor_model_parallel_all_reduce(out)

    def places(self) -> dict[str, Place]:
        """The tensors of the layer in a checkpoint, and what of them this device has."""
        out: dict[str, Place] = {}
        config, share, layout = self.config, self.share, self.layout
        hidden, heads = config.hidden_size, config.num_attention_heads

        def put_linear(name: str, shape: tuple[int, int], module: nn.Module, at: int) -> None:
            """All rows of a tensor, at row `at` of the module's weight."""
            target = rows(at, shape[0])
            out[f"{name}.weight"] = Place(shape, [Copy(module.weight, target)])
            if config.attention_bias:
                out[f"{name}.bias"] = Place(shape[:1], [Copy(module.bias, target)])

        def forget_linear(name: str, shape: tuple[int, int]) -> None:
            """A tensor that only other devices need."""
            out[f"{name}.weight"] = Place(shape)
            if config.attention_bias:
                out[f"{name}.bias"] = Place(shape[:1])

        # Rows and columns that no tensor fills are zero.
        for module in (self.kv_a_proj, self.kv_b_proj, self.o_proj):
            for parameter in module.parameters(recurse=False):
                parameter.data.zero_()

        query_dim = self.nope_dim + self.rope_dim
        mine = rows(share.first_head * query_dim, share.num_heads * query_dim)
        if self.normed_heads:
            out |= self._normed_head_places(mine)
        elif config.q_lora_rank is None:
            out["q_proj.weight"] = Place(
                (heads * query_dim, hidden), [Copy(self.q_proj.weight, (), mine)]
            )
            if config.attention_bias:
                out["q_proj.bias"] = Place((heads * query_dim,), [Copy(self.q_proj.bias, (), mine)])
        else:
            rank = config.q_lora_rank
            put_linear("q_a_proj", (rank, hidden), self.q_a_proj, 0)
            out["q_a_layernorm.weight"] = Place((rank,), [Copy(self.q_a_layernorm.weight)])
            out["q_b_proj.weight"] = Place(
                (heads * query_dim, rank), [Copy(self.q_b_proj.weight, (), mine)]
            )

        inputs = self.inputs
        put_linear("k_rope_proj", (self.rope_dim, inputs), self.kv_a_proj, layout.size)
        if config.latent_norm == "replicated":
            shape = (config.latent_norm_rank, hidden)
            target = rows(layout.size + self.rope_dim, shape[0])
            out["kv_norm_proj.weight"] = Place(shape, [Copy(self.kv_a_proj.weight, target)])
        for index, rank in enumerate(config.latent_shared_ranks):
            name = f"kv_shared_proj.{index}"
            if index in layout.shared:
                put_linear(name, (rank, inputs), self.kv_a_proj, layout.shared[index].start)
            else:
                forget_linear(name, (rank, inputs))
        for index, branch in enumerate(config.latent_branches):
            name = f"kv_a_proj.{index}"
            if index in layout.own:
                put_linear(name, (branch["rank"], inputs), self.kv_a_proj, layout.own[index].start)
            else:
                forget_linear(name, (branch["rank"], inputs))
            out |= self._branch_places(index)

        mine = (slice(None), *rows(share.first_head * self.v_dim, share.num_heads * self.v_dim))
        out["o_proj.weight"] = Place(
            (hidden, heads * self.v_dim), [Copy(self.o_proj.weight, (), mine)]
        )
        if config.attention_bias:
            # Added once, though every device adds to the sum.
            loaders = [Copy(self.o_proj.bias)] if self.tp_rank == 0 else []
            out["o_proj.bias"] = Place((hidden,), loaders)
        return out

    def _normed_head_places(self, query_rows: Index) -> dict[str, Place]:
        """The source's projections and norms; query_rows: this device's of q_b_proj."""
        config, share = self.config, self.share
        head = config.normed_head_dim
        queries = config.num_attention_heads * head
        out: dict[str, Place] = {}
        # All of them where the norm is over all.
        mine = rows(share.first_head * head, share.num_heads * head)
        mine = mine if self.query_heads == share.num_heads else ()
        for name, module, count, part in (
            ("q_proj", self.q_proj, queries, mine),
            ("k_proj", self.k_proj, self.inputs // 2, ()),
            ("v_proj", self.v_proj, self.inputs // 2, ()),
        ):
            shape = (count, config.hidden_size)
            out[f"{name}.weight"] = Place(shape, [Copy(module.weight, (), part)])
            if config.normed_bias:
                out[f"{name}.bias"] = Place(shape[:1], [Copy(module.bias, (), part)])
        for name, norm in (("q_norm", self.q_norm), ("k_norm", self.k_norm)):
            out[f"{name}.weight"] = Place(tuple(norm.weight.shape), [Copy(norm.weight)])
        size = config.num_attention_heads * (self.nope_dim + self.rope_dim)
        out["q_b_proj.weight"] = Place((size, head), [Copy(self.q_b_weight, (), query_rows)])
        if config.attention_bias:
            out["q_b_proj.bias"] = Place((size,), [Copy(self.q_b_bias, (), query_rows)])
        return out

    def _branch_places(self, index: int) -> dict[str, Place]:
        """What is made for the whole latent of a branch: its norm and its heads' maps."""
        config = self.config
        branch = config.latent_branches[index]
        shared = branch.get("shared")
        rank = branch["rank"] + (0 if shared is None else config.latent_shared_ranks[shared])
        up_dim = self.nope_dim + self.v_dim
        norm: list[Copy] = []
        up: list[Copy] = []
        at = 0
        for part in self.share.branches:
            if part.branch == index:
                skipped = part.first_head - branch["first_head"]
                mine = rows(skipped * up_dim, part.num_heads * up_dim)
                target = rows(at * up_dim, part.num_heads * up_dim)
                column = 0
                for span in self.layout.parts_of(index, branch):
                    columns = rows(column, span.stop - span.start)
                    up.append(Copy(self.kv_b_proj.weight, (*target, span), (*mine, *columns)))
                    if config.latent_norm == "branch":
                        norm.append(Copy(self.kv_a_layernorm, (span,), columns))
                    column += span.stop - span.start
            at += part.num_heads
        places = {f"kv_b_proj.{index}.weight": Place((branch["num_heads"] * up_dim, rank), up)}
        if config.latent_norm == "branch":
            places[f"kv_a_layernorm.{index}.weight"] = Place((rank,), norm)
        return places


def linear(columns: int, size: int, bias: bool, prefix: str) -> ReplicatedLinear:
    """A product that this device computes by itself; what it holds is only the device's share."""
    return ReplicatedLinear(columns, size, bias=bias, quant_config=None, prefix=prefix)

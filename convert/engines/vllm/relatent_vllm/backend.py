"""Attention kernels for latents of any size.

vLLM's MLA scaffolding checks sizes against those of published models, in two places. The check of
`MLACommonMetadata.__post_init__` asks one base class whatever the backend; a metadata class of our
own, given to the backend's metadata builder, leaves it out. The reference kernel for CPUs decodes
one size only; `AnySizeCPUImpl` decodes any.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import MLACommonBackend, MLACommonMetadata
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.selector import get_attn_backend


@cache
def any_size_metadata(base: type[MLACommonMetadata]) -> type[MLACommonMetadata]:
    """The metadata class without its check of the entry size."""

    @dataclass
    class AnySizeMetadata(base):
        def __post_init__(self) -> None:
            pass

    return AnySizeMetadata


@cache
def any_size_builder(base: type) -> type:
    """The metadata builder of a backend, making metadata of any entry size."""

    class AnySizeMetadataBuilder(base):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            self.metadata_cls = any_size_metadata(self.metadata_cls)

    return AnySizeMetadataBuilder


@cache
def any_size(base: type[AttentionBackend]) -> type[AttentionBackend]:
    """A backend whose kernels serve any entry size, with metadata that says so."""

    class AnySizeBackend(base):
        @staticmethod
        def get_builder_cls() -> type:
            return any_size_builder(base.get_builder_cls())

    return AnySizeBackend


class AnySizeCPUImpl(CPUMLAImpl):
    """vLLM's reference attention for CPUs, with a decode step for latents of any size."""

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: Any,
    ) -> tuple[torch.Tensor, None]:
        """Every sequence with one query; scores and sums are formed in float32.

        q [sequences, heads, latent + rotary], cache [blocks, block size, latent + rotary]
        -> [sequences, heads, latent]
        """
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        decode = attn_metadata.decode
        block_size = kv_c_and_k_pe_cache.shape[1]
        out = q.new_empty(*q.shape[:2], self.kv_lora_rank)
        for row, length in enumerate(decode.seq_lens.tolist()):
            blocks = decode.block_table[row, : -(-length // block_size)].long()
            entries = kv_c_and_k_pe_cache[blocks].flatten(0, 1)[:length].float()
            scores = torch.matmul(q[row].float(), entries.T) * self.scale
            mixed = torch.matmul(torch.softmax(scores, dim=-1), entries[:, : self.kv_lora_rank])
            out[row] = mixed
        return out, None


class AnySizeCPUBackend(CPUMLABackend):
    """The CPU backend for any size. It keeps the name under which vLLM knows what it can do."""

    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type[AnySizeCPUImpl]:
        return AnySizeCPUImpl


def choose_backend(
    entry_size: int, num_heads: int, kv_cache_dtype: str
) -> type[AttentionBackend] | None:
    """The backend for cache entries of so many numbers; None leaves the choice to vLLM."""
    if current_platform.is_cpu():
        if kv_cache_dtype not in AnySizeCPUBackend.supported_kv_cache_dtypes:
            raise ValueError(
                f"kv_cache_dtype {kv_cache_dtype!r} was asked for, and caches of latents have the "
                "model's type on CPUs"
            )
        return any_size(AnySizeCPUBackend)
    if MLACommonBackend.supports_head_size(entry_size):
        return None
    chosen = get_attn_backend(
        entry_size, torch.get_default_dtype(), kv_cache_dtype, use_mla=True, num_heads=num_heads
    )
    return any_size(chosen)

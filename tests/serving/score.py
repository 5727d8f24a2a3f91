"""Runs one folder in vLLM on the CPU and says, as JSON, what came out.

    python score.py FOLDER --tokens TOKENS.npy --sequences 4 --length 256 --tp 2

Perplexity is over every predicted token of every sequence, as `relatent verify` counts them. Greedy
continuations and the bytes that the cache of every device really takes come along. With several
devices the script starts itself once for each, in one process group.
"""

import argparse
import ctypes
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

# vLLM reads these when it is imported; the devices of a test share few cores.
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
# Of the token file: beyond the sequences that perplexity is measured on.
PROMPTS = ((8192, 8), (16384, 45), (32768, 130))
NEW_TOKENS = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=Path, required=True, help="one-dimensional .npy")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tp", type=int, default=1, help="tensor parallel size")
    parser.add_argument(
        "--pp",
        type=int,
        default=1,
        # No perplexity then. Stages make their buffers in a run before the first, which vLLM 0.32
        # leaves out on CPUs where there is nothing to compile.
        help="pipeline parallel size; needs --compile",
    )
    parser.add_argument("--model-impl", choices=("auto", "transformers"), default="auto")
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--chunk", type=int, help="chunked prefill of so many tokens at a time")
    parser.add_argument("--prefix-caching", action="store_true")
    parser.add_argument("-o", "--output", type=Path, help="where the JSON goes besides stdout")
    return parser.parse_args()


def die_with_parent() -> None:
    """So that no device outlives a test that was stopped, whatever stopped it."""
    set_death_signal = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def become_launcher(devices: int) -> None:
    """Replaces this process by torchrun, which starts it again for every device."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(devices)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    os.execv(sys.executable, [*command, *sys.argv])


def make_engine(args: argparse.Namespace) -> Any:
    from vllm import LLM

    longest = max(args.length, max(length for _, length in PROMPTS) + NEW_TOKENS)
    chunks = {"enable_chunked_prefill": args.chunk is not None}
    if args.chunk is not None:
        chunks["max_num_batched_tokens"] = args.chunk
    return LLM(
        model=str(args.folder),
        dtype=args.dtype,
        model_impl=args.model_impl,
        tensor_parallel_size=args.tp,
        pipeline_parallel_size=args.pp,
        distributed_executor_backend="external_launcher" if args.tp * args.pp > 1 else None,
        enforce_eager=not args.compile,
        enable_prefix_caching=args.prefix_caching,
        skip_tokenizer_init=True,
        max_model_len=longest + 8,
        max_num_seqs=8,
        max_logprobs=1,
        seed=0,
        **chunks,
    )


def log_likelihoods(engine: Any, sequences: list[list[int]]) -> list[float]:
    """Of every token but the first of each sequence, given those before it."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in sequences]
    out = []
    for ids, done in zip(sequences, engine.generate(prompts, asked, use_tqdm=False), strict=True):
        for token, found in zip(ids[1:], done.prompt_logprobs[1:], strict=True):
            out.append(found[token].logprob)
    return out


def continuations(engine: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The end token is no reason to stop."""
    from vllm import SamplingParams

    asked = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, detokenize=False
    )
    done = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in done]


def cache_of(worker: Any) -> dict[str, float]:
    """Of the tensors that a device really holds: bytes per token, layers, and tokens with room."""
    runner = worker.model_runner
    layers = runner.compilation_config.static_forward_context
    tensors = [layer.kv_cache for layer in layers.values() if hasattr(layer, "kv_cache")]
    tensors = [t[0] if isinstance(t, (list, tuple)) else t for t in tensors]
    config = runner.kv_cache_config
    group_sizes = {group.kv_cache_spec.block_size for group in config.kv_cache_groups}
    assert len(group_sizes) == 1, group_sizes
    tokens = config.num_blocks * group_sizes.pop()
    return {
        "bytes_per_token": sum(t.numel() * t.element_size() for t in tensors) / tokens,
        "layers": len(tensors),
        "tokens": tokens,
    }


def weight_bytes(worker: Any) -> int:
    parameters = worker.model_runner.model.parameters()
    return sum(p.numel() * p.element_size() for p in parameters)


def class_of_model(worker: Any) -> str:
    return type(worker.model_runner.model).__name__


def from_all_devices(value: Any) -> list[Any]:
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, value)
    return out


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All that is printed, the same on every device."""
    started = time.monotonic()
    engine = make_engine(args)
    loaded = time.monotonic()
    tokens = np.load(args.tokens).astype(np.int64)
    measured = tokens[: args.sequences * args.length].reshape(args.sequences, args.length)
    # The first pipeline stage has no logits of the prompt, and vLLM 0.32 asks it for them.
    likelihoods = log_likelihoods(engine, measured.tolist()) if args.pp == 1 else []
    nll = -math.fsum(likelihoods) / len(likelihoods) if likelihoods else None
    scored = time.monotonic()
    prompts = [tokens[start : start + length].tolist() for start, length in PROMPTS]
    greedy = continuations(engine, prompts)
    if args.prefix_caching:
        # Again, with every full block of the prompts in the cache.
        assert continuations(engine, prompts) == greedy
    written = time.monotonic()
    config = engine.llm_engine.vllm_config
    return {
        "nll": nll,
        "perplexity": None if nll is None else math.exp(nll),
        "predicted_tokens": len(likelihoods),
        "prompts": prompts,
        "greedy": greedy,
        "cache": from_all_devices(engine.collective_rpc(cache_of)[0]),
        "weight_bytes": from_all_devices(engine.collective_rpc(weight_bytes)[0]),
        "architecture": engine.collective_rpc(class_of_model)[0],
        "chunked_prefill": config.scheduler_config.enable_chunked_prefill,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "seconds": {
            "load": loaded - started,
            "score": scored - loaded,
            "greedy": written - scored,
        },
    }


def main() -> None:
    args = parse_arguments()
    die_with_parent()
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    devices = args.tp * args.pp
    if devices > 1 and "RANK" not in os.environ:
        become_launcher(devices)
    # Code beside weights, where it is used at all, is copied somewhere before it runs.
    with tempfile.TemporaryDirectory(prefix="relatent-modules-") as modules:
        os.environ["HF_MODULES_CACHE"] = modules
        text = json.dumps(measure(args))
    if int(os.environ.get("RANK", "0")) == 0:
        if args.output is not None:
            args.output.write_text(text)
        print(text)
    finish()


def finish() -> None:
    """Ends the process group, so that nothing is left in shared memory, and leaves at once."""
    import torch.distributed as dist
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    cleanup_dist_env_and_memory()
    sys.stdout.flush()
    # Threads of the engine would keep the interpreter waiting.
    os._exit(0)


if __name__ == "__main__":
    main()

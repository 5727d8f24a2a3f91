"""The dense algebra that no conversion can do without, run bare: the floor of scale.py.

Counted for one layer of `convert --method weights-only` to MLA, with D the hidden size, H heads on
G key/value heads of d, rank r, all float64, each product in its cheapest exact form:

  covariance      [K; V] [K; V]ᵀ as one symmetric product of order 2Gd over D; the dropped
                  rotation acts on it frequency by frequency, which is not counted
  head metrics    2H symmetric products of order d over D: queries for the keys' metric, o_proj
                  for the values'
  rotary          d/2 Hermitian eigenproblems of order G
  metric roots    2G symmetric eigenproblems of order d, all vectors
  weighing        metric times covariance times metric, the metric block-diagonal
  latent          the r leading eigenpairs of order 2Gd: dsyevr, as LAPACK gives them fastest
  down            basis times metric times [K; V]: r by 2Gd by D
  content         for each head one symmetric eigenproblem of order d, since a head's scores have
                  rank d whatever r is, and the products that make its factors, r by d and d by D

Not counted: reading, writing, widening and rounding, transposes, and whatever is linear in the
weights. Inputs count as independent, so that their moment costs nothing. Layers run beside each
other, one thread for each; where threads are left over, also with all of them, and the faster
counts. Processor seconds are those of one thread for each layer. It is a floor for the method and
not for its result: other algebra might do with less.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Layer:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rank: int

    @classmethod
    def of(cls, config: dict[str, Any], rank: int) -> "Layer":
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim", config["hidden_size"] // heads)
        return cls(config["hidden_size"], heads, config["num_key_value_heads"], head_dim, rank)


def flops(layer: Layer) -> dict[str, float]:
    """Of the products and, by their usual leading terms, of the eigenproblems."""
    d, keys, r = layer.head_dim, 2 * layer.kv_heads * layer.head_dim, layer.rank
    whole = 9.0 * d**3  # tridiagonal form, its eigenpairs, and back
    return {
        "covariance": float(keys**2 * layer.hidden),
        "head metrics": 2.0 * layer.heads * d**2 * layer.hidden,
        "rotary": d / 2 * 4 * 9.0 * layer.kv_heads**3,
        "metric roots": 2 * layer.kv_heads * whole,
        "weighing": 4.0 * keys**2 * d,
        "latent": 4 / 3 * keys**3 + 2.0 * keys**2 * r,
        "down": 2.0 * r * keys * (layer.hidden + d),
        "content": layer.heads * (whole + 2.0 * d**2 * (2 * r + layer.hidden)),
    }


def work(layer: Layer) -> dict[str, Callable[[], None]]:
    """What each item runs. The inputs are made here, before any clock is started."""
    import numpy as np
    from scipy.linalg import eigh

    random = np.random.default_rng(0)
    d, r = layer.head_dim, layer.rank
    keys = 2 * layer.kv_heads * d
    y = random.standard_normal((keys, layer.hidden))
    head = random.standard_normal((d, layer.hidden))
    narrow = random.standard_normal((keys, keys + d))
    order_keys = np.asfortranarray(narrow @ narrow.T)
    order_d = np.asfortranarray(head @ head.T)
    groups = random.standard_normal((2, layer.kv_heads, layer.kv_heads))
    hermitian = np.asfortranarray(groups[0] + 1j * groups[1])
    hermitian = hermitian @ hermitian.conj().T
    strip = random.standard_normal((d, keys))
    basis = random.standard_normal((r, keys))
    up = random.standard_normal((d, r))

    def times(count: int, *products: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                for product in products:
                    product()

        return run

    def down() -> None:
        for g in range(0, keys, d):
            basis[:, g : g + d] @ order_d
        basis @ y

    def all_pairs(matrix: Any) -> Callable[[], Any]:
        return lambda: eigh(matrix, driver="evr", check_finite=False)

    leading = [keys - r, keys - 1]
    return {
        "covariance": times(1, lambda: y @ y.T),
        "head metrics": times(2 * layer.heads, lambda: head @ head.T),
        "rotary": times(d // 2, all_pairs(hermitian)),
        "metric roots": times(2 * layer.kv_heads, all_pairs(order_d)),
        "weighing": times(4 * layer.kv_heads, lambda: order_d @ strip),
        "latent": times(
            1, lambda: eigh(order_keys, subset_by_index=leading, driver="evr", check_finite=False)
        ),
        "down": down,
        "content": times(
            layer.heads,
            lambda: up @ up.T,
            all_pairs(order_d),
            lambda: up.T @ order_d,
            lambda: order_d @ head,
        ),
    }


def lane(layer: Layer, layers: int) -> None:
    """One of the processes: gets ready, waits for a line, runs its layers, prints its seconds."""
    items = work(layer)
    items["head metrics"]()
    items["metric roots"]()
    print("ready", flush=True)
    if not sys.stdin.readline():
        return
    found = {"seconds": -time.perf_counter(), "cpu_seconds": -time.process_time()}
    seconds = dict.fromkeys(items, 0.0)
    for _ in range(layers):
        for name, run in items.items():
            begun = time.process_time()
            run()
            seconds[name] += time.process_time() - begun
    found["seconds"] += time.perf_counter()
    found["cpu_seconds"] += time.process_time()
    print(json.dumps(found | {"items": seconds}))


def run_lanes(layer: Layer, layers: int, lanes: int, threads: int) -> list[dict[str, Any]]:
    """What each lane found, with so many threads for each."""
    environment = {name: str(threads) for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")}
    processes = []
    for i in range(lanes):
        share = layers // lanes + (i < layers % lanes)
        processes.append(
            subprocess.Popen(
                [sys.executable, __file__, json.dumps([asdict(layer), share])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, **environment},
            )
        )
    try:
        for process in processes:
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError("floor.py: a lane did not start")
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        return [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.communicate()


def run_floor(layer: Layer, layers: int, threads: int) -> dict[str, Any]:
    """Wall seconds for so many layers on so many threads; processor seconds, in all and by item."""
    lanes = min(layers, threads)
    found = run_lanes(layer, layers, lanes, 1)
    seconds = max(one["seconds"] for one in found)
    if threads > lanes:
        # Threads that wait for each other cost processor time and need not win any.
        shared = run_lanes(layer, layers, lanes, threads // lanes)
        seconds = min(seconds, max(one["seconds"] for one in shared))
    return {
        "seconds": seconds,
        "cpu_seconds": sum(one["cpu_seconds"] for one in found),
        "items": {name: sum(one["items"][name] for one in found) for name in flops(layer)},
    }


if __name__ == "__main__":
    given, count = json.loads(sys.argv[1])
    lane(Layer(**given), count)

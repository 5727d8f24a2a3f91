"""Heals a converted checkpoint: trains its attention until it says again what the source says.

    python examples/heal/heal.py SOURCE CONVERTED -o HEALED --tokens tokens.npy

SOURCE is the checkpoint that was converted, CONVERTED a folder that `relatent convert` wrote (any
form and any layout that transformers loads), tokens.npy the tokens of ordinary text in one row, as
`relatent calibrate` reads them. Only the matrices of the attention are trained; the loss is the
divergence KL(source || healed) of the next token, averaged over positions. HEALED is the folder
CONVERTED with other numbers in those tensors, so whatever reads the one reads the other;
`relatent verify SOURCE HEALED` measures what was won. HEALED/healing_report.json says how it went.

One GPU is enough for what fits on it as weights of the source in their own type, weights of the
converted model in float32, and 16 bytes for every trained weight. Without a GPU it runs on the
processor, for small models.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import AutoModelForCausalLM, PreTrainedModel

# What a step moves a weight by at most, about, relative to the size that weights have at its place.
DEFAULT_RATE = 5e-3
# Share of the steps that the rate rises in.
WARM_UP = 0.03
FIRST_MOMENT, SECOND_MOMENT = 0.9, 0.95
REPORT = "healing_report.json"
# What convert measured of the weights that are replaced here.
STALE = ("conversion_report.json",)


class Refused(Exception):
    """What the user has to change, in one sentence."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="checkpoint that was converted")
    parser.add_argument("converted", type=Path, help="folder that relatent convert wrote")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="folder to make; must not exist"
    )
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of token ids to train on")
    parser.add_argument(
        "--validation", type=Path, help=".npy of token ids to report on, never trained on"
    )
    parser.add_argument("--validation-sequences", type=int, default=64, metavar="N")
    parser.add_argument(
        "--length", type=int, default=1024, metavar="N", help="tokens of a sequence"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="sequences of a step")
    parser.add_argument("--steps", type=int, metavar="N", help="steps (default: all tokens once)")
    parser.add_argument(
        "--rate", type=float, default=DEFAULT_RATE, help="largest step, relative to a tensor's size"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def read_tokens(path: Path, length: int, vocabulary: int) -> torch.Tensor:
    """[sequences, length], as many whole sequences as there are."""
    try:
        ids = np.load(path, allow_pickle=False).reshape(-1)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} is not a .npy file of token ids: {error}") from error
    if not np.issubdtype(ids.dtype, np.integer):
        raise Refused(f"{path} holds {ids.dtype}, not token ids")
    sequences = len(ids) // length
    if sequences == 0:
        raise Refused(f"{path} has {len(ids)} tokens, fewer than --length {length}")
    if ids.max() >= vocabulary or ids.min() < 0:
        raise Refused(f"{path} has token {ids.max()}, but the vocabulary ends at {vocabulary - 1}")
    cut = ids[: sequences * length].astype(np.int64).reshape(sequences, length)
    return torch.from_numpy(cut)


def load(folder: Path, dtype: torch.dtype | str, device: str) -> PreTrainedModel:
    if not (folder / "config.json").is_file():
        raise Refused(f"{folder} is not a checkpoint folder: it has no config.json")
    # Folders of the relatent layout bring their model as Python files, which convert put there.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    return model.to(device).eval().requires_grad_(False)


class Sized(nn.Module):
    """A matrix as numbers around 1 times the sizes of its rows and columns.

    Latents are stored in units that differ by orders of magnitude, and some layouts store a constant
    beside them; with steps of one size for a whole matrix the small ones would drown in them. What
    is zero, such as coordinates that only fill a kernel's width, stays zero.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        square = weight.detach().double().square()
        rows, columns = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
        size = (rows * columns / square.mean().clamp(min=1e-300)).sqrt()
        self.register_buffer("size", size.to(weight.dtype), persistent=False)

    def forward(self, relative: torch.Tensor) -> torch.Tensor:
        return relative * self.size

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.where(self.size > 0, weight / self.size.clamp(min=1e-30), 0)


def attention_maps(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules of attention that multiply by a matrix, by the name of that."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if ".self_attn." in name and getattr(module, "weight", torch.empty(0)).dim() == 2
    }


def total_divergence(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """KL(wanted || found) of log-probabilities, summed over positions."""
    return functional.kl_div(found, wanted, reduction="sum", log_target=True)


def token_log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return functional.log_softmax(logits.float(), dim=-1)


class Healing:
    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.source = load(options.source, "auto", options.device)
        self.student = load(options.converted, torch.float32, options.device)
        vocabulary = self.source.config.vocab_size
        if self.student.config.vocab_size != vocabulary:
            raise Refused(
                f"{options.converted} has a vocabulary of {self.student.config.vocab_size} and "
                f"{options.source} of {vocabulary}: it was not made from this source"
            )
        self.sequences = read_tokens(options.tokens, options.length, vocabulary)
        self.held_out = None
        if options.validation:
            kept = read_tokens(options.validation, options.length, vocabulary)
            self.held_out = kept[: options.validation_sequences]
        if len(self.sequences) < options.batch:
            raise Refused(
                f"{options.tokens} has {len(self.sequences)} sequences, fewer than --batch"
            )
        self.steps = options.steps or len(self.sequences) // options.batch
        self.maps = attention_maps(self.student)
        self.log: list[dict[str, float]] = []
        self.start = time.monotonic()

    def precision(self) -> Any:
        if self.options.device.startswith("cuda"):
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return nullcontext()

    def batches(self) -> Iterator[torch.Tensor]:
        """Every sequence once, in an order of its own, and so on."""
        order = torch.Generator().manual_seed(self.options.seed)
        while True:
            mixed = self.sequences[torch.randperm(len(self.sequences), generator=order)]
            for batch in mixed.split(self.options.batch):
                if len(batch) == self.options.batch:
                    yield batch.to(self.options.device)

    def divergence(self, ids: torch.Tensor) -> torch.Tensor:
        """KL(source || healed) per position, in nats."""
        with self.precision():
            with torch.no_grad():
                wanted = token_log_probabilities(self.source(ids, use_cache=False).logits)
            found = token_log_probabilities(self.student(ids, use_cache=False).logits)
        return total_divergence(wanted, found) / ids.numel()

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """On validation tokens: nats lost per token, and KL(source || healed)."""
        assert self.held_out is not None
        lost = divergence = 0.0
        predicted = 0
        for ids in self.held_out.split(self.options.batch):
            ids = ids.to(self.options.device)
            with self.precision():
                logits = [m(ids, use_cache=False).logits for m in (self.source, self.student)]
            wanted, found = (token_log_probabilities(x[:, :-1]) for x in logits)
            following = ids[:, 1:, None]
            lost += (wanted - found).gather(-1, following).sum().item()
            divergence += total_divergence(wanted, found).item()
            predicted += following.numel()
        return {"nats": lost / predicted, "kl": divergence / predicted}

    def report(self, step: int) -> None:
        row = {
            "tokens": step * self.options.batch * self.options.length,
            "seconds": round(time.monotonic() - self.start, 1),
            **self.measure(),
        }
        self.log.append(row)
        print(
            f"{row['tokens']:>12,} tokens: {row['nats']:.4f} nats lost, KL {row['kl']:.4f}"
            f"  ({row['seconds']:.0f} s)",
            flush=True,
        )

    def rate(self, step: int) -> float:
        """Rises to 1 in a few steps and falls to 0 as half a cosine."""
        rising = max(1, round(WARM_UP * self.steps))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, self.steps - rising)))

    def train(self) -> None:
        for module in self.maps.values():
            parametrize.register_parametrization(module, "weight", Sized(module.weight))
        trained = [module.parametrizations.weight.original for module in self.maps.values()]
        for parameter in trained:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            trained,
            lr=self.options.rate,
            betas=(FIRST_MOMENT, SECOND_MOMENT),
            weight_decay=0.0,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.rate)
        if self.held_out is not None:
            self.report(0)
        due = 16
        for step, ids in enumerate(self.batches(), start=1):
            loss = self.divergence(ids)
            if not torch.isfinite(loss):
                raise Refused(f"the loss is {loss.item()} at step {step}; try a smaller --rate")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if step == due or step == self.steps:
                due *= 2
                if self.held_out is not None:
                    self.report(step)
                else:
                    print(f"step {step} of {self.steps}: KL {loss.item():.4f}", flush=True)
            if step == self.steps:
                break


def write_weights(file: Path, output: Path, maps: dict[str, nn.Module]) -> set[str]:
    """A weight file with the trained matrices in it, in the types that they had; their names."""
    tensors = {}
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
        for name in stored.keys():
            tensor = stored.get_tensor(name)
            if name in maps:
                tensor = maps[name].weight.detach().to("cpu", tensor.dtype).contiguous()
            tensors[name] = tensor
    save_file(tensors, output, metadata=metadata)
    return tensors.keys() & maps.keys()


def write_folder(healing: Healing) -> None:
    """The converted folder with the trained tensors; under its name only when it is whole."""
    options = healing.options
    partial = options.output.with_name(options.output.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    written: set[str] = set()
    for file in sorted(options.converted.iterdir()):
        if file.suffix == ".safetensors":
            written |= write_weights(file, partial / file.name, healing.maps)
        elif file.is_file() and file.name not in STALE:
            shutil.copyfile(file, partial / file.name)
    missing = sorted(healing.maps.keys() - written)
    if missing:
        raise Refused(f"{options.converted} holds no tensor {missing[0]}: its files are not whole")
    report = {
        "source": str(options.source),
        "converted": str(options.converted),
        "trained_tensors": len(written),
        "tokens_per_step": options.batch * options.length,
        "steps": healing.steps,
        "rate": options.rate,
        "seed": options.seed,
        "validation": healing.log,
    }
    (partial / REPORT).write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(options.output)


def main() -> None:
    options = arguments()
    if options.output.exists():
        raise Refused(f"{options.output} exists already")
    torch.manual_seed(options.seed)
    healing = Healing(options)
    healing.train()
    write_folder(healing)
    print(f"{options.output} is written; now: relatent verify {options.source} {options.output}")


if __name__ == "__main__":
    try:
        main()
    except Refused as refusal:
        sys.exit(f"heal: {refusal}")

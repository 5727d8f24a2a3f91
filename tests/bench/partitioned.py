"""Nats lost against cache per device, for the forms that devices can split.

Every row keeps the same elements per token and layer on each device: relatent's own TPLA and
MLRA (shared key, split value), GLA, TPLA's two published orders, and MLA, whose one latent every
device holds whole. All get the same calibration file and validation tokens, and all but
`--no-refit` rows the same refit of o_proj. Sizes are those of --sizes where it names them, and
otherwise chosen by relatent on the calibration tokens.

  tests/bench/partitioned.py --model M --devices 4 --per-device 128,96,64
  tests/bench/partitioned.py --model M --devices 4 --per-device 96 --sizes 96:32+32

For an MLA source the published slices keep all of its latent, so give the numbers that leaves:
  tests/bench/partitioned.py --model deepseek --devices 2 --per-device 96
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from runner import Failure, Row, Runner, parser_of


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument("--per-device", default="128,96,64", help="elements per token and layer")
    parser.add_argument("--forms", default="tpla,mlra,gla,pca,hadamard,mla")
    parser.add_argument(
        "--sizes", action="append", default=[], help="PER:ROTARY+SHARED, for tpla and mlra"
    )
    parser.add_argument("--rope-dim", type=int, help="rotary size of gla, mla and the orders")
    parser.add_argument("--extra", default="", help="further options of `relatent convert`")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


class Bench(Runner):
    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        super().__init__(options)
        self.folder = folder
        self.config = json.loads((options.model / "config.json").read_text())
        self.latent = "kv_lora_rank" in self.config
        self.calibration = folder / "calibration.h5"
        self.sizes = dict(size.split(":") for size in options.sizes)

    def form(self, form: str, per_device: int) -> list[Any] | None:
        """Options that give a form with so many elements on each device; None where it cannot."""
        devices = self.options.devices
        if self.latent:
            rotary = self.config["qk_rope_head_dim"]
        else:
            rotary = self.options.rope_dim or max(16, per_device // 3 // 16 * 16)
        if form in ("tpla", "mlra", "gla"):
            if form == "mlra" and devices not in (2, 4):
                return None
            # MLRA-2 makes four latents of its own.
            out = ["--to", form, "--branches", devices, "--per-device", per_device]
            if form != "gla" and str(per_device) in self.sizes:
                rope, shared = self.sizes[str(per_device)].split("+")
                out += ["--rope-dim", rope, "--key-rank", shared]
            elif form == "gla" and not self.latent:
                out += ["--rope-dim", rotary]
            return out
        if form in ("pca", "hadamard"):
            rank = devices * (per_device - rotary)
            if self.latent and rank != self.config["kv_lora_rank"]:
                return None
            out = ["--to", "tpla", "--branches", devices, "--rank", rank, "--order", form]
            return out if self.latent else [*out, "--rope-dim", rotary]
        if form == "mla" and not self.latent:
            return ["--to", "mla", "--rope-dim", rotary, "--rank", per_device - rotary]
        return None

    def measure(self, form: str, per_device: int, *more: Any) -> Row | None:
        options = self.form(form, per_device)
        if options is None:
            return None
        out = self.folder / "converted"
        words = ["convert", self.options.model, "-o", out, "--calibration", self.calibration]
        report = self.relatent(*words, *options, *more, *self.options.extra.split())
        found = self.verify(out)
        config = json.loads((out / "config.json").read_text())
        shutil.rmtree(out)
        return {
            "form": form,
            "options": " ".join(map(str, (*options, *more))),
            "per_device": per_device,
            "rope_dim": report["rope_dim"],
            "kv_rank": report["kv_rank"],
            "shared": config.get("latent_shared_ranks", []),
            "nats": found["nats"],
            "perplexity": found["converted_ppl"],
            "source_perplexity": found["source_ppl"],
            "bytes_per_device": found["kv_bytes_per_token"]["per_device"].get(
                str(self.options.devices)
            ),
            "seconds": report["seconds"],
        }


def describe(row: Row) -> str:
    shared = f", {row['shared'][0]} shared" if row["shared"] else ""
    return (
        f"{row['per_device']:>6}  {row['form']:<20} {row['nats']:>9.4f} {row['perplexity']:>10.3f}"
        f"   rotary {row['rope_dim']} + latents {row['kv_rank']}{shared}"
        f"   {row['seconds']:.0f} s"
    )


def main() -> int:
    options = arguments()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        bench.calibrate(bench.calibration)
        print(f"{options.model}, {options.devices} devices; nats lost, perplexity, sizes, time")
        for per_device in map(int, options.per_device.split(",")):
            for form in options.forms.split(","):
                variants = [()]
                if form in ("pca", "hadamard"):
                    variants = [("--no-refit",), ()]
                for more in variants:
                    row = bench.measure(form, per_device, *more)
                    if row is None:
                        continue
                    if form in ("pca", "hadamard"):
                        row["form"] = f"tpla {form}" + (" as is" if more else "")
                    rows.append(row)
                    print(describe(row), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        print(f"partitioned.py: {str(failure).splitlines()[-1]}", file=sys.stderr)
        sys.exit(1)

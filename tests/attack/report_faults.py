"""Faults of conversion_report.json, and of the source that it was made from."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from config_faults import EDITS as CONFIG_EDITS
from faults import (
    FUNCTION,
    PREDICTION,
    REFUSED,
    SAID,
    STRUCTURE,
    Edit,
    Fault,
    Subject,
    change_one_byte,
    delete,
    edit_json,
    in_part,
    put,
    setting,
    without,
    write,
)
from folders import REPORT, Json, seal
from tensor_faults import edited as edited_tensor
from tensor_faults import moved, scaled


def edited(where: str, what: str, edit: Edit, *caught_by: str) -> Iterator[Fault]:
    """As it is, which the report's own checksum must give away, and with that checksum forged."""
    yield Fault("report", what, where, edit_json(REPORT, edit), (STRUCTURE,))

    def sealed(report: Json) -> None:
        edit(report)
        seal(report)

    yield Fault("report", what, where, edit_json(REPORT, sealed), caught_by, is_forged=True)


def report_faults(subject: Subject) -> Iterator[Fault]:
    report = subject.original.report
    if report is None:
        return
    yield from whole_report_faults(subject, report)
    yield from entry_faults(report)
    yield from checksum_faults(report)
    if report["probe"] is not None:
        yield from probe_faults(report["probe"], subject.source.config["vocab_size"])


def whole_report_faults(subject: Subject, report: Json) -> Iterator[Fault]:
    yield Fault("report", "deleted", REPORT, delete(REPORT), (SAID,))
    contents: dict[str, str | bytes] = {
        "empty": "",
        "cut short": json.dumps(report)[:-40],
        "a list": "[]",
        "a number": "1",
        "an empty object": "{}",
        "not UTF-8": b'{"method": "\xff"}',
        "deeply nested": "[" * 100000,
        "two documents": json.dumps(report) * 2,
    }
    for what, text in contents.items():
        yield Fault("report", what, REPORT, write(REPORT, text), (STRUCTURE,))
    other = subject.other.report if subject.other else None
    if other is None:
        return
    yield Fault(
        "report", "of another conversion", REPORT, write(REPORT, json.dumps(other)), (STRUCTURE,)
    )
    if report["probe"] and other["probe"]:
        figures = setting("probe", other["probe"])
        yield from edited("probe", "of another conversion", figures, PREDICTION)


def entry_faults(report: Json) -> Iterator[Fault]:
    """What it says of how the conversion was made."""
    wrong: dict[str, tuple[Any, ...]] = {
        "format_version": (0, 2, "1"),
        "written_by": ("relatent 0.0.1", 3),
        "method": ("another", "lossless", "transmla", 3),
        "form": ("another", "mla", "tpla"),
        "engine": ("another", "relatent", "deepseek"),
        "dtype": ("F64", "F16", "another"),
        "source_config": ("0" * 32, 3),
        "files": ({}, []),
        "tensors": ({}, []),
    }
    for key, values in wrong.items():
        yield from edited(key, "missing", without(key), STRUCTURE)
        for value in values:
            if value != report.get(key):
                edit, what = setting(key, value), f"is {json.dumps(value)}"
                # What claims to be lossless, or of a type, is also measured by that.
                claims = (FUNCTION,) if value == "lossless" or key == "dtype" else ()
                yield from edited(key, what, edit, STRUCTURE, *claims)


def checksum_faults(report: Json) -> Iterator[Fault]:
    tensor = next(iter(report["tensors"]))
    for part, name in (("tensors", tensor), *(("files", name) for name in report["files"])):
        digits = report[part][name]
        edits: dict[str, Edit] = {
            "another checksum": setting(name, ("2" if digits[0] == "1" else "1") + digits[1:]),
            "no checksum": setting(name, "xyz"),
            "a number for a checksum": setting(name, 5),
            "without its checksum": without(name),
        }
        for what, edit in edits.items():
            yield from edited(f"{part} {name}", what, in_part(part, edit), STRUCTURE, REFUSED)
    for part in ("tensors", "files"):
        edit = in_part(part, setting("model.more", "0" * 32))
        yield from edited(part, "a checksum of what is not there", edit, STRUCTURE)


def probe_faults(probe: Json, vocabulary: int) -> Iterator[Fault]:
    def probed(where: str, what: str, edit: Edit) -> Iterator[Fault]:
        edit = in_part("probe", edit)
        return edited(f"probe {where}", what, edit, PREDICTION, STRUCTURE)

    yield from edited("probe", "null", setting("probe", None), SAID)
    yield from edited("probe", "missing", without("probe"), STRUCTURE)
    no_probes: tuple[Any, ...] = ({}, [], "none")
    for value in no_probes:
        edit = setting("probe", value)
        yield from edited("probe", f"is {json.dumps(value)}", edit, STRUCTURE, PREDICTION)
    tokens = list(probe["tokens"])
    wrong: dict[str, list[Any]] = {
        "one changed": [*tokens[:5], (tokens[5] + 1) % vocabulary, *tokens[6:]],
        "the last one changed": [*tokens[:-1], (tokens[-1] + 1) % vocabulary],
        "reversed": tokens[::-1],
        "fewer": tokens[: len(tokens) // 2],
        "none": [],
        "one alone": tokens[:1],
        "beyond the vocabulary": [*tokens[:-1], vocabulary],
        "negative": [*tokens[:-1], -1],
        "beyond every integer": [*tokens[:-1], 2**63],
        "no numbers": [str(token) for token in tokens],
        "fractions": [token + 0.5 for token in tokens],
        "very many": tokens * 4000,
    }
    for what, values in wrong.items():
        yield from probed("tokens", what, setting("tokens", values))
    for figure in ("nats", "mean_kl", "rel_logit_error"):
        for what, edit in figure_edits(figure, probe[figure]):
            yield from probed(figure, what, edit)
    for layer in sorted({0, len(probe["layers"]) - 1}):
        for figure in ("attention_rel_error", "residual_rel_error"):
            for what, edit in figure_edits(figure, probe["layers"][layer][figure]):
                where = f"layer {layer} {figure}"
                yield from probed(where, what, in_layer_entry(layer, edit))
    yield from probed("layers", "one less", lambda probe: probe["layers"].pop())
    yield from probed(
        "layers", "one more", lambda probe: probe["layers"].append(probe["layers"][0])
    )
    yield from probed("layers", "in another order", lambda probe: probe["layers"].reverse())


def in_layer_entry(layer: int, edit: Edit) -> Edit:
    return lambda probe: edit(probe["layers"][layer])


def figure_edits(figure: str, value: float) -> Iterator[tuple[str, Edit]]:
    size = max(abs(value), 1e-4)
    wrong: dict[str, Any] = {
        "a hundredth more": value + size * 1e-2,
        "a thousandth less": value - size * 1e-3,
        "zero": 0.0,
        "of the other sign": -value,
        "null": None,
        "a text": str(value),
        "huge": 1e300,
    }
    for what, other in wrong.items():
        if other != value:
            yield what, setting(figure, other)
    yield "missing", without(figure)


def source_faults(subject: Subject) -> Iterator[Fault]:
    """The source is edited after the conversion: what was written is not its conversion."""
    tensors = subject.source.tensors
    for part, caught_by in {
        "self_attn.k_proj.weight": subject.running,
        "self_attn.v_proj.weight": subject.running,
        "self_attn.kv_b_proj.weight": subject.running,
        "self_attn.o_proj.weight": subject.running,
        "mlp.down_proj.weight": (STRUCTURE,),
        "input_layernorm.weight": (STRUCTURE,),
    }.items():
        name = next((name for name in tensors if name.endswith(part)), None)
        if name is None or not caught_by:
            continue
        for what, edit in {"scaled a little": scaled, "rows moved by one": moved}.items():
            change = put(partial(edited_tensor, edit, name, tensors[name]))
            yield Fault("source", what, name, change, caught_by, on_source=True)
    for key in ("rope_theta", "rms_norm_eps", "max_position_embeddings", "bos_token_id", "layers"):
        what, edit_config = next(iter(CONFIG_EDITS[key].items()))
        where = f"config.json {key}"
        caught_by = (STRUCTURE, REFUSED, *subject.running)
        change = edit_json("config.json", edit_config)
        yield Fault("source", what, where, change, caught_by, on_source=True)
    yield Fault(
        "source",
        "one byte changed",
        "tokenizer.json",
        change_one_byte("tokenizer.json"),
        (STRUCTURE,),
        on_source=True,
    )

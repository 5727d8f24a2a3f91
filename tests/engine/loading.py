"""Loads written folders as a user would, for test_loading.py, which looks at what is said.

Arguments: for each folder a way to load it, its name and its path. Nothing but a heading for each
is written to stderr here; standard input must be a file, of which nothing may be read.
"""

import sys
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils.logging import disable_progress_bar

TEXT = "def rotate(x, cos, sin):\n    return  x * 'Straße' + 12345\n"


def check_tokenizer(tokenizer: Any, folder: str) -> None:
    expected = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(TEXT).ids
    assert tokenizer.encode(TEXT) == expected
    assert tokenizer.decode(expected) == TEXT


def load(folder: str, **options: Any) -> None:
    config = AutoConfig.from_pretrained(folder, **options)
    check_tokenizer(AutoTokenizer.from_pretrained(folder, **options), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model.config) is type(config)


def load_stock(folder: str) -> None:
    load(folder)


def load_trusted(folder: str) -> None:
    load(folder, trust_remote_code=True)


def load_registered(folder: str) -> None:
    """The code of the folder as a part of transformers; no argument says anything of it."""
    model = get_class_from_dynamic_module("modeling_relatent.RelatentForCausalLM", folder)
    AutoConfig.register("relatent", model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)
    load(folder)


def load_tokenizer_alone(folder: str) -> None:
    check_tokenizer(PreTrainedTokenizerFast.from_pretrained(folder), folder)


def load_untrusted(folder: str) -> None:
    """Whoever does not trust the code still has the tokenizer."""
    check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), folder)


WAYS: dict[str, Callable[[str], None]] = {
    "stock": load_stock,
    "trusted": load_trusted,
    "untrusted": load_untrusted,
    "tokenizer": load_tokenizer_alone,
    "registered": load_registered,
}


def main(arguments: list[str]) -> None:
    disable_progress_bar()
    for way, name, folder in zip(arguments[::3], arguments[1::3], arguments[2::3], strict=True):
        print(f"== {way} {name}", file=sys.stderr, flush=True)
        WAYS[way](folder)
    assert sys.stdin.buffer.raw.tell() == 0, "standard input was read"


if __name__ == "__main__":
    main(sys.argv[1:])

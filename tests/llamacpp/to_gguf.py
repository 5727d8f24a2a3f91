"""llama.cpp's own converter, told what it cannot recognise about a tokenizer of unknown origin.

It wants to know how a tokenizer cuts text into pieces before merging, and finds out by the hash
of one encoded string, which only vocabularies that it has seen can match. The tokenizers of the
tests cut like GPT-2's: `ByteLevel` with its own expression, as their tokenizer.json says.
Everything else is the converter as it came, from where tests/run.sh has unpacked it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(sys.prefix, "share/llama.cpp")))

import convert_hf_to_gguf
from conversion import TextModel

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()

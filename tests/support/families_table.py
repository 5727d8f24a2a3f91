"""The README's table of families, made of what `relatent families` says.

`python3 tests/support/families_table.py` writes it anew, with the program that RELATENT_BIN names
or else the one in build/release.
"""

import json
import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end of families -->)", re.DOTALL)


def table(families: list[dict[str, str]]) -> str:
    """Of those that are converted."""
    lines = ["| `model_type` | models | beside Llama's parts |", "|---|---|---|"]
    for family in families:
        if family["use"] == "source":
            lines.append(
                f"| `{family['model_type']}` | {family['models']} | {family['features']} |"
            )
    return "\n".join(lines).replace("|  |", "| |") + "\n"


def shown() -> str:
    found = BLOCK.search(README.read_text())
    assert found, "README.md has no table of families"
    return found[0]


def main() -> None:
    program = os.environ.get("RELATENT_BIN", ROOT / "build/release/cli/relatent")
    done = subprocess.run([program, "families", "--json"], capture_output=True, check=True)
    new = table(json.loads(done.stdout))
    README.write_text(BLOCK.sub(lambda _: new, README.read_text()))


if __name__ == "__main__":
    main()

"""Whether the includes of the C++ code go the ways that docs/architecture.md allows.

    python3 tests/check_includes.py

Reads the table of rooms there. Exit status 1 names every include that crosses, and every room that the table
lacks.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("linalg", "formats", "convert", "cli")
# How one backend works, and who chooses it.
PRIVATE = "convert/compute/cpu/"
CHOOSER = "convert/compute/backend.cc"
BELOW = {"linalg": set(), "formats": {"linalg"}}


def allowed() -> dict[str, set[str]]:
    """What each room may include besides itself."""
    out = {room: set(rooms) for room, rooms in BELOW.items()}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 5 and re.fullmatch(r"`(convert/\w+|cli)`", cells[1]):
            out[cells[1].strip("`")] = set(re.findall(r"`([\w/]+)`", cells[3])) | {"formats", "linalg"}
    out["cli"] |= {room for room in out if room != "cli"}
    return out


def room_of(path: str) -> str:
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "convert" else parts[0]


def circle(rules: dict[str, set[str]]) -> list[str]:
    """Rooms that the table lets include each other, directly or not."""
    reach = {room: set(rooms) for room, rooms in rules.items()}
    for _ in rules:
        for room in rules:
            reach[room] |= set().union(*(reach.get(other, set()) for other in reach[room]))
    return sorted(room for room in rules if room in reach[room])


def main() -> None:
    rules = allowed()
    wrong = [f"docs/architecture.md lets {room} include itself in a circle" for room in circle(rules)]
    count = 0
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix not in (".h", ".cc"):
                continue
            name = path.relative_to(ROOT).as_posix()
            here = room_of(name)
            if here not in rules:
                wrong.append(f"{name}: docs/architecture.md has no room {here}")
                continue
            for target in re.findall(r'#include "((?:linalg|formats|convert|cli)/[^"]+)"', path.read_text()):
                count += 1
                if room_of(target) != here and room_of(target) not in rules[here]:
                    wrong.append(f"{name} includes {target}: {here} may not include {room_of(target)}")
                elif target.startswith(PRIVATE) and not name.startswith(PRIVATE) and name != CHOOSER:
                    wrong.append(f"{name} includes {target}: only {CHOOSER} may include {PRIVATE}")
    print("\n".join(wrong) if wrong else f"{count} includes go the ways that docs/architecture.md allows")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env bash
# The benchmark of scale in one go: builds what is missing, makes checkpoints of published shapes in
# a temporary folder, and leaves bench.json, bench.md and, with matplotlib, bench.svg in a folder.
#
#   tests/bench/run.sh [FOLDER] [options of scale.py]      FOLDER is build/bench unless given
#
# PYTHON names the interpreter (default python3; tests/run.sh keeps one with all it needs in ~/.cache/relatent),
# RELATENT_BIN a binary, TMPDIR where the checkpoints go: about 9 GB as the options stand.
set -euo pipefail
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/setup.sh"
out="$ROOT/build/bench"
if (($# > 0)) && [[ "$1" != -* ]]; then
  out="$(realpath -m "$1")"
  shift
fi
cd "$ROOT"

python="${PYTHON:-python3}"
missing=()
for module in numpy scipy torch transformers; do
  if ! "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)"; then
    missing+=("$module")
  fi
done
if ((${#missing[@]} > 0)); then
  cat >&2 <<TEXT
$python lacks ${missing[*]}. In an environment of its own, for example:
  python3 -m venv .venv
  .venv/bin/pip install -r tests/engine/requirements.txt -r tests/bench/requirements.txt
TEXT
  exit 2
fi

binary="${RELATENT_BIN:-$ROOT/build/release/cli/relatent}"
if [[ ! -x "$binary" ]]; then
  if [[ -n "${RELATENT_BIN:-}" ]]; then
    echo "$binary is not a program" >&2
    exit 2
  fi
  build_release relatent
fi

# Under other names until all is there, so that an interrupted run leaves the last one's result.
mkdir -p "$out"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
"$python" tests/bench/scale.py --relatent "$binary" --work "$work" --json "$work/bench.json" "$@" \
  | tee "$work/bench.md"
if "$python" -c "import matplotlib" 2>/dev/null; then
  if grep -q '"growth": {' "$work/bench.json"; then
    "$python" tests/bench/plot_scale.py "$work/bench.json" -o "$work/bench.svg"
    mv "$work/bench.svg" "$out/"
  fi
else
  echo "no matplotlib: no bench.svg" >&2
fi
mv "$work/bench.json" "$work/bench.md" "$out/"
echo "results in $out" >&2

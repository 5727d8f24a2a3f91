#!/usr/bin/env bash
# Installs what is missing, builds, and runs every test. Safe to run again.
# RELATENT_MODELS may name a folder with models/ and tokens/ of larger checkpoints for the engine tests.
set -euo pipefail
if [[ -n "${RELATENT_MODELS:-}" ]]; then
  RELATENT_MODELS="$(realpath "$RELATENT_MODELS")"
  export RELATENT_MODELS
fi
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$ROOT"

# The engine tests' own Python, made anew whenever what it should hold changes.
make_python() {
  local requirements=tests/engine/requirements.txt
  local stamp=.venv/requirements.sha256
  local wanted
  wanted="$(cat "$requirements" <(python3 --version) | sha256sum)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    return
  fi
  step "make .venv" python3 -m venv --clear .venv
  # torch goes first and alone, so that this one step can be pointed at the index of CPU builds
  # (TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu); several GB of CUDA come along otherwise.
  step "install torch" .venv/bin/pip install --quiet \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' "$requirements")"
  step "install the rest" .venv/bin/pip install --quiet -r "$requirements"
  printf '%s\n' "$wanted" >"$stamp"
}

install_packages "${BUILD_PACKAGES[@]}" python3 python3-venv
build_release all
step "unit tests" ctest --preset release
make_python
step "engine tests" env RELATENT_BIN="$ROOT/build/release/cli/relatent" \
  .venv/bin/python -m pytest tests/engine

printf '\nall tests passed\n'

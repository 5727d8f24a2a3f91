#!/usr/bin/env bash
# Installs what is missing, builds, lints, and runs every test but tests/package.sh. Safe to run again.
#
# RELATENT_MODELS may name a folder with models/ and tokens/ of larger checkpoints, which then take part; without it small
# ones stand in that the tests make. Where small sets of tests stand for large ones, the output says what was left out;
# RELATENT_FULL=1 runs all.
# RELATENT_CACHE names where the Python environments are kept (default ~/.cache/relatent, about 6 GB).
set -euo pipefail
if [[ -n "${RELATENT_MODELS:-}" ]]; then
  RELATENT_MODELS="$(realpath "$RELATENT_MODELS")"
  export RELATENT_MODELS
fi
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$ROOT"
export RELATENT_BIN="$ROOT/build/release/cli/relatent"

# llama.cpp's converter comes in no package but as a part of this one's source, of which nothing is built.
unpack_converter() {
  step "download llama.cpp's converter" "$1/bin/pip" download --quiet --no-deps --dest "$1/source" \
    --no-binary llama-cpp-python llama-cpp-python==0.3.36
  mkdir -p "$1/share/llama.cpp"
  step "unpack it" tar -xzf "$1"/source/*.tar.gz -C "$1/share/llama.cpp" --strip-components=3 --wildcards \
    '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
  rm -r "$1/source"
}

# vLLM brings these along, built for another torch, and needs none of them.
drop_builds_for_another_torch() {
  step "uninstall what fits another torch" "$1/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
}

# Runs pytest in the environment made last.
run_tests() {
  step "$1" "$ENVIRONMENT/bin/python" -m pytest "${@:2}"
}

install_packages "${BUILD_PACKAGES[@]}" python3 python3-venv
build_release all
step "includes go one way" python3 tests/check_includes.py
step "unit tests" ctest --preset release
step "install" cmake --install build/release --prefix build/install
step "the installed program" build/install/bin/relatent --version
step "lint" tests/lint.sh

make_python transformers unpack_converter tests/engine/requirements.txt tests/llamacpp/requirements.txt
run_tests "engine tests: pinned transformers" tests/engine
run_tests "llama.cpp tests" tests/llamacpp

step "attacks, for a short while" env PYTHON="$ENVIRONMENT/bin/python" tests/attack/run.sh short

make_python transformers-newest true tests/engine/requirements-newest.txt
if [[ "${RELATENT_FULL:-}" == 1 ]]; then
  run_tests "engine tests: newest transformers" tests/engine
else
  printf '\nnewest transformers: what loads and runs folders, llama-3m ONLY; RELATENT_FULL=1 runs all\n'
  (
    unset RELATENT_MODELS
    run_tests "engine tests: newest transformers" -k "not made-" \
      tests/engine/test_{loading,lossless,compressed,custom_code,tensor_parallel}.py
  )
fi

make_python vllm drop_builds_for_another_torch tests/serving/requirements.txt
run_tests "serving tests" tests/serving

printf '\nall tests passed\n'

#!/usr/bin/env bash
# From a fresh clone to a converted checkpoint and the proof of how close it is. Safe to run again.
# With RELATENT_BIN, an installed program, nothing is built: RELATENT_BIN=relatent examples/quickstart.sh
set -euo pipefail
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [[ -n "${RELATENT_BIN:-}" ]]; then
  relatent="$(realpath "$(command -v "$RELATENT_BIN")")" || {
    echo "$RELATENT_BIN (RELATENT_BIN) is not a program" >&2
    exit 2
  }
fi
cd "$ROOT"

if [[ -z "${RELATENT_BIN:-}" ]]; then
  install_packages "${BUILD_PACKAGES[@]}"
  build_release relatent
  relatent=build/release/cli/relatent
fi

model=examples/llama-3m
out=examples/out
rm -rf "$out"
mkdir "$out"

step "what the source is and what its cache costs" \
  "$relatent" inspect "$model"

step "rewrite it without loss: the same cache, the same output" \
  "$relatent" convert "$model" -o "$out/lossless" --method lossless --quiet

step "how close that is" \
  "$relatent" verify "$model" "$out/lossless" --tokens examples/tokens/validation.npy --sequences 16 --quiet

step "run the source over tokens once and keep what compression needs" \
  "$relatent" calibrate "$model" --tokens examples/tokens/calibration.npy -o "$out/calibration.h5" --quiet

step "rewrite it with half of the cache" \
  "$relatent" convert "$model" -o "$out/half" --kv-budget 0.5 \
  --calibration "$out/calibration.h5" --quiet

step "what that costs before any training" \
  "$relatent" verify "$model" "$out/half" --tokens examples/tokens/validation.npy --sequences 16 --quiet

printf '\n%s\n' "Both folders in $out load with transformers' AutoModelForCausalLM.from_pretrained as they are."

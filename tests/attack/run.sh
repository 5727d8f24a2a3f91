#!/usr/bin/env bash
# Attacks: what the unit tests would not think of. Each command builds what it needs and may be run again at any time.
#
#   tests/attack/run.sh fuzz [--seconds N] [TARGET]...
#       fuzzes the readers of outside data, N seconds each (default 60): all targets (tests/attack/fuzz/*.cc) unless some
#       are named. What was learnt stays in build/fuzz/corpus and is where the next run begins. Ends with a table, and
#       exits with 1 when there is a finding; the table then names the file that brings it about again.
#   tests/attack/run.sh planted_faults|false_alarms|crashes|mutate_calibration|mutate_resume [ARGUMENT]...
#       builds the program and runs the script of that name, whose arguments --help tells.
#   tests/attack/run.sh short
#       all but the fuzzers for a short while, as tests/run.sh does; it needs the program built and PYTHON, an
#       environment with tests/engine/requirements.txt (default: made here).
set -euo pipefail
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../../examples/setup.sh"
cd "$ROOT"
jobs="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"
fuzz="build/fuzz/tests/attack/fuzz"

usage() {
  sed -n '/^#   /,/^[^#]/ { /^#/ s/^# \{0,3\}//p }' "${BASH_SOURCE[0]}"
}

fuzz_targets() {
  grep -l LLVMFuzzerTestOneInput tests/attack/fuzz/*.cc | xargs basename -s .cc
}

# The last number that a pattern with one group finds in a log; - where there is none.
last_number() {
  local found
  found="$(sed -n "s/.*$1.*/\1/p" "$2" | tail -n 1)"
  echo "${found:--}"
}

# Fuzzes TARGET for SECONDS; adds a line to the table. Fails on a finding.
fuzz_one() {
  local target="$1" seconds="$2" log="build/fuzz/logs/$1.log" words=() leaks=1 code=0
  mkdir -p "build/fuzz/corpus/$target" build/fuzz/findings build/fuzz/logs
  if [[ -f "build/fuzz/seeds/$target.dict" ]]; then
    words=("-dict=build/fuzz/seeds/$target.dict")
  fi
  # libhdf5 loses memory, which sends LeakSanitizer through all of it input after input; it still looks once at the end.
  if [[ "$target" == calibration_* ]]; then
    leaks=0
  fi
  RELATENT_FUZZ_FOLDER="$scratch" OPENBLAS_NUM_THREADS=1 "$fuzz/$target" -max_total_time="$seconds" -max_len=65536 \
    -timeout=20 -rss_limit_mb=3072 -malloc_limit_mb=1024 -detect_leaks="$leaks" -print_final_stats=1 "${words[@]}" \
    -artifact_prefix="build/fuzz/findings/$target-" "build/fuzz/corpus/$target" "build/fuzz/seeds/$target" \
    >"$log" 2>&1 || code=$?
  printf '%-20s %12s %8s %9s %9s  %s\n' "$target" "$(last_number 'number_of_executed_units: *\([0-9]*\)' "$log")" \
    "$(last_number 'average_exec_per_sec: *\([0-9]*\)' "$log")" "$(last_number ' cov: \([0-9]*\)' "$log")" \
    "$(last_number '(\([0-9]*\) inline 8-bit counters)' "$log")" \
    "$( ((code == 0)) || { grep -o 'Test unit written to .*' "$log" || echo "ended with $code, see $log"; })" >>"$table"
  return "$code"
}

attack_fuzz() {
  local seconds=60 targets=() known target failed=0
  while (($# > 0)); do
    case "$1" in
      --seconds)
        seconds="${2:?--seconds needs a number}"
        shift
        ;;
      -*)
        usage >&2
        exit 2
        ;;
      *) targets+=("$1") ;;
    esac
    shift
  done
  mapfile -t known < <(fuzz_targets)
  if ((${#targets[@]} == 0)); then
    targets=("${known[@]}")
  fi
  for target in "${targets[@]}"; do
    if [[ " ${known[*]} " != *" $target "* ]]; then
      echo "no such target: $target (${known[*]})" >&2
      exit 2
    fi
  done
  install_packages "${BUILD_PACKAGES[@]}" clang-14 libclang-rt-14-dev
  step "configure for fuzzing" cmake --preset fuzz
  step "build fuzz targets" cmake --build --preset fuzz -j "$jobs" --target make_seeds "${targets[@]/#/fuzz_}"
  step "write seeds" "$fuzz/make_seeds" tests/attack/fuzz/configs build/fuzz/seeds
  scratch="$(mktemp -d -p "$([[ -w /dev/shm ]] && echo /dev/shm || echo "${TMPDIR:-/tmp}")" relatent-fuzz-XXXXXX)"
  table="$(mktemp)"
  # shellcheck disable=SC2064
  trap "rm -rf '$scratch' '$table'" EXIT
  for target in "${targets[@]}"; do
    printf 'fuzz %s for %s s\n' "$target" "$seconds"
    fuzz_one "$target" "$seconds" || failed=1
  done
  printf '\n%-20s %12s %8s %9s %9s  %s\n' target executions "each s" edges "of" finding
  cat "$table"
  if ((failed != 0)); then
    printf '\nFINDINGS: run %s/TARGET FILE for one; logs are in build/fuzz/logs\n' "$fuzz"
  fi
  return "$failed"
}

# Runs a script beside this one.
attack() {
  step "attack: $*" "$python" "tests/attack/$1.py" "${@:2}"
}

attack_short() {
  attack planted_faults --short
  attack crashes --seconds 40
  attack mutate_calibration --seconds 30
  attack mutate_resume --seconds 30
}

# The Python that the scripts need, in the environment of the engine tests.
find_python() {
  if [[ -z "${PYTHON:-}" ]]; then
    install_packages python3 python3-venv
    make_python attack true tests/engine/requirements.txt
  fi
  python="${PYTHON:-$ENVIRONMENT/bin/python}"
}

case "${1:-}" in
  short)
    find_python
    attack_short
    ;;
  planted_faults | false_alarms | crashes | mutate_calibration | mutate_resume)
    install_packages "${BUILD_PACKAGES[@]}"
    build_release relatent
    find_python
    attack "$@"
    ;;
  fuzz)
    shift
    attack_fuzz "$@"
    ;;
  *)
    usage >&2
    exit 2
    ;;
esac

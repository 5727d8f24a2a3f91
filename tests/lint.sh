#!/usr/bin/env bash
# Formatting, static analysis and the unit tests under sanitizers, each with the versions of Debian 12.
#
#   tests/lint.sh [format|shell|tidy|sanitize]...       all four unless some are named
#
# clang-tidy takes up to a minute and a half for a file that includes Eigen. It sees the C++ files changed since the
# branch left origin's, or by the last commits where nothing has been added to origin's, newest first, and stops after
# RELATENT_TIDY_SECONDS (default 90). The sanitizers see the tests of linalg/ and formats/. What is left out is named;
# RELATENT_FULL=1 checks every file and runs every test, with every check of the preset `sanitize`.
set -euo pipefail
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
cd "$ROOT"
full="${RELATENT_FULL:-}"
jobs="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

check_format() {
  install_packages clang-format-14
  printf '\n# formatting of every C++ file\n'
  git ls-files -z '*.cc' '*.h' | xargs -0 clang-format-14 --dry-run -Werror
}

check_shell() {
  install_packages shellcheck
  printf '\n# every shell script\n'
  { git ls-files -z '*.sh' && printf '.ci/run\0'; } | xargs -0 shellcheck --external-sources
}

# The C++ files that differ from where the branch left origin's, or that the last commits changed; newest first.
changed_files() {
  local base commits=5
  git diff --name-only HEAD
  base="$(git merge-base HEAD origin/HEAD 2>/dev/null || git merge-base HEAD origin/main 2>/dev/null || true)"
  if [[ -n "$base" && "$base" != "$(git rev-parse HEAD)" ]]; then
    git log --name-only --format= "$base..HEAD"
  elif [[ "$(git rev-parse --is-shallow-repository)" == true ]]; then
    echo "a clone without history: the files of its last commit only" >&2
    git log --name-only --format= -1
  else
    echo "the files of the last $commits commits that change C++" >&2
    git log --name-only --format= -"$commits" -- '*.cc' '*.h'
  fi
}

# For a header the source of its name, or else one that includes it; clang-tidy checks a header where it is included.
source_of() {
  local file="$1"
  if [[ "$file" == *.h && -f "${file%.h}.cc" ]]; then
    echo "${file%.h}.cc"
  elif [[ "$file" == *.h ]]; then
    git grep -l --fixed-strings "#include \"$file\"" -- '*.cc' | head -n 1
  elif [[ "$file" == *.cc ]]; then
    echo "$file"
  fi
}

# Of the files on stdin those that build/release compiles, which says how; the fuzz targets are built elsewhere.
built_files() {
  local file
  while read -r file; do
    if grep -qF "\"file\": \"$ROOT/$file\"" build/release/compile_commands.json; then echo "$file"; fi
  done
}

# Checks FILE until END, seconds since 1970; writes to a file in OUT what there is to say, or that time ran out.
tidy_one() {
  local out="$1" left=$(($2 - EPOCHSECONDS)) file="$3" code=124 log
  log="$out/${file//\//+}"
  if ((left > 0)); then
    code=0
    timeout "$left" clang-tidy-14 -p build/release --quiet "$file" >"$log" 2>&1 || code=$?
  fi
  case "$code" in
    0) rm "$log" ;;
    124)
      rm -f "$log"
      echo "$file" >>"$out/unchecked"
      ;;
    *) return 1 ;;
  esac
}

check_tidy() {
  install_packages "${BUILD_PACKAGES[@]}" clang-tidy-14
  step "configure" cmake --preset release
  local changed file files=()
  if [[ "$full" == 1 ]]; then
    changed="$(git ls-files '*.cc')"
  else
    changed="$(changed_files | awk '!seen[$0]++')"
  fi
  mapfile -t files < <(while read -r file; do
    if [[ -f "$file" ]]; then source_of "$file"; fi
  done <<<"$changed" | awk '!seen[$0]++' | built_files)
  local seconds="${RELATENT_TIDY_SECONDS:-90}" failed=0 out unchecked
  if [[ "$full" == 1 ]]; then
    seconds=86400
  fi
  printf '\n# clang-tidy on %d files, for %d s at most\n' "${#files[@]}" "$seconds"
  out="$(mktemp -d)"
  if ((${#files[@]} > 0)); then
    export -f tidy_one
    # shellcheck disable=SC2016
    printf '%s\0' "${files[@]}" |
      xargs -0 -n 1 -P "$jobs" bash -c 'tidy_one "$@"' tidy "$out" "$((EPOCHSECONDS + seconds))" || failed=1
  fi
  touch "$out/unchecked"
  unchecked="$(sort "$out/unchecked")"
  rm "$out/unchecked"
  cat "$out"/* 2>/dev/null || true
  rm -r "$out"
  printf '%d of %d files checked\n' "$((${#files[@]} - $(grep -c . <<<"$unchecked" || true)))" "${#files[@]}"
  if [[ -n "$unchecked" ]]; then
    printf 'NOT CHECKED for time (RELATENT_FULL=1 or a larger RELATENT_TIDY_SECONDS does):\n%s\n' "$unchecked"
  fi
  return "$failed"
}

check_sanitize() {
  install_packages "${BUILD_PACKAGES[@]}"
  if [[ "$full" == 1 ]]; then
    step "configure with sanitizers" cmake --preset sanitize
    step "build with sanitizers" cmake --build --preset sanitize
    step "all unit tests under sanitizers" ctest --preset sanitize
    return
  fi
  # Without alignment, null, object-size and vptr, checks of every access that take a third of the compiler's time.
  local behaviour=bool,bounds,enum,float-cast-overflow,integer-divide-by-zero,nonnull-attribute,return
  behaviour+=,returns-nonnull-attribute,shift,signed-integer-overflow,unreachable,vla-bound
  printf '\nNOT CHECKED under sanitizers: the tests of convert/; null and misaligned pointers that do not crash\n'
  step "configure with sanitizers" cmake --preset sanitize -B build/lint -D "RELATENT_SANITIZE=address,$behaviour"
  step "build with sanitizers" cmake --build build/lint -j "$jobs" --target relatent_base_tests
  step "unit tests of linalg/ and formats/ under sanitizers" build/lint/tests/relatent_base_tests --gtest_brief=1
}

checks=("$@")
if ((${#checks[@]} == 0)); then
  checks=(format shell tidy sanitize)
fi
for check in "${checks[@]}"; do
  case "$check" in
    format | shell | tidy | sanitize) "check_$check" ;;
    *)
      echo "no such check: $check (format, shell, tidy, sanitize)" >&2
      exit 2
      ;;
  esac
done

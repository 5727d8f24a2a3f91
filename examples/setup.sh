# What the quick start and the test script share. Sourced by them, from any folder; ROOT is the checkout.
# shellcheck shell=bash disable=SC2034

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

BUILD_PACKAGES=(
  cmake make g++ pkg-config
  libeigen3-dev liblapacke-dev libopenblas-dev libhdf5-dev libxxhash-dev libdnnl-dev
  libcli11-dev nlohmann-json3-dev libgtest-dev libgmock-dev
)

# Says what the next command does, shows it, runs it.
step() {
  local what="$1"
  shift
  printf '\n# %s\n$' "$what"
  printf ' %q' "$@"
  printf '\n'
  "$@"
}

# Installs those of the named Debian packages that are missing; touches nothing when none is.
install_packages() {
  if ! command -v dpkg-query >/dev/null; then
    echo "not a Debian system: make sure that the equivalents of these are installed: $*"
    return
  fi
  local package missing=()
  for package in "$@"; do
    if [[ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null || true)" != installed ]]; then
      missing+=("$package")
    fi
  done
  if ((${#missing[@]} == 0)); then
    return
  fi
  echo "installing Debian packages: ${missing[*]}"
  local as_root=(env DEBIAN_FRONTEND=noninteractive)
  if ((EUID != 0)); then
    as_root=(sudo "${as_root[@]}")
  fi
  "${as_root[@]}" apt-get update -q
  "${as_root[@]}" apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# Configures the release preset and builds the named targets. Run from the checkout.
build_release() {
  step "configure" cmake --preset release
  step "build" cmake --build --preset release --target "$@"
}

# Makes a Python environment from requirements files and leaves its folder in ENVIRONMENT:
#   make_python NAME FINISH FILE...
# FINISH is a function that gets the folder at the end, or `true`. Environments lie outside the checkout, one for
# every content of the files, and are used again as they are; one whose making was interrupted is made anew.
make_python() {
  local name="$1" finish="$2" hash
  shift 2
  hash="$(cat "$@" <(type "$finish") <(python3 --version) | sha256sum)"
  ENVIRONMENT="${RELATENT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/relatent}/$name-${hash:0:12}"
  if [[ -f "$ENVIRONMENT/complete" ]]; then
    return
  fi
  step "make an environment for Python: $name" python3 -m venv --clear "$ENVIRONMENT"
  # torch goes first and alone, so that this one step can be pointed at the index of CPU builds
  # (TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu); several GB of CUDA may come along otherwise.
  step "install torch" "$ENVIRONMENT/bin/pip" install --quiet \
    ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep -h '^torch==' "$@")"
  step "install the rest" "$ENVIRONMENT/bin/pip" install --quiet "${@/#/--requirement=}"
  "$finish" "$ENVIRONMENT"
  touch "$ENVIRONMENT/complete"
}

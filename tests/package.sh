#!/usr/bin/env bash
# Packs the program as a Debian package and proves it on a system that has nothing else: a minimal Debian 12 in a
# folder, where apt installs the package with what it depends on, and the quick start's commands run with it.
#
#   tests/package.sh [FOLDER]       FOLDER, where the package is left, is build/package unless given
#
# Wants root (chroot) and Debian's archive; without them it says what was not tried and succeeds. MIRROR names another
# archive. tests/run.sh does not run it: the new system alone takes minutes.
set -euo pipefail
# shellcheck source=examples/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../examples/setup.sh"
out="$(realpath -m "${1:-$ROOT/build/package}")"
cd "$ROOT"
mirror="${MIRROR:-http://deb.debian.org/debian}"

skip() {
  printf '\nSKIPPED: %s\n' "$*"
  exit 0
}

install_packages "${BUILD_PACKAGES[@]}" dpkg-dev file
step "configure" cmake --preset package
step "build and pack" cmake --build --preset package --target package
version="$(build/package/cli/relatent --version)"
package="build/package/relatent_${version#relatent }_$(dpkg --print-architecture).deb"
step "what the package says of itself" dpkg-deb --info "$package"
step "what is in it" dpkg-deb --contents "$package"
if command -v lintian >/dev/null; then
  # Made by CPack and not by Debian's own tools: it closes no bug, has no manual page, and its name is not an archive's.
  step "what lintian says" lintian --fail-on error "$package"
fi
mkdir -p "$out"
[[ "$package" -ef "$out/${package##*/}" ]] || cp "$package" "$out"

((EUID == 0)) || skip "the package was made, not installed: that wants root"
install_packages debootstrap
system="$(mktemp -d)"
trap 'rm -rf --one-file-system "$system"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
if ! step "a system with nothing on it" debootstrap --variant=minbase bookworm "$system" "$mirror" \
  >"$system.log" 2>&1; then
  tail -n 5 "$system.log"
  rm "$system.log"
  skip "the package was made, not installed: $mirror gave no new system"
fi
rm "$system.log"

in_system() {
  env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    chroot "$system" "$@"
}
cp "$package" "$system/root/"
mkdir "$system/root/checkout"
git ls-files -z examples | xargs -0 cp --parents --target-directory="$system/root/checkout"
step "install the package with apt" \
  in_system apt-get install -q -y --no-install-recommends "/root/${package##*/}"
step "the version" in_system relatent --version
step "nothing is missing that it links" in_system ldd /usr/bin/relatent
step "the quick start with the installed program" \
  in_system env RELATENT_BIN=relatent /root/checkout/examples/quickstart.sh
step "remove it" in_system apt-get purge -q -y relatent
if [[ -e "$system/usr/bin/relatent" || -e "$system/usr/share/relatent" || -e "$system/usr/share/doc/relatent" ]]; then
  echo "removing the package left files behind" >&2
  exit 1
fi
printf '\n%s was installed, used and removed on a new Debian system\n' "${package##*/}"

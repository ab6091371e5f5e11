#!/bin/sh
# Make what the slow tests of installations need, once: about 15 minutes and 1.5 GB. Needs root and
# debootstrap, systemd-container, qemu-user-static and binfmt-support. The test of the container
# images also needs buildah, podman and runc, and that of reverse proxies nginx and caddy.
#
#   tests/install/prepare.sh FOLDER
set -eu
cd "$(dirname "$0")/../.."
folder=$1
mirror=${DEBIAN_MIRROR:-} # Empty: debootstrap's own.
common=ca-certificates,iproute2,procps,python3,python3-pip,python3-venv
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

if [ ! -e "$folder/systemd" ]; then
    debootstrap --variant=minbase --include="systemd,systemd-sysv,dbus,$common" \
        bookworm "$folder/systemd.new" $mirror
    mv "$folder/systemd.new" "$folder/systemd"
fi
if [ ! -e "$folder/arm64" ]; then
    debootstrap --foreign --arch=arm64 --variant=minbase --include="$common" \
        bookworm "$folder/arm64.new" $mirror
    if ! mountpoint -q /proc/sys/fs/binfmt_misc; then
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    fi
    update-binfmts --import
    update-binfmts --enable qemu-aarch64
    chroot "$folder/arm64.new" /debootstrap/debootstrap --second-stage
    mv "$folder/arm64.new" "$folder/arm64"
fi

# The wheels for Debian 12's Python, for both machines; then the package itself, always anew.
for machine in x86_64:run:wheels aarch64:agent:wheels-arm64; do
    target=$folder/${machine##*:}
    lock=${machine#*:}
    make bundle MACHINE="${machine%%:*}" LOCK="${lock%%:*}" PYTHON_VERSION=3.11
    rm -rf "$target"
    mv dist/wheels "$target"
done
rm -rf "$folder/bundle"
mv dist "$folder/bundle"

#!/bin/sh
# Install what the tests need to run the Arm kernels on another processor, or say how.
#
# Always exits 0: without a cross compiler and an emulator that one test is skipped and says so.
packages="g++-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"

if command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 && command -v qemu-aarch64 >/dev/null 2>&1; then
    echo "emulator: qemu-aarch64 and a cross compiler are installed"
    exit 0
fi

run=
[ "$(id -u)" -eq 0 ] || run="sudo -n"
if command -v apt-get >/dev/null 2>&1 && $run true >/dev/null 2>&1; then
    $run apt-get update -qq >/dev/null 2>&1
    # shellcheck disable=SC2086 # a list of packages
    if $run env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends $packages >/dev/null 2>&1; then
        echo "emulator: installed $packages"
        exit 0
    fi
fi
echo "emulator: not installed, the Arm kernels are not tested here; to test them run:"
echo "    apt-get install -y $packages"

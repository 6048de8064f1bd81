#!/bin/sh
# Make headless rendering work, or say how.  Usage: tools/rendering.sh PYTHON
#
# The simulator draws camera images through EGL.  If that works already nothing is done; if not, and
# packages may be installed without asking for a password, they are; otherwise the one command to
# run is printed.  Always exits 0: everything but the closed-loop part works without a renderer.
python=$1
packages="libegl1 libgl1-mesa-dri"

renders() {
    MUJOCO_GL=egl "$python" -c 'import mujoco; mujoco.GLContext(16, 16).make_current()' \
        >/dev/null 2>&1
}

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

may_install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    [ "$(id -u)" -eq 0 ] || sudo -n true >/dev/null 2>&1
}

if renders; then
    echo "rendering: EGL works"
    exit 0
fi

if may_install; then
    echo "rendering: installing $packages"
    as_root apt-get update -qq
    # shellcheck disable=SC2086  # two package names
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        $packages
    if renders; then
        echo "rendering: EGL works"
        exit 0
    fi
fi

prefix=
[ "$(id -u)" -eq 0 ] || prefix="sudo "
cat <<END
rendering: EGL does not work here, so the simulator cannot draw camera images.
Everything else works. To bring it, run:

    ${prefix}apt-get install -y $packages

END

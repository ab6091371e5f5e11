#!/bin/sh
# Install shoal on this machine: an environment in /opt/shoal and a systemd service.
#
#   sudo SHOAL_TOKEN=... sh install.sh agent [options of `shoal agent install`]
#   sudo sh install.sh coordinator [options of `shoal coordinator install`]
#   sudo sh install.sh uninstall [--yes | --keep-data]
#
# It installs the wheel that lies beside it (make dist), or the source tree that it is part of.
# Run again, it upgrades. Variables:
#   SHOAL_TOKEN    the cluster's token, kept in /etc/shoal/token
#   SHOAL_WHEELS   a folder with every wheel that is needed; nothing is downloaded then.
#                  Default: wheels/ beside this script, if there is one (make bundle)
#   SHOAL_EXTRAS   more extras of the package, say: highs
#   SHOAL_PREFIX   instead of /opt/shoal
#   PYTHON         instead of python3
set -eu

PREFIX=${SHOAL_PREFIX:-/opt/shoal}
PYTHON=${PYTHON:-python3}
COMMAND=/usr/local/bin/shoal
HERE=$(cd "$(dirname "$0")" && pwd)

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '/^set/d'
}

uninstall() {
    for kind in agent coordinator; do
        if [ -e "/etc/systemd/system/shoal-$kind.service" ]; then
            "$PREFIX/bin/shoal" "$kind" uninstall "$@"
        fi
    done
    if [ -L "$COMMAND" ] && [ "$(readlink "$COMMAND")" = "$PREFIX/bin/shoal" ]; then
        rm "$COMMAND"
    fi
    if [ -e "$PREFIX/pyvenv.cfg" ]; then
        rm -r "$PREFIX"
    fi
    echo "shoal is removed"
}

check_python() {
    command -v "$PYTHON" >/dev/null || fail "$PYTHON is missing: install Python 3.10 or newer"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10) or sys.maxsize < 2 ** 32)' ||
        fail "$PYTHON must be a 64-bit Python 3.10 or newer; name another one in PYTHON"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "this Python lacks venv: sudo apt install python3-venv"
}

is_jetson() {
    [ -e /etc/nv_tegra_release ]
}

# A Jetson's torch comes from NVIDIA and lies in the system's Python.
has_system_torch() {
    is_jetson && "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
}

make_environment() {
    if [ -e "$PREFIX/pyvenv.cfg" ] && "$PREFIX/bin/python" -c 'import pip' 2>/dev/null; then
        return # An upgrade in place.
    fi
    if [ -e "$PREFIX" ] && [ ! -e "$PREFIX/pyvenv.cfg" ]; then
        fail "$PREFIX exists and is not an environment of shoal; name another one in SHOAL_PREFIX"
    fi
    if has_system_torch; then
        "$PYTHON" -m venv --clear --system-site-packages "$PREFIX"
    else
        "$PYTHON" -m venv --clear "$PREFIX"
    fi
}

pip_install() {
    "$PREFIX/bin/python" -m pip --disable-pip-version-check install --quiet --no-cache-dir "$@"
}

install_package() {
    extras=$1${SHOAL_EXTRAS:+,$SHOAL_EXTRAS}
    lock=$2
    wheels=${SHOAL_WHEELS:-}
    if [ -z "$wheels" ] && [ -d "$HERE/wheels" ]; then
        wheels=$HERE/wheels
    fi
    package=
    for wheel in "$HERE"/shoal_llm-*.whl; do
        if [ -e "$wheel" ]; then package=$wheel; fi
    done
    if [ -z "$package" ]; then
        [ -e "$HERE/pyproject.toml" ] || fail "no shoal_llm-*.whl beside this script"
        package=$HERE
    fi
    for folder in "$HERE" "$HERE/requirements"; do
        if [ -e "$folder/$lock" ]; then lock=$folder/$lock; fi
    done
    set --
    if [ -n "$wheels" ]; then
        set -- --no-index --find-links "$wheels"
    fi
    if has_system_torch; then
        # NVIDIA builds its torch against numpy 1; the lock has numpy 2.
        pip_install "$@" "$package[$extras]" 'numpy<2'
        return
    fi
    [ -e "$lock" ] || fail "$lock is missing beside this script"
    pip_install "$@" --require-hashes --only-binary=:all: -r "$lock"
    pip_install "$@" --no-deps --force-reinstall "$package"
    if [ -n "${SHOAL_EXTRAS:-}" ]; then
        pip_install "$@" "$package[$extras]"
    fi
}

kind=${1:-}
case $kind in
agent) lock=agent.lock ;;
coordinator) lock=run.lock ;;
uninstall) ;;
-h | --help)
    usage
    exit 0
    ;;
*)
    usage >&2
    exit 2
    ;;
esac
shift

[ "$(id -u)" = 0 ] || fail "only root can install services: sudo sh install.sh $kind"
if [ "$kind" = uninstall ]; then
    uninstall "$@"
    exit 0
fi

check_python
make_environment
# A machine that is both keeps what its other service needs.
if [ -e /etc/systemd/system/shoal-coordinator.service ]; then lock=run.lock; fi
if [ $lock = run.lock ]; then
    install_package agent,coordinator run.lock
else
    install_package agent agent.lock
fi
ln -sfn "$PREFIX/bin/shoal" "$COMMAND"
"$PREFIX/bin/shoal" "$kind" install "$@"
"$PREFIX/bin/shoal" doctor || true

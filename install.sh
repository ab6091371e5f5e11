#!/bin/sh
# Install shoal on this machine: an environment in /opt/shoal and a systemd service.
#
#   sudo sh install.sh coordinator [options of `shoal coordinator install`]
#   sudo sh install.sh agent --token-file - [options of `shoal agent install`]
#   sudo sh install.sh rollback
#   sudo sh install.sh uninstall [--yes | --keep-data]
#
# An agent needs a token once: `sudo shoal token create` where the coordinator runs prints it.
# With `--token-file -` this script asks for it, or reads it from standard input. So it lands
# neither in the shell's history nor in sudo's log. `--token-file FILE` reads a file.
#
# It installs the wheel beside it (make dist), or the source tree that it is part of.
# Run it again to upgrade. It then restarts the machine's services, and keeps the old
# environment in /opt/shoal.previous. `rollback` goes back to that. Variables:
#   SHOAL_WHEELS   A folder with all needed wheels. Nothing is downloaded then.
#                  Default: wheels/ beside this script, if it exists (make bundle).
#   SHOAL_EXTRAS   More extras of the package, such as highs.
#   SHOAL_PREFIX   The environment's folder. Default: /opt/shoal.
#   PYTHON         The Python to use. Default: python3.
set -eu
umask 022 # The service reads the environment, and only root changes it.

PREFIX=${SHOAL_PREFIX:-/opt/shoal}
PYTHON=${PYTHON:-python3}
PREVIOUS=$PREFIX.previous
KEPT=$PREFIX.kept # The old environment during an upgrade.
SWAP=$PREFIX.swap # The replaced environment during a rollback.
UNITS=/etc/systemd/system
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
        if [ -e "$UNITS/shoal-$kind.service" ]; then
            [ -x "$PREFIX/bin/shoal" ] ||
                fail "$PREFIX/bin/shoal is missing: install it again with \`sudo sh install.sh $kind\`, then remove it"
            "$PREFIX/bin/shoal" "$kind" uninstall "$@"
        fi
    done
    if [ -L "$COMMAND" ] && [ "$(readlink "$COMMAND")" = "$PREFIX/bin/shoal" ]; then
        rm "$COMMAND"
    fi
    if [ -e "$PREFIX/pyvenv.cfg" ]; then
        rm -r "$PREFIX"
    fi
    rm -rf "$PREVIOUS" "$KEPT" "$KEPT.part" "$SWAP"
    echo "shoal is removed"
}

# Prints the version of shoal in an environment, or nothing.
version_in() {
    "$1/bin/python" -c 'import importlib.metadata as m; print(m.version("shoal-llm"))' 2>/dev/null || true
}

# Repairs the state after an upgrade or a rollback that was cut short, for instance by a power cut.
mend() {
    rm -rf "$KEPT.part"
    if [ -e "$KEPT" ]; then
        rm -rf "$PREFIX"
        mv "$KEPT" "$PREFIX"
        echo "an upgrade was cut short: shoal $(version_in "$PREFIX") is in place again"
    fi
    if [ -e "$SWAP" ]; then
        if [ -e "$PREFIX" ]; then mv "$SWAP" "$PREVIOUS"; else mv "$SWAP" "$PREFIX"; fi
    fi
}

# Copies the environment before it is changed. The copy works only at the old path.
keep_environment() {
    before=$(version_in "$PREFIX")
    [ -n "$before" ] || return 0
    if ! cp -a "$PREFIX" "$KEPT.part"; then
        rm -rf "$KEPT.part"
        fail "$PREFIX cannot be copied for a rollback: make room on its disk. Nothing was changed"
    fi
    mv "$KEPT.part" "$KEPT"
    trap put_back EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
}

put_back() {
    code=$?
    trap - EXIT
    rm -rf "$PREFIX"
    mv "$KEPT" "$PREFIX"
    echo "install.sh: the upgrade failed: shoal $before is in place again, nothing was restarted" >&2
    exit $code
}

# Checks that the new environment works, and keeps the old one for a rollback.
accept_environment() {
    "$PREFIX/bin/shoal" --help >/dev/null
    trap - EXIT INT TERM HUP
    [ -e "$KEPT" ] || return 0
    kept=$(version_in "$PREVIOUS")
    if [ "$(version_in "$PREFIX")" = "$before" ] && [ -n "$kept" ] && [ "$kept" != "$before" ]; then
        rm -rf "$KEPT" # The same version again: keep the earlier one.
    else
        rm -rf "$PREVIOUS"
        mv "$KEPT" "$PREVIOUS"
    fi
}

# Renews the unit of an installed service, and restarts it if it runs.
renew() {
    unit=shoal-$1.service
    [ -e "$UNITS/$unit" ] || return 0
    if systemctl --quiet is-enabled "$unit" 2>/dev/null; then
        "$PREFIX/bin/shoal" "$1" install --no-start
    fi
    case $(systemctl is-active "$unit" 2>/dev/null || true) in
    active | activating | reloading)
        systemctl restart "$unit"
        restarted="${restarted:+$restarted, }shoal-$1"
        ;;
    esac
}

rollback() {
    earlier=$(version_in "$PREVIOUS")
    [ -n "$earlier" ] || fail "there is nothing to go back to: $PREVIOUS is missing or damaged"
    now=$(version_in "$PREFIX")
    mv "$PREFIX" "$SWAP"
    mv "$PREVIOUS" "$PREFIX"
    mv "$SWAP" "$PREVIOUS"
    ln -sfn "$PREFIX/bin/shoal" "$COMMAND"
    restarted=
    renew coordinator
    renew agent
    echo "shoal ${now:-?} -> $earlier in $PREFIX; restarted: ${restarted:-nothing}"
    echo "shoal ${now:-?} is kept in $PREVIOUS: \`sudo sh install.sh rollback\` goes forward again"
}

# Says what was installed.
report() {
    after=$(version_in "$PREFIX")
    if [ -z "$before" ]; then
        echo "shoal $after is installed in $PREFIX"
        return
    fi
    echo "shoal $before -> $after in $PREFIX; restarted: ${restarted:-nothing}"
    echo "shoal $(version_in "$PREVIOUS") is kept in $PREVIOUS: \`sudo sh install.sh rollback\` goes back"
}

# Reads the token, if it comes by standard input, before anything takes long.
read_token() {
    token=
    previous=
    for option in "$@"; do
        if [ "$previous $option" = "--token-file -" ] || [ "$option" = --token-file=- ]; then
            if [ -t 0 ]; then
                printf 'Paste the token (it is not shown): ' >&2
                trap 'stty echo; exit 130' INT TERM HUP
                stty -echo
                IFS= read -r token || true
                stty echo
                trap - INT TERM HUP
                echo >&2
            else
                token=$(cat)
            fi
            [ -n "$token" ] || fail "no token was given"
        fi
        previous=$option
    done
}

# Installs the service. The shell's own printf keeps the token out of the list of processes.
install_service() {
    if [ -n "$token" ]; then
        printf '%s\n' "$token" | "$PREFIX/bin/shoal" "$kind" install "$@"
    else
        "$PREFIX/bin/shoal" "$kind" install "$@"
    fi
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

# NVIDIA installs a Jetson's torch into the system's Python.
has_system_torch() {
    is_jetson && "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)'
}

make_environment() {
    if [ -e "$PREFIX/pyvenv.cfg" ] && "$PREFIX/bin/python" -c 'import pip' 2>/dev/null; then
        return # It is an upgrade in place.
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
        # NVIDIA builds its torch for numpy 1, but the lock has numpy 2.
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
rollback | uninstall) ;;
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
mend
if [ "$kind" = rollback ]; then
    rollback
    exit 0
fi

check_python
read_token "$@"
before=
keep_environment
make_environment
# A machine with both services keeps the packages of the other one.
if [ -e "$UNITS/shoal-coordinator.service" ]; then lock=run.lock; fi
if [ $lock = run.lock ]; then
    install_package agent,coordinator run.lock
else
    install_package agent agent.lock
fi
accept_environment
ln -sfn "$PREFIX/bin/shoal" "$COMMAND"
install_service "$@"
restarted=shoal-$kind
for option in "$@"; do
    if [ "$option" = --no-start ]; then restarted=; fi
done
for other in coordinator agent; do
    if [ "$other" != "$kind" ]; then renew "$other"; fi
done
report
"$PREFIX/bin/shoal" doctor --role "$kind" || true

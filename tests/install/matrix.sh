#!/bin/sh
# Install the locked requirements and the wheel in a fresh environment of each supported Python that
# pyenv or PATH has, and run the tests there that need no other process. Options go to pytest.
set -eu
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- tests/wire tests/model tests/cli tests/install tests/test_packaging.py
failed=
for version in 3.10 3.11 3.12 3.13; do
    python=
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python "python$version"; do
        if [ -z "$python" ] && "$candidate" -c pass 2>/dev/null; then python=$candidate; fi
    done
    if [ -z "$python" ]; then
        echo "Python $version: not on this machine"
        continue
    fi
    environment=$(mktemp -d)
    if make --silent "VENV=$environment" "PYTHON=$python" "$environment/dev.stamp" &&
        "$environment/bin/python" -m pytest -q -m 'not slow' "$@"; then
        echo "Python $version: passed ($("$environment/bin/python" --version))"
    else
        failed="$failed $version"
    fi
    rm -rf "$environment"
done
[ -z "$failed" ] || { echo "failed on Python$failed" >&2; exit 1; }

#!/usr/bin/env bash
# Check and measure torch_cuda on a machine with an NVIDIA GPU, in 8 minutes at most.
#
#   benchmarks/on_gpu.sh [DIR]     logs and figures go to DIR, by default ./gpu-report
#
#   PYTHON=...     the Python that has PyTorch with CUDA; default: python3
#   WHEELS=DIR     install what is missing from the wheels in DIR, without a network
#   SHAPES="..."   what to measure; default: llama-1b
#   BACKEND=...    torch_cpu tries this script on a machine without a GPU; default: torch_cuda
#
# Steps: install what is missing, name the machine, let a coordinator and CUDA agents answer, measure,
# compare every kernel with the reference, measure shares of layers, compare with transformers if it
# is installed, profile. A step ends at its own limit or when 8 minutes are over. The exit code is the
# number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-gpu-report}" && realpath "${1:-gpu-report}")
PYTHON=${PYTHON:-python3}
BACKEND=${BACKEND:-torch_cuda}
WORK=$(mktemp -d)
umask 077
export PYTHONPATH="$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
TOTAL_S=475
failed=0
trap 'rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM

shoal() { "$PYTHON" -m cli "$@"; }

# step NAME SECONDS COMMAND...   The output goes to NAME.log; its end is shown.
step() {
    local name=$1 limit_s=$2 code=0 started=$SECONDS
    shift 2
    local left_s=$((TOTAL_S - SECONDS))
    [ "$limit_s" -le "$left_s" ] || limit_s=$((left_s > 1 ? left_s : 1))
    echo "== $name"
    timeout --kill-after=5 "$limit_s" "$@" >"$OUT/$name.log" 2>&1 || code=$?
    tail -n "${SHOW:-25}" "$OUT/$name.log"
    case $code in
        0) echo "-- $name: ok, $((SECONDS - started)) s" | tee -a "$OUT/summary.txt" ;;
        124 | 137) echo "-- $name: STOPPED after $limit_s s" | tee -a "$OUT/summary.txt" ;;
        *) echo "-- $name: FAILED with exit code $code, see $OUT/$name.log" | tee -a "$OUT/summary.txt" ;;
    esac
    [ $code = 0 ] || failed=$((failed + 1))
}

install() { # Only what this Python lacks, so that the board's own torch and numpy stay.
    local missing
    missing=$("$PYTHON" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement

def pins(name):
    """The pins of a lock that apply to this Python."""
    lines = Path("requirements", name).read_text().splitlines()
    found = [Requirement(line.rstrip(" \\")) for line in lines if line[:1].isalnum()]
    return [pin for pin in found if pin.marker is None or pin.marker.evaluate()]

def is_missing(pin):
    try:
        return not version(pin.name)
    except PackageNotFoundError:
        return True

tests = "execnet hypothesis iniconfig pluggy pytest pytest-timeout pytest-xdist sortedcontainers".split()
wanted = pins("run.lock") + [pin for pin in pins("dev.lock") if pin.name in tests]
print(*(f"{pin.name}{pin.specifier}" for pin in wanted if is_missing(pin)))
PY
    ) || return 1
    echo "missing here: ${missing:-nothing}"
    [ -z "$missing" ] && return 0
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --no-deps --no-compile --target "$WORK/site" \
        ${WHEELS:+--no-index --find-links "$WHEELS"} $missing
}

machine() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null ||
        cat /proc/device-tree/model 2>/dev/null || true
    "$PYTHON" --version
    shoal agent --list-backends
}

answer() { # The embedded model through a coordinator and an agent at 4, 8 and 16 bits, and over a team.
    trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
    export SHOAL_COORDINATOR=http://127.0.0.1:17421
    # Not by the function: a signal would end its shell alone.
    "$PYTHON" -m cli coordinator --no-mdns --bind 127.0.0.1 --port 17420 --http 127.0.0.1:17421 \
        --state-dir "$WORK/coordinator" &
    for _ in $(seq 20); do
        shoal token create --uses 2 --state-dir "$WORK/coordinator" >"$WORK/token" 2>/dev/null && break
        sleep 1
    done
    # Both have the same GPU. They share layers over sockets, as two boards do.
    agent gpu &
    agent gpu-2 &
    for _ in $(seq 60); do
        [ "$(shoal devices --json 2>/dev/null | grep -o '"name": "gpu' | wc -l)" = 2 ] && break
        sleep 1
    done
    local bits result=0
    for bits in 4 8 16; do
        ask "at $bits bits" --bits "$bits" --no-teams || result=1
    done
    ask "by a team at 4 bits" --bits 4 --team gpu,gpu-2 --replace || result=1
    return $result
}

agent() {
    exec "$PYTHON" -m cli agent --name "$1" --backend "$BACKEND" --coordinator 127.0.0.1:17420 \
        --token-file "$WORK/token" --memory 2G --storage 2G --state-dir "$WORK/$1"
}

ask() { # WHAT OPTION...
    local what=$1
    shift
    shoal load examples/tiny-opt/model --max-weight-error none "$@" || return 1
    shoal run tiny-opt --max-tokens 8 \
        "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?" \
        >"$WORK/answer" || return 1
    echo "$what: $(cat "$WORK/answer")"
    grep -q 'in the attic' "$WORK/answer"
}

bench() {
    local shape
    for shape in ${SHAPES:-llama-1b}; do
        shoal bench --backend "$BACKEND" --shape "$shape" --bits 4,8,16 --rounds 5 || return 1
    done
}

shares() { # What cuts for a team cost, and the time of a half.
    local shape
    for shape in ${SHAPES:-llama-1b}; do
        "$PYTHON" -m benchmarks.shares --backend "$BACKEND" --shapes "$shape" --parts 1 2 || return 1
    done
}

peer() { # The same shape by transformers.
    local shape
    "$PYTHON" -c "import transformers" 2>/dev/null || { echo "no transformers here" && return 0; }
    for shape in ${SHAPES:-llama-1b}; do
        "$PYTHON" -m benchmarks.gpu_peer --backend "$BACKEND" --shape "$shape" || return 1
    done
}

profile() { # The kernels of a token and of a prompt, and how each product's kernel was chosen.
    local shape
    [ "$BACKEND" = torch_cuda ] || { echo "only a GPU is profiled" && return 0; }
    for shape in ${SHAPES:-llama-1b}; do
        "$PYTHON" -m benchmarks.gpu_profile --backend "$BACKEND" --shape "$shape" --bits 4 --rounds 3 \
            --verbose || return 1
    done
}

export -f shoal machine answer agent ask bench shares peer profile install
export PYTHON BACKEND WORK OUT

: >"$OUT/summary.txt"
step install 50 bash -c install
step machine 20 bash -c machine
step answer 140 bash -c answer
SHOW=60 step bench 90 bash -c bench
# Shares of layers first. Their tests have the backend's name too. Failures show as they come.
step conformance 180 "$PYTHON" -m pytest tests/backends/test_shares.py tests/backends/test_torch_shares.py \
    tests/backends -k "torch" -p no:cacheprovider -p no:benchmark -v --tb short -n 6 \
    --timeout 120 -rfs --maxfail 30
step shares 45 bash -c shares
step peer 120 bash -c peer
SHOW=60 step profile 50 bash -c profile
echo
cat "$OUT/summary.txt"
exit $failed

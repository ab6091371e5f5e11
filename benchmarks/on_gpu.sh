#!/usr/bin/env bash
# Check and measure torch_cuda on a machine with an NVIDIA GPU, in 7 minutes at most.
#
#   benchmarks/on_gpu.sh [DIR]     logs and figures go to DIR, by default ./gpu-report
#
#   PYTHON=...     the Python that has PyTorch with CUDA; default: python3
#   WHEELS=DIR     install what is missing from the wheels in DIR, without a network
#   SHAPES="..."   what to measure; default: llama-1b
#   BACKEND=...    torch_cpu tries this script on a machine without a GPU; default: torch_cuda
#
# Steps: install what is missing, name the machine, let a coordinator and a CUDA agent answer, measure,
# profile, compare every kernel with the reference. The exit code is the number of failed steps.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=$(mkdir -p "${1:-gpu-report}" && realpath "${1:-gpu-report}")
PYTHON=${PYTHON:-python3}
BACKEND=${BACKEND:-torch_cuda}
WORK=$(mktemp -d)
export PYTHONPATH="$PWD:$WORK/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0
trap 'rm -rf "$WORK"' EXIT
trap 'exit 130' INT TERM

shoal() { "$PYTHON" -m cli "$@"; }

# step NAME SECONDS COMMAND...   The output goes to NAME.log; its end is shown.
step() {
    local name=$1 limit_s=$2 code=0 started=$SECONDS
    shift 2
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
from importlib.util import find_spec
names = """msgpack numpy psutil rich zeroconf ifaddr onnx onnxruntime httpx httpcore h11 anyio
idna certifi jinja2 markupsafe pulp yaml:pyyaml starlette tokenizers huggingface_hub uvicorn click
pytest pytest_timeout:pytest-timeout xdist:pytest-xdist execnet pluggy iniconfig packaging
hypothesis sortedcontainers""".split()
wanted = [name.partition(":") for name in names]
print(" ".join(package or module for module, _, package in wanted if find_spec(module) is None))
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

answer() { # The embedded model through a coordinator and an agent, at 4, 8 and 16 bits.
    trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
    export SHOAL_COORDINATOR=http://127.0.0.1:17421
    # Not by the function: a signal would end its shell alone.
    "$PYTHON" -m cli coordinator --no-mdns --bind 127.0.0.1 --port 17420 --http 127.0.0.1:17421 \
        --state-dir "$WORK/coordinator" &
    "$PYTHON" -m cli agent --name gpu --backend "$BACKEND" --coordinator 127.0.0.1:17420 --memory 2G \
        --storage 2G --state-dir "$WORK/agent" &
    for _ in $(seq 60); do
        shoal devices 2>/dev/null | grep -q gpu && break
        sleep 1
    done
    local bits result=0
    for bits in 4 8 16; do
        shoal load examples/tiny-opt/model --bits "$bits" --max-weight-error none || return 1
        shoal run tiny-opt --max-tokens 8 \
            "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?" \
            >"$WORK/answer" || return 1
        echo "at $bits bits: $(cat "$WORK/answer")"
        grep -q 'in the attic' "$WORK/answer" || result=1
    done
    return $result
}

bench() {
    local shape
    for shape in ${SHAPES:-llama-1b}; do
        shoal bench --backend "$BACKEND" --shape "$shape" --bits 4,8,16 --rounds 5 || return 1
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

export -f shoal machine answer bench profile install
export PYTHON BACKEND WORK OUT

: >"$OUT/summary.txt"
step install 50 bash -c install
step machine 20 bash -c machine
step answer 60 bash -c answer
SHOW=60 step bench 90 bash -c bench
SHOW=60 step profile 50 bash -c profile
# Shares of layers first. Their tests have the backend's name too. Failures show as they come.
step conformance 150 "$PYTHON" -m pytest tests/backends/test_shares.py tests/backends/test_torch_shares.py \
    tests/backends -k "torch" -p no:cacheprovider -p no:benchmark -v --tb short -n 6 \
    --timeout 120 -rfs --maxfail 30
echo
cat "$OUT/summary.txt"
exit $failed

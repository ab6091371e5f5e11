"""Runs llama.cpp for the comparisons, under a Python that has llama-cpp-python.

    python llama_cpp_worker.py MODEL.gguf --threads 1 --context-tokens 600
    python llama_cpp_worker.py MODEL.gguf ... --rpc 10.0.0.1:50052,10.0.0.2:50052 --split 8,9

The worker reads lines `prefill N` and `decode CONTEXT N` from stdin. It answers each with a JSON
list of seconds: of the whole prompt, or of each token. The first line of output says what runs.

With --rpc all layers are on llama.cpp's RPC servers. --split gives the number of layers of each,
and the output counts as one. The library is then the one in LLAMA_CPP_LIB_PATH.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

DEFAULT_BATCH = 512
"""llama.cpp's own number of rows that are computed at once."""


def preload() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """Load libggml and libggml-rpc of LLAMA_CPP_LIB_PATH before llama-cpp-python loads its own."""
    directory = Path(os.environ["LLAMA_CPP_LIB_PATH"])
    try:
        return (
            ctypes.CDLL(str(directory / "libggml.so"), ctypes.RTLD_GLOBAL),
            ctypes.CDLL(str(directory / "libggml-rpc.so"), ctypes.RTLD_GLOBAL),
        )
    except OSError as error:
        sys.exit(f"cannot load llama.cpp's libraries: {error}")


def add_servers(endpoints: list[str]) -> None:
    """Make the servers' devices known, as llama-cli does for --rpc."""
    ggml, rpc = preload()
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for endpoint in endpoints:
        server = rpc.ggml_backend_rpc_add_server(endpoint.encode())
        if not server:
            sys.exit(f"no llama.cpp RPC server answers at {endpoint}")
        ggml.ggml_backend_register(server)


class Model:
    """A context of one sequence. Logits are computed for the last row of a batch."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp as api  # Imported late, because the servers' libraries come first.

        self._api = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        if not options.verbose:
            api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        params = api.llama_model_default_params()
        if options.rpc:
            params.n_gpu_layers = 999
            if options.split:
                shares = [float(share) for share in options.split.split(",")]
                shares += [0.0] * (api.llama_max_devices() - len(shares))
                self._split = (ctypes.c_float * len(shares))(*shares)
                params.tensor_split = self._split
        model = api.llama_model_load_from_file(options.model.encode(), params)
        if not model:
            sys.exit(f"llama.cpp cannot load {options.model}")
        context = api.llama_context_default_params()
        context.n_ctx = options.context_tokens
        context.n_batch = DEFAULT_BATCH
        context.n_ubatch = options.batch
        context.n_threads = context.n_threads_batch = options.threads
        self._context: Any = api.llama_init_from_model(model, context)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._filled = 0
        self.version = (
            f"llama-cpp-python {api.__version__}: {api.llama_print_system_info().decode()}"
        )

    def prefill(self, count: int) -> list[float]:
        """Return the seconds of a prompt of ``count`` tokens."""
        self._forget(0)
        started_s = time.perf_counter()
        self._run(count)
        return [time.perf_counter() - started_s]

    def decode(self, context: int, count: int) -> list[float]:
        """Return the seconds of each token behind ``context`` tokens."""
        if self._filled < context:
            self._run(context - self._filled)
        self._forget(context)
        times_s = []
        for _ in range(count):
            started_s = time.perf_counter()
            self._run(1)
            times_s.append(time.perf_counter() - started_s)
        self._forget(context)
        return times_s

    def _run(self, count: int) -> None:
        api = self._api
        for first in range(0, count, DEFAULT_BATCH):
            rows = min(DEFAULT_BATCH, count - first)
            tokens = (api.llama_token * rows)(*(3 + 7 * i % 1000 for i in range(rows)))
            if api.llama_decode(self._context, api.llama_batch_get_one(tokens, rows)):
                sys.exit("llama.cpp failed to decode")
            api.llama_get_logits_ith(self._context, -1)
        self._filled += count

    def _forget(self, position: int) -> None:
        api = self._api
        api.llama_memory_seq_rm(api.llama_get_memory(self._context), 0, position, -1)
        self._filled = position


def main() -> None:
    parser = argparse.ArgumentParser(description="llama.cpp, as benchmarks drive it.")
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context-tokens", type=int, required=True)
    parser.add_argument("--batch", type=int, default=DEFAULT_BATCH, help="rows at once")
    parser.add_argument("--rpc", help="addresses of RPC servers")
    parser.add_argument("--split", help="layers of each")
    parser.add_argument("--verbose", action="store_true", help="with llama.cpp's log")
    options = parser.parse_args()
    if options.rpc:
        add_servers(options.rpc.split(","))
    model = Model(options)
    print(model.version, flush=True)
    for line in sys.stdin:
        work, *numbers = line.split()
        run = model.prefill if work == "prefill" else model.decode
        print(json.dumps(run(*map(int, numbers))), flush=True)


if __name__ == "__main__":
    main()

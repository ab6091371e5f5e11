"""Runs llama.cpp for compare_llama_cpp.py, under a Python that has llama-cpp-python.

    python llama_cpp_worker.py MODEL.gguf THREADS CONTEXT_TOKENS

Reads lines `prefill N` and `decode CONTEXT N` from stdin and answers each with seconds: of the
whole prompt (in batches of 512, llama.cpp's own default), or the median of a token. The first line
it writes says what runs.
"""

from __future__ import annotations

import ctypes
import sys
import time
from statistics import median
from typing import Any

import llama_cpp as api

BATCH = 512


class Model:
    """A context of one sequence; logits are computed for the last row of a batch."""

    def __init__(self, path: str, threads: int, context_tokens: int) -> None:
        quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(quiet, ctypes.c_void_p(0))
        self._quiet = quiet
        api.llama_backend_init()
        model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = context_tokens
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context: Any = api.llama_init_from_model(model, params)
        if not self._context:
            sys.exit("llama.cpp cannot make a context")
        self._filled = 0

    def prefill(self, count: int) -> float:
        """Seconds of a prompt of ``count`` tokens."""
        self._forget(0)
        started_s = time.perf_counter()
        for first in range(0, count, BATCH):
            self._run(min(BATCH, count - first))
        return time.perf_counter() - started_s

    def decode(self, context: int, count: int) -> float:
        """Median seconds of a token behind ``context`` tokens."""
        if self._filled < context:
            self._run(context - self._filled)
        self._forget(context)
        times_s = []
        for _ in range(count):
            started_s = time.perf_counter()
            self._run(1)
            times_s.append(time.perf_counter() - started_s)
        self._forget(context)
        return median(times_s)

    def _run(self, count: int) -> None:
        for first in range(0, count, BATCH):
            rows = min(BATCH, count - first)
            tokens = (api.llama_token * rows)(*(3 + 7 * i % 1000 for i in range(rows)))
            if api.llama_decode(self._context, api.llama_batch_get_one(tokens, rows)):
                sys.exit("llama.cpp failed to decode")
            api.llama_get_logits_ith(self._context, -1)
        self._filled += count

    def _forget(self, position: int) -> None:
        api.llama_memory_seq_rm(api.llama_get_memory(self._context), 0, position, -1)
        self._filled = position


def main() -> None:
    model = Model(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(f"llama-cpp-python {api.__version__}: {api.llama_print_system_info().decode()}")
    sys.stdout.flush()
    for line in sys.stdin:
        work, *numbers = line.split()
        run = model.prefill if work == "prefill" else model.decode
        print(run(*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()

"""Decode and prefill speed of a Llama shape here and in llama.cpp, interleaved.

    python -m benchmarks.compare_llama_cpp --llama-python ~/llama/bin/python --bits 4 --against q4_0
    LLAMA_CPP_LIB_PATH=~/llama.cpp/build/bin python -m benchmarks.compare_llama_cpp ... --json

Both run the same shape with random weights, the same threads and contexts. Each has a process of
its own, and they take turns of a few seconds. The report has medians over rounds, and the median of
the ratios within a round. llama.cpp is llama-cpp-python's under the given Python.
LLAMA_CPP_LIB_PATH points to another build of the library.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from backends.registry import backend_class
from benchmarks import gguf
from benchmarks.llama_cpp_process import Worker, worker_command
from calibration.machine import processor_name
from calibration.shapes import shape_spec
from calibration.speed import SpeedOptions, Trial, prepared_stage
from model.quantize import Format


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-python", required=True, help="a Python with llama-cpp-python")
    parser.add_argument("--shape", default="llama-1b", help="as for `shoal bench`")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--against", choices=sorted(gguf.TYPES), default="q4_0")
    parser.add_argument("--backend", default="onnx_cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 900])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fast-prompts", action="store_true", help="through a copy in bytes")
    parser.add_argument("--directory", type=Path, help="for 2 GB of weights meanwhile")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _take_turns(
    options: argparse.Namespace, trial: Trial, llama: Worker
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return our tokens per second and llama.cpp's in each round, by what was measured."""
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[str, list[float]] = defaultdict(list)
    for number in range(options.rounds):
        # The second one finds a warmer machine, so they take turns.
        for which in (0, 1) if number % 2 else (1, 0):
            if which:
                trial.round()
                continue
            (seconds,) = llama.ask("prefill", options.prompt)
            theirs["prefill"].append(options.prompt / seconds)
            for context in options.contexts:
                seconds = median(llama.ask("decode", context, options.tokens))
                theirs[f"decode past {context}"].append(1 / seconds)
        for name, rate in trial.latest().items():
            ours[name].append(rate)
    return ours, theirs


def main() -> None:
    options = _options()
    spec = replace(shape_spec(options.shape), vocab=options.vocab)
    speed = SpeedOptions(
        threads=options.threads,
        contexts=tuple(options.contexts),
        prompt_tokens=options.prompt,
        decode_tokens=options.tokens,
        fast_prompts=options.fast_prompts,
    )
    context_tokens = max(options.prompt, *options.contexts) + options.tokens
    with ExitStack() as stack:
        home = Path(stack.enter_context(TemporaryDirectory(dir=options.directory)))
        model = home / "model.gguf"
        gguf.write_llama(model, spec, options.against, context_tokens)
        formats = [Format.of(options.bits, "rtn", options.group_size)]
        backend = backend_class(options.backend)()
        trial = stack.enter_context(prepared_stage(spec, formats, backend, speed, home))
        command = worker_command(options.llama_python, model, options.threads, context_tokens)
        process = subprocess.Popen(  # noqa: S603 - the user's own Python
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        llama = Worker(process)
        stack.callback(llama.close)
        ours, theirs = _take_turns(options, trial, llama)
        result = trial.result()
        version = llama.version
    rows = [
        {
            "what": name,
            "shoal_tokens_per_s": median(ours[name]),
            "llama_cpp_tokens_per_s": median(theirs[name]),
            "ratio": median(a / b for a, b in zip(ours[name], theirs[name], strict=True)),
            "lowest_ratio": min(a / b for a, b in zip(ours[name], theirs[name], strict=True)),
        }
        for name in theirs
    ]
    if options.json:
        answer: dict[str, Any] = {
            "machine": processor_name(),
            "llama_cpp": version,
            "shape": options.shape,
            "against": options.against,
            "rows": rows,
            "shoal": asdict(result),
        }
        print(json.dumps(answer))
        return
    table = Table(title=f"{options.shape}, {options.bits} bits against {options.against}")
    for column in rows[0]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["what"]), *(f"{row[key]:.2f}" for key in list(row)[1:]))
    Console().print(table, f"{processor_name()}; {version}")


if __name__ == "__main__":
    main()

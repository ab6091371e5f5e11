"""distributed-llama as the other side of a comparison: files of random weights, and its nodes.

Source: https://github.com/b4rtaz/distributed-llama (converter/writer.py, src/llm.cpp). Everything
is in its format q40 (4 bits in groups of 32), with partial sums in 8 bits, which it requires.
"""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.gguf import BLOCK, TYPES
from model.spec import ModelSpec
from testbed.bed import Testbed

PROGRAM = "dllama"
PORT = 9990

_MODEL_MAGIC, _TOKENIZER_MAGIC = 0xA00ABCD, 0x567124
_LLAMA, _F32, _Q40, _SILU = 0xABCD00, 0, 2, 1
_LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp."""

_START_S = 60.0
_PIECE_ROWS = 1024
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def find_program(directory: Path) -> Path:
    """Return the program in a folder of its build. Exits if it is missing."""
    program = directory / PROGRAM
    if not program.is_file():
        sys.exit(f"{directory} has no {PROGRAM}: run `make {PROGRAM}` there")
    return program


def write_files(directory: Path, spec: ModelSpec, context_tokens: int) -> tuple[Path, Path]:
    """Write a model of the shape ``spec`` and a tokenizer for it, unless they are there."""
    directory.mkdir(parents=True, exist_ok=True)
    model, tokenizer = directory / "dllama.m", directory / "dllama.t"
    if not tokenizer.exists():
        _write_model(model, spec, context_tokens)
        _write_tokenizer(tokenizer, spec.vocab)
    return model, tokenizer


def _write_model(path: Path, spec: ModelSpec, context_tokens: int) -> None:
    layer = spec.layers[0]
    fields = {
        0: 1,  # version
        1: _LLAMA,
        2: spec.hidden,
        3: layer.ffn,
        4: len(spec.layers),
        5: layer.heads,
        6: layer.kv_heads,
        7: 0,  # experts
        8: 0,
        9: spec.vocab,
        10: context_tokens,
        11: _SILU,
        12: 10000,  # rope's theta
        13: _Q40,
    }
    header = _header(_MODEL_MAGIC, fields)
    random = np.random.default_rng(0)
    heads, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    with path.open("wb") as file:
        file.write(header)
        for first in range(0, spec.vocab, _PIECE_ROWS):
            rows = min(_PIECE_ROWS, spec.vocab - first)
            file.write(random.standard_normal((rows, spec.hidden), np.float32).tobytes())
        norm = np.ones(spec.hidden, np.float32).tobytes()
        for _ in spec.layers:
            for rows, columns in (
                (heads, spec.hidden),
                (kv, spec.hidden),
                (kv, spec.hidden),
                (spec.hidden, heads),
                (layer.ffn, spec.hidden),
                (spec.hidden, layer.ffn),
                (layer.ffn, spec.hidden),
            ):
                file.write(_q40(rows, columns, random))
            file.write(norm * 2)
        file.write(norm)
        file.write(_q40(spec.vocab, spec.hidden, random))


def _header(magic: int, fields: Mapping[int, int]) -> bytes:
    """Return a file's magic number, the length of its header, and numbered fields."""
    numbers = [item for pair in fields.items() for item in pair]
    return struct.pack(f"<{2 + len(numbers)}i", magic, 8 + 4 * len(numbers), *numbers)


def _q40(rows: int, columns: int, random: np.random.Generator) -> bytes:
    """Return a random matrix in blocks of an fp16 scale and 32 codes, as in ggml's Q4_0."""
    _, block_bytes = TYPES["q4_0"]
    blocks = random.integers(0, 256, (rows * columns // BLOCK, block_bytes), np.uint8)
    blocks[:, :2] = np.array([1 / (8 * columns**0.5)], np.float16).view(np.uint8)
    return blocks.tobytes()


def _write_tokenizer(path: Path, vocab: int) -> None:
    """Write a tokenizer of single letters. Its other tokens never occur in a text."""
    tokens = [*_LETTERS, *(f"<{number}>" for number in range(vocab - len(_LETTERS)))]
    fields = {0: 1, 1: vocab, 2: max(map(len, tokens)), 3: vocab - 1, 9: 1, 10: 0}
    content = _header(_TOKENIZER_MAGIC, fields) + struct.pack("<i", vocab - 1)
    for number, token in enumerate(tokens):
        content += struct.pack("<fI", -float(number), len(token)) + token.encode()
    path.write_bytes(content)


def measure(
    bed: Testbed,
    program: Path,
    files: tuple[Path, Path],
    hosts: Sequence[str],
    prompt_tokens: int,
    tokens: int,
) -> tuple[float, float]:
    """Return (seconds of the prompt, seconds a token) of one generation over ``hosts``.

    The first host is the root. The prompt's time is the program's own sum over its chunks. Tokens
    are timed as they arrive at its output, without the first. Exits if the program fails.
    """
    model, tokenizer = files
    root, *others = hosts
    with ExitStack() as stack:
        for host in others:
            _start_worker(bed, program, host, stack)
        workers = [f"{bed.network.address(host)}:{PORT}" for host in others]
        process = bed.popen(
            root,
            [
                *(str(program), "inference", "--model", str(model), "--tokenizer", str(tokenizer)),
                *("--buffer-float-type", "q80", "--nthreads", "1", "--temperature", "0"),
                *("--prompt", (_LETTERS * prompt_tokens)[:prompt_tokens]),
                *("--steps", str(prompt_tokens + tokens)),
                *(("--workers", *workers) if workers else ()),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        prompt_ms, arrived_s, last = 0, list[float](), ""
        for line in _lines(process):
            if found := re.match(r"\S*\s*Eval\s*(\d+) ms Sync\s*(\d+) ms", line):
                prompt_ms += int(found[1]) + int(found[2])
            elif re.match(r"\S* Pred", line):
                arrived_s.append(time.perf_counter())
            last = line.strip() or last
        if len(arrived_s) < 2:
            sys.exit(f"distributed-llama gave no tokens: {last}")
        return prompt_ms / 1e3, fmean(np.diff(arrived_s))


def _lines(process: subprocess.Popen[str]) -> Iterator[str]:
    if process.stdout is not None:
        with process.stdout:
            yield from process.stdout


def _start_worker(bed: Testbed, program: Path, host: str, stack: ExitStack) -> None:
    """Start a worker, which ends with ``stack``, and return when it listens."""
    process = bed.popen(
        host,
        [str(program), "worker", "--port", str(PORT), "--nthreads", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline_s = time.monotonic() + _START_S
    # A connection that only tries the port would be taken for the root's, so the kernel is asked.
    while not bed.inside(host, _listening):
        if process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"{program} does not start as a worker on {host}")
        time.sleep(0.05)  # No event announces another program's port.


def _listening() -> bool:
    """Whether a program listens on PORT in this thread's network."""
    rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    fields = [row.split() for row in rows]
    return any(row[1].endswith(f":{PORT:04X}") and row[3] == _LISTENS for row in fields)

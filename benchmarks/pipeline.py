"""What splitting over 1 to 4 equal devices costs, on an emulated LAN, and what it costs llama.cpp.

    make bench-pipeline
    python -m benchmarks.pipeline --stages 1,4 --rounds 5 --json
    python -m benchmarks.pipeline --llama-cpp ~/llama.cpp/build/bin --llama-python PYTHON

Each stage is a process on a host of its own (testbed/): 40 % of a core in periods of 5 ms, 1
Gbit/s, 0.2 ms round trip. The model is Llama-1B with random weights at 4 bits and a vocabulary of
32,000. Stages and hops are the agent's own (benchmarks/pipeline_stage.py); no coordinator takes
part. All numbers of stages stand at once and take turns.

Reported for each: decoded tokens per second, against what the stages' calls took and the measured
hops add up to (1 / (sum of compute + sum of hops)); the time of a prompt of 512 tokens, and against
the first number of stages given, as the median of the ratios within a round. The hop of a link is
half its median round trip and the bytes of a row at its rate, as measured by the relay's own probe
on the emulated network.

With --llama-cpp, the same shape as GGUF in Q4_0, as many layers on each of llama.cpp's RPC servers
on the same hosts with one thread each. Its client holds the embedding only; it is on a host of its
own without a limit, or on the first of the others (--client-shares). The Python given has the
llama-cpp-python that the libraries were built for.

The quota flatters a split: a stage that computes for less than its share of a period is not slowed
down at all, and a short call of a small stage is just that. Compare with the bound, not with one
stage's decoding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from agent.links import LinkFigures
from benchmarks import gguf, llama_cpp_process
from benchmarks.pipeline_stage import model_spec
from calibration.machine import processor_name
from model.artifact import write_artifact
from model.quantize import Format
from model.spec import ModelSpec
from planning.prompt import Passage, best_chunk_tokens, block_passage
from testbed.bed import Testbed, TestbedError
from testbed.network import Host, Link, Network
from wire import limits
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS, payload_bytes

CPU_PERCENT = 40.0
ROUND_TRIP_S = 0.2e-3
BYTES_PER_S = 125e6
BITS = 4
THREADS = 1
PROMPT_TOKENS = 512
SHORT_TOKENS = 8
"""The prompt that decoding starts from."""

CLIENT = "client"
STAGE_SCRIPT = Path(__file__).with_name("pipeline_stage.py")


def split(spec: ModelSpec, stages: int) -> list[range]:
    """Contiguous runs of blocks, the longest prompt time as short as can be, then the decoding.

    A single sequence decodes equally fast however its blocks are shared out, a prompt does not.
    """
    reads = [
        0 if block == 0 else sum(map(math.prod, spec.block_tensors(block).values()))
        for block in range(spec.block_count)
    ]
    # The head runs for one row of a prompt.
    prompt = [*reads[:-1], reads[-1] // PROMPT_TOKENS]

    def longest(runs: list[range]) -> tuple[int, int]:
        return (
            max(sum(prompt[run.start : run.stop]) for run in runs),
            max(sum(reads[run.start : run.stop]) for run in runs),
        )

    cuts = itertools.combinations(range(2, spec.block_count), stages - 1)
    ends = ((0, *cut, spec.block_count) for cut in cuts)
    return min(([range(*pair) for pair in itertools.pairwise(end)] for end in ends), key=longest)


def write_blocks(spec: ModelSpec, directory: Path) -> list[str]:
    """Artifacts of random blocks; all layers are alike: time does not depend on the values."""
    random = np.random.default_rng(0)
    made: dict[str, dict[str, npt.NDArray[np.float32]]] = {}
    paths = []
    for block in range(spec.block_count):
        kind = spec.block_kind(block)
        if kind not in made:
            made[kind] = {
                name: (random.random(shape, np.float32) - 0.5) * np.float32(2 / shape[-1] ** 0.5)
                for name, shape in spec.block_tensors(block).items()
            }
        paths.append(str(write_artifact(directory, block, made[kind], Format.of(BITS)).path))
    return paths


# ---- the line of stages, as the benchmark sees it ------------------------------------------------


class Line:
    """Stages on hosts, connected to a ring."""

    def __init__(
        self, bed: Testbed, names: Sequence[str], configs: Sequence[dict[str, Any]]
    ) -> None:
        self._processes: list[subprocess.Popen[str]] = [
            bed.popen(
                name,
                [sys.executable, str(STAGE_SCRIPT), json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, config in zip(names, configs, strict=True)
        ]
        ports = [self._hear(index)["port"] for index in range(len(names))]
        self.links: list[LinkFigures] = []
        self.chunk_tokens = limits.PREFILL_CHUNK_TOKENS
        if len(names) > 1:
            for index, _ in enumerate(names):
                after = (index + 1) % len(names)
                self._tell(
                    index,
                    do="connect",
                    host=bed.network.address(names[after]),
                    port=ports[after],
                    name=names[after],
                )
                self.links.append(LinkFigures(**self._hear(index)))

    def generate(self, sequence: int, prompt_tokens: int, tokens: int) -> list[float]:
        """Seconds after the start at which the tokens were there."""
        for index in reversed(range(len(self._processes))):  # The first one last, as in a shoal.
            self._tell(
                index,
                do="start",
                sequence=sequence,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                chunk_tokens=self.chunk_tokens,
            )
        started_s = self._hear(0)["started_s"]
        answer = self._hear(len(self._processes) - 1)
        if "failed" in answer:
            raise RuntimeError(answer["failed"])
        return [arrived_s - started_s for arrived_s in answer["arrived_s"]]

    def calls(self) -> list[list[tuple[int, float]]]:
        """(rows, seconds) of the calls of each stage since the last time."""
        result = []
        for index in range(len(self._processes)):
            self._tell(index, do="calls")
            result.append([(rows, seconds) for rows, seconds in self._hear(index)["calls"]])
        return result

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()

    def _tell(self, index: int, **command: Any) -> None:
        stream = self._processes[index].stdin
        if stream is not None:
            stream.write(json.dumps(command) + "\n")
            stream.flush()

    def _hear(self, index: int) -> dict[str, Any]:
        stream = self._processes[index].stdout
        line = "" if stream is None else stream.readline()
        if not line:
            raise RuntimeError(f"stage {index} ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---- the measurement ----------------------------------------------------------------------------


@dataclass(slots=True)
class Split:
    """One number of stages, here and in llama.cpp, and what each round gave."""

    runs: list[range]
    line: Line
    llama: llama_cpp_process.Worker | None
    hop_s: float
    rounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    busy_s: list[float] = field(default_factory=list)
    """What each stage computed for the last prompt."""

    def measure(self, number: int, tokens: int) -> None:
        """Decode and prefill, here; ``number`` differs from all before."""
        self.line.calls()
        step_s = fmean(np.diff(self.line.generate(2 * number, SHORT_TOKENS, tokens + 1)))
        calls = self.line.calls()
        compute_s = sum(fmean(s for rows, s in stage if rows == 1) for stage in calls)
        self.rounds["step_s"].append(step_s)
        self.rounds["compute_s"].append(compute_s)
        self.rounds["prompt_s"].append(self.line.generate(2 * number + 1, PROMPT_TOKENS, 1)[0])
        self.busy_s = [sum(s for _, s in stage) for stage in self.line.calls()]

    def measure_llama(self, tokens: int) -> None:
        """The same in llama.cpp."""
        if self.llama is not None:
            decode_s = self.llama.ask("decode", SHORT_TOKENS, tokens)
            self.rounds["llama_step_s"].append(fmean(decode_s))
            self.rounds["llama_prompt_s"] += self.llama.ask("prefill", PROMPT_TOKENS)

    def row(self, first: Split) -> dict[str, Any]:
        """Medians over the rounds, and of the ratios within each."""
        rounds = self.rounds

        def ratios(above: list[float], below: list[float]) -> list[float]:
            return [a / b for a, b in zip(above, below, strict=True)]

        bound_s = [compute_s + self.hop_s for compute_s in rounds["compute_s"]]
        against_bound = ratios(bound_s, rounds["step_s"])
        result: dict[str, Any] = {
            "stages": len(self.runs),
            "blocks": [len(run) for run in self.runs],
            "tokens_per_s": 1 / median(rounds["step_s"]),
            "compute_ms": median(rounds["compute_s"]) * 1e3,
            "hops_ms": self.hop_s * 1e3,
            "step_ms": median(rounds["step_s"]) * 1e3,
            "speed_against_bound": median(against_bound),
            "chunk_tokens": self.line.chunk_tokens,
            "prompt_s": median(rounds["prompt_s"]),
            "prompt_against_first": median(ratios(first.rounds["prompt_s"], rounds["prompt_s"])),
            "busy_s": self.busy_s,
            "rounds": dict(rounds),
        }
        if self.llama is not None:
            decode = ratios(rounds["llama_step_s"], rounds["step_s"])
            prompt = ratios(rounds["llama_prompt_s"], rounds["prompt_s"])
            result |= {
                "llama_tokens_per_s": 1 / median(rounds["llama_step_s"]),
                "against_llama": median(decode),
                "lowest_against_llama": min(decode),
                "llama_prompt_s": median(rounds["llama_prompt_s"]),
                "prompt_against_llama": median(prompt),
            }
        return result


def measure(options: argparse.Namespace, spec: ModelSpec, home: Path) -> list[dict[str, Any]]:
    """A row for each number of stages, all on one testbed."""
    counts = [int(count) for count in options.stages.split(",")]
    names = [f"stage-{number}" for number in range(1, max(counts) + 1)]
    hosts = {name: Host(cpu_percent=CPU_PERCENT) for name in names}
    client = names[0] if options.client_shares else CLIENT
    network = Network(hosts | {CLIENT: Host()}, default=Link(ROUND_TRIP_S / 2, BYTES_PER_S))
    context_tokens = PROMPT_TOKENS + options.tokens + 1
    paths = write_blocks(spec, home)
    model = home / "model.gguf"
    if options.llama_cpp:
        gguf.write_llama(model, spec, "q4_0", context_tokens)
    with ExitStack() as stack:
        bed = stack.enter_context(Testbed(network, "pipeline"))
        splits = []
        for count in counts:
            say(f"{count} stages ...")
            runs = split(spec, count)
            configs = [
                {
                    "name": name,
                    "previous": names[(index - 1) % count],
                    "address": network.address(name),
                    "layers": options.layers,
                    "vocab": options.vocab,
                    "blocks": [run.start, run.stop],
                    "paths": paths,
                    "backend": options.backend,
                    "hop_bits": options.hop_bits,
                    "threads": THREADS,
                    "context_tokens": context_tokens,
                }
                for index, (name, run) in enumerate(zip(names, runs, strict=False))
            ]
            line = Line(bed, names[:count], configs)
            stack.callback(line.close)
            llama = None
            if options.llama_cpp:
                say(f"{count} RPC servers ...")
                llama = start_llama(options, bed, names[:count], client, runs, model, stack)
                llama.ask("decode", SHORT_TOKENS, 4)
            line.generate(1, limits.PREFILL_CHUNK_TOKENS, 4)
            line.chunk_tokens = options.chunk or best_chunk_tokens(
                timed(line.calls()), PROMPT_TOKENS
            )
            row_bytes = payload_bytes(1, spec.hidden, options.hop_bits)
            hop_s = sum(
                link.rtt_s / 2 + row_bytes / link.bytes_per_s for link in line.links[:-1]
            ) + sum(link.rtt_s / 2 for link in line.links[-1:])
            splits.append(Split(runs, line, llama, hop_s))
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds} ...")
            # Whoever comes second finds the machine warmer: they take turns.
            for each in splits if number % 2 else reversed(splits):
                if number % 2:
                    each.measure_llama(options.tokens)
                each.measure(number + 1, options.tokens)
                if not number % 2:
                    each.measure_llama(options.tokens)
        return [each.row(splits[0]) for each in splits]


def timed(calls: Sequence[Sequence[tuple[int, float]]]) -> list[Passage]:
    """Stages as chunks pass them, by what a row took and a row of a whole chunk."""
    stages = []
    for stage in calls:
        row_s, chunk_s = (
            median(s for rows, s in stage if rows == count)
            for count in (1, limits.PREFILL_CHUNK_TOKENS)
        )
        prompt_s = chunk_s / limits.PREFILL_CHUNK_TOKENS
        stages.append(block_passage(row_s, prompt_s))
    return stages


def start_llama(
    options: argparse.Namespace,
    bed: Testbed,
    hosts: Sequence[str],
    client: str,
    runs: Sequence[range],
    model: Path,
    stack: ExitStack,
) -> llama_cpp_process.Worker:
    """llama.cpp's servers on the hosts, and a worker that has put the model there."""
    server = llama_cpp_process.find_server(options.llama_cpp)
    addresses = llama_cpp_process.start_servers(bed, hosts, server, THREADS, client, stack)
    # The embedding stays with the client; the output counts as a layer.
    layers = [len(run) - (run.start == 0) for run in runs]
    command = llama_cpp_process.worker_command(
        options.llama_python,
        model,
        THREADS,
        PROMPT_TOKENS + options.tokens + 1,
        *("--rpc", ",".join(addresses), "--split", ",".join(map(str, layers))),
        *("--batch", str(options.llama_batch)),
    )
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(options.llama_cpp.resolve())}
    process = bed.popen(
        client,
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return llama_cpp_process.Worker(process)


def say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="1,2,3,4", help="numbers of stages")
    parser.add_argument("--layers", type=int, default=16, help="of Llama-1B's 16")
    parser.add_argument("--vocab", type=int, default=32000, help="Llama-1B's is 128256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="decoded in a round")
    parser.add_argument(
        "--chunk", type=int, help="rows of a prompt at once (as a coordinator would choose)"
    )
    parser.add_argument("--hop-bits", type=int, choices=HOP_BITS, default=DEFAULT_HOP_BITS)
    parser.add_argument("--backend", default="onnx_cpu")
    parser.add_argument("--llama-cpp", type=Path, help="bin folder of a build with RPC")
    parser.add_argument("--llama-python", help="a Python with llama-cpp-python")
    parser.add_argument("--llama-batch", type=int, default=512, help="rows that it has at once")
    parser.add_argument(
        "--client-shares", action="store_true", help="llama.cpp's client is on the first host"
    )
    parser.add_argument("--directory", type=Path, help="for 2 GB of weights meanwhile")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (options.llama_cpp is None) != (options.llama_python is None):
        parser.error("--llama-cpp and --llama-python belong together")
    if options.llama_cpp:
        llama_cpp_process.find_server(options.llama_cpp)
    spec = model_spec(options.layers, options.vocab)
    with TemporaryDirectory(prefix="shoal-pipeline-", dir=options.directory) as directory:
        try:
            rows = measure(options, spec, Path(directory))
        except TestbedError as error:
            sys.exit(str(error))
    if options.json:
        answer = {"machine": processor_name(), "layers": options.layers, "vocab": options.vocab}
        print(json.dumps(answer | {"rows": rows}))
        return
    table = Table(title=f"{options.layers} layers of Llama-1B, {BITS} bits; {processor_name()}")
    columns = {
        "stages": "{}",
        "tokens_per_s": "{:.2f}",
        "compute_ms": "{:.1f}",
        "hops_ms": "{:.2f}",
        "speed_against_bound": "{:.2f}",
        "chunk_tokens": "{}",
        "prompt_s": "{:.2f}",
        "prompt_against_first": "{:.2f}",
        "llama_tokens_per_s": "{:.2f}",
        "against_llama": "{:.2f}",
        "lowest_against_llama": "{:.2f}",
        "llama_prompt_s": "{:.2f}",
        "prompt_against_llama": "{:.2f}",
    }
    shown = {name: form for name, form in columns.items() if name in rows[0]}
    for name in shown:
        table.add_column(name.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(*(form.format(row[name]) for name, form in shown.items()))
    Console(width=max(Console().width, 120)).print(table)


if __name__ == "__main__":
    main()

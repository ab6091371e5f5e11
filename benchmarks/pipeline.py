"""What splitting over 1 to 4 equal devices costs, on an emulated LAN.

    make bench-pipeline
    python benchmarks/pipeline.py --stages 1,4 --layers 16 --vocab 128256 --json

Each stage is a process on a host of its own (testbed/): 40 % of a core in periods of 5 ms, 1
Gbit/s, 0.2 ms round trip. The model has Llama-1B's layers and random weights at 4 bits; the default
is 4 of its 16 layers and a small vocabulary. Stages and hops are the agent's own (agent.relay,
agent.peers, agent.hop); no coordinator takes part.

Reported for each number of stages: decoded tokens per second, against one stage and against
1 / (sum of what the stages' calls took + sum of the measured hops); the time of a prompt of 512
tokens, and against one stage. The hop of a link is half its median round trip and the bytes of a
row at its rate, as measured by the relay's own probe on the emulated network.

The quota flatters a split: a stage that computes for less than its share of a period is not slowed
down at all, and a short call of a small stage is just that. Compare with the bound, not with one
stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from agent.links import Link as PeerLink
from agent.links import LinkFigures, Measuring
from agent.peers import PeerServer, connect_peer, measure_link
from agent.relay import Relay
from backends.base import Array, Stage, StageOptions, Tokens
from backends.registry import backend_class
from calibration.shapes import shape_spec
from model.artifact import write_artifact
from model.quantize import Format
from model.spec import ModelSpec
from wire.activations import DEFAULT_HOP_BITS, HOP_BITS, payload_bytes
from wire.connection import Listener
from wire.messages import Endpoint, Message, Sampling, SequenceFailed, StartSequence, TokenSampled

CPU_PERCENT = 40.0
ROUND_TRIP_S = 0.2e-3
BYTES_PER_S = 125e6
BITS = 4
PROMPT_TOKENS = 512
EPOCH = 1
ANSWER_S = 600


def model_spec(layers: int, vocab: int) -> ModelSpec:
    """Llama-1B with fewer layers and words."""
    whole = shape_spec("llama-1b")
    return replace(whole, vocab=vocab, layers=whole.layers[:layers], max_context=2048)


def balanced(weights: Sequence[int], parts: int) -> list[range]:
    """Contiguous runs of blocks whose largest is as light as it can be."""
    best: list[range] = []
    least = math.inf
    for cuts in itertools.combinations(range(1, len(weights)), parts - 1):
        ends = (0, *cuts, len(weights))
        runs = [range(first, last) for first, last in itertools.pairwise(ends)]
        largest = max(sum(weights[run.start : run.stop]) for run in runs)
        if largest < least:
            best, least = runs, largest
    return best


def block_weights(spec: ModelSpec) -> list[int]:
    """What decoding a token reads of each block; of the embedding one row."""
    return [
        0 if block == 0 else sum(map(math.prod, spec.block_tensors(block).values()))
        for block in range(spec.block_count)
    ]


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


# ---- a stage, in a process on its host ----------------------------------------------------------


class TimedStage(Stage):
    """Puts down how long each call takes, by its rows."""

    def __init__(self, stage: Stage) -> None:
        self.calls: list[tuple[int, float]] = []
        self._stage = stage

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: bool = True
    ) -> Array:
        started_s = time.perf_counter()
        output = self._stage.forward(slot, position, inputs, logits=logits)
        self.calls.append((len(inputs), time.perf_counter() - started_s))
        return output

    @property
    def memory_bytes(self) -> int:
        return self._stage.memory_bytes

    def close(self) -> None:
        self._stage.close()


@dataclass(slots=True)
class StageProcess:
    """Carries out the lines of JSON on stdin, and answers each with one on stdout."""

    config: dict[str, Any]
    arrived_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        config = self.config
        spec = model_spec(config["layers"], config["vocab"])
        blocks = range(*config["blocks"])
        stage = TimedStage(
            backend_class(config["backend"])().load(
                spec,
                [(block, Path(config["paths"][block])) for block in blocks],
                StageOptions(1, config["context_tokens"], 1),
            )
        )
        relay = Relay(
            stage,
            spec,
            blocks,
            epoch=EPOCH,
            slots=1,
            context_tokens=config["context_tokens"],
            hop_bits=config["hop_bits"],
            report=self._report,
        )
        listener = Listener(config["address"], 0)
        server = PeerServer(config["name"], listener, relay.deliver)
        server.start()
        say({"port": listener.port})
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "connect":
                endpoint = Endpoint(command["host"], command["port"])
                with connect_peer(config["name"], command["name"], [endpoint]) as probe:
                    figures = measure_link(probe)
                relay.connect(
                    connect_peer(config["name"], command["name"], [endpoint]),
                    PeerLink(command["name"], figures),
                    Measuring(),
                )
                say(
                    {
                        "rtt_s": figures.rtt_s,
                        "rtt_p90_s": figures.rtt_p90_s,
                        "bytes_per_s": figures.bytes_per_s,
                    }
                )
            elif command["do"] == "start":
                random = np.random.default_rng(command["sequence"])
                prompt = tuple(random.integers(0, spec.vocab, command["prompt_tokens"]).tolist())
                say({"started_s": time.monotonic()})
                sampling = Sampling(command["tokens"], ())
                relay.start(StartSequence(EPOCH, command["sequence"], 0, prompt, sampling))
            else:
                calls, stage.calls = stage.calls, []
                say({"calls": calls})
        relay.close()
        server.close()

    def _report(self, message: Message) -> None:
        """The last stage's tokens; they are told when all are there."""
        if isinstance(message, SequenceFailed):
            say({"failed": message.reason})
        elif isinstance(message, TokenSampled):
            self.arrived_s.append(time.monotonic())
            if message.finish:
                arrived_s, self.arrived_s = self.arrived_s, []
                say({"arrived_s": arrived_s})


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


# ---- the line of stages, as the benchmark sees it ------------------------------------------------


class Line:
    """Stages on hosts, connected to a ring."""

    def __init__(self, bed: Any, names: Sequence[str], configs: Sequence[dict[str, Any]]) -> None:
        self._processes: list[subprocess.Popen[str]] = [
            bed.popen(
                name,
                [sys.executable, __file__, "--stage-process", json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, config in zip(names, configs, strict=True)
        ]
        ports = [self._hear(index)["port"] for index in range(len(names))]
        self.links: list[LinkFigures] = []
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
        self._tell(0, do="start", sequence=sequence, prompt_tokens=prompt_tokens, tokens=tokens)
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


def measure(
    options: argparse.Namespace, spec: ModelSpec, paths: list[str], stages: int
) -> dict[str, Any]:
    """One number of stages, on a testbed of its own."""
    from testbed.bed import Testbed
    from testbed.network import Host, Link, Network

    names = [f"stage-{number}" for number in range(1, stages + 1)]
    network = Network(
        {name: Host(cpu_percent=CPU_PERCENT) for name in names},
        default=Link(ROUND_TRIP_S / 2, BYTES_PER_S),
    )
    runs = balanced(block_weights(spec), stages)
    with ExitStack() as stack:
        bed = stack.enter_context(Testbed(network, "pipeline"))
        configs = [
            {
                "name": name,
                "address": network.address(name),
                "layers": options.layers,
                "vocab": options.vocab,
                "blocks": [run.start, run.stop],
                "paths": paths,
                "backend": options.backend,
                "hop_bits": options.hop_bits,
                "context_tokens": PROMPT_TOKENS + options.tokens + 1,
            }
            for name, run in zip(names, runs, strict=True)
        ]
        line = Line(bed, names, configs)
        stack.callback(line.close)
        line.generate(1, 8, 4)
        line.calls()
        step_s: list[float] = []
        compute_s: list[float] = []
        for sequence in range(2, 2 + options.rounds):
            arrived_s = line.generate(sequence, 8, options.tokens + 1)
            step_s += np.diff(arrived_s).tolist()
            decode = [[s for rows, s in calls if rows == 1] for calls in line.calls()]
            compute_s.append(sum(statistics.fmean(calls) for calls in decode))
        prefill_s = [
            line.generate(100 + turn, PROMPT_TOKENS, 1)[0] for turn in range(options.prefills)
        ]
        row_bytes = payload_bytes(1, spec.hidden, options.hop_bits)
        hop_s = sum(
            link.rtt_s / 2 + row_bytes / link.bytes_per_s for link in line.links[:-1]
        ) + sum(link.rtt_s / 2 for link in line.links[-1:])
        return {
            "stages": stages,
            "blocks": [len(run) for run in runs],
            "tokens_per_s": 1 / statistics.fmean(step_s),
            "compute_ms": statistics.fmean(compute_s) * 1e3,
            "hops_ms": hop_s * 1e3,
            "rtt_ms": [link.rtt_s * 1e3 for link in line.links],
            "prefill_s": min(prefill_s),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What splitting over 1 to 4 equal devices costs, on an emulated LAN.",
        epilog="example: python benchmarks/pipeline.py --stages 1,4 --rounds 3 --json",
    )
    parser.add_argument("--stages", default="1,2,3,4", help="numbers of stages")
    parser.add_argument("--layers", type=int, default=4, help="of Llama-1B's 16")
    parser.add_argument("--vocab", type=int, default=8192, help="Llama-1B's is 128256")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=24, help="decoded in a round")
    parser.add_argument("--prefills", type=int, default=2, help=f"of {PROMPT_TOKENS} tokens")
    parser.add_argument("--hop-bits", type=int, choices=HOP_BITS, default=DEFAULT_HOP_BITS)
    parser.add_argument("--backend", default="onnx_cpu")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--stage-process", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage_process:
        StageProcess(json.loads(options.stage_process)).run()
        return
    spec = model_spec(options.layers, options.vocab)
    with TemporaryDirectory(prefix="shoal-pipeline-") as directory:
        paths = write_blocks(spec, Path(directory))
        rows = []
        for stages in map(int, options.stages.split(",")):
            print(f"{stages} stages ...", file=sys.stderr)
            rows.append(measure(options, spec, paths, stages))
    for row in rows:
        row["speed_against_one"] = row["tokens_per_s"] / rows[0]["tokens_per_s"]
        bound = 1e3 / (row["compute_ms"] + row["hops_ms"])
        row["speed_against_bound"] = row["tokens_per_s"] / bound
        row["prefill_against_one"] = rows[0]["prefill_s"] / row["prefill_s"]
    if options.json:
        print(json.dumps({"layers": options.layers, "vocab": options.vocab, "rows": rows}))
        return
    table = Table(title=f"{options.layers} layers of Llama-1B, {BITS} bits")
    columns = {
        "stages": "{}",
        "tokens_per_s": "{:.2f}",
        "speed_against_one": "{:.2f}",
        "compute_ms": "{:.1f}",
        "hops_ms": "{:.2f}",
        "speed_against_bound": "{:.2f}",
        "prefill_s": "{:.2f}",
        "prefill_against_one": "{:.2f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(shown.format(row[name]) for name, shown in columns.items()))
    Console().print(table)


if __name__ == "__main__":
    main()

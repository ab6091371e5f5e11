"""One stage of benchmarks/pipeline.py, in a process on its emulated host.

Its description is JSON on the command line. It then carries out the lines of JSON on stdin, and
answers each with a line on stdout. Stage, relay and hop are the agent's own.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.links import Link, Measuring
from agent.peers import Entrance, PeerServer, connect_peer, measure_link
from agent.relay import Relay
from backends.base import Array, Stage, StageOptions, Tokens
from backends.registry import backend_class
from calibration.shapes import shape_spec
from model.spec import ModelSpec
from wire import limits
from wire.connection import Listener
from wire.messages import Endpoint, Message, Sampling, SequenceFailed, StartSequence, TokenSampled

EPOCH = 1

HOP_KEY = b"of all stages here"


def model_spec(layers: int, vocab: int) -> ModelSpec:
    """Return Llama-1B with fewer layers and words."""
    whole = shape_spec("llama-1b")
    return replace(whole, vocab=vocab, layers=whole.layers[:layers], max_context=2048)


class TimedStage(Stage):
    """Records the time of each call, and its rows."""

    def __init__(self, stage: Stage) -> None:
        self.calls: list[tuple[int, float]] = []
        self._stage = stage

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
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
    """Carries out the lines on stdin."""

    config: dict[str, Any]
    arrived_s: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Run until stdin ends."""
        config = self.config
        spec = model_spec(config["layers"], config["vocab"])
        blocks = range(*config["blocks"])
        stage = TimedStage(
            backend_class(config["backend"])().load(
                spec,
                [(block, Path(config["paths"][block])) for block in blocks],
                StageOptions(1, config["context_tokens"], config["threads"]),
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
        server = PeerServer(config["name"], listener)
        server.entrances = (Entrance(config["previous"], HOP_KEY, relay.deliver),)
        server.start()
        say({"port": listener.port})
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "connect":
                endpoint = Endpoint(command["host"], command["port"])
                with connect_peer(config["name"], command["name"], [endpoint]) as probe:
                    figures, _ = measure_link(probe)
                relay.connect(
                    connect_peer(config["name"], command["name"], [endpoint], hop_key=HOP_KEY),
                    Link(command["name"], figures),
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
                if blocks.start == 0:
                    say({"started_s": time.monotonic()})
                sampling = Sampling(command["tokens"], ())
                chunk_tokens = command["chunk_tokens"]
                # This allows longer chunks than a coordinator may ask for.
                limits.PREFILL_CHUNK_TOKENS = max(limits.PREFILL_CHUNK_TOKENS, chunk_tokens)
                number = command["sequence"]
                relay.start(StartSequence(EPOCH, number, 0, prompt, sampling, chunk_tokens))
            else:
                calls, stage.calls = stage.calls, []
                say({"calls": calls})
        relay.close()
        server.close()

    def _report(self, message: Message) -> None:
        """Collect the last stage's tokens, and report them when all are there."""
        if isinstance(message, SequenceFailed):
            say({"failed": message.reason})
        elif isinstance(message, TokenSampled):
            self.arrived_s.append(time.monotonic())
            if message.finish:
                arrived_s, self.arrived_s = self.arrived_s, []
                say({"arrived_s": arrived_s})


def say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    StageProcess(json.loads(sys.argv[1])).run()

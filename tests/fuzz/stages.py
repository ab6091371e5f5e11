"""Relays of a stage under messages that almost fit. Neither an exception nor a bug may come out."""

from __future__ import annotations

import queue
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from agent.encoding import EncoderRelay
from agent.relay import Relay
from backends.base import Array, StageOptions, Tokens
from backends.onnx_cpu import OnnxCpuBackend
from model.checkpoint import Checkpoint
from model.quantize import Format
from tests.agent.teams import ReferenceStage
from tests.encoder_cases import stored
from tests.fuzz.frames import Frames
from wire.messages import (
    Activation,
    EncodeTexts,
    Message,
    PassFailed,
    Sampling,
    SequenceFailed,
    StartSequence,
    TextRows,
    TokenSampled,
)

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
EPOCH = 7
CONTEXT = 40
SLOTS = 2
BATCH = 20


class _ComputesAnything(ReferenceStage):
    """The reference without numpy's warnings of rows that overflow, which other backends lack."""

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):
            return super().forward(slot, position, inputs, logits=logits)


@dataclass(frozen=True, slots=True)
class StageSteps:
    """Steps of a target, and the relays that it uses."""

    step: Callable[[], int]
    relays: Sequence[Relay | EncoderRelay]

    def __call__(self) -> int:
        return self.step()

    def close(self) -> None:
        for relay in self.relays:
            relay.close()


def rows_and_tokens(seed: int) -> StageSteps:
    """What a coordinator and a previous device say to a whole model, and to its last blocks."""
    frames, checkpoint = Frames(seed), Checkpoint.open(LLAMA)
    reports: queue.Queue[Message] = queue.Queue()
    spec, pick = checkpoint.spec, frames.random.choice
    relays = [
        Relay(
            _ComputesAnything.whole(checkpoint, blocks, SLOTS),
            spec,
            blocks,
            epoch=EPOCH,
            slots=SLOTS,
            context_tokens=CONTEXT,
            hop_bits=32,
            report=reports.put,
        )
        for blocks in (range(spec.block_count), range(2, spec.block_count))
    ]
    newest = 0

    def near(message: Message, relay: Relay) -> Message:
        """The message with the fields that lead furthest, mostly."""
        nonlocal newest
        if isinstance(message, StartSequence):
            newest += 1
            short, odd = Sampling(pick((1, 4)), ()), message.sampling
            fields: dict[str, Any] = {
                name: pick((getattr(short, name), getattr(short, name), getattr(odd, name)))
                for name in Sampling.__dataclass_fields__
            }
            prompt = tuple(frames.random.randrange(spec.vocab) for _ in range(pick((0, 1, 9))))
            return replace(
                message,
                epoch=EPOCH,
                sequence=newest,
                slot=frames.random.randrange(SLOTS),
                prompt=prompt,
                sampling=Sampling(**fields),
                chunk_tokens=pick((1, 7, message.chunk_tokens)),
                cached=pick((0, 0, message.cached)),
                drafts=pick((0, 3, message.drafts)),
            )
        if isinstance(message, Activation):
            return replace(
                message,
                epoch=EPOCH,
                sequence=relay.newest,  # It waits for the start of later ones.
                slot=frames.random.randrange(SLOTS),
                position=pick((0, 1, message.position)),
                rows=pick((1, 2, message.rows)),
            )
        assert isinstance(message, TokenSampled)
        return replace(message, epoch=EPOCH, sequence=relay.newest)

    def step() -> int:
        for _ in range(BATCH):
            relay = pick(relays)
            message = near(frames.message(pick((StartSequence, Activation, TokenSampled))), relay)
            if isinstance(message, StartSequence):
                relay.start(message)
            else:
                size_bytes = pick((0, 4 * spec.hidden, 8 * spec.hidden, 64))
                relay.deliver(message, memoryview(frames.random.randbytes(size_bytes)))
        _require_no_bug(reports)
        return BATCH

    return StageSteps(step, relays)


def texts(seed: int) -> StageSteps:
    """Passes of whole texts for an encoder, as a coordinator and a previous device send them."""
    frames = Frames(seed)
    reports: queue.Queue[Message] = queue.Queue()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint, artifacts = stored("minilm", Format.of(32), Path(directory))
        spec = checkpoint.spec
        options = StageOptions(1, CONTEXT, 1, exact=True)
        relays = [
            EncoderRelay(
                OnnxCpuBackend().stage(spec, artifacts[first:], options),
                spec,
                range(first, spec.block_count),
                epoch=EPOCH,
                context_tokens=CONTEXT,
                hop_bits=32,
                report=reports.put,
            )
            for first in (0, 1)
        ]
    pick, random = frames.random.choice, frames.random.randrange

    def step() -> int:
        for _ in range(BATCH):
            count = pick((1, 2, 40))
            lengths = tuple(pick((1, 1, 3, CONTEXT, random(CONTEXT + 2))) for _ in range(count))
            seconds = tuple(pick((length, 0, length + 1)) for length in lengths)
            if pick((True, False)):
                message = frames.message(EncodeTexts)
                assert isinstance(message, EncodeTexts)
                tokens = tuple(random(spec.vocab) for _ in range(sum(lengths)))
                relays[0].encode(
                    replace(
                        message,
                        epoch=EPOCH,
                        tokens=pick((tokens, tokens, message.tokens)),
                        lengths=pick((lengths, lengths, message.lengths)),
                        seconds=pick((lengths, seconds)),
                    )
                )
                continue
            rows = frames.message(TextRows)
            assert isinstance(rows, TextRows)
            payload = frames.random.randbytes(4 * spec.hidden * sum(lengths))
            rows = replace(rows, epoch=EPOCH, bits=32, lengths=lengths, seconds=lengths)
            pick(relays).deliver(rows, memoryview(payload))
        _require_no_bug(reports)
        return BATCH

    return StageSteps(step, relays)


def _require_no_bug(reports: queue.Queue[Message]) -> None:
    while not reports.empty():
        report = reports.get()
        if isinstance(report, (SequenceFailed, PassFailed)):
            assert "internal error" not in report.reason

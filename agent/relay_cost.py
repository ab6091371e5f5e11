"""The cost of a token besides the stage's own call, measured with a stage that computes nothing.

A relay runs alone, as one that is first and last. Its share has locks, the hand-over to the stage's
thread, sampling, and a report that leaves by a connection. What rows take to and from the bytes of
a link is timed beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np

from agent.loopback import loopback_pair
from agent.pace import PacedStage
from agent.relay import Relay
from backends.base import Array, Stage, Tokens
from calibration.disturbance import Patience, spread_of, steady
from model.spec import LayerSpec, ModelSpec
from wire.activations import HopBits, decode_rows, encode_rows
from wire.conditions import Conditions
from wire.identity import Identity
from wire.messages import Message, Sampling, StartSequence, TokenSampled

STEPS = 60
_RUNS = 5
_WARM_UP = 10
_VOCAB = 32_000
_HIDDEN = 2048
_READ_BYTES = 4 << 20
"""A stage reads its weights: so Python finds little of its own in the caches."""
_HOP_BITS: HopBits = 16
_LIMIT_S = 20.0
"""For one run, on the slowest device; it is not waited for longer."""


def measure_relay(identity: Identity | None, patience_s: float) -> tuple[float, Conditions]:
    """Seconds a token, in a fraction of a second; and what else went on meanwhile.

    Whatever others disturbed is measured again for ``patience_s`` at most.
    identity: the agent's, which encrypts. None if it does not.
    """
    return steady(
        partial(_share_s, identity), Patience(limit_s=patience_s), lambda seconds: seconds
    )


class _IdleStage(Stage):
    """Reads some memory, and computes nothing; ``busy_s`` is how long its last call took."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self._read = np.ones(_READ_BYTES, np.uint8)
        self._logits = np.zeros((1, _VOCAB), np.float32)

    def forward(
        self, slot: int, position: int, inputs: Array | Tokens, *, logits: int = 1
    ) -> Array:
        started_s = time.perf_counter()
        self._read.sum()
        self.busy_s = time.perf_counter() - started_s
        return self._logits

    @property
    def memory_bytes(self) -> int:
        return _READ_BYTES

    def close(self) -> None:
        pass


def _share_s(identity: Identity | None) -> tuple[float, float]:
    """The median over some runs of the median of their steps, and the spread over runs."""
    runs_s = [median(_steps_s(identity)) for _ in range(_RUNS)]
    rows = np.zeros((1, _HIDDEN), np.float32)

    def convert() -> None:
        decode_rows(encode_rows(rows, _HOP_BITS), 1, _HIDDEN, _HOP_BITS)

    return median(runs_s) + _median_s(convert), spread_of(runs_s)


def _steps_s(identity: Identity | None) -> list[float]:
    """The seconds of each step of a relay alone, without its stage."""
    stage, done = _IdleStage(), threading.Event()
    told_s: list[float] = []
    steps_s: list[float] = []

    def report(message: Message) -> None:
        near.send(message)
        told_s.append(time.perf_counter())
        if len(told_s) > _WARM_UP:
            steps_s.append(told_s[-1] - told_s[-2] - stage.busy_s)
        if not isinstance(message, TokenSampled) or message.finish:
            done.set()

    spec = _spec()
    with loopback_pair(identity) as (near, _):
        relay = Relay(
            PacedStage(stage, epoch=1),
            spec,
            range(spec.block_count),
            epoch=1,
            slots=1,
            context_tokens=STEPS + 2,
            hop_bits=_HOP_BITS,
            report=report,
        )
        relay.start(StartSequence(1, 1, 0, (0,), Sampling(STEPS, ())))
        done.wait(_LIMIT_S)
        relay.close()
    return steps_s or [0.0]


def _median_s(call: Callable[[], object]) -> float:
    times_s = []
    for _ in range(STEPS):
        started_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - started_s)
    return median(times_s)


def _spec() -> ModelSpec:
    """A model whose tokens and rows are of a usual size."""
    layer = LayerSpec(
        hidden=_HIDDEN,
        heads=1,
        kv_heads=1,
        head_dim=_HIDDEN,
        ffn=1,
        norm="rmsnorm",
        norm_eps=1e-5,
        norm_position="pre",
        activation="silu",
        gated=False,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
    )
    return ModelSpec(
        vocab=_VOCAB,
        hidden=_HIDDEN,
        embed_dim=_HIDDEN,
        max_context=STEPS + 2,
        layers=(layer,),
        learned_positions=0,
        position_offset=0,
        final_norm=True,
        tied_head=True,
        bos_token=None,
        eos_tokens=(),
    )

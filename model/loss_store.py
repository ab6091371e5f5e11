"""The losses of fewer bits, measured when a model is first planned and kept from then on.

One file per checkpoint, kind of format, text and tokenizer. Losing a file costs time, never
correctness.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from model.bounded import read_json
from model.checkpoint import Checkpoint
from model.durable import replace_text
from model.errors import ModelError
from model.experts import ExpertCounts
from model.loss_estimate import (
    SEQUENCE_TOKENS,
    LossEstimate,
    LossUnknown,
    OnStep,
    affordable_tokens,
    estimate_losses,
    needed_bytes,
    plan_loss,
)
from model.memory import memory_bytes
from model.passages import built_in_text, split_passages
from model.quantize import BITS, Format, Quantizer, Scheme
from model.spec import ModelSpec

log = logging.getLogger(__name__)

VERSION = 1
"""The version of the file and of the method. Another one measures anew."""

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Form:
    """A checkpoint and how its integer widths are stored."""

    checkpoint: Checkpoint
    scheme: Quantizer
    group_size: int

    @property
    def stored_scheme(self) -> Scheme:
        """How codes of integer widths decode."""
        return Format.of(min(BITS), self.scheme, self.group_size).scheme

    def format(self, block: int, bits: int) -> Format:
        return self.checkpoint.format_of(block, Format.of(bits, self.scheme, self.group_size))


class LossStore:
    """Measures losses with the built-in text and keeps them; one thread at a time."""

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "losses"

    def known(self, form: Form) -> LossEstimate | None:
        """Return earlier measurements, or None if there are none or their file is damaged."""
        path = self._path(form)
        try:
            return _read(read_json(path), form.checkpoint.spec)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            log.warning("%s is damaged or of another version: measured anew", path)
            return None

    def losses(self, form: Form, on_step: OnStep, cancelled: Callable[[], bool]) -> LossEstimate:
        """Return earlier measurements, or measure now. Raises LossUnknown, Cancelled."""
        known = self.known(form)
        if known is None:
            sequences = _text(form.checkpoint)
            checkpoint, scheme, group_size = form.checkpoint, form.scheme, form.group_size
            known = _measured(
                lambda: estimate_losses(
                    checkpoint, sequences, scheme, group_size, on_step, cancelled
                )
            )
            self._save(form, known)
        return known

    def plan_loss(
        self,
        form: Form,
        bits: tuple[int, ...],
        on_step: OnStep,
        cancelled: Callable[[], bool],
    ) -> float:
        """The measured KL divergence of a plan with these bits of blocks. Errors: ``losses``."""
        known = self.losses(form, on_step, cancelled)
        if bits not in known.plans:
            sequences = _text(form.checkpoint)
            formats = [form.format(block, width) for block, width in enumerate(bits)]
            kl = _measured(
                lambda: plan_loss(form.checkpoint, formats, sequences, on_step, cancelled)
            )
            known = replace(known, plans={**known.plans, bits: kl})
            self._save(form, known)
        return known.plans[bits]

    def _save(self, form: Form, known: LossEstimate) -> None:
        content = {
            "version": VERSION,
            "blocks": [list(map(list, row.items())) for row in known.blocks],
            "margin": known.margin,
            "tokens": known.tokens,
            "seconds": known.seconds,
            "plans": [[list(bits), kl] for bits, kl in known.plans.items()],
            "experts": None if known.experts is None else known.experts.layers,
        }
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            replace_text(self._path(form), json.dumps(content))
        except OSError as error:
            log.warning("losses cannot be kept: %s", error)

    def _path(self, form: Form) -> Path:
        """Named by all that the figures depend on; files of the tokenizer by size and time."""
        key = [str(VERSION), *built_in_text(), str(affordable_tokens(form.checkpoint.spec))]
        for file in sorted(form.checkpoint.directory.glob("tokenizer*")):
            stat = file.stat()
            key.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
        text = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
        name = f"{form.checkpoint.fingerprint}-{form.scheme}-{form.group_size}-{text}.json"
        return self._directory / name


def _text(checkpoint: Checkpoint) -> list[list[int]]:
    """Token ids to measure with. Raises LossUnknown: no memory, or no text that the model reads."""
    spec = checkpoint.spec
    needed, (free, _) = needed_bytes(spec), memory_bytes()
    if needed > free:
        raise LossUnknown(
            f"measuring needs {needed / GIB:.2f} GiB of memory, and {free / GIB:.2f} GiB are free"
        )
    tokens = affordable_tokens(spec)
    try:
        from model.tokenizer import Tokenizer  # A plan that measures nothing does without.

        tokenizer = Tokenizer.load(checkpoint.directory)
        encoded = [tokenizer.encode(passage) for passage in built_in_text()]
    except ModelError as error:
        raise LossUnknown(f"there is no text to measure with: {error}") from error
    except ModuleNotFoundError as error:
        raise LossUnknown(f"measuring needs {error.name}, which this installation lacks") from error
    known = [[token for token in one if token < spec.vocab] for one in encoded]
    sequences = split_passages(known, min(SEQUENCE_TOKENS, spec.max_context), tokens)
    if not sequences:
        raise LossUnknown("the tokenizer makes no tokens of the text to measure with")
    return sequences


def _measured(work: Callable[[], Any]) -> Any:
    """Return the result of ``work``. Raises LossUnknown if memory or the weights fail it."""
    try:
        with np.errstate(all="ignore"):  # What is not finite is refused in one line.
            return work()
    except MemoryError as error:
        raise LossUnknown("measuring ran out of memory") from error
    except ModelError as error:
        raise LossUnknown(f"the weights cannot be measured: {error}") from error


def _read(content: Any, spec: ModelSpec) -> LossEstimate:
    """A kept file's content. Raises ValueError, KeyError, TypeError for any other content."""
    blocks = tuple({int(bits): float(kl) for bits, kl in row} for row in content["blocks"])
    plans = {tuple(map(int, bits)): float(kl) for bits, kl in content["plans"]}
    numbers = [kl for row in blocks for kl in row.values()] + [*plans.values()]
    counts = content.get("experts")
    experts = None
    if counts is not None:
        experts = ExpertCounts(tuple(tuple(map(int, row)) for row in counts))
        numbers += [count for row in experts.layers for count in row]
    margin, tokens = float(content["margin"]), int(content["tokens"])
    if (
        content["version"] != VERSION
        or len(blocks) != spec.block_count
        or not all(0 <= kl < math.inf for kl in numbers)
        or not 1 <= margin < math.inf
        or not all(blocks)
    ):
        raise ValueError("not what is written here")
    return LossEstimate(blocks, margin, tokens, float(content["seconds"]), plans, experts)

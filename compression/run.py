"""Compresses a model step by step. Every step's result is kept, and done only if it is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backends.base import Backend
from compression.cuts import Cut, cut_blocks, cut_spec, weights_of
from compression.distil import Recipe, distil
from compression.folder import can_cut_heads, write_folder
from compression.importance import (
    Importance,
    Probe,
    best_cut,
    gate_importance,
    importance_of,
    layer_order,
)
from compression.measure import answers, losses, stored
from compression.network import Network
from compression.points import Point, Points
from compression.text import Batch, batches
from evaluation.losses import Target
from evaluation.tasks import Tasks
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.spec import ModelSpec

Blocks = Sequence[Mapping[str, Any]]
OnStep = Callable[[str, int, int, str], None]
"""Gets (what, done, all, note)."""

TokenTime = Callable[[ModelSpec, Path, Format], float | None]
"""Predicts the seconds of a token of a model, which is in a folder. None: it fits no device."""

PROBE_TOKENS = 4096
"""Tokens of the text that importance is measured on."""


@dataclass(frozen=True, slots=True)
class Text:
    """The user's text. tasks: the questions whose answers are scored, or None."""

    learn: Sequence[Target]
    measure: Sequence[Target]
    tasks: Tasks | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """The wishes of a run. sizes: shares of the layers' weights. 1 is the original itself.

    formats: in which each smaller model is measured.
    coded: gives a model the codes of the quantizer that is asked for.
    token_time: for latencies, or None.
    """

    sizes: Sequence[float]
    formats: Sequence[Format]
    recipe: Recipe
    coded: Callable[[Checkpoint], Checkpoint]
    token_time: TokenTime | None
    backend: Backend
    threads: int


class Compression:
    """One run over a model, whose results go to a folder."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        text: Text,
        wanted: Wanted,
        directory: Path,
        points: Points,
        on_step: OnStep,
    ) -> None:
        """Read the original, which ``check_source`` has passed, into memory."""
        self._checkpoint, self._text, self._wanted = checkpoint, text, wanted
        self._directory, self.points, self._on_step = directory, points, on_step
        self._blocks = [checkpoint.block(block) for block in range(checkpoint.spec.block_count)]
        self._teacher = Network(checkpoint.spec, self._blocks)
        most = wanted.recipe.batch_tokens
        self._probe = Probe(
            self._teacher, list(batches(_some(text.learn, PROBE_TOKENS), PROBE_TOKENS))
        )
        self._measured: list[Batch] = list(batches(text.measure, most))
        self._with_heads = can_cut_heads(checkpoint)

    def run(self) -> None:
        """Make and measure what is missing. Raises ModelError, BackendError and OSError."""
        sizes = sorted(self._wanted.sizes, reverse=True)
        for size in sizes:
            if size >= 1:
                self._measure(size, self._checkpoint.directory, distilled=False)
        importance = self._importance()
        for size in sizes:
            if size < 1:
                self._make(size, importance)
        if self._wanted.token_time is not None:
            self._predict(self._wanted.token_time)

    def spec_of(self, point: Point) -> ModelSpec:
        """Return the description of a point's model."""
        kept = self.points.get(f"cut {point.size:g}")
        spec = self._checkpoint.spec
        return spec if kept is None else cut_spec(spec, Cut.from_dict(kept))

    def folder(self, size: float) -> Path:
        """Return where the model of a size is, taught unless no teaching was asked for."""
        return self._directory / f"{size * 100:g}"

    # ---- steps -----------------------------------------------------------------------------------

    def _importance(self) -> Importance:
        kept = self.points.get("importance")
        if kept is None:
            heads, columns = gate_importance(
                self._teacher,
                self._probe.batches,
                lambda a, b: self._on_step("weighing parts", a, b, ""),
            )
            order = layer_order(
                self._probe, lambda a, b: self._on_step("weighing layers", a, b, "")
            )
            kept = asdict(Importance(heads, columns, order))
            self.points.put("importance", kept)
        return importance_of(kept)

    def _make(self, size: float, importance: Importance) -> None:
        """Prune to a size, measure, teach, and measure again."""
        cut = self._cut(size, importance)
        spec = cut_spec(self._checkpoint.spec, cut)
        if not self._is_measured(size, distilled=False):
            pruned = cut_blocks(self._checkpoint.spec, self._blocks, cut)
            # A model that is taught next is not worth its place on the disk.
            is_last = not self._wanted.recipe.steps
            folder = self.folder(size) if is_last else self._directory / f".pruned-{size * 100:g}"
            self._write(cut, pruned, folder, "pruned")
            self._measure(size, folder, distilled=False)
            if not is_last:
                shutil.rmtree(folder)
        if self._wanted.recipe.steps and not self._is_measured(size, distilled=True):
            if self.points.get(f"distilled {size:g}") is None:
                student = Network(spec, cut_blocks(self._checkpoint.spec, self._blocks, cut))
                training = self._directory / f".training-{size * 100:g}.pt"
                distil(
                    self._teacher,
                    student,
                    cut,
                    self._text.learn,
                    self._wanted.recipe,
                    training,
                    lambda done, total, loss: self._on_step(
                        f"teaching {size:.0%}", done, total, f", loss {loss:.3f}"
                    ),
                )
                self._write(cut, student.arrays(), self.folder(size), "pruned and distilled")
                self.points.put(f"distilled {size:g}", True)
                training.unlink(missing_ok=True)
            self._measure(size, self.folder(size), distilled=True)

    def _cut(self, size: float, importance: Importance) -> Cut:
        kept = self.points.get(f"cut {size:g}")
        if kept is None:
            cut = best_cut(
                self._probe,
                importance,
                size,
                lambda a, b: self._on_step(f"choosing {size:.0%}", a, b, ""),
                with_heads=self._with_heads,
            )
            kept = cut.to_dict()
            self.points.put(f"cut {size:g}", kept)
        return Cut.from_dict(kept)

    def _is_measured(self, size: float, *, distilled: bool) -> bool:
        return all(
            self.points.point(size, fmt.bits, distilled=distilled) is not None
            for fmt in self._wanted.formats
        )

    def _measure(self, size: float, folder: Path, *, distilled: bool) -> None:
        """Measure the model in a folder at every format that is missing."""
        label = f"{size:.0%}{', distilled' if distilled else ''}"
        formats = self._wanted.formats
        if not self._is_measured(size, distilled=distilled):
            made = self._wanted.coded(Checkpoint.open(folder))
            for number, fmt in enumerate(formats):
                if self.points.point(size, fmt.bits, distilled=distilled) is None:
                    self._on_step(f"measuring {label}", number, len(formats), "")
                    self.points.add(self._point(size, made, fmt, distilled=distilled))
        self._on_step(f"measuring {label}", len(formats), len(formats), "")

    def _predict(self, token_time: TokenTime) -> None:
        """Predict the time of a token of every point that is wanted now.

        Raises what ``token_time`` raises.
        """
        found: dict[tuple[ModelSpec, int], float | None] = {}
        points = self.points.all()
        formats = {fmt.bits: fmt for fmt in self._wanted.formats}
        for number, point in enumerate(points):
            self._on_step("planning", number, len(points), "")
            if point.bits not in formats or point.size not in self._wanted.sizes:
                continue
            key = self.spec_of(point), point.bits
            if key not in found:
                # A pruned model has the shape of the taught one, whose folder stays.
                folder = self.folder(point.size)
                folder = folder if point.size < 1 else self._checkpoint.directory
                token_s = token_time(key[0], folder, formats[point.bits])
                found[key] = None if token_s is None else 1e3 * token_s
            self.points.add(replace(point, latency_ms=found[key]))
        self._on_step("planning", len(points), len(points), "")

    def _point(self, size: float, made: Checkpoint, fmt: Format, *, distilled: bool) -> Point:
        blocks, size_bytes = stored(made, fmt)
        loss, kl = losses(self._teacher, made, blocks, self._measured)
        del blocks  # The answers below need the memory.
        exact, f1 = None, None
        if self._text.tasks is not None:
            wanted = self._wanted
            exact, f1 = answers(
                made, self._text.tasks, fmt, wanted.backend, wanted.threads, lambda *_: None
            )
        spec, first = made.spec, made.spec.layers[0]
        head = spec.vocab * spec.embed_dim * (1 if spec.tied_head else 2)
        return Point(
            size=size,
            distilled=distilled,
            bits=fmt.bits,
            layers=len(spec.layers),
            kv_heads=first.kv_heads,
            ffn=first.ffn,
            weights=weights_of(spec) + head,
            bytes=size_bytes,
            loss=loss,
            kl=kl,
            exact_match=exact,
            f1=f1,
        )

    def _write(self, cut: Cut, blocks: Blocks, folder: Path, how: str) -> None:
        name = self._checkpoint.directory.name
        about = (
            f"# {name}, {how} by shoal\n\n"
            f"{cut.shape} stay of {len(self._checkpoint.spec.layers)} layers, "
            f"{self._checkpoint.spec.layers[0].kv_heads} KV heads and "
            f"{self._checkpoint.spec.layers[0].ffn} columns. "
            f"Layers (from 0): {', '.join(map(str, cut.layers))}.\n"
        )
        write_folder(self._checkpoint, cut, blocks, folder, about)


def _some(targets: Sequence[Target], most_tokens: int) -> list[Target]:
    """The first sequences with so many tokens together, at least one."""
    chosen: list[Target] = []
    count = 0
    for target in targets:
        if chosen and count + len(target.tokens) > most_tokens:
            break
        chosen.append(target)
        count += len(target.tokens)
    return chosen

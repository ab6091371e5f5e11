"""Compresses a model step by step. Every step's result is kept, and done only if it is missing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from backends.base import Backend
from compression.choice import Choice, Rows, Variant, fastest, least_loss
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
from compression.measure import answers, block_losses, losses, stored, student_of
from compression.network import Network
from compression.points import Point, Points
from compression.text import Batch, batches
from evaluation.losses import Target
from evaluation.tasks import Tasks
from model.checkpoint import Checkpoint
from model.quantize import Format
from model.spec import ModelSpec
from planning.plan import Plan

Blocks = Sequence[Mapping[str, Any]]
OnStep = Callable[[str, int, int, str], None]
"""Gets (what, done, all, note)."""

TokenTime = Callable[[ModelSpec, Path, Format], float | None]
"""Predicts the seconds of a token of a model, which is in a folder. None: it fits no device."""

Planner = Callable[[ModelSpec, Path, Sequence[Format], tuple[Rows, float] | None], Plan]
"""Gives the fastest plan of a model, which is in a folder, with some formats to choose from.

The last argument has what each block adds to the loss, and how much all may add. Raises
InfeasiblePlan and PlanError.
"""

MOST_CHOICES = 8
"""The most choices that are measured to keep one bound on the loss."""

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


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound on a choice: seconds of a token, or else nats of divergence."""

    token_s: float | None = None
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """The chosen model with its widths and placement.

    point: as measured. Its bits are the most that any block has.
    predicted_kl, bound: as in ``Choice``. None for a point of the curve, whose loss was measured.
    """

    point: Point
    plan: Plan
    predicted_kl: float | None = None
    bound: float | None = None

    @property
    def bits(self) -> tuple[int, ...]:
        return tuple(one.bits for one in self.plan.placements)


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
        self._measured_on: list[Batch] = list(batches(text.measure, most))
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

    def choose(self, plan: Planner, limit: Limit, curve: Sequence[Point]) -> Chosen | None:
        """Return the best model, widths of its blocks and placement together, within a limit.

        It is measured. A point of the curve that is better as measured is taken instead.
        None: nothing keeps the limit. Raises what ``plan`` raises, and as ``run``.
        """
        kept = [one for one in self.points.all() if self._is_kept(one)]
        models = list({(one.size, one.distilled): one for one in kept}.values())
        variants = [self._variant(one, plan) for one in models]
        best = min(
            (one for one in curve if self._is_kept(one) and _keeps(one, limit)),
            key=partial(_cost, limit),
            default=None,
        )
        chosen = None
        if best is not None:
            fmt = next(fmt for fmt in self._wanted.formats if fmt.bits == best.bits)
            chosen = Chosen(best, plan(self.spec_of(best), self.kept_folder(best), [fmt], None))
        bound: float | None = None
        asked = limit
        for _ in range(MOST_CHOICES):
            self._on_step("weighing sizes, bits and devices", 0, 1, "")
            choice = _choice(variants, asked)
            if choice is None:
                break
            # A tighter bound later rules out choices that keep the one that was asked for.
            bound = choice.bound if bound is None else bound
            point = self._measured(models[choice.variant], choice.plan)
            if _keeps(point, limit):
                if chosen is None or _cost(limit, point) < _cost(limit, chosen.point):
                    chosen = Chosen(point, choice.plan, choice.loss, bound)
                break
            if limit.loss is None:
                break
            tighter = choice.loss * min(limit.loss / point.kl, 0.99)
            asked = replace(limit, loss=tighter)
        self._on_step("weighing sizes, bits and devices", 1, 1, "")
        return chosen

    def kept_folder(self, point: Point) -> Path:
        """Return where a point's model is: the original, or its size's folder."""
        return self._checkpoint.directory if point.size >= 1 else self.folder(point.size)

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

    def _is_kept(self, point: Point) -> bool:
        """Say if the point's model has a folder of this run. Teaching leaves the taught one."""
        taught = point.distilled or point.size >= 1 or not self._wanted.recipe.steps
        return taught and point.size in self._wanted.sizes

    def _variant(self, point: Point, plan: Planner) -> Variant:
        """Return a model to choose from. What its blocks lose is measured when it is needed."""
        spec, folder = self.spec_of(point), self.kept_folder(point)
        formats = self._wanted.formats
        key = f"{point.size:g} {'distilled' if point.distilled else 'pruned'}"
        base = self.points.get(f"base {key}")
        if base is None:
            made = Checkpoint.open(folder)
            blocks = [made.block(block) for block in range(spec.block_count)]
            base = losses(self._teacher, student_of(spec, blocks), self._measured_on)[1]
            self.points.put(f"base {key}", base)

        def rows() -> Rows:
            name = f"losses {key} {','.join(str(fmt.bits) for fmt in formats)}"
            kept = self.points.get(name)
            if kept is None:
                made = self._wanted.coded(Checkpoint.open(folder))
                what = f"weighing blocks of {point.name}"
                kept = block_losses(
                    self._teacher,
                    made,
                    formats,
                    self._measured_on,
                    lambda done, total: self._on_step(what, done, total, ""),
                )
                self._on_step(what, len(kept), len(kept), "")
                self.points.put(name, [{str(bits): kl for bits, kl in row.items()} for row in kept])
            return [{int(bits): kl for bits, kl in row.items()} for row in kept]

        return Variant(base, rows, lambda found, most: plan(spec, folder, formats, (found, most)))

    def _measured(self, point: Point, plan: Plan) -> Point:
        """Measure a model at a plan's widths."""
        formats = {fmt.bits: fmt for fmt in self._wanted.formats}
        made = self._wanted.coded(Checkpoint.open(self.kept_folder(point)))
        widths = [formats[one.bits] for one in plan.placements]
        self._on_step("measuring the choice", 0, 1, "")
        found = self._point(point.size, made, widths, distilled=point.distilled)
        self._on_step("measuring the choice", 1, 1, "")
        return replace(found, latency_ms=1e3 * plan.decode_s)

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
                    widths = [fmt] * made.spec.block_count
                    self.points.add(self._point(size, made, widths, distilled=distilled))
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
                folder = self.kept_folder(point)
                token_s = token_time(key[0], folder, formats[point.bits])
                found[key] = None if token_s is None else 1e3 * token_s
            self.points.add(replace(point, latency_ms=found[key]))
        self._on_step("planning", len(points), len(points), "")

    def _point(
        self, size: float, made: Checkpoint, formats: Sequence[Format], *, distilled: bool
    ) -> Point:
        blocks, size_bytes = stored(made, formats)
        loss, kl = losses(self._teacher, student_of(made.spec, blocks), self._measured_on)
        del blocks  # The answers below need the memory.
        exact, f1 = None, None
        if self._text.tasks is not None:
            wanted = self._wanted
            exact, f1 = answers(
                made, self._text.tasks, formats, wanted.backend, wanted.threads, lambda *_: None
            )
        spec, first = made.spec, made.spec.layers[0]
        head = spec.vocab * spec.embed_dim * (1 if spec.tied_head else 2)
        return Point(
            size=size,
            distilled=distilled,
            bits=max(fmt.bits for fmt in formats),
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


def _choice(variants: Sequence[Variant], limit: Limit) -> Choice | None:
    if limit.token_s is not None:
        return least_loss(variants, limit.token_s)
    return fastest(variants, limit.loss or 0.0)


def _keeps(point: Point, limit: Limit) -> bool:
    """Say if a point has a time, and is within the limit."""
    if point.latency_ms is None:
        return False
    if limit.token_s is not None:
        return point.latency_ms <= 1e3 * limit.token_s
    return limit.loss is not None and point.kl <= limit.loss


def _cost(limit: Limit, point: Point) -> tuple[float, ...]:
    """Return what the limit's other side minimises, then bytes."""
    return (point.kl if limit.token_s is not None else point.latency_ms or 0.0), point.bytes


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

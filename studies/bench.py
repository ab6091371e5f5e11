"""Measures losses and answers of rounded models, and keeps them as they come.

Everything is kept by the name of a run, so that a study that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import groupby

from calibration.quality.students import Options, students_of
from evaluation.bootstrap import Estimate
from evaluation.data import Data
from evaluation.judge import Judge
from evaluation.kept import Kept
from evaluation.losses import Formats
from evaluation.report import Scored, figures
from evaluation.tasks import Tasks
from evaluation.work import Answering, add_answers_here, add_losses, add_scores
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from studies.rounding import ORIGINAL, RoundedModel, Rounding, weight_errors

OnStep = Callable[[int, int], None]
Counting = Callable[[str], AbstractContextManager[OnStep]]
"""Shows the progress of a step with this label, for the time of the context."""

ByWidth = dict[int, float]
_TOGETHER = 4
"""Models whose losses are measured beside one run of the original."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A model whose decoder layers are rounded: a label, and the width of each layer.

    Embedding and head stay as they are, as in the paper. ``rounding`` None: so do the layers.
    """

    label: str
    bits: tuple[int, ...]
    rounding: Rounding | None

    @property
    def key(self) -> str:
        """The name of its results. Equal weights have equal names, whatever their labels."""
        if self.rounding is None or set(self.bits) == {ORIGINAL}:
            return "original"
        return f"layers {widths_text(self.bits)} {self.rounding}"


@dataclass(frozen=True, slots=True)
class Bench:
    """A model and its data, with the results so far.

    sequences: token ids of other items of the data, to measure sensitivities with.
    answering: None if no questions are answered.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    data: Data
    tasks: Tasks
    sequences: Sequence[Sequence[int]]
    kept: Kept
    options: Options
    answering: Answering | None
    judge: Judge | None
    counting: Counting
    with_bleu: bool
    seed: int
    _known: dict[str, Mapping[str, Estimate]] = field(default_factory=dict)
    """Figures by the subject's key, until more of it is measured."""

    @property
    def layers(self) -> range:
        """The blocks of decoder layers."""
        return range(1, self.checkpoint.spec.head_block)

    def weight_errors(self, rounding: Rounding, widths: Iterable[int]) -> list[ByWidth]:
        """Return by layer and width the largest |w - w_b| / 2^b. Raises CheckpointError."""
        run = f"weight errors {rounding}"
        wanted = sorted(set(widths))
        found = []
        with self.counting(f"measuring weight errors, {rounding}") as on_step:
            for block in self.layers:
                on_step(block - 1, len(self.layers))
                known = _by_width(self.kept.get(run, "errors", block))
                missing = [width for width in wanted if width not in known]
                if missing:
                    known |= weight_errors(self.checkpoint, block, missing, rounding)
                    self.kept.put(run, "errors", block, _as_json(known))
                found.append({width: known[width] for width in wanted})
            on_step(len(self.layers), len(self.layers))
        return found

    def sensitivities(self, rounding: Rounding, widths: Iterable[int]) -> list[ByWidth]:
        """Return by layer and width the KL divergence of the model with that layer rounded.

        It is the mean over all tokens of ``sequences``, in nats. Raises ModelError, BackendError.
        """
        text = hashlib.sha256(repr(self.sequences).encode()).hexdigest()[:8]
        run = f"one layer {rounding}, text {text}"
        wanted = [width for width in sorted(set(widths)) if width < ORIGINAL]
        known = {block: _by_width(self.kept.get(run, "kl", block)) for block in self.layers}
        missing = {
            block: some
            for block, row in known.items()
            if (some := [width for width in wanted if width not in row])
        }
        with self.counting(f"measuring sensitivities, {rounding}") as on_step:
            if missing:
                self._measure(run, rounding, missing, known, on_step)
        return [{ORIGINAL: 0.0} | {width: row[width] for width in wanted} for row in known.values()]

    def _measure(
        self,
        run: str,
        rounding: Rounding,
        missing: Mapping[int, Sequence[int]],
        known: Mapping[int, ByWidth],
        on_step: OnStep,
    ) -> None:
        head = self.checkpoint.spec.head_block
        told = Options(self.options.backend, self.options.threads, on_step)
        with students_of(self.checkpoint, self.sequences, told, None) as students:
            students.expect(head + sum(1 + head - block for block in missing))
            final = students.teach(missing)
            for block, widths in missing.items():
                tensors = self.checkpoint.block(block)
                rounded = ((width, rounding.tensors(tensors, width)) for width in widths)
                known[block].update(students.replaced(block, rounded, final))
                self.kept.put(run, "kl", block, _as_json(known[block]))

    def measure(
        self, subjects: Sequence[Subject], *, answers: bool, done: Callable[[], None]
    ) -> None:
        """Measure the losses of the subjects, and their answers if asked for.

        ``done`` is called after each few of them. Raises ModelError, BackendError, EvaluationError.
        """
        by_key = {subject.key: subject for subject in subjects}
        keys = list(by_key)
        for begin in range(0, len(keys), _TOGETHER):
            some = [by_key[key] for key in keys[begin : begin + _TOGETHER]]
            self._add_losses(some)
            done()
            for subject in some if answers and self.tasks.questions else ():
                self._add_answers(subject)
                done()

    def figures(self, subject: Subject) -> Mapping[str, Estimate]:
        """Return the figures that the results so far give, by name."""
        if subject.key in self._known:
            return self._known[subject.key]
        found = self._known[subject.key] = figures(
            Scored(
                self.kept,
                subject.key,
                self.tasks.items,
                self.tasks.questions,
                self.data.rules,
                self.tasks.wishes.no_answer,
                self.seed,
                self.with_bleu,
            )
        )
        return found

    def _add_losses(self, subjects: Sequence[Subject]) -> None:
        as_is: Formats = [None] * self.checkpoint.spec.block_count
        label = ", ".join(subject.label for subject in subjects)
        for subject in subjects:
            self._known.pop(subject.key, None)
        with self.counting(f"measuring losses: {label}") as on_step:
            add_losses(
                self.kept,
                self.tasks,
                self.checkpoint,
                {subject.key: as_is for subject in subjects},
                self.options,
                on_step,
                with_original=True,
                sources={subject.key: self._model(subject) for subject in subjects},
            )

    def _add_answers(self, subject: Subject) -> None:
        if self.answering is None:
            return
        self._known.pop(subject.key, None)
        with self.counting(f"answering: {subject.label}") as on_step:
            add_answers_here(
                self.kept,
                self.tasks,
                subject.key,
                self._model(subject),
                [None] * self.checkpoint.spec.block_count,
                self.tokenizer,
                self.answering,
                on_step,
            )
        if self.judge is not None:
            with self.counting(f"judging: {subject.label}") as on_step:
                add_scores(self.kept, self.tasks, subject.key, self.judge, on_step)

    def _model(self, subject: Subject) -> RoundedModel:
        rounding = subject.rounding or Rounding("truncate", 64)
        bits = (ORIGINAL, *subject.bits)
        bits += (ORIGINAL,) * (self.checkpoint.spec.block_count - len(bits))
        return RoundedModel(self.checkpoint, bits, rounding)


def widths_text(bits: Sequence[int]) -> str:
    """Return widths as a short text: 4x3 8 16x2."""
    runs = [(width, len([*some])) for width, some in groupby(bits)]
    return " ".join(f"{width}x{count}" if count > 1 else f"{width}" for width, count in runs)


def _as_json(values: ByWidth) -> dict[str, float]:
    return {str(width): value for width, value in values.items()}


def _by_width(values: Mapping[str, float] | None) -> ByWidth:
    return {} if values is None else {int(width): value for width, value in values.items()}

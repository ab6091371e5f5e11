"""``shoal eval`` for encoders: SQuAD's questions by spans, and classes of texts as in GLUE."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cli.commands.evaluate_models import Loaded, Model, Run
from cli.errors import CommandFailed, UsageError
from cli.render import Screen, titled_table

if TYPE_CHECKING:
    from evaluation.data import Data, Question
    from evaluation.encoders import Figures, Labelled

TEXTS_AT_ONCE = 64
"""The texts of a request for classes."""

_PERCENT = ("exact_match", "f1", "accuracy")


class Encoder(Protocol):
    """The one that answers."""

    def classes(self, items: Sequence[Labelled]) -> list[int]:
        """Return the class of each item."""

    def answer(self, question: Question, *, may_lack: bool) -> str:
        """Return the best answer, or "" if the text lacks it."""


def run_encoder_eval(
    options: argparse.Namespace,
    screen: Screen,
    data: Data | None,
    model: Model,
    runs: Sequence[Run],
) -> None:
    """Evaluate a model that encodes. ``data`` is None for labelled texts. Raises CommandFailed."""
    _refuse_others(options)
    wanted = "span" if data is not None else "class"
    if model.output != wanted or (data is not None and data.kind != "squad"):
        needs = {
            "vector": "gives vectors, which have no score here",
            "class": "classifies texts: give lines with text and label (--format glue)",
            "tokens": "classifies tokens, which have no score here",
            "span": "answers questions about a text: give SQuAD's JSON",
        }
        raise CommandFailed(f"{model.name} {needs[model.output or 'vector']}")
    shown = []
    for run in runs:
        with _encoder(options, model, run) as encoder:
            started_s = time.monotonic()
            figures = _spans(options, data, encoder) if data else _classes(options, model, encoder)
            seconds = time.monotonic() - started_s
        items = next(iter(figures.values())).items
        shown.append((run, figures, items / seconds))
    _show(options, screen, model, shown)


def _refuse_others(options: argparse.Namespace) -> None:
    for name in ("judge", "out", "csv", "plot", "template"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is for models that generate text")
    if options.chat:
        raise UsageError("--chat is for models that generate text")


def _spans(options: argparse.Namespace, data: Data, encoder: Encoder) -> Figures:
    from evaluation.data import sample
    from evaluation.encoders import span_figures

    places = sample(len(data.questions), options.questions, options.seed)
    questions = [data.questions[place] for place in places]
    may_lack = data.rules == "2.0"
    with ThreadPoolExecutor(options.slots or 4) as pool:
        answers = list(pool.map(lambda one: encoder.answer(one, may_lack=may_lack), questions))
    return span_figures(questions, answers, data.rules, options.seed)


def _classes(options: argparse.Namespace, model: Model, encoder: Encoder) -> Figures:
    from evaluation.data import sample
    from evaluation.encoders import class_figures, label_of, read_labelled
    from model.encoder_files import label_names_of

    data = read_labelled(options.data)
    directory = _files(model)
    names = label_names_of(directory)
    if len(names) < 2:
        raise CommandFailed(f"{model.name} has one score for a text, and no classes")
    places = sample(len(data.items), options.questions, options.seed)
    items = [data.items[place] for place in places]
    right = [label_of(item, names) for item in items]
    parts = [items[begin : begin + TEXTS_AT_ONCE] for begin in range(0, len(items), TEXTS_AT_ONCE)]
    found = [label for part in parts for label in encoder.classes(part)]
    return class_figures(right, found, len(names), options.seed)


def _files(model: Model) -> Path:
    if model.files is None:
        raise CommandFailed(f"the names of {model.name}'s classes need its files on this machine")
    return model.files.checkpoint.directory


@contextmanager
def _encoder(options: argparse.Namespace, model: Model, run: Run) -> Iterator[Encoder]:
    """Yield who answers: what is loaded, or this machine alone."""
    if model.loaded is not None:
        yield _OverHttp(model.loaded, model)
        return
    from backends.base import StageOptions
    from backends.registry import backend_class
    from calibration.machine import usable_threads
    from evaluation.encoders import LocalEncoder
    from evaluation.local import local_stage
    from planning.request import DEFAULT_CONTEXT_TOKENS

    if model.files is None:
        raise CommandFailed(f"{model.name} is not on this machine")
    checkpoint, kind = model.files.checkpoint, backend_class(options.backend)
    kind.probe()
    context_tokens = min(DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context)
    threads = options.threads or usable_threads()
    stage_options = StageOptions(1, context_tokens, threads, exact=options.exact)
    with local_stage(checkpoint, run.formats(), kind(), stage_options) as stage:
        yield LocalEncoder(stage, model.files.tokenizer, context_tokens)


class _OverHttp:
    """The loaded model."""

    def __init__(self, loaded: Loaded, model: Model) -> None:
        self._loaded = loaded
        self._model = model

    def classes(self, items: Sequence[Labelled]) -> list[int]:
        from model.encoder_files import label_names_of

        names = label_names_of(_files(self._model))
        inputs = [item.texts[0] if len(item.texts) == 1 else list(item.texts) for item in items]
        body = {"model": self._loaded.name, "input": inputs, "truncate": True}
        answer = self._loaded.client.post("/v1/classify", body)
        return [names.index(one["label"]) for one in answer["data"]]

    def answer(self, question: Question, *, may_lack: bool) -> str:
        body = {
            "model": self._loaded.name,
            "question": question.question,
            "context": question.context,
            "may_lack": may_lack,
        }
        answers = self._loaded.client.post("/v1/answers", body)["data"]
        return str(answers[0]["answer"]) if answers else ""


def _show(
    options: argparse.Namespace,
    screen: Screen,
    model: Model,
    shown: Sequence[tuple[Run, Figures, float]],
) -> None:
    if options.json:
        results = [
            {
                "run": run.label,
                "answers_by": run.answers_by,
                "items_per_s": rate,
                **{name: asdict(figure) for name, figure in figures.items()},
            }
            for run, figures, rate in shown
        ]
        screen.json({"model": model.name, "data": str(options.data), "runs": results})
        return
    names = list(shown[0][1])
    table = titled_table(f"{model.name} on {options.data.name}")
    for column in ("run", "items", *(name.replace("_", " ") for name in names), "items/s"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for run, figures, rate in shown:
        cells = [_cell(name, figures[name]) for name in names]
        table.add_row(run.label, str(figures[names[0]].items), *cells, f"{rate:.1f}")
    screen.table(table)
    for answers_by in dict.fromkeys(run.answers_by for run, _, _ in shown):
        screen.out.print(f"answers: {answers_by}", soft_wrap=True, markup=False)


def _cell(name: str, figure: object) -> str:
    from evaluation.bootstrap import Estimate

    if not isinstance(figure, Estimate):
        return ""
    digits = 1 if name in _PERCENT else 3
    value, low, high = (f"{part:.{digits}f}" for part in (figure.value, figure.low, figure.high))
    return f"{value} ({low} to {high})"

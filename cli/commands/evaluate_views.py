"""Shows the figures of ``shoal eval``: table, JSON, CSV and picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.render import Screen, titled_table

if TYPE_CHECKING:
    from cli.commands.evaluate_models import Run
    from evaluation.bootstrap import Estimate
    from evaluation.data import Data
    from evaluation.kept import Kept
    from evaluation.tasks import Tasks
    from model.checkpoint import Checkpoint

LOSSES_BY = {
    "files": "computed on this machine, block by block, from the weights at these bits; "
    "activations and hops are not rounded",
    "devices": "measured by the devices, over HTTP; activations and hops are rounded as in answers",
}
"""How losses are measured, by --loss-by."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The results of all runs.

    checkpoint: the model's files, or None if they are not here.
    speeds: questions per second that each run answered just now, by its label.
    """

    model: str
    checkpoint: Checkpoint | None
    data: Data
    tasks: Tasks
    runs: Sequence[Run]
    kept: Kept
    speeds: Mapping[str, float]


def show(options: argparse.Namespace, screen: Screen, done: Evaluated) -> None:
    """Print the figures as JSON or as a table, and write them to --csv and --plot."""
    from evaluation.picture import figures_svg
    from evaluation.report import csv_text

    named = [(run.label, _figures(options, screen, done, run)) for run in done.runs]
    count = f"{len(done.tasks.items)} of {done.tasks.of}"
    kind = "windows" if done.data.kind == "text" else "questions"
    title = f"{done.model} on {done.data.path.name}: {count} {kind}"
    if options.json:
        screen.json(_answer(options, done, named))
    else:
        _show_table(screen, title, named)
        for line in _lines(options, done, named):
            screen.out.print(escape(line), soft_wrap=True)
    if options.csv is not None:
        options.csv.write_text(csv_text(named), encoding="utf-8")
        screen.note(f"figures are in {options.csv}")
    if options.plot is not None:
        options.plot.write_text(figures_svg(title, named), encoding="utf-8")
        screen.note(f"drawn to {options.plot}")


def _figures(
    options: argparse.Namespace, screen: Screen, done: Evaluated, run: Run
) -> Mapping[str, Estimate]:
    from evaluation.bleu import is_installed
    from evaluation.report import Scored, figures

    with_bleu = run.label in done.speeds and is_installed()
    if run.label in done.speeds and not with_bleu and run is done.runs[0]:
        screen.note("no BLEU, because sacrebleu is not installed: pip install 'shoal-llm[eval]'")
    tasks, rules = done.tasks, done.data.rules
    return figures(
        Scored(
            done.kept,
            run.key,
            tasks.items,
            tasks.questions,
            rules,
            tasks.wishes.no_answer,
            options.seed,
            with_bleu,
        )
    )


def _answer(
    options: argparse.Namespace,
    done: Evaluated,
    named: Sequence[tuple[str, Mapping[str, Estimate]]],
) -> dict[str, Any]:
    from evaluation.bootstrap import CONFIDENCE, DRAWS
    from evaluation.report import plain

    return {
        "model": done.model,
        "data": str(done.data.path),
        "format": done.data.kind,
        "squad_rules": done.data.rules if done.data.kind == "squad" else None,
        "items": len(done.tasks.items),
        "items_in_data": done.tasks.of,
        "seed": options.seed,
        "confidence": CONFIDENCE,
        "draws": DRAWS,
        "losses_by": LOSSES_BY[options.loss_by],
        "too_long_for_a_loss": len(done.tasks.too_long),
        "unspelt": len(done.tasks.unspelt),
        "runs": [
            {**_details(done, run), "figures": plain(figures)}
            for run, (_, figures) in zip(done.runs, named, strict=True)
        ],
    }


def _details(done: Evaluated, run: Run) -> dict[str, Any]:
    from evaluation.weights import bits_per_weight, ratio

    answers = [done.kept.get(run.key, "answer", item) for item in done.tasks.questions]
    judged = [done.kept.get(run.key, "judge", item) for item in done.tasks.questions]
    checkpoint = done.checkpoint
    return {
        "run": run.label,
        "bits": list(run.bits),
        "scheme": run.scheme,
        "group_size": run.group_size,
        "bits_per_weight": checkpoint and bits_per_weight(checkpoint, run.bits),
        "quantization_ratio": checkpoint and ratio(checkpoint, run.bits),
        "answers_by": run.answers_by,
        "questions_per_s": done.speeds.get(run.label) or None,
        "refused": sum(one is not None and one.get("answer") is None for one in answers),
        "unjudged": sum(one is not None and len(one) == 1 for one in judged),
    }


def _show_table(
    screen: Screen, title: str, named: Sequence[tuple[str, Mapping[str, Estimate]]]
) -> None:
    from evaluation.report import LABELS

    table = titled_table(title)
    table.add_column("figure, 95 % interval")
    for label, _ in named:
        table.add_column(escape(label), justify="right", no_wrap=True)
    for name, words in LABELS.items():
        cells = [figures.get(name) for _, figures in named]
        if any(cells):
            digits = 6 if "perplexity" in name else 4  # Near 1, fewer would all look alike.
            table.add_row(words, *("" if one is None else _cell(one, digits) for one in cells))
    screen.table(table)


def _cell(one: Estimate, digits: int) -> str:
    value, low, high = (f"{part:.{digits}g}" for part in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"


def _lines(
    options: argparse.Namespace,
    done: Evaluated,
    named: Sequence[tuple[str, Mapping[str, Estimate]]],
) -> Iterator[str]:
    """Yield how each figure was computed, and what was left out."""
    from evaluation.bleu import is_installed

    if done.speeds and is_installed() and not any("bleu" in figures for _, figures in named):
        yield "no BLEU: it compares four words at a time, which no accepted answer has"
    if any("loss" in figures for _, figures in named):
        yield f"losses and KL: {LOSSES_BY[options.loss_by]}"
    for run in done.runs:
        details = _details(done, run)
        if details["bits_per_weight"] is not None:
            yield (
                f"{run.label}: {details['bits_per_weight']:.4g} bits per weight, "
                f"{details['quantization_ratio']:.4g} of the original's"
            )
        if run.label in done.speeds:
            yield f"{run.label}: answers {run.answers_by}"
        if done.speeds.get(run.label):
            yield f"{run.label}: {done.speeds[run.label]:.3g} questions per second, measured"
        if details["refused"]:
            yield f"{run.label}: {details['refused']} prompts are too long, so they score 0"
        if details["unjudged"]:
            yield f"{run.label}: the judge gave no scores for {details['unjudged']} answers"
    if done.tasks.too_long:
        count = len(done.tasks.too_long)
        yield f"losses leave out {count} questions that are longer than the model's context"
    if done.tasks.unspelt:
        count = len(done.tasks.unspelt)
        yield f"losses leave out {count} questions whose answers the model's tokens do not spell"

"""``shoal study table1``: the DILEMMA paper's table on a model's own weights, and what it tells."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.commands.evaluate_arguments import (
    SLOTS,
    add_compute_arguments,
    add_data_arguments,
    add_judge_arguments,
    add_prompt_arguments,
    wishes_of,
)
from cli.commands.evaluate_models import Files, Model
from cli.commands.evaluate_steps import judge_of, settings_of, telling
from cli.errors import CommandFailed, UsageError, failed
from cli.render import Screen
from cli.shared_arguments import (
    adapter_of,
    add_adapter_argument,
    add_group_size_argument,
)

if TYPE_CHECKING:
    from evaluation.bootstrap import Estimate
    from evaluation.kept import Kept
    from paper.study import Sweep
    from studies.bench import Bench
    from studies.plans import MixedPlan, PlanSet
    from studies.table1 import Row

QUESTIONS, TOKENS, PLANS = 200, 2048, 40
SCHEMES = ("truncate", "rtn")

TABLE1_EXAMPLES = (
    "  shoal study table1 ./opt-350m --data dev-v1.1.json --questions 1000\n"
    "  shoal study table1 ./opt-350m --data dev.json --judge http://127.0.0.1:8000/v1\n"
    "  shoal study table1 ./opt-350m --data wiki.txt --questions 20 --plans 60\n"
)

_numbers = argument_types.argument(
    lambda text: tuple(argument_types.at_least_0(part) for part in text.split(",")),
    "numbers from 0 up, with commas between them",
)


def _schemes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(SCHEMES):
        raise ValueError(text)
    return names


def add_table1_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="A folder, a GGUF file, or a name on the hub."
    )
    add_data_arguments(parser.add_argument_group("data"), questions=QUESTIONS)
    add_prompt_arguments(parser.add_argument_group("prompts"))
    study = parser.add_argument_group("the study")
    study.add_argument(
        "--deltas",
        type=_numbers,
        metavar="1e-7,1e-6,...",
        help="The paper's bounds on weight errors. Default: its own, 1e-7 to 1.",
    )
    study.add_argument(
        "--budgets",
        type=_numbers,
        metavar="0.001,0.01,...",
        help="Bounds on the sum of KL divergences, in nats per token. Default: 1e-4 to 0.3.",
    )
    study.add_argument(
        "--schemes",
        type=argument_types.argument(_schemes, "some of " + ",".join(SCHEMES)),
        default=",".join(SCHEMES),
        metavar="LIST",
        help="How layers are rounded for budgets and random plans: truncated as in the paper, "
        "rounded to nearest as shoal does, or both. Default: %(default)s.",
    )
    study.add_argument(
        "--plans",
        type=argument_types.argument(argument_types.whole, "a whole number"),
        default=PLANS,
        metavar="N",
        help="Random plans of any bits, and of equal bits, for each scheme. Default: %(default)s.",
    )
    study.add_argument(
        "--answer-plans",
        action="store_true",
        help="Answer the questions with every random plan too, for exact match and F1.",
    )
    study.add_argument(
        "--no-answers", action="store_true", help="Measure losses alone, without any answer."
    )
    study.add_argument(
        "--tokens",
        type=argument_types.count,
        default=TOKENS,
        metavar="N",
        help="Tokens that sensitivities are measured with. They are of questions that are not "
        "evaluated. Default: %(default)s.",
    )
    add_group_size_argument(study)
    add_judge_arguments(study)
    where = parser.add_argument_group("where it runs")
    add_adapter_argument(where)
    add_compute_arguments(where)
    where.add_argument(
        "--slots",
        type=argument_types.count,
        default=SLOTS,
        metavar="N",
        help="Questions that are answered at once. Default: %(default)s.",
    )


@dataclass(slots=True)
class Found:
    """Everything that the study has found so far. Lists grow while it runs."""

    bench: Bench
    rows: list[Row] = field(default_factory=list)
    plans: list[PlanSet] = field(default_factory=list)
    sweeps: tuple[Sweep, Sweep] | None = None
    largest_weight: float = 0.0

    def figures(self, one: Row | MixedPlan) -> Mapping[str, Estimate]:
        """Return the measured figures of a row or a plan."""
        return self.bench.figures(one.subject)


def run_table1(options: argparse.Namespace, screen: Screen) -> None:
    """Run the study, and show it. Raises CommandFailed."""
    from backends.base import BackendError
    from cli.commands.table1_views import show_table1
    from evaluation.errors import EvaluationError
    from model.errors import ModelError
    from paper.study_log import ForeignFile
    from planning.plan import PlanError

    try:
        with _bench(options, screen) as bench:
            found = Found(bench)
            with telling(options.out / "results.jsonl", bench.kept, screen):
                _study(options, screen, found)
            show_table1(options, screen, found)
    except (BackendError, EvaluationError, ForeignFile, ModelError, PlanError) as error:
        raise failed(error) from error


@contextmanager
def _bench(options: argparse.Namespace, screen: Screen) -> Iterator[Bench]:
    """Read the model and the data, and open the file of results."""
    from backends.registry import backend_class
    from calibration.quality.students import Options
    from cli.commands.model_names import model_here
    from evaluation.bleu import is_installed
    from evaluation.data import read_data
    from evaluation.tasks import make_tasks
    from evaluation.work import Answering
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer
    from planning.request import model_name
    from studies.bench import Bench
    from studies.text import other_sequences

    data = read_data(options.data, options.format)
    for note in data.notes:
        screen.note(note)
    path = model_here(options.model, screen)
    files = Files(Checkpoint.open(path, adapter_of(options)), Tokenizer.load(path))
    spec = files.checkpoint.spec
    if spec.encodes:
        raise CommandFailed(f"{path}: it encodes texts: the study needs a model that generates")
    wishes = wishes_of(options, data)
    tasks = make_tasks(data, wishes, files.tokenizer, spec.max_context)
    if not tasks.targets:
        raise CommandFailed(f"{data.path}: no item fits the model's context")
    sequences = other_sequences(data, tasks, files.tokenizer, spec.max_context, options.tokens)
    settings = settings_of(data, Model(model_name(path.absolute()), files), wishes)
    backend = backend_class(options.backend)()
    answers = bool(tasks.questions) and not options.no_answers
    with ExitStack() as stack:
        judge = judge_of(options, tasks, stack, answers=answers)
        kept = stack.enter_context(_kept(options, settings))
        if len(kept):
            screen.note(f"{options.out} has {len(kept)} results already: going on")
        if answers and not is_installed():
            screen.note(
                "no BLEU, because sacrebleu is not installed: pip install 'shoal-llm[eval]'"
            )
        yield Bench(
            files.checkpoint,
            files.tokenizer,
            data,
            tasks,
            sequences,
            kept,
            Options(backend, options.threads),
            Answering(backend, options.threads, True, options.slots) if answers else None,
            judge,
            screen.counting,
            answers and is_installed(),
            options.seed,
        )


def _kept(options: argparse.Namespace, settings: Mapping[str, Any]) -> Kept:
    from evaluation.kept import Kept

    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {options.out}: {(error.strerror or str(error)).lower()}"
        ) from error
    return Kept(options.out / "results.jsonl", settings, "study table1")


def _study(options: argparse.Namespace, screen: Screen, found: Found) -> None:
    """Do every part of the study, and write the tables after each few models."""
    from cli.commands.table1_views import write_figures, write_plans, write_table
    from model.quantize import INTEGER_BITS
    from paper.study import DELTAS
    from studies.plans import KINDS, draw_plans
    from studies.rounding import Rounding
    from studies.table1 import (
        BUDGETS,
        original_row,
        rows_by_budget,
        rows_by_delta,
        widths_of,
    )

    bench = found.bench
    truncation = Rounding("truncate", options.group_size)
    roundings = [Rounding(scheme, options.group_size) for scheme in options.schemes]
    rows, errors = rows_by_delta(bench, truncation, options.deltas or DELTAS)
    found.rows += [original_row(bench), *rows]
    losses = {}
    for rounding in roundings:
        rows, losses[rounding] = rows_by_budget(bench, rounding, options.budgets or BUDGETS)
        found.rows += rows
    write_table(options, found)
    measured = [row.subject for row in found.rows if row.is_measured]
    bench.measure(measured, answers=True, done=lambda: write_table(options, found))
    screen.note(f"the table is in {options.out / 'table1.csv'}")
    for rounding in roundings if options.plans else ():
        widths = [width for width in widths_of(rounding) if width < 16]
        known = errors if rounding == truncation else bench.weight_errors(rounding, INTEGER_BITS)
        for kind in KINDS:
            drawn = draw_plans(
                rounding, kind, widths, known, losses[rounding], options.plans, options.seed
            )
            found.plans.append(drawn)
            plans = [plan.subject for plan in drawn.plans]
            bench.measure(
                plans, answers=options.answer_plans, done=lambda: write_plans(options, found)
            )
    if found.plans:
        screen.note(f"the random plans are in {options.out / 'plans.csv'}")
    found.sweeps = _monte_carlo(options, screen, found, errors)
    write_figures(options, screen, found)


def _monte_carlo(
    options: argparse.Namespace, screen: Screen, found: Found, errors: Sequence[dict[int, float]]
) -> tuple[Sweep, Sweep]:
    """Draw link speeds for figures 5 and 6, with the model's own weight errors."""
    from paper.study import monte_carlo
    from paper.study_log import StudyLog

    checkpoint = found.bench.checkpoint
    what = {
        "name": "table1",
        "seed": options.seed,
        "weights": checkpoint.fingerprint,
        "version": 1,
    }
    with (
        screen.progress() as on_step,
        StudyLog(options.out / "draws.jsonl", what) as log,
    ):

        def report(label: str, done: int, total: int) -> None:
            step = {"phase": label, "label": "", "done": done, "total": total, "unit": "steps"}
            on_step(step)

        return monte_carlo(checkpoint.spec, errors, options.runs, options.seed, report, log)

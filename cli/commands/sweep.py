"""``shoal sweep``: plans for a grid of bounds, bits, links, memory and objectives."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.evaluate_arguments import wishes_of
from cli.commands.evaluate_models import Files, Model, Run, text_key
from cli.commands.evaluate_steps import add_answers_of, add_losses_of, settings_of, telling
from cli.commands.sweep_arguments import grid_of
from cli.errors import CommandFailed, UsageError, failed
from cli.render import Screen
from cli.shared_arguments import adapter_of, with_scheme

if TYPE_CHECKING:
    from evaluation.bootstrap import Estimate
    from evaluation.data import Data
    from evaluation.kept import Kept
    from evaluation.tasks import Tasks
    from planning.problem import PlanningProblem
    from studies.grid import Cell, Outcome

ABOUT = (
    "Every combination of the values is planned. Devices are those of a lab file, or of the "
    "coordinator. Times are predictions. With --eval, losses and answers of each plan are measured "
    "on this machine."
)
EXAMPLES = (
    "  shoal sweep ./opt-350m --devices lab.yaml --quality-budget 0.01,0.03,0.1,none\n"
    "  shoal sweep ./opt-350m --devices lab.yaml --links 10,100,1000 --memory x0.5,x1\n"
    "  shoal sweep ./opt-350m --bits 4,8 --bits 4,8,16 --objective latency,request\n"
    "  shoal sweep --shape llama-1b --devices lab.yaml --links x0.1,x1,x10\n"
    "  shoal sweep ./opt-350m --devices lab.yaml --max-weight-error 1e-4,1e-3,1e-2 \\\n"
    "    --eval --data dev-v1.1.json --questions 200\n"
)

_LOOSE = 1e9
"""A bound that no plan breaks. With it the problem has what the bounds of the grid need."""
_TOGETHER = 4
"""Plans whose losses are measured beside one run of the original."""


@dataclass(frozen=True, slots=True)
class Subject:
    """The subject of a sweep: a model's name, a problem to vary, and the words for its devices.

    hops: the formats of hops for a budget, where they depend on it.
    files: the model's files here, or None.
    """

    name: str
    problem: PlanningProblem
    devices: str
    hops: Mapping[float | None, Any]
    files: Files | None


@dataclass(slots=True)
class Swept:
    """The cells of a grid, and what was found so far."""

    subject: Subject
    cells: Sequence[Cell]
    outcomes: dict[Cell, Outcome] = field(default_factory=dict)
    figures: dict[Cell, Mapping[str, Estimate]] = field(default_factory=dict)


def run_sweep(options: argparse.Namespace, screen: Screen) -> None:
    """Plan every cell, evaluate if asked for, and show the results. Raises CommandFailed."""
    from backends.base import BackendError
    from cli.commands.sweep_views import show_sweep, write_sweep
    from evaluation.errors import EvaluationError
    from model.errors import ModelError
    from planning.labs.lab import LabError
    from planning.labs.sensitivity_file import SensitivityError
    from planning.plan import PlanError
    from studies.grid import cells_of

    _check(options)
    try:
        data = _data(options, screen)
        with _subject(options, screen) as subject:
            grid = grid_of(options, subject.problem.bits)
            swept = Swept(subject, [_bounded(options, subject, cell) for cell in cells_of(grid)])
            with _kept(options, subject, data) as kept:
                if len(kept):
                    screen.note(f"{options.out} has {len(kept)} results already: going on")
                with telling(options.out / "results.jsonl", kept, screen):
                    _plan(options, screen, swept, kept)
                    if data is not None:
                        _evaluate(options, screen, swept, kept, data)
                write_sweep(options, swept)
            screen.note(f"the grid is in {options.out / 'sweep.csv'} and sweep.svg")
            show_sweep(options, screen, swept)
    except (
        BackendError, EvaluationError, LabError, ModelError, PlanError, SensitivityError, ValueError
    ) as error:  # fmt: skip
        raise failed(error) from error


def _check(options: argparse.Namespace) -> None:
    """Check what goes together, and add what the shared functions of planning read."""
    if (options.model is None) == (options.shape is None):
        raise UsageError("give one MODEL, or --shape NAME with --devices LAB.yaml")
    if options.shape is not None and options.devices is None:
        raise UsageError("--shape has no files for a coordinator to read: add --devices LAB.yaml")
    if options.eval and options.data is None:
        raise UsageError("--eval needs --data FILE")
    if options.data is not None and not options.eval:
        raise UsageError("--data is for an evaluation: add --eval")
    if options.eval and options.shape is not None:
        raise UsageError("--shape has no weights to evaluate: give a MODEL")
    options.plan, options.check_quality, options.pin = None, False, []
    options.migration_weight, options.formulation = 0.0, "shoal"


def _data(options: argparse.Namespace, screen: Screen) -> Data | None:
    from evaluation.data import read_data

    if not options.eval:
        return None
    data = read_data(options.data, options.format)
    for note in data.notes:
        screen.note(note)
    return data


def _planned(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options of one plan whose problem has what every cell of the grid needs."""
    deltas = [value for value in options.max_weight_error or () if value is not None]
    budgets = [value for value in options.quality_budget or () if value is not None]
    values = dict(vars(options))
    values["bits"] = sorted({width for some in options.bits or () for width in some}) or None
    values["max_weight_error"] = _LOOSE if deltas else None
    values["quality_budget"] = _LOOSE if budgets else None
    if not budgets and options.quality_budget:
        values["quality_budget"] = math.inf  # Only "none" was given.
    values["objective"] = options.objective[0]
    values["draft"] = values["draft_bits"] = None
    return argparse.Namespace(**values)


@contextmanager
def _subject(options: argparse.Namespace, screen: Screen) -> Iterator[Subject]:
    """Make the problem to vary, of a lab file or of the coordinator's measurements."""
    from cli.client import Client, default_url
    from cli.commands.model_names import model_here, model_to_plan

    if options.eval:
        options.model = str(model_here(options.model, screen))
    files = _files(options) if options.eval else None
    planned = _planned(options)
    if options.devices is not None:
        with model_to_plan(planned, screen):
            yield _described(options, planned, screen, files)
        return
    with Client(options.url or default_url()) as client:
        yield _live(planned, screen, client, files)


def _files(options: argparse.Namespace) -> Files:
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer

    path = Path(options.model)
    checkpoint = with_scheme(options, Checkpoint.open(path, adapter_of(options)))
    if checkpoint.spec.encodes:
        raise CommandFailed(f"{path}: it encodes texts: compare widths with `shoal eval --bits`")
    return Files(checkpoint, Tokenizer.load(path))


def _described(
    options: argparse.Namespace,
    planned: argparse.Namespace,
    screen: Screen,
    files: Files | None,
) -> Subject:
    from cli.commands.described import hop_formats, read_described
    from planning.request import model_name

    found = read_described(planned, screen)
    if planned.max_weight_error is not None and found.checkpoint is None:
        raise UsageError(f"--max-weight-error needs weights, and {options.model} has none here")
    hops = {
        budget: hop_formats(planned, found.lab, found.losses, quality_budget=budget)
        for budget in {None, *(options.quality_budget or ())}
    }
    name = options.shape or model_name(Path(planned.model).absolute())
    return Subject(name, found.problem, str(options.devices), hops, files)


def _live(planned: argparse.Namespace, screen: Screen, client: Any, files: Files | None) -> Subject:
    from cli.commands.model_names import locate
    from cli.commands.plan_arguments import request_of
    from planning.problem import PlanningProblem

    request_of(planned)  # Wrong arguments are told before a model is fetched.
    locate(planned, client, screen, weights=False)
    request = request_of(planned, with_problem=True).to_dict()
    with screen.progress() as on_step:
        answer = client.operate("/shoal/v1/plan", request, on_step)
    problem = PlanningProblem.from_dict(answer["problem"])
    return Subject(answer["model"], problem, "measured devices", {}, files)


def _bounded(options: argparse.Namespace, subject: Subject, cell: Cell) -> Cell:
    """Return the cell with the default budget, where `shoal plan` has one."""
    from planning.sensitivity import applying_budget

    if options.quality_budget or subject.problem.spec.encodes:
        return cell
    budget = applying_budget(
        None, cell.max_weight_error, unbounded=False, decided=len(cell.bits) == 1
    )
    if options.max_weight_error:
        budget = None
    return replace(cell, quality_budget=budget)


@contextmanager
def _kept(options: argparse.Namespace, subject: Subject, data: Data | None) -> Iterator[Kept]:
    """Open the file of results: those of the same problem, data and prompts go on."""
    from evaluation.kept import Kept

    plain = json.dumps(subject.problem.to_dict(), sort_keys=True)
    settings: dict[str, Any] = {
        "subject": subject.name,
        "problem": hashlib.sha256(plain.encode()).hexdigest(),
        "time_limit_s": options.time_limit,
    }
    if data is not None:
        model = Model(subject.name, subject.files)
        settings |= settings_of(data, model, wishes_of(options, data))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"--out {options.out}: {(error.strerror or str(error)).lower()}"
        ) from error
    with Kept(options.out / "results.jsonl", settings, "sweep") as kept:
        yield kept


def _plan(options: argparse.Namespace, screen: Screen, swept: Swept, kept: Kept) -> None:
    """Plan the cells that were not planned yet, and write the grid after each."""
    from cli.commands.sweep_views import write_sweep
    from studies.grid import Outcome, outcome_of, problem_of

    subject = swept.subject
    with screen.counting("planning") as on_step:
        for done, cell in enumerate(swept.cells):
            on_step(done, len(swept.cells))
            known = kept.get(cell.key, "plan", 0)
            if known is None:
                problem = problem_of(subject.problem, cell)
                if subject.hops:
                    own = cell.quality_budget if options.quality_budget else None
                    problem = replace(problem, hop_formats=subject.hops[own])
                swept.outcomes[cell] = outcome_of(problem, options.time_limit)
                kept.put(cell.key, "plan", 0, asdict(swept.outcomes[cell]))
            else:
                swept.outcomes[cell] = Outcome.from_json(known)
            write_sweep(options, swept)
        on_step(len(swept.cells), len(swept.cells))


def _evaluate(
    options: argparse.Namespace, screen: Screen, swept: Swept, kept: Kept, data: Data
) -> None:
    """Evaluate each set of bits once, and write the grid after each few."""
    from cli.commands.sweep_views import write_sweep
    from evaluation.tasks import make_tasks

    files = swept.subject.files
    if files is None:  # _check has seen to it.
        return
    spec = files.checkpoint.spec
    tasks = make_tasks(data, wishes_of(options, data), files.tokenizer, spec.max_context)
    model = Model(swept.subject.name, files)
    runs = _runs(options, swept, text_key(files.checkpoint))
    # Slots are those of plans. Answers on this machine have their own default.
    here = argparse.Namespace(**{**vars(options), "slots": None})
    losses = bool({"loss", "kl"} & set(options.metrics))
    answers = bool(tasks.questions) and "answers" in options.metrics
    order = list(runs)
    for begin in range(0, len(order), _TOGETHER):
        some = order[begin : begin + _TOGETHER]
        if losses:
            add_losses_of(here, screen, kept, tasks, files, [runs[bits] for bits in some])
        for bits in some:
            if answers:
                add_answers_of(here, screen, kept, tasks, model, runs[bits])
            figures = _figures(options, kept, tasks, data, runs[bits])
            for cell, outcome in swept.outcomes.items():
                if outcome.bits == bits:
                    swept.figures[cell] = figures
            write_sweep(options, swept)


def _runs(options: argparse.Namespace, swept: Swept, text: str) -> dict[tuple[int, ...], Run]:
    """Return one evaluation for each different set of bits. ``text`` is ``text_key``'s."""
    from evaluation.work import formats_key

    runs: dict[tuple[int, ...], Run] = {}
    for outcome in swept.outcomes.values():
        bits = outcome.bits
        if bits and bits not in runs:
            key = formats_key(bits, options.scheme, options.group_size) + text
            key += f", here by {options.backend}{' exact' if options.exact else ''}"
            label = f"plan {len(runs) + 1}"
            runs[bits] = Run(label, key, bits, options.scheme, options.group_size, "")
    return runs


def _figures(
    options: argparse.Namespace, kept: Kept, tasks: Tasks, data: Data, run: Run
) -> Mapping[str, Estimate]:
    from evaluation.bleu import is_installed
    from evaluation.report import Scored, figures

    return figures(
        Scored(
            kept,
            run.key,
            tasks.items,
            tasks.questions,
            data.rules,
            tasks.wishes.no_answer,
            options.seed,
            "answers" in options.metrics and is_installed(),
        )
    )

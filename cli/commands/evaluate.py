"""``shoal eval``: scores a model's answers, and the losses of expected ones."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from cli.commands.evaluate_arguments import wishes_of
from cli.commands.evaluate_encoders import run_encoder_eval
from cli.commands.evaluate_models import Model, Run, model_and_runs
from cli.commands.evaluate_steps import (
    add_answers_of,
    add_losses_of,
    add_scores_of,
    add_served_losses_of,
    judge_of,
    settings_of,
    telling,
)
from cli.errors import CommandFailed, UsageError, failed
from cli.render import Screen

if TYPE_CHECKING:
    from evaluation.data import Data

ABOUT = (
    "Answers come from what is loaded, over HTTP, with as many requests at once as it has slots. "
    "With --bits or --plan, this machine answers alone, with the whole model in its memory.\n\n"
    "Loss, perplexity and KL are computed on this machine. They need the model's files here. They "
    "use the weights at the plan's bits, and neither activations nor hops are rounded. With "
    "--loss-by devices, the devices of what is loaded measure its loss, without any file here.\n\n"
    "Intervals of 95 % come from drawing the items again 1000 times."
)
EXAMPLES = (
    "  shoal eval tiny-opt --data dev.json --template '{context} {question}'\n"
    "  shoal eval opt-350m --data dev-v2.0.json --questions 1000 --out opt.jsonl\n"
    "  shoal eval ./opt-350m --data dev-v1.1.json --bits 4,8,16 --plot bits.svg\n"
    "  shoal eval ./opt-350m --data prompts.jsonl --plan plan.json --csv plan.csv\n"
    "  shoal eval ./opt-350m --data wiki.txt --bits 4 --metrics loss,kl\n"
    "  shoal eval tiny-opt --data dev.json --judge http://127.0.0.1:8000/v1\n"
    "  shoal eval ./bert-sst2 --data dev.tsv --format glue --bits 4,8\n"
)


def run_eval(options: argparse.Namespace, screen: Screen) -> None:
    """Evaluate, and show the figures. Raises CommandFailed."""
    from backends.base import BackendError
    from evaluation.data import read_data
    from evaluation.errors import EvaluationError
    from model.errors import ModelError
    from planning.plan import PlanError

    try:
        if options.format == "glue":
            _evaluate_labelled(options, screen)
            return
        data = read_data(options.data, options.format)
        for note in data.notes:
            screen.note(note)
        if data.kind == "text" and options.metrics == ("answers",):
            raise UsageError("a plain text has no questions: add loss to --metrics")
        with model_and_runs(options, screen) as (model, runs):
            if model.output is not None:
                run_encoder_eval(options, screen, data, model, runs)
            else:
                _evaluate(options, screen, data, model, runs)
    except (BackendError, EvaluationError, ModelError, PlanError) as error:
        raise failed(error) from error


def _evaluate_labelled(options: argparse.Namespace, screen: Screen) -> None:
    """Score the classes that a model gives to texts."""
    with model_and_runs(options, screen) as (model, runs):
        if model.output is None:
            raise CommandFailed(
                f"{model.name} generates text: --format glue is for models that classify texts"
            )
        run_encoder_eval(options, screen, None, model, runs)


def _evaluate(
    options: argparse.Namespace, screen: Screen, data: Data, model: Model, runs: Sequence[Run]
) -> None:
    from cli.commands.evaluate_views import Evaluated, show
    from evaluation.kept import Kept
    from evaluation.tasks import make_tasks

    wishes = wishes_of(options, data)
    by_devices = options.loss_by == "devices"
    needs_files = bool({"loss", "kl"} & set(options.metrics)) and not by_devices
    files = model.files if needs_files or data.kind == "text" else None
    if files is None and data.kind == "text":
        raise CommandFailed("a plain text needs the model's files on this machine")
    tasks = (
        make_tasks(data, wishes)
        if files is None
        else make_tasks(data, wishes, files.tokenizer, files.checkpoint.spec.max_context)
    )
    with Kept(options.out, settings_of(data, model, wishes)) as kept, ExitStack() as stack:
        judge = judge_of(options, tasks, stack, answers="answers" in options.metrics)
        if len(kept):
            screen.note(f"{options.out} has {len(kept)} results already: going on")
        speeds: dict[str, float] = {}
        with telling(options.out, kept, screen):
            if files is not None:
                add_losses_of(options, screen, kept, tasks, files, runs)
            for run in runs if by_devices and "loss" in options.metrics else ():
                add_served_losses_of(options, screen, kept, tasks, model, run)
            for run in runs if tasks.questions and "answers" in options.metrics else ():
                speeds[run.label] = add_answers_of(options, screen, kept, tasks, model, run)
                if judge is not None:
                    add_scores_of(screen, kept, tasks, run, judge)
        checkpoint = None if model.files is None else model.files.checkpoint
        done = Evaluated(model.name, checkpoint, data, tasks, runs, kept, speeds)
        show(options, screen, done)

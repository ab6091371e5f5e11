"""``shoal study``: repeats the experiments of the DILEMMA paper (docs/dilemma.md)."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.commands.study_views import show_dilemma_study
from cli.commands.table1 import TABLE1_EXAMPLES, add_table1_arguments, run_table1
from cli.errors import CommandFailed
from cli.render import Screen
from cli.results_folder import results_folder

if TYPE_CHECKING:
    from paper.study import DilemmaStudy

ABOUT = (
    "`shoal study dilemma` computes the table and figures from a cost model and synthetic "
    "weights. `shoal study table1 MODEL` measures them on a model and your data."
)
DILEMMA_EXAMPLES = (
    "  shoal study dilemma --out figures\n"
    "  shoal study dilemma --runs 10 --out quick  # fewer random instances\n"
)
EXAMPLES = DILEMMA_EXAMPLES + TABLE1_EXAMPLES


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="Print JSON instead of tables.",
    )

    def study(name: str, summary: str, examples: str) -> Any:
        return studies.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"examples:\n{examples}",
            parents=[shared],
        )

    dilemma = study(
        "dilemma",
        "Compute Table 1 and figures 3, 5 and 6 from the paper's cost model.",
        DILEMMA_EXAMPLES,
    )
    add_out_argument(dilemma, "dilemma-study")
    add_runs_argument(dilemma)
    dilemma.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="The seed of the random instances. Default: %(default)s.",
    )
    table1 = study(
        "table1",
        "Measure Table 1 and figures 2 to 6 on a model, and what delta predicts.",
        TABLE1_EXAMPLES,
    )
    add_table1_arguments(table1)
    group = table1.add_argument_group("results")
    add_out_argument(group, "table1-study")
    add_runs_argument(group)


def add_out_argument(parser: argparse._ActionsContainer, default: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(default),
        metavar="DIR",
        help="The directory for figures and results. Default: %(default)s.",
    )


def add_runs_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--runs",
        type=argument_types.count,
        default=100,
        metavar="N",
        help="Random instances of each experiment. Default: %(default)s.",
    )


def run_study(options: argparse.Namespace, screen: Screen) -> None:
    """Run the study that is asked for. Raises CommandFailed."""
    if options.study == "table1":
        run_table1(options, screen)
    else:
        run_dilemma_study(options, screen)


def run_dilemma_study(options: argparse.Namespace, screen: Screen) -> None:
    """Run ``shoal study dilemma``: Table 1 and figures 3, 5, 6. Raises CommandFailed."""
    with ExitStack() as stack:
        log = None
        if options.out:
            stack.enter_context(results_folder(options.out, "study dilemma"))
            log = options.out / "results.jsonl"
            screen.note(f"results are kept in {log}: after a stop, the same command goes on")
        study = _dilemma_study(options, screen, log)
        if options.out:
            for name, text in study.figures().items():
                (options.out / name).write_text(text, encoding="utf-8")
                screen.note(f"drawn to {options.out / name}")
    if options.json:
        screen.json(study.to_dict())
    else:
        show_dilemma_study(screen, study)


def _dilemma_study(options: argparse.Namespace, screen: Screen, log: Path | None) -> DilemmaStudy:
    from paper.study import study_dilemma
    from paper.study_log import ForeignFile
    from planning.plan import PlanError

    with screen.progress() as on_step:

        def report(what: str, done: int, total: int) -> None:
            step = {"phase": what, "label": "", "done": done, "total": total, "unit": "steps"}
            on_step(step)
            if done == total:
                screen.note(f"{what}: done")

        try:
            return study_dilemma(runs=options.runs, seed=options.seed, on_step=report, log=log)
        except (ForeignFile, PlanError) as error:
            raise CommandFailed(str(error)) from error
        except OSError as error:
            raise CommandFailed(f"{log}: {(error.strerror or str(error)).lower()}") from error

"""The arguments of ``shoal eval``, which commands that also evaluate share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cli import argument_types
from cli.errors import UsageError
from cli.parser import add_url_argument
from cli.shared_arguments import (
    add_adapter_argument,
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
    add_threads_argument,
)

if TYPE_CHECKING:
    from evaluation.data import Data
    from evaluation.tasks import Wishes

METRICS = ("loss", "kl", "answers")
MAX_TOKENS, WINDOW, SLOTS, SEED = 32, 1024, 4, 0
NO_ANSWER = "unanswerable"
KEY_VARIABLE = "SHOAL_JUDGE_KEY"


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A loaded model's name or folder. With --bits or --plan: a folder, a GGUF file, or "
        "a name on the hub.",
    )
    add_data_arguments(parser.add_argument_group("data"), labelled=True)
    add_prompt_arguments(parser.add_argument_group("prompts"))
    _add_where_arguments(parser.add_argument_group("where it runs"))
    _add_result_arguments(parser.add_argument_group("results"))


def add_data_arguments(
    data: argparse._ActionsContainer,
    *,
    required: bool = True,
    questions: int | None = None,
    labelled: bool = False,
) -> None:
    """Add the options about data.

    questions: how many are taken by default, or None for all.
    labelled: texts with a label are data, too.
    """
    data.add_argument(
        "--data",
        type=Path,
        required=required,
        metavar="FILE",
        help="Questions as SQuAD JSON (versions 1.1 and 2.0), or one JSON object with prompt and "
        "answer a line, or a plain text.",
    )
    data.add_argument(
        "--format",
        choices=("squad", "jsonl", "text", *(("glue",) if labelled else ())),
        help="What FILE is. Default: its contents tell."
        + " glue is never told: texts with a label, as TSV or JSON lines." * labelled,
    )
    data.add_argument(
        "--questions",
        type=argument_types.count,
        default=questions,
        metavar="N",
        help="Take N questions, or windows of a text, at random. "
        f"Default: {'all' if questions is None else '%(default)s'}.",
    )
    add_seed_argument(data, "questions and intervals")


def add_seed_argument(group: argparse._ActionsContainer, drawn: str) -> None:
    """Add --seed. ``drawn`` says what it draws."""
    group.add_argument(
        "--seed",
        type=argument_types.argument(argument_types.whole, "a whole number"),
        default=SEED,
        metavar="N",
        help=f"Equal seeds draw equal {drawn}. Default: %(default)s.",
    )


def add_length_arguments(group: argparse._ActionsContainer, *, window: int = WINDOW) -> None:
    """Add the template of prompts, and how long answers and windows of a text are."""
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="The prompt of a SQuAD question, with {context} and {question} in it. "
        r"Default: '{context}\n\nQuestion: {question}\nAnswer:'.",
    )
    group.add_argument(
        "--max-tokens",
        type=argument_types.count,
        default=MAX_TOKENS,
        metavar="N",
        help="End an answer after N tokens. Default: %(default)s.",
    )
    group.add_argument(
        "--window",
        type=argument_types.count,
        default=window,
        metavar="N",
        help="Tokens of a plain text that are seen together, at most the model's context. "
        "Default: %(default)s.",
    )


def add_compute_arguments(group: argparse._ActionsContainer) -> None:
    """Add what computes on this machine."""
    group.add_argument(
        "--backend",
        type=argument_types.backend,
        default="onnx_cpu",
        metavar="NAME",
        help="What computes on this machine. Default: %(default)s.",
    )
    add_threads_argument(group)


def add_prompt_arguments(group: argparse._ActionsContainer) -> None:
    """Add the options about prompts and answers, which ``wishes_of`` reads."""
    add_length_arguments(group)
    group.add_argument(
        "--chat", action="store_true", help="Send prompts as chat messages, with MODEL's template."
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="End an answer before TEXT. It may be repeated. Default: the end of the line for "
        "SQuAD, else none.",
    )
    group.add_argument(
        "--no-answer",
        default=NO_ANSWER,
        metavar="TEXT",
        help="The answer that says a question has none. It counts as SQuAD's empty answer. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--stride",
        type=argument_types.count,
        metavar="N",
        help="Tokens from one window to the next. Default: as --window.",
    )


def _add_where_arguments(group: argparse._ActionsContainer) -> None:
    alone = group.add_mutually_exclusive_group()
    alone.add_argument(
        "--bits",
        type=argument_types.bits,
        metavar="4,8,16",
        help="Answer on this machine alone, once with all blocks at each of these widths.",
    )
    alone.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="Answer on this machine alone, with each block at its width in this saved plan.",
    )
    add_scheme_argument(group)
    add_scheme_text_argument(group)
    add_group_size_argument(group)
    add_adapter_argument(group)
    add_compute_arguments(group)
    group.add_argument(
        "--exact",
        action="store_true",
        help="Answer on this machine with activations that are not rounded.",
    )
    group.add_argument(
        "--loss-by",
        choices=("files", "devices"),
        default="files",
        help="What measures the loss of what is loaded: this machine with MODEL's files, or the "
        "devices, over HTTP, as they answer. Devices take a prompt token by token, and give no "
        "KL. Default: %(default)s.",
    )
    group.add_argument(
        "--slots",
        type=argument_types.count,
        metavar="N",
        help=f"Questions at once. Default: the loaded model's slots, else {SLOTS}.",
    )
    add_url_argument(group)


def _add_result_arguments(group: argparse._ActionsContainer) -> None:
    metrics_argument(group)
    add_judge_arguments(group)
    group.add_argument(
        "--out",
        type=argument_types.ending_in(".jsonl"),
        metavar="FILE.jsonl",
        help="Keep every answer and loss as it comes. The same command goes on where it stopped.",
    )
    group.add_argument(
        "--csv",
        type=argument_types.ending_in(".csv"),
        metavar="FILE.csv",
        help="Write the figures.",
    )
    group.add_argument(
        "--plot", type=argument_types.svg_file, metavar="FILE.svg", help="Draw the figures."
    )


def add_judge_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--judge",
        metavar="URL",
        help="Have a model score each answer from 0 to 10. URL is what comes before "
        f"/chat/completions of an OpenAI-compatible endpoint. Its key is in ${KEY_VARIABLE}.",
    )
    group.add_argument(
        "--judge-model",
        metavar="NAME",
        help="The judging model's name at --judge. Default: the first that it lists.",
    )


def metrics_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--metrics",
        type=argument_types.argument(_metrics, "some of " + ",".join(METRICS)),
        default=",".join(METRICS),
        metavar="LIST",
        help="What to measure. KL runs the original too, and answers give exact match, F1 and "
        "BLEU. Default: %(default)s.",
    )


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(METRICS):
        raise ValueError(text)
    return names


def wishes_of(options: argparse.Namespace, data: Data) -> Wishes:
    from evaluation.data import SQUAD_TEMPLATE
    from evaluation.tasks import Wishes

    template = SQUAD_TEMPLATE if options.template is None else options.template
    if "{question}" not in template:
        raise UsageError("--template: {question} is missing in it")
    stop = options.stop or (["\n"] if data.kind == "squad" else [])
    if not all(stop):
        raise UsageError("--stop: expected a text that is not empty")
    return Wishes(
        template=template.replace("\\n", "\n"),
        chat=options.chat,
        max_tokens=options.max_tokens,
        stop=tuple(text.replace("\\n", "\n") for text in stop),
        no_answer=options.no_answer,
        count=options.questions,
        seed=options.seed,
        window=options.window,
        stride=options.stride or options.window,
    )

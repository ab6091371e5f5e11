"""``shoal compress``: smaller models of a given one, with what each loses and gains."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.argument_types import argument, between
from cli.commands.evaluate_arguments import (
    NO_ANSWER,
    add_length_arguments,
    add_seed_argument,
    wishes_of,
)
from cli.errors import Unavailable, failed
from cli.parser import add_url_argument
from cli.render import Screen
from cli.results_folder import results_folder
from cli.shared_arguments import (
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
    add_threads_argument,
    scheme_text_of,
    with_scheme,
)
from model.schemes import PREPARED

if TYPE_CHECKING:
    from cli.commands.compress_times import Times
    from compression.points import Points
    from compression.run import Text, TokenTime, Wanted
    from evaluation.data import Data
    from evaluation.tasks import Tasks
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer

SIZES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
BITS = [16]
STEPS, RATE, BATCH_TOKENS, HIDDEN_WEIGHT = 1000, 1e-3, 2048, 1.0
WINDOW, HELD_SHARE = 256, 0.1
MEASURED = 200

ABOUT = (
    "Heads, MLP columns and whole layers that matter least on your text are removed. Then the "
    "smaller model is taught to predict what MODEL predicts (distillation).\n\n"
    "Each size becomes an ordinary Hugging Face folder in --out. What each loses is measured on "
    "text that it was not taught. A plan predicts the time of a token, for the "
    "devices of --lab, or those of a running coordinator.\n\n"
    "It takes the memory of 6 copies of MODEL in fp32. The extra torch is needed: "
    "pip install 'shoal-llm[torch]'."
)
EXAMPLES = (
    "  shoal compress ./llama-160m --data my.txt --out smaller\n"
    "  shoal compress ./llama-160m --data ask.jsonl --eval dev.jsonl --out smaller\n"
    "  shoal compress ./llama-160m --data my.txt --out smaller --sizes 1,0.7,0.5\n"
    "  shoal compress ./llama-160m --data my.txt --out smaller --steps 0\n"
    "  shoal compress ./llama-160m --data my.txt --out smaller --bits 16,8,4 \\\n"
    "      --lab home.yaml --at-most 40ms\n"
)


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="A model's folder, or a name on the hub.")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="The folder for the smaller models, the curve, and results to go on from.",
    )
    _add_text_arguments(parser.add_argument_group("text"))
    # Prompts are plain. The rest of what `shoal eval` may be asked for has its defaults.
    parser.set_defaults(chat=False, stop=None, no_answer=NO_ANSWER, stride=None)
    _add_size_arguments(parser.add_argument_group("smaller models"))
    _add_choice_arguments(parser.add_argument_group("the choice of one"))


def _add_text_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="What the model is for: a plain text, SQuAD JSON, or one JSON object with prompt and "
        "answer a line.",
    )
    group.add_argument(
        "--eval",
        type=Path,
        metavar="FILE",
        help="What losses and answers are measured on. Default: a tenth of --data, which is then "
        "not taught.",
    )
    group.add_argument(
        "--questions",
        type=argument_types.count,
        default=MEASURED,
        metavar="N",
        help="Measure with N questions, or windows of a text. Default: %(default)s.",
    )
    add_length_arguments(group, window=WINDOW)


def _add_size_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--sizes",
        type=argument(_sizes, "shares between 0 and 1, such as 1,0.8,0.6"),
        default=SIZES,
        metavar="LIST",
        help="Shares of the layers' weights to keep. 1 is MODEL itself. "
        f"Default: {','.join(f'{size:g}' for size in SIZES)}.",
    )
    group.add_argument(
        "--bits",
        type=argument_types.bits,
        default=BITS,
        metavar="16,8,4",
        help="Measure each size at these bits. Default: 16.",
    )
    add_scheme_argument(group)
    add_scheme_text_argument(group)
    add_group_size_argument(group)
    group.add_argument(
        "--steps",
        type=argument(_steps, "a whole number"),
        default=STEPS,
        metavar="N",
        help="Steps of teaching. 0 only prunes. Default: %(default)s.",
    )
    group.add_argument(
        "--rate",
        type=argument(between(1e-8, 1), "a number between 0 and 1"),
        default=RATE,
        metavar="R",
        help="The highest learning rate. Large models need less, such as 1e-4. "
        "Default: %(default)g.",
    )
    group.add_argument(
        "--batch-tokens",
        type=argument_types.count,
        default=BATCH_TOKENS,
        metavar="N",
        help="Tokens of a step. Default: %(default)s.",
    )
    group.add_argument(
        "--hidden-weight",
        type=argument(between(0, 1e3), "a number from 0 to 1000"),
        default=HIDDEN_WEIGHT,
        metavar="W",
        help="How much hidden states count beside predictions. Default: %(default)g.",
    )
    add_seed_argument(group, "text")
    add_threads_argument(group)


def _add_choice_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--lab",
        type=Path,
        metavar="LAB.yaml",
        help="Predict the time of a token by a plan for the devices of this lab file. Default: "
        "for the coordinator's devices, if one runs.",
    )
    group.add_argument(
        "--context",
        type=argument_types.count,
        default=512,
        metavar="TOKENS",
        help="The context of these plans. Default: %(default)s.",
    )
    bound = group.add_mutually_exclusive_group()
    bound.add_argument(
        "--at-most",
        type=argument(_milliseconds, "milliseconds, such as 40 or 40ms"),
        metavar="MS",
        help="Choose size, bits of each block and placement together: what loses least, of all "
        "whose token takes at most MS. The plan is written to plan.json in --out.",
    )
    bound.add_argument(
        "--quality-budget",
        type=argument(between(0, 1e3), "a number from 0 to 1000"),
        metavar="KL",
        help="The same the other way: choose the fastest, of all whose measured KL divergence from "
        "MODEL is at most KL nats per token.",
    )
    add_url_argument(group)


def run_compress(options: argparse.Namespace, screen: Screen) -> None:
    """Compress a model, and show the curve. Raises CommandFailed."""
    from backends.base import BackendError
    from compression.errors import CompressionError
    from evaluation.errors import EvaluationError
    from model.errors import ModelError
    from planning.labs.lab import LabError
    from planning.plan import PlanError

    try:
        _compress(options, screen)
    except (
        BackendError, CompressionError, EvaluationError, LabError, ModelError, PlanError
    ) as error:  # fmt: skip
        raise failed(error) from error
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Unavailable(
            "this installation lacks torch: pip install 'shoal-llm[torch]' to use `shoal compress`"
        ) from error


def _compress(options: argparse.Namespace, screen: Screen) -> None:
    import torch

    from cli.commands.compress_times import times_of
    from cli.commands.model_names import model_here
    from compression.folder import check_source
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer

    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(model_here(options.model, screen))
    check_source(checkpoint)
    with times_of(options, screen) as times:
        text = _text(options, screen, checkpoint, Tokenizer.load(checkpoint.directory))
        with results_folder(options.out, "compress"):
            _run(options, screen, checkpoint, text, times)


def _run(
    options: argparse.Namespace,
    screen: Screen,
    checkpoint: Checkpoint,
    text: Text,
    times: Times | None,
) -> None:
    """Make and measure what is missing in --out, and show the curve."""
    from cli.commands.compress_times import is_choosing
    from cli.commands.compress_views import Shown, show
    from compression.points import Points
    from compression.run import Compression, Limit

    points = Points(options.out / "compress.json", _settings(options, checkpoint))
    before = len(points.all())
    if before:
        screen.note(f"{options.out} has {before} points already: going on")
    with _telling(options, points, screen), screen.progress() as on_step:

        def report(what: str, done: int, total: int, note: str) -> None:
            step = {"phase": what, "label": "", "unit": "steps", "done": done, "total": total}
            on_step({**step, "note": note})

        wanted = _wanted(options, None if times is None else times.token_time)
        compression = Compression(checkpoint, text, wanted, options.out, points, report)
        compression.run()
        curve = [
            one for one in points.all() if one.size in options.sizes and one.bits in options.bits
        ]
        chosen = None
        if times is not None and is_choosing(options):
            seconds = None if options.at_most is None else options.at_most / 1e3
            limit = Limit(seconds, options.quality_budget)
            chosen = compression.choose(times.plan, limit, curve)
    show(options, screen, checkpoint, compression, Shown(curve, chosen, times))


@contextmanager
def _telling(options: argparse.Namespace, points: Points, screen: Screen) -> Iterator[None]:
    """Say what is kept if the block ends early."""
    try:
        yield
    except BaseException:  # Ctrl-C too: it goes on after a word on what is kept.
        screen.note(f"{len(points.all())} points are kept in {options.out}: ask again to go on")
        raise


def _wanted(options: argparse.Namespace, token_time: TokenTime | None) -> Wanted:
    from backends.registry import backend_class
    from compression.distil import Recipe
    from compression.run import Wanted
    from model.quantize import Format

    return Wanted(
        sizes=options.sizes,
        formats=[Format.of(bits, options.scheme, options.group_size) for bits in options.bits],
        recipe=Recipe(
            options.steps, options.rate, options.batch_tokens, options.hidden_weight, options.seed
        ),
        coded=partial(with_scheme, options),
        token_time=token_time,
        backend=backend_class("onnx_cpu")(),
        threads=options.threads,
    )


def _settings(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values that results depend on, apart from sizes and bits."""
    names = ("questions", "template", "max_tokens", "window", "scheme", "group_size")
    taught = ("steps", "rate", "batch_tokens", "hidden_weight", "seed")
    settings = {name: getattr(options, name) for name in (*names, *taught)}
    text = scheme_text_of(options)
    settings["scheme_text"] = text and hashlib.sha256(text.encode()).hexdigest()
    # Earlier versions measured these schemes as plain rounding.
    settings["codes"] = options.scheme if options.scheme in PREPARED else None
    for name in ("data", "eval"):
        path = getattr(options, name)
        settings[name] = path and hashlib.sha256(path.read_bytes()).hexdigest()
    return {"weights": checkpoint.fingerprint, **settings}


def _text(
    options: argparse.Namespace, screen: Screen, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> Text:
    """Read what is taught and what is measured."""
    from compression.errors import CompressionError
    from compression.run import Text
    from compression.text import divided
    from evaluation.data import read_data

    data = read_data(options.data)
    tasks = _tasks(options, data, checkpoint, tokenizer, None)
    for note in data.notes:
        screen.note(note)
    if options.eval is not None:
        measured = _tasks(
            options, read_data(options.eval), checkpoint, tokenizer, options.questions
        )
        learn = [*tasks.targets.values()]
    else:
        items, held = divided([*tasks.targets], HELD_SHARE, options.seed)
        learn = [tasks.targets[item] for item in items]
        measured = _only(tasks, held[: options.questions])
    if not learn or not measured.targets:
        raise CompressionError(
            f"{options.data}: two or more sequences that fit the model's context are needed"
        )
    questions = measured if measured.questions else None
    return Text(learn, [*measured.targets.values()], questions)


def _tasks(
    options: argparse.Namespace,
    data: Data,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    count: int | None,
) -> Tasks:
    from evaluation.tasks import make_tasks

    wishes = replace(wishes_of(options, data), count=count)
    return make_tasks(data, wishes, tokenizer, checkpoint.spec.max_context)


def _only(tasks: Tasks, items: Sequence[int]) -> Tasks:
    """Return the tasks with some items alone."""
    from evaluation.tasks import Tasks

    def some(every: Mapping[int, Any]) -> dict[int, Any]:
        return {item: every[item] for item in items if item in every}

    return Tasks(tasks.wishes, some(tasks.questions), some(tasks.targets), of=tasks.of)


def _sizes(text: str) -> tuple[float, ...]:
    sizes = tuple(float(part) for part in text.split(","))
    if not sizes or any(not 0 < size <= 1 for size in sizes):
        raise ValueError(text)
    return tuple(dict.fromkeys(sizes))


def _steps(text: str) -> int:
    return argument_types.whole(text)


def _milliseconds(text: str) -> float:
    return between(0.001, 1e6)(text.removesuffix("ms"))

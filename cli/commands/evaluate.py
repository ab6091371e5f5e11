"""``shoal eval``: scores a model's answers, and the losses of expected ones."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli import argument_types
from cli.errors import CommandFailed, UsageError
from cli.parser import add_url_argument
from cli.render import Screen
from cli.shared_arguments import (
    adapter_of,
    add_adapter_argument,
    add_group_size_argument,
    add_scheme_argument,
    add_scheme_text_argument,
    add_threads_argument,
    scheme_text_of,
    with_scheme,
)

if TYPE_CHECKING:
    from cli.client import Client
    from evaluation.data import Data
    from evaluation.judge import Judge
    from evaluation.kept import Kept
    from evaluation.tasks import Tasks, Wishes
    from model.checkpoint import Checkpoint
    from model.quantize import Format
    from model.tokenizer import Tokenizer

METRICS = ("loss", "kl", "answers")
MAX_TOKENS, WINDOW, SLOTS, SEED = 32, 1024, 4, 0
KEY_VARIABLE = "SHOAL_JUDGE_KEY"

ABOUT = (
    "Answers come from what is loaded, over HTTP, with as many requests at once as it has slots. "
    "With --bits or --plan, this machine answers alone, with the whole model in its memory.\n\n"
    "Loss, perplexity and KL are always computed on this machine, because the API gives no chances "
    "of tokens. They need the model's files here. They use the weights at the plan's bits, and "
    "neither activations nor hops are rounded.\n\n"
    "Intervals of 95 % come from drawing the items again 1000 times."
)
EXAMPLES = (
    "  shoal eval tiny-opt --data dev.json --template '{context} {question}'\n"
    "  shoal eval opt-350m --data dev-v2.0.json --questions 1000 --out opt.jsonl\n"
    "  shoal eval ./opt-350m --data dev-v1.1.json --bits 4,8,16 --plot bits.svg\n"
    "  shoal eval ./opt-350m --data prompts.jsonl --plan plan.json --csv plan.csv\n"
    "  shoal eval ./opt-350m --data wiki.txt --bits 4 --metrics loss,kl\n"
    "  shoal eval tiny-opt --data dev.json --judge http://127.0.0.1:8000/v1\n"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the results: a label, the key of its results, and the bits of every block.

    answers_by: the words that say how its answers were made.
    """

    label: str
    key: str
    bits: tuple[int, ...]
    scheme: str
    group_size: int
    answers_by: str

    def formats(self) -> list[Format]:
        from model.quantize import Format

        return [Format.of(width, self.scheme, self.group_size) for width in self.bits]  # type: ignore[arg-type]  # checked by the planner or the parser


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that a coordinator serves, and how many questions to ask it at once."""

    client: Client
    name: str
    slots: int


@dataclass(frozen=True, slots=True)
class Files:
    """A model's files on this machine."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """The model's name, with its files, the loaded model, or both."""

    name: str
    files: Files | None
    loaded: Loaded | None = None


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="A loaded model's name or folder. With --bits or --plan: a folder, a GGUF file, or "
        "a name on the hub.",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="Questions as SQuAD JSON (versions 1.1 and 2.0), or one JSON object with prompt and "
        "answer a line, or a plain text.",
    )
    data.add_argument(
        "--format",
        choices=("squad", "jsonl", "text"),
        help="What FILE is. Default: its contents tell.",
    )
    data.add_argument(
        "--questions",
        type=argument_types.count,
        metavar="N",
        help="Take N questions, or windows of a text, at random. Default: all.",
    )
    data.add_argument(
        "--seed",
        type=argument_types.argument(argument_types.whole, "a whole number"),
        default=SEED,
        metavar="N",
        help="Equal seeds draw equal questions and intervals. Default: %(default)s.",
    )
    _add_prompt_arguments(parser.add_argument_group("prompts"))
    _add_where_arguments(parser.add_argument_group("where it runs"))
    _add_result_arguments(parser.add_argument_group("results"))


def _add_prompt_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--template",
        metavar="TEXT",
        help="The prompt of a SQuAD question, with {context} and {question} in it. "
        r"Default: '{context}\n\nQuestion: {question}\nAnswer:'.",
    )
    group.add_argument(
        "--chat", action="store_true", help="Send prompts as chat messages, with MODEL's template."
    )
    group.add_argument(
        "--max-tokens",
        type=argument_types.count,
        default=MAX_TOKENS,
        metavar="N",
        help="End an answer after N tokens. Default: %(default)s.",
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
        default="unanswerable",
        metavar="TEXT",
        help="The answer that says a question has none. It counts as SQuAD's empty answer. "
        "Default: %(default)s.",
    )
    group.add_argument(
        "--window",
        type=argument_types.count,
        default=WINDOW,
        metavar="N",
        help="Tokens of a plain text that are seen together, at most the model's context. "
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
    group.add_argument(
        "--backend",
        default="onnx_cpu",
        metavar="NAME",
        help="What computes on this machine. Default: %(default)s.",
    )
    add_threads_argument(group)
    group.add_argument(
        "--exact",
        action="store_true",
        help="Answer on this machine with activations that are not rounded.",
    )
    group.add_argument(
        "--slots",
        type=argument_types.count,
        metavar="N",
        help=f"Questions at once. Default: the loaded model's slots, else {SLOTS}.",
    )
    add_url_argument(group)


def _add_result_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--metrics",
        type=argument_types.argument(_metrics, "some of " + ",".join(METRICS)),
        default=",".join(METRICS),
        metavar="LIST",
        help="What to measure. KL runs the original too, and answers give exact match, F1 and "
        "BLEU. Default: %(default)s.",
    )
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
    group.add_argument(
        "--out",
        type=Path,
        metavar="FILE.jsonl",
        help="Keep every answer and loss as it comes. The same command goes on where it stopped.",
    )
    group.add_argument("--csv", type=Path, metavar="FILE.csv", help="Write the figures.")
    group.add_argument("--plot", type=Path, metavar="FILE.svg", help="Draw the figures.")


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(METRICS):
        raise ValueError(text)
    return names


def run_eval(options: argparse.Namespace, screen: Screen) -> None:
    """Evaluate, and show the figures. Raises CommandFailed."""
    from backends.base import BackendError
    from evaluation.data import read_data
    from evaluation.errors import EvaluationError
    from model.errors import ModelError
    from planning.plan import PlanError

    for name, end in (("plot", ".svg"), ("csv", ".csv"), ("out", ".jsonl")):
        path = getattr(options, name)
        if path is not None and path.suffix.lower() != end:
            raise UsageError(f"--{name} {path}: end the name in {end}")
    try:
        data = read_data(options.data, options.format)
        for note in data.notes:
            screen.note(note)
        if data.kind == "text" and options.metrics == ("answers",):
            raise UsageError("a plain text has no questions: add loss to --metrics")
        with _model(options, screen) as (model, runs):
            _evaluate(options, screen, data, model, runs)
    except (BackendError, EvaluationError, ModelError, PlanError) as error:
        raise CommandFailed(str(error)) from error


# ---- what is evaluated -------------------------------------------------------------------------


@contextmanager
def _model(options: argparse.Namespace, screen: Screen) -> Iterator[tuple[Model, list[Run]]]:
    """Find the model and the runs, of which there is one for each set of bits."""
    from cli.client import Client, default_url

    if options.bits is not None or options.plan is not None:
        yield _here(options, screen)
        return
    _refuse_ignored(options)
    with Client(options.url or default_url()) as client:
        yield _loaded(options, client, screen)


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Raise UsageError for an option that the loaded model has decided already."""
    from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME

    decided = {
        "--exact": options.exact,
        "--adapter": options.adapter is not None,
        "--scheme": options.scheme != DEFAULT_SCHEME,
        "--group-size": options.group_size != DEFAULT_GROUP_SIZE,
    }
    for name, is_given in decided.items():
        if is_given:
            raise UsageError(f"{name} goes with --bits or --plan: what is loaded is as it is")


def _here(options: argparse.Namespace, screen: Screen) -> tuple[Model, list[Run]]:
    from cli.commands.model_names import model_here
    from evaluation.work import formats_key
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer
    from planning.request import model_name
    from planning.saved import read_plan

    path = model_here(options.model, screen)
    checkpoint = with_scheme(options, Checkpoint.open(path, adapter_of(options)))
    blocks = checkpoint.spec.block_count
    if options.plan is not None:
        saved = read_plan(options.plan)
        widths = [(options.plan.name, tuple(bits for _, bits in saved.placements))]
        if len(saved.placements) != blocks:
            raise CommandFailed(
                f"{options.plan}: it has {len(saved.placements)} blocks and the model {blocks}"
            )
    else:
        widths = [(f"{width} bits", (width,) * blocks) for width in options.bits]
    rounding = "not rounded" if options.exact else "rounded as the backend does"
    how = f"on this machine alone, {options.backend}, activations {rounding}"
    runs = []
    for label, bits in widths:
        key = formats_key(bits, options.scheme, options.group_size) + _text_key(checkpoint)
        key += f", here by {options.backend}{' exact' if options.exact else ''}"
        runs.append(Run(label, key, bits, options.scheme, options.group_size, how))
    return Model(model_name(path.absolute()), Files(checkpoint, Tokenizer.load(path))), runs


def _text_key(checkpoint: Checkpoint) -> str:
    """The words of a result's key for the text that chose the codes."""
    prepared = checkpoint.prepared
    return "" if prepared is None else f", text {prepared.recipe.text_key[:16]}"


def _as_loaded(
    options: argparse.Namespace, known: Mapping[str, Any], checkpoint: Checkpoint
) -> Checkpoint:
    """The model's files with the codes that are loaded. Raises UsageError, ModelError."""
    from model.quantize import DEFAULT_SCHEME
    from model.quantizers.prepared import quantized
    from planning.request_fields import text_sha256
    from wire.service import default_state_dir

    text, scheme = scheme_text_of(options), known.get("scheme", DEFAULT_SCHEME)
    if text_sha256(text) != known.get("scheme_text_sha256"):
        raise UsageError(
            f"{known['model']} was loaded with --scheme {scheme} and another text: give the same "
            "one with --scheme-text, or drop it if the load had none"
        )
    return quantized(checkpoint, scheme, default_state_dir("coordinator"), text)


def _loaded(options: argparse.Namespace, client: Client, screen: Screen) -> tuple[Model, list[Run]]:
    """The model that is loaded, with its files if they are on this machine too."""
    from evaluation.work import formats_key
    from model.checkpoint import Checkpoint
    from model.errors import ModelError
    from model.hub import is_loaded_from
    from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME
    from model.tokenizer import Tokenizer

    answer = client.get("/shoal/v1/ps")
    models = [one for one in (answer["model"], *answer.get("beside", ())) if one is not None]
    wanted = str(Path(options.model).absolute())
    for known in models:
        names = (known["model"], known["directory"])
        directory = Path(known["directory"])
        if options.model in names or wanted == names[1] or is_loaded_from(directory, options.model):
            break
    else:
        name = models[0]["model"] if models else "nothing"
        raise CommandFailed(
            f"{options.model} is not loaded ({name} is): `shoal load` it, or evaluate it on this "
            "machine alone with --bits or --plan"
        )
    if "stages" not in known:
        raise CommandFailed(f"{known['model']} is {known['state']}: wait, see `shoal ps`")
    slots = options.slots or known["slots"]["total"]
    loaded = Loaded(client, known["model"], slots)
    files = None
    try:
        checkpoint = _as_loaded(options, known, Checkpoint.open(directory, known.get("adapter")))
        files = Files(checkpoint, Tokenizer.load(directory))
    except ModelError as error:
        if {"loss", "kl"} & set(options.metrics):
            screen.note(f"no loss and no KL, because they need the model's files here: {error}")
    bits = tuple(block["bits"] for block in known["plan"]["blocks"])
    # Older coordinators do not say how they quantized.
    scheme = known.get("scheme", DEFAULT_SCHEME)
    group_size = known.get("group_size", DEFAULT_GROUP_SIZE)
    devices = list(dict.fromkeys(stage["device"] for stage in known["stages"]))
    where = f"on what is loaded, over HTTP, {slots} at once: {', '.join(devices)}"
    key = f"{formats_key(bits, scheme, group_size)}, loaded on {' '.join(devices)}"
    run = Run("loaded", key, bits, scheme, group_size, where)
    return Model(known["model"], files, loaded), [run]


# ---- the evaluation ----------------------------------------------------------------------------


def _evaluate(
    options: argparse.Namespace, screen: Screen, data: Data, model: Model, runs: Sequence[Run]
) -> None:
    from cli.commands.evaluate_views import Evaluated, show
    from evaluation.kept import Kept
    from evaluation.tasks import make_tasks

    wishes = _wishes(options, data)
    files = model.files if {"loss", "kl"} & set(options.metrics) else None
    if files is None and data.kind == "text":
        raise CommandFailed("a plain text needs the model's files on this machine")
    tasks = (
        make_tasks(data, wishes)
        if files is None
        else make_tasks(data, wishes, files.tokenizer, files.checkpoint.spec.max_context)
    )
    with Kept(options.out, _settings(data, model, wishes)) as kept, ExitStack() as stack:
        judge = _judge(options, tasks, stack)
        if len(kept):
            screen.note(f"{options.out} has {len(kept)} results already: going on")
        speeds: dict[str, float] = {}
        with _telling(options.out, kept, screen):
            if files is not None:
                _add_losses(options, screen, kept, tasks, files, runs)
            for run in runs if tasks.questions and "answers" in options.metrics else ():
                speeds[run.label] = _add_answers(options, screen, kept, tasks, model, run)
                if judge is not None:
                    _add_scores(screen, kept, tasks, run, judge)
        checkpoint = None if model.files is None else model.files.checkpoint
        done = Evaluated(model.name, checkpoint, data, tasks, runs, kept, speeds)
        show(options, screen, done)


@contextmanager
def _telling(out: Path | None, kept: Kept, screen: Screen) -> Iterator[None]:
    """Tell what is kept if the block ends early."""
    try:
        yield
    except BaseException:  # Ctrl-C too: it goes on after a word on what is kept.
        if out is None:
            screen.note("nothing is kept: --out FILE.jsonl keeps what is done")
        else:
            screen.note(f"{len(kept)} results are kept in {out}: ask again to go on")
        raise


def _wishes(options: argparse.Namespace, data: Data) -> Wishes:
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


def _settings(data: Data, model: Model, wishes: Wishes) -> dict[str, Any]:
    """Return the values that results depend on, apart from the bits, for the head of --out."""
    settings: dict[str, Any] = {"model": model.name, "data": data.sha256, "format": data.kind}
    settings["weights"] = "" if model.files is None else model.files.checkpoint.weights_fingerprint
    if data.kind == "text":
        return {**settings, "window": wishes.window, "stride": wishes.stride}
    settings |= {"chat": wishes.chat, "max_tokens": wishes.max_tokens, "stop": list(wishes.stop)}
    settings |= {"template": wishes.template} if data.kind == "squad" else {}
    return {**settings, "no_answer": wishes.no_answer}


def _judge(options: argparse.Namespace, tasks: Tasks, stack: ExitStack) -> Judge | None:
    from evaluation.judge import Judge

    if options.judge is None:
        return None
    if not tasks.questions or "answers" not in options.metrics:
        raise UsageError("--judge scores answers: it needs questions, and answers in --metrics")
    judge = Judge(options.judge, options.judge_model, os.environ.get(KEY_VARIABLE))
    return stack.enter_context(closing(judge))


def _add_losses(
    options: argparse.Namespace,
    screen: Screen,
    kept: Kept,
    tasks: Tasks,
    files: Files,
    runs: Sequence[Run],
) -> None:
    from backends.registry import backend_class
    from calibration.quality.students import Options
    from evaluation.work import add_losses

    how = Options(backend_class(options.backend)(), options.threads)
    formats = {run.key: run.formats() for run in runs}
    with screen.counting("measuring losses") as on_step:
        add_losses(
            kept,
            tasks,
            files.checkpoint,
            formats,
            how,
            on_step,
            with_original="kl" in options.metrics,
        )


def _add_answers(
    options: argparse.Namespace,
    screen: Screen,
    kept: Kept,
    tasks: Tasks,
    model: Model,
    run: Run,
) -> float:
    """Answer the missing questions of a run, and return how many a second."""
    from backends.registry import backend_class
    from evaluation.work import Answering, add_answers, add_answers_here

    before, started_s = len(kept), time.monotonic()
    with screen.counting(f"answering, {run.label}") as on_step:
        if model.loaded is not None:
            loaded = model.loaded
            ask = _asking(loaded, tasks)
            add_answers(kept, tasks, run.key, ask, loaded.slots, on_step)
        elif model.files is not None:
            backend = backend_class(options.backend)()
            slots = options.slots or SLOTS
            answering = Answering(backend, options.threads, options.exact, slots)
            add_answers_here(
                kept,
                tasks,
                run.key,
                model.files.checkpoint,
                run.formats(),
                model.files.tokenizer,
                answering,
                on_step,
            )
    return (len(kept) - before) / (time.monotonic() - started_s)


def _add_scores(screen: Screen, kept: Kept, tasks: Tasks, run: Run, judge: Judge) -> None:
    from evaluation.work import add_scores

    with screen.counting(f"judging, {run.label}") as on_step:
        add_scores(kept, tasks, run.key, judge, on_step)


def _asking(loaded: Loaded, tasks: Tasks) -> Any:
    """Make a function that asks the loaded model one question, for the likeliest answer."""
    from cli.client import Refused

    wishes = tasks.wishes
    body = {
        "model": loaded.name,
        "max_tokens": wishes.max_tokens,
        "stop": list(wishes.stop) or None,
        "temperature": 0,
        "top_p": 1,
        "top_k": 0,
        "repetition_penalty": 1,
    }
    path = "/v1/chat/completions" if wishes.chat else "/v1/completions"

    def ask(item: int) -> Mapping[str, Any]:
        prompt = tasks.prompt(item)
        asked: dict[str, Any] = {"prompt": prompt}
        if wishes.chat:
            asked = {"messages": [{"role": "user", "content": prompt}]}
        try:
            choice = loaded.client.post(path, {**body, **asked})["choices"][0]
        except Refused as refused:
            if refused.code != "context_length_exceeded":
                raise
            return {"answer": None, "refused": str(refused)}
        return {"answer": choice["message"]["content"] if wishes.chat else choice["text"]}

    return ask

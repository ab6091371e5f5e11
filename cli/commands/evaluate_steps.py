"""The steps of an evaluation for commands: what is missing is done, with progress."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.commands.evaluate_arguments import KEY_VARIABLE, SLOTS
from cli.commands.evaluate_models import Files, Loaded, Model, Run
from cli.errors import UsageError
from cli.render import Screen

if TYPE_CHECKING:
    from evaluation.data import Data
    from evaluation.judge import Judge
    from evaluation.kept import Kept
    from evaluation.tasks import Tasks, Wishes


@contextmanager
def telling(out: Path | None, kept: Kept, screen: Screen) -> Iterator[None]:
    """Tell what is kept if the block ends early."""
    try:
        yield
    except BaseException:  # Ctrl-C too: it goes on after a word on what is kept.
        if out is None:
            screen.note("nothing is kept: --out FILE.jsonl keeps what is done")
        else:
            screen.note(f"{len(kept)} results are kept in {out}: ask again to go on")
        raise


def settings_of(data: Data, model: Model, wishes: Wishes) -> dict[str, Any]:
    """Return the values that results depend on, apart from the bits, for the head of --out."""
    settings: dict[str, Any] = {"model": model.name, "data": data.sha256, "format": data.kind}
    settings["weights"] = "" if model.files is None else model.files.checkpoint.weights_fingerprint
    if data.kind == "text":
        return {**settings, "window": wishes.window, "stride": wishes.stride}
    settings |= {"chat": wishes.chat, "max_tokens": wishes.max_tokens, "stop": list(wishes.stop)}
    settings |= {"template": wishes.template} if data.kind == "squad" else {}
    return {**settings, "no_answer": wishes.no_answer}


def judge_of(
    options: argparse.Namespace, tasks: Tasks, stack: ExitStack, *, answers: bool
) -> Judge | None:
    """Open the judge that is asked for. Raises UsageError if there will be no answers."""
    from evaluation.judge import Judge

    if options.judge is None:
        return None
    if not tasks.questions or not answers:
        raise UsageError("--judge scores answers: it needs questions, and answers in --metrics")
    judge = Judge(options.judge, options.judge_model, os.environ.get(KEY_VARIABLE))
    return stack.enter_context(closing(judge))


def add_losses_of(
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


def add_answers_of(
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


def add_served_losses_of(
    options: argparse.Namespace, screen: Screen, kept: Kept, tasks: Tasks, model: Model, run: Run
) -> None:
    """Measure the missing losses of a run by the devices of a loaded model."""
    from cli.client import Refused
    from evaluation.served import add_served_losses

    loaded = model.loaded
    if loaded is None or not tasks.questions or tasks.wishes.chat:
        raise UsageError(
            "--loss-by devices is for questions to what is loaded: drop --chat, --bits and --plan"
        )
    client, body = loaded.client, {"model": loaded.name, "max_tokens": 0, "echo": True}

    def ask(text: str) -> Mapping[str, Any] | None:
        try:
            answer = client.post("/v1/completions", {**body, "prompt": text, "logprobs": 0})
        except Refused as refused:
            if refused.code != "context_length_exceeded":
                raise
            return None
        told: Mapping[str, Any] = answer["choices"][0]["logprobs"]
        return told

    with screen.counting("measuring losses by the devices") as on_step:
        add_served_losses(kept, tasks, run.key, ask, loaded.slots, on_step)


def add_scores_of(screen: Screen, kept: Kept, tasks: Tasks, run: Run, judge: Judge) -> None:
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
            message = {"role": "user", "content": prompt}
            # Thoughts are a part of the judged text, as of a model that runs here.
            asked = {"messages": [message], "reasoning_format": "none"}
        try:
            choice = loaded.client.post(path, {**body, **asked})["choices"][0]
        except Refused as refused:
            if refused.code != "context_length_exceeded":
                raise
            return {"answer": None, "refused": str(refused)}
        return {"answer": choice["message"]["content"] if wishes.chat else choice["text"]}

    return ask

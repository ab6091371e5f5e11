"""Does the missing parts of an evaluation, and keeps each result as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from backends.base import Backend, StageOptions
from calibration.quality.students import BlockSource, Options
from evaluation.flight import in_flight
from evaluation.judge import Judge
from evaluation.kept import Kept
from evaluation.local import StoredSource, greedy_answers, local_stage
from evaluation.losses import Formats, OnStep, measure_losses
from evaluation.report import answer_of
from evaluation.tasks import Tasks
from model.tokenizer import Tokenizer

JUDGED_AT_ONCE = 4

Ask = Callable[[int], Mapping[str, Any]]
"""Answers an item, as {"answer": text} or {"answer": None, "refused": reason}."""


@dataclass(frozen=True, slots=True)
class Answering:
    """How prompts are answered on this machine."""

    backend: Backend
    threads: int
    exact: bool
    slots: int


def add_losses(
    kept: Kept,
    tasks: Tasks,
    checkpoint: BlockSource,
    runs: Mapping[str, Formats],
    options: Options,
    on_step: OnStep,
    *,
    with_original: bool,
    sources: Mapping[str, BlockSource] | None = None,
) -> None:
    """Measure the losses that are missing. ``sources`` is as in ``measure_losses``.

    Raises ModelError and BackendError.
    """
    waiting: dict[tuple[str, ...], list[int]] = {}
    for item in tasks.targets:
        found = {run: kept.get(run, "loss", item) for run in runs}
        missing = tuple(
            run
            for run, values in found.items()
            if values is None or (with_original and values.get("kl") is None)
        )
        if missing:
            waiting.setdefault(missing, []).append(item)
    for names, items in waiting.items():
        measured = measure_losses(
            checkpoint,
            {name: runs[name] for name in names},
            {item: tasks.targets[item] for item in items},
            options,
            on_step,
            with_original=with_original,
            sources=sources,
        )
        for chunk in measured:
            for name, losses in chunk.items():
                for item, loss in losses.items():
                    kept.put(name, "loss", item, asdict(loss))


def add_answers(
    kept: Kept, tasks: Tasks, run: str, ask: Ask, at_once: int, on_step: OnStep
) -> None:
    """Ask the questions whose answers are missing, ``at_once`` at a time.

    Raises what ``ask`` raises.
    """
    _keep(kept, tasks, run, in_flight(ask, _unanswered(kept, tasks, run), at_once), on_step)


def add_answers_here(
    kept: Kept,
    tasks: Tasks,
    run: str,
    checkpoint: StoredSource,
    formats: Formats,
    tokenizer: Tokenizer,
    answering: Answering,
    on_step: OnStep,
) -> None:
    """Answer the questions that are missing with the whole model on this machine.

    Raises ModelError and BackendError.
    """
    wanted = _unanswered(kept, tasks, run)
    most = checkpoint.spec.max_context - tasks.wishes.max_tokens
    prompts = {item: tasks.prompt_tokens(item, tokenizer) for item in wanted}
    fitting = {item: tokens for item, tokens in prompts.items() if 0 < len(tokens) <= most}

    def is_done(tokens: Sequence[int]) -> bool:
        return bool(tasks.wishes.stop) and tasks.is_stopped(tokenizer.decode(tokens))

    def answers() -> Iterator[tuple[int, dict[str, Any]]]:
        for item in prompts.keys() - fitting.keys():
            count = len(prompts[item])
            yield item, {"answer": None, "refused": f"the prompt has {count} tokens"}
        if not fitting:
            return
        context = max(map(len, fitting.values())) + tasks.wishes.max_tokens
        slots = min(answering.slots, len(fitting))
        options = StageOptions(slots, context, answering.threads, exact=answering.exact)
        with local_stage(checkpoint, formats, answering.backend, options) as stage:
            found = greedy_answers(
                stage,
                slots,
                fitting,
                tasks.wishes.max_tokens,
                checkpoint.spec.eos_tokens,
                is_done,
            )
            with closing(found):
                for item, tokens in found:
                    yield item, {"answer": tasks.cut(tokenizer.decode(tokens))}

    _keep(kept, tasks, run, answers(), on_step)


def add_scores(kept: Kept, tasks: Tasks, run: str, judge: Judge, on_step: OnStep) -> None:
    """Have the judge score the answers that it has not scored. Raises EvaluationError."""
    answers = {item: kept.get(run, "answer", item) for item in tasks.items}
    answered = [item for item, values in answers.items() if values is not None]

    def score(item: int) -> dict[str, Any]:
        question = tasks.questions[item]
        values = answers[item]
        text = None if values is None else answer_of(values, "")
        scores = judge.score(question.context, question.question, question.answers, text or "")
        return {"judge": judge.model, **scores}

    waiting = [item for item in answered if not _is_judged(kept.get(run, "judge", item), judge)]
    done = len(answered) - len(waiting)
    on_step(done, len(answered))
    for item, scores in in_flight(score, waiting, JUDGED_AT_ONCE):
        kept.put(run, "judge", item, scores)
        done += 1
        on_step(done, len(answered))


def formats_key(bits: Sequence[int], scheme: str, group_size: int) -> str:
    """Return a short name of the widths of all blocks and how they are quantized."""
    runs = [(width, len([*some])) for width, some in groupby(bits)]
    text = " ".join(f"{width}x{count}" if count > 1 else f"{width}" for width, count in runs)
    return f"{text} {scheme} {group_size}" if any(width < 16 for width in bits) else text


def _is_judged(values: Mapping[str, Any] | None, judge: Judge) -> bool:
    return values is not None and values.get("judge") == judge.model


def _unanswered(kept: Kept, tasks: Tasks, run: str) -> list[int]:
    return [item for item in tasks.questions if kept.get(run, "answer", item) is None]


def _keep(
    kept: Kept,
    tasks: Tasks,
    run: str,
    answers: Iterator[tuple[int, Mapping[str, Any]]],
    on_step: OnStep,
) -> None:
    """Keep answers as they come, each with its question's name and accepted answers."""
    total = len(tasks.questions)
    done = total - len(_unanswered(kept, tasks, run))
    on_step(done, total)
    for item, values in answers:
        question = tasks.questions[item]
        named = {"id": question.name, "accepted": list(question.answers)}
        kept.put(run, "answer", item, {**values, **named})
        done += 1
        on_step(done, total)

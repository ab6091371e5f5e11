"""Losses from the log-probabilities that a served model's API tells of an echoed prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from evaluation.errors import EvaluationError
from evaluation.flight import in_flight
from evaluation.kept import Kept
from evaluation.losses import Loss, OnStep
from evaluation.tasks import Tasks, following

_BYTES = re.compile(r"bytes:((?:\\x[0-9a-f]{2})+)")
"""A token that is no character by itself, as the API writes it."""

AskEcho = Callable[[str], Mapping[str, Any] | None]
"""Returns the ``logprobs`` of a completion that echoes a text, or None if it is too long."""


def echoed_loss(logprobs: Mapping[str, Any], expected: str) -> Loss | None:
    """Return the loss of the text at the end of an echoed prompt, or None if it is not there.

    It is not there if the tokenizer changes letters, or its tokens' bytes are not known.

    logprobs: of the prompt alone, as a completion with echo has them. A token that has letters of
    ``expected`` and of the text before it counts.

    Raises EvaluationError for an answer of another form.
    """
    try:
        pieces = [_bytes(text) for text in logprobs["tokens"]]
        values = [None if value is None else float(value) for value in logprobs["token_logprobs"]]
        scored = list(zip(pieces, values, strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise EvaluationError("the API answered an echo without log-probabilities") from error
    wanted, nats, tokens = expected.encode(), 0.0, 0
    if not wanted or not b"".join(pieces).endswith(wanted):
        return None
    left = len(wanted)
    for piece, value in reversed(scored):
        if left <= 0 or value is None:  # The first token has nothing before it.
            break
        left -= len(piece)
        nats -= value
        tokens += 1
    return Loss(tokens, nats) if tokens else None


def add_served_losses(
    kept: Kept, tasks: Tasks, run: str, ask: AskEcho, at_once: int, on_step: OnStep
) -> None:
    """Ask for the losses of expected answers that are missing, ``at_once`` at a time.

    Questions that are too long go to ``tasks.too_long``, and those whose echo does not end in the
    answer to ``tasks.unspelt``. Raises EvaluationError and what ``ask`` raises.
    """
    waiting = [item for item in tasks.questions if kept.get(run, "loss", item) is None]
    total = len(tasks.questions)
    done = total - len(waiting)
    on_step(done, total)

    def loss(item: int) -> Loss | None:
        prompt = tasks.prompt(item)
        after = following(prompt, tasks.expected(item))
        told = ask(prompt + after)
        if told is None:
            tasks.too_long.append(item)
            return None
        found = echoed_loss(told, after)
        if found is None:
            tasks.unspelt.append(item)
        return found

    for item, found in in_flight(loss, _with_answer(tasks, waiting), at_once):
        if found is not None:
            kept.put(run, "loss", item, asdict(found))
        done += 1
        on_step(done, total)


def _with_answer(tasks: Tasks, items: Iterable[int]) -> list[int]:
    return [item for item in items if tasks.expected(item) and tasks.prompt(item)]


def _bytes(text: str) -> bytes:
    found = _BYTES.fullmatch(text)
    return text.encode() if found is None else bytes.fromhex(found[1].replace("\\x", ""))

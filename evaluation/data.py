"""Reads what a model is asked: SQuAD files, prompts with answers, or a plain text.

Files are read up to a size, and every field is checked, because they come from strangers.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from evaluation.errors import EvaluationError
from model.bounded import read_bytes

Kind = Literal["squad", "jsonl", "text"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MAX_DATA_BYTES = 64 << 20
"""The largest SQuAD file has 42 MB."""
MAX_TEXT_BYTES = 16 << 20
"""A tokenizer takes about 80 times a text's size in memory."""

SQUAD_TEMPLATE = "{context}\n\nQuestion: {question}\nAnswer:"

_JSON_HEAD = re.compile(r'\s*(?:\{\s*["}]|\[\s*[\[{"])')
_HEAD_CHARACTERS = 4096

_FIELD = re.compile(r"\{(context|question)\}")


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its accepted answers, of which an unanswerable one has none.

    context: the passage that has the answer. It is empty for a prompt without one.
    """

    name: str
    context: str
    question: str
    answers: tuple[str, ...]

    def prompt(self, template: str) -> str:
        """Return the text that a model continues. ``template`` has {context} and {question}."""
        if not self.context:
            return self.question
        values = {"context": self.context, "question": self.question}
        return _FIELD.sub(lambda match: values[match[1]], template)


@dataclass(frozen=True, slots=True)
class Data:
    """The contents of a data file: questions, or one text.

    rules: the SQuAD script whose scores apply, 1.1 or 2.0. Version 2.0 has unanswerable questions.
    notes: lines for the user about the file.
    """

    path: Path
    kind: Kind
    sha256: str
    questions: tuple[Question, ...] = ()
    text: str = ""
    rules: Literal["1.1", "2.0"] = "1.1"
    notes: tuple[str, ...] = ()


def read_data(path: Path, kind: Kind | None = None) -> Data:
    """Read a data file. ``kind`` None: its contents tell what it is.

    Raises EvaluationError that names the file, the place and what was expected, and OSError.
    """
    try:
        content = read_bytes(path, MAX_DATA_BYTES)
    except ValueError as error:
        raise EvaluationError(f"{path}: {error}: cut it, or take fewer questions") from error
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text at byte {error.start}") from error
    if "\0" in text:
        raise EvaluationError(f"{path}: not a text: it has zero bytes")
    looks = _looks(text)
    chosen = kind or looks or "text"
    if chosen == "squad":
        questions, rules = _squad(path, text)
        return Data(path, chosen, sha256, questions, rules=rules)
    if chosen == "jsonl":
        return Data(path, chosen, sha256, tuple(_prompts(path, text)))
    return _text(path, sha256, text, kind)


def sample(count: int, wanted: int | None, seed: int) -> list[int]:
    """Return the places of ``wanted`` out of ``count`` items in order, drawn by ``seed``."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), wanted))  # noqa: S311 - no secret


def windows(tokens: Sequence[int], length: int, stride: int) -> list[tuple[list[int], int]]:
    """Cut a text into windows of ``length`` tokens that begin every ``stride`` tokens.

    Each comes with its first scored place. No token is scored twice, and none without a token
    before it in its window.
    """
    found: list[tuple[list[int], int]] = []
    scored = 1
    for begin in range(0, len(tokens), stride):
        piece = list(tokens[begin : begin + length])
        first = max(1, scored - begin)
        if first < len(piece):
            found.append((piece, first))
            scored = begin + len(piece)
        if begin + length >= len(tokens):
            break
    return found


def _looks(text: str) -> Kind | None:
    """The kind of a text that looks like JSON, also if it is damaged. None: it does not.

    The kind is "text" for JSON that is neither SQuAD nor lines of prompts.
    """
    if _JSON_HEAD.match(text) is None:
        return None
    first = text.lstrip().split("\n", 1)[0]
    line = _json(first)
    if isinstance(line, dict) and "prompt" in line:
        return "jsonl"
    whole = line if line is not None else _json(text)
    if isinstance(whole, dict) and "data" in whole:
        return "squad"
    if whole is None:  # A file that was cut has its first names still.
        if '"prompt"' in first:
            return "jsonl"
        if '"data"' in text[:_HEAD_CHARACTERS]:
            return "squad"
    return "text"


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _text(path: Path, sha256: str, text: str, asked: Kind | None) -> Data:
    """A plain text. JSON is one only if the user says so, and then a note tells it."""
    if len(text) > MAX_TEXT_BYTES:
        size = MAX_TEXT_BYTES >> 20
        raise EvaluationError(f"{path}: a text of more than {size} MiB: cut it")
    if not text.strip():
        raise EvaluationError(f"{path}: an empty text")
    notes: tuple[str, ...] = ()
    if _looks(text) is not None:
        if asked is None:
            raise EvaluationError(
                f'{path}: JSON, but neither SQuAD ("data") nor lines with "prompt" and "answer":'
                " say --format text to measure it as a plain text"
            )
        notes = (f"{path} is JSON: as a plain text, its braces and keys count as words",)
    return Data(path, "text", sha256, text=text, notes=notes)


def _squad(path: Path, text: str) -> tuple[tuple[Question, ...], Literal["1.1", "2.0"]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{path}:{error.lineno}: not JSON: {error.msg.lower()}") from error
    except RecursionError as error:
        raise EvaluationError(f"{path}: not JSON: nested too deep") from error
    if not isinstance(values, dict):
        raise EvaluationError(f"{path}: expected an object with a list named data")
    questions = []
    is_second = str(values.get("version", "")).lower().lstrip("v").startswith("2")
    for where, context, item in _questions(path, values):
        is_second = is_second or "is_impossible" in item
        answers = _texts(path, where, item)
        if item.get("is_impossible") is True:
            answers = ()  # Version 2.0 has plausible, wrong answers under another name.
        name = str(item.get("id", where))
        questions.append((where, Question(name, context, item["question"], answers)))
    if not questions:
        raise EvaluationError(f"{path}: no question in it")
    for where, question in questions:
        if not is_second and not question.answers:
            raise EvaluationError(f"{path}: {where}: no answer, which version 1.1 always has")
    return tuple(question for _, question in questions), "2.0" if is_second else "1.1"


def _questions(path: Path, values: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield the place, the passage and the fields of each question."""
    for article, where in _objects(path, values, "data", ""):
        for paragraph, inside in _objects(path, article, "paragraphs", where):
            context = paragraph.get("context")
            if not isinstance(context, str) or not context:
                raise EvaluationError(f"{path}: {inside}.context: expected a text")
            for item, place in _objects(path, paragraph, "qas", inside):
                if not isinstance(item.get("question"), str):
                    raise EvaluationError(f"{path}: {place}.question: expected a text")
                yield place, context, item


def _objects(
    path: Path, values: dict[str, Any], key: str, where: str
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each object of a list with its place, such as data[0].paragraphs[2]."""
    place = f"{where}.{key}" if where else key
    items = values.get(key)
    if not isinstance(items, list):
        raise EvaluationError(f"{path}: {place}: expected a list")
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise EvaluationError(f"{path}: {place}[{index}]: expected an object")
        yield item, f"{place}[{index}]"


def _texts(path: Path, where: str, item: dict[str, Any]) -> tuple[str, ...]:
    """The answers of a question. Hubs also keep them as one object of lists."""
    answers = item.get("answers", [])
    if isinstance(answers, dict):
        found = answers.get("text")
    elif isinstance(answers, list):
        found = [answer.get("text") if isinstance(answer, dict) else None for answer in answers]
    else:
        found = None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise EvaluationError(f"{path}: {where}.answers: expected a list of objects with a text")
    return tuple(found)


def _prompts(path: Path, text: str) -> Iterator[Question]:
    """Yield the question of each line that is not blank."""
    some = False
    # JSON may hold other line separators of Unicode inside a text.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        values = _json(line)
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise EvaluationError(f'{where}: expected an object with "prompt" and "answer"')
        answers = values.get("answer")
        answers = [answers] if isinstance(answers, str) else answers
        if not isinstance(answers, list) or not answers:
            raise EvaluationError(f"{where}: answer: expected a text, or a list of texts")
        if not all(isinstance(answer, str) for answer in answers):
            raise EvaluationError(f"{where}: answer: expected a text, or a list of texts")
        if not values["prompt"]:
            raise EvaluationError(f"{where}: prompt: expected a text that is not empty")
        some = True
        yield Question(str(values.get("id", number)), "", values["prompt"], tuple(answers))
    if not some:
        raise EvaluationError(f"{path}: no prompt in it")

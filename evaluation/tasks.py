"""Turns data into prompts, and into tokens whose loss is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from evaluation.data import Data, Question, sample, windows
from evaluation.errors import EvaluationError
from evaluation.losses import Target
from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Wishes:
    """How data is put to a model.

    count, seed: so many questions or windows, drawn at random. None: all.
    chat: prompts are messages of the model's chat template.
    no_answer: the words that stand for "there is no answer".
    window, stride: tokens of a text that are seen together, and from one window to the next.
    """

    template: str
    chat: bool = False
    max_tokens: int = 32
    stop: tuple[str, ...] = ()
    no_answer: str = "unanswerable"
    count: int | None = None
    seed: int = 0
    window: int = 1024
    stride: int = 1024


@dataclass(slots=True)
class Tasks:
    """The items of an evaluation: questions by their place in the data, or windows of a text.

    too_long: items without a target, because the model's context is shorter.
    unspelt: items whose answer a served model does not echo as it is written.
    """

    wishes: Wishes
    questions: dict[int, Question] = field(default_factory=dict)
    targets: dict[int, Target] = field(default_factory=dict)
    too_long: list[int] = field(default_factory=list)
    unspelt: list[int] = field(default_factory=list)
    of: int = 0

    @property
    def items(self) -> list[int]:
        return [*(self.questions or self.targets)]

    def prompt(self, item: int) -> str:
        return self.questions[item].prompt(self.wishes.template)

    def expected(self, item: int) -> str:
        """Return the answer whose loss is measured: the first accepted one."""
        return next(iter(self.questions[item].answers), self.wishes.no_answer)

    def prompt_tokens(self, item: int, tokenizer: Tokenizer) -> list[int]:
        """Return a prompt's tokens. Raises TokenizerError for --chat without a template."""
        return _prompt_tokens(self.prompt(item), tokenizer, chat=self.wishes.chat)

    def cut(self, text: str) -> str:
        """Return a text up to the first stop string."""
        places = [at for stop in self.wishes.stop if (at := text.find(stop)) >= 0]
        return text[: min(places, default=len(text))]

    def is_stopped(self, text: str) -> bool:
        return any(stop in text for stop in self.wishes.stop)


def make_tasks(
    data: Data, wishes: Wishes, tokenizer: Tokenizer | None = None, max_context: int = 0
) -> Tasks:
    """Choose the items of the data and, with a tokenizer, their tokens for losses.

    Raises EvaluationError for a text of too few tokens or without a tokenizer, and TokenizerError.
    """
    if data.kind == "text":
        if tokenizer is None:
            raise EvaluationError("a plain text needs the model's tokenizer")
        tokens = tokenizer.encode(data.text)
        window = min(wishes.window, max_context)
        pieces = windows(tokens, window, min(wishes.stride, window))
        if not pieces:
            raise EvaluationError(f"{data.path}: fewer than two tokens")
        chosen = sample(len(pieces), wishes.count, wishes.seed)
        targets = {place: Target(tuple(pieces[place][0]), pieces[place][1]) for place in chosen}
        return Tasks(wishes, targets=targets, of=len(pieces))
    chosen = sample(len(data.questions), wishes.count, wishes.seed)
    tasks = Tasks(
        wishes, {place: data.questions[place] for place in chosen}, of=len(data.questions)
    )
    if tokenizer is None:
        return tasks
    for item in tasks.items:
        prompt, answer = tasks.prompt(item), tasks.expected(item)
        target = answer_target(prompt, answer, tokenizer, chat=wishes.chat)
        if target is None:
            continue
        if len(target.tokens) > max_context:
            tasks.too_long.append(item)
        else:
            tasks.targets[item] = target
    return tasks


def answer_target(prompt: str, answer: str, tokenizer: Tokenizer, *, chat: bool) -> Target | None:
    """Return the tokens of a prompt and its answer, of which the answer's are expected.

    A plain prompt and its answer are one text with a space between them, so that words have the
    tokens that they have inside a text. None: the answer has no token.
    """
    before = _prompt_tokens(prompt, tokenizer, chat=chat)
    if chat:
        whole = [*before, *tokenizer.encode(answer, add_special=False)]
    else:
        whole = tokenizer.encode(prompt + following(prompt, answer))
    first = _common(before, whole)
    if first >= len(whole) or first < 1 or not answer:
        return None
    return Target(tuple(whole), first)


def following(prompt: str, answer: str) -> str:
    """Return an answer as it follows a plain prompt, with a space before it if there is none."""
    return answer if prompt[-1:].isspace() or answer[:1].isspace() else f" {answer}"


def _prompt_tokens(prompt: str, tokenizer: Tokenizer, *, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(prompt)
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    return tokenizer.encode(text, add_special=False)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The tokens at the beginning of both."""
    pairs = zip(first, second, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))

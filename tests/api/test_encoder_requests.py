"""Requests to encoders: what is refused, and which text it is about."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from api.openai.encoders import EncoderRoutes, _windows, read_texts
from model.checkpoint import Checkpoint
from model.spans import LEAST_WINDOW, MOST_WINDOWS
from model.tokenizer import Tokenizer
from planning.errors import RequestInvalid
from tests.encoder_cases import ENCODERS

FOLDER = ENCODERS / "minilm"
LONG = "a " * 200


def deployment() -> Any:
    """As much of a deployment as is looked at."""
    return SimpleNamespace(
        name="minilm",
        spec=Checkpoint.open(FOLDER).spec,
        tokenizer=Tokenizer.load(FOLDER),
        context_tokens=16,
        request=SimpleNamespace(model=FOLDER),
    )


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": ["a", LONG]}, r"input\[1\]: it has \d+ tokens and the context 16"),
        ({"input": LONG}, r"^input: it has \d+ tokens and the context 16"),
        ({"input": ["a", [1, 2, 10**9]]}, r"input\[1\]: token ids outside the vocabulary"),
        ({"input": ["a", 5]}, r"input\[1\]: expected a text, or a list of token ids"),
        ({"input": ["a", []]}, r"input\[1\]: expected a text, or a list of token ids"),
        ({"input": []}, "input: expected 1 to 2048 texts"),
        ({"input": None}, "input: expected a text, or a list of token ids"),
        ({"input": "a", "prompt_name": []}, "prompt_name: minilm has"),
        ({"input": "a", "prompt_name": {}}, "prompt_name: minilm has"),
        ({"input": "a", "truncate": 1}, "truncate: expected true or false"),
    ],
    ids=str,
)
def test_the_text_or_field_that_is_wrong_is_named(body: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestInvalid, match=words):
        read_texts(deployment(), body)


def test_texts_are_cut_at_their_end_if_that_is_wished_for() -> None:
    here = deployment()
    (whole,) = read_texts(here, {"input": LONG, "truncate": True}).encoded
    assert len(whole.tokens) == here.context_tokens
    assert whole.tokens[-1] == here.tokenizer.encode("a")[-1]
    # The empty text has the tokens that every text has.
    (empty,) = read_texts(here, {"input": ""}).encoded
    assert 0 < len(empty.tokens) < len(here.tokenizer.encode("a"))


def test_null_is_no_encoding() -> None:
    """As everywhere, a field that is null is not given."""

    async def prepare(deployment: Any, work: Any, *, is_long: bool) -> Any:
        return work()

    async def encode(deployment: Any, texts: Any) -> list[Any]:
        return []

    answers, encoders = SimpleNamespace(prepare=prepare), SimpleNamespace(encode=encode)
    routes = EncoderRoutes(Any, answers, encoders)  # type: ignore[arg-type]  # As much as it asks.
    body = {"input": "a", "encoding_format": None, "dimensions": None}
    answer = asyncio.run(routes._embeddings(deployment(), body))
    assert answer["data"] == []
    with pytest.raises(RequestInvalid, match="encoding_format: expected float or base64"):
        asyncio.run(routes._embeddings(deployment(), {**body, "encoding_format": []}))


def test_a_question_that_leaves_little_room_does_not_multiply_a_long_text() -> None:
    """Each part has the whole question, and each token of the text is in about one part."""
    here = deployment()
    here.context_tokens = 64
    own = len(here.tokenizer.encode_text("", "").tokens)
    question = "a " * (here.context_tokens - own - LEAST_WINDOW)
    fits, step = LEAST_WINDOW + 6 * (MOST_WINDOWS - 1), "a "
    assert len(_windows(here, question, step * fits).tokens) == MOST_WINDOWS
    with pytest.raises(RequestInvalid, match=r"takes 2049 parts of 8 tokens, and at most 2048"):
        _windows(here, question, step * (fits + 1))

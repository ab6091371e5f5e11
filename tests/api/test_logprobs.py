"""Log-probabilities of completions: each token's place in the text."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from api.openai.answers import Completions
from api.openai.events import Event, Outcome
from api.openai.jobs import Job
from coordinator.serving.pieces import Piece
from model.tokenizer import Tokenizer
from wire.logprobs import TokenLogprobs
from wire.messages import Sampling

TOKENIZER = Tokenizer.load(Path(__file__).parents[1] / "fixtures" / "llama")
DEPLOYMENT: Any = SimpleNamespace(name="m", tokenizer=TOKENIZER, vocabulary=None)
PROMPT, ANSWER = "Hé", "ü!"


def scored(tokens: list[int]) -> tuple[TokenLogprobs, ...]:
    return tuple(TokenLogprobs(token, -1.0, ()) for token in tokens)


def test_offsets_are_places_in_the_text_that_is_told() -> None:
    """The token that begins a prompt has no text, and two tokens may share a character."""
    prompt = TOKENIZER.encode(PROMPT)
    answer = TOKENIZER.encode(ANSWER, add_special=False)
    assert (len(prompt), len(answer)) == (4, 3)
    job = Job(
        deployment=DEPLOYMENT,
        chat=False,
        prompts=(tuple(prompt),),
        sampling=Sampling(9, (), top_logprobs=0, prompt_logprobs=True),
        stop=(),
        stream=True,
        include_usage=False,
        token_ids=False,
        echoed=(PROMPT,),
    )
    pieces = [Piece("", (), "", prompt_logprobs=scored(prompt[1:]))]
    for token, text in zip(answer, ("", "ü", "!"), strict=True):
        pieces.append(Piece(text, (token,), "", logprobs=scored([token])))
    outcome, api = Outcome(), Completions({})
    list(api.begin(job, [outcome]))
    chunks: list[dict[str, Any]] = []
    parser = job.parser()
    for piece in [*pieces, Piece("", (), "stop")]:
        event = Event(0, tuple(parser.feed(piece.text)), piece, piece.finish)
        outcome.add(event)
        chunks += api.add(event)
    (choice,) = Completions({}).whole(job, [outcome])["choices"]
    assert choice["text"] == PROMPT + ANSWER
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == [0, 0, 1, 1, 2, 2, 3]
    assert [choice["text"][at] for at in offsets[1:]] == ["H", "é", "é", "ü", "ü", "!"]
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [at for one in told if one for at in one["text_offset"]] == offsets

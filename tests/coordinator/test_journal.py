"""Answers that were cut off are kept, and go on when they are asked for again."""

from __future__ import annotations

import asyncio
import os
from array import array
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coordinator.errors import CoordinatorError, NotLoaded, Stalled
from coordinator.serving import journal, requests
from coordinator.serving.gateway import Gateway
from coordinator.serving.journal import AnswerJournal
from coordinator.serving.requests import InFlight, Requests
from tests.coordinator.test_teams import ALONE, Shoal, plan_of, running
from wire.messages import Sampling, StageDamaged, StartSequence, TokenSampled

STALLED = Stalled("no token")


def test_an_answer_is_kept_until_it_ends(tmp_path: Path) -> None:
    kept = AnswerJournal(tmp_path / "answers")
    with kept.entry("id", (1, 2)) as entry:
        assert entry.tokens == ()
        entry.add((5, 6))
        entry.add(())
        entry.add((7,))
        (path,) = (tmp_path / "answers").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        # Another coordinator, after this one was killed.
        with AnswerJournal(tmp_path / "answers").entry("id", (1, 2)) as again:
            assert again.tokens == (5, 6, 7)
            again.add((8,))
            with AnswerJournal(tmp_path / "answers").entry("id", (1, 2)) as third:
                assert third.tokens == (5, 6, 7, 8)
            with AnswerJournal(tmp_path / "answers").entry("id", (1, 3)) as other:
                assert other.tokens == ()
    assert list((tmp_path / "answers").iterdir()) == []


def cut_off(directory: Path, *tokens: int, error: BaseException = STALLED) -> tuple[int, ...]:
    """Return the tokens that an answer begins with, which then gets others and an error."""
    begin: tuple[int, ...] = ()

    def answer() -> None:
        nonlocal begin
        with AnswerJournal(directory).entry("id") as entry:
            begin = entry.tokens
            entry.add(tokens)
            raise error

    with pytest.raises(type(error)):
        answer()
    return begin


@pytest.mark.parametrize("error", [NotLoaded("stopped"), STALLED])
def test_an_answer_that_fails_is_kept(tmp_path: Path, error: Exception) -> None:
    cut_off(tmp_path, 5, error=error)
    with AnswerJournal(tmp_path).entry("id") as again:
        assert list(again.tokens) == [5]
        again.withdraw()
        assert list(again.tokens) == []
        again.add((9,))
        with AnswerJournal(tmp_path).entry("id") as third:
            assert third.tokens == (9,)


def test_a_client_that_leaves_is_not_waited_for(tmp_path: Path) -> None:
    cut_off(tmp_path, 5, error=GeneratorExit())
    assert list(tmp_path.iterdir()) == []


def test_the_same_request_at_the_same_time_has_no_part_in_it(tmp_path: Path) -> None:
    kept = AnswerJournal(tmp_path)
    with kept.entry("id") as first:
        first.add((5,))
        with kept.entry("id") as second:
            assert second.tokens == ()
            second.add((6,))
        assert len(list(tmp_path.iterdir())) == 1
        with AnswerJournal(tmp_path).entry("id") as after:
            assert after.tokens == (5,)


def test_old_answers_and_too_many_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "MOST_KEPT", 3)
    for age in range(6):
        path = tmp_path / f"answer-{age}"
        path.touch()
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 10 * age))
    old = tmp_path / "answer-0"
    os.utime(old, (0, 0))
    with AnswerJournal(tmp_path).entry("id"):
        assert {path.name for path in tmp_path.iterdir()} == {"answer-1", "answer-2", "answer-3"}


def test_half_a_token_and_a_file_of_another_program_are_nothing(tmp_path: Path) -> None:
    cut_off(tmp_path, 5, 6)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    assert cut_off(tmp_path, 7) == (5,)
    assert cut_off(tmp_path) == (5, 7)
    os.truncate(path, journal.MOST_BYTES + 8)
    assert cut_off(tmp_path) == ()


def test_a_directory_that_cannot_be_written_ends_no_answer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "answers").touch()
    with AnswerJournal(tmp_path / "answers").entry("id") as entry:
        entry.add((5,))
        entry.add((6,))
    assert caplog.text.count("answers cannot be kept") == 1


# ---- by the gateway ----------------------------------------------------------------------------

Test = Callable[[Shoal], Awaitable[None]]


def with_journal(directory: Path, test: Test) -> None:
    async def main() -> None:
        async with running(directory) as shoal:
            shoal.gateway = Gateway(
                shoal.roster, shoal.models, journal=AnswerJournal(directory / "answers")
            )
            await shoal.join("a", "d")
            await asyncio.wait_for(test(shoal), 60)

    asyncio.run(main())


async def ask(shoal: Shoal, sampling: Sampling, name: str = "mine") -> list[int]:
    """Return the tokens of the answer to a request with this id."""
    with Requests().serve(InFlight(name)):
        assert requests.current().id == name
        deployment = await shoal.models.deployment()
        pieces = shoal.gateway.generate(deployment, (1, 2), sampling)
        return [token async for piece in pieces for token in piece.tokens]


def test_the_same_request_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    async def cut(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(ALONE))
        answer = asyncio.ensure_future(ask(shoal, Sampling(4, ())))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        for index, token in enumerate((5, 6)):
            await shoal.said("d", TokenSampled(deployment.epoch, number, index, token, ""))
        await shoal.member("d").lives()
        shoal.keeper.close()
        with pytest.raises(NotLoaded):
            await answer

    async def go_on(shoal: Shoal) -> None:
        deployment = await shoal.load(plan_of(ALONE))
        for name, sampling, prompt, left in (
            ("yours", Sampling(4, ()), (1, 2), 4),
            ("mine", Sampling(5, ()), (1, 2), 5),
            ("mine", Sampling(4, ()), (1, 2, 5, 6), 2),
            ("mine", Sampling(4, ()), (1, 2), 4),
        ):
            shoal.told.clear()
            answer = asyncio.ensure_future(ask(shoal, sampling, name))
            await shoal.until(lambda: shoal.of(StartSequence))
            start = next(one for _, one in shoal.of(StartSequence) if one.prompt)
            assert (start.prompt, start.sampling.max_tokens) == (prompt, left)
            for index in range(left):
                message = TokenSampled(deployment.epoch, start.sequence, index, 7, "")
                if index + 1 == left:
                    message.finish = "length"
                await shoal.said("d", message)
            assert await answer == [*prompt[2:], *[7] * left]

    with_journal(tmp_path, cut)
    with_journal(tmp_path, go_on)
    assert list((tmp_path / "answers").iterdir()) == []


def test_no_answer_goes_on_behind_tokens_of_a_damaged_stage(tmp_path: Path) -> None:
    """The damage was found, and the user unloaded the model before it was placed anew."""

    async def test(shoal: Shoal) -> None:
        first = await shoal.load(plan_of(ALONE))
        answer = asyncio.ensure_future(ask(shoal, Sampling(4, ())))
        await shoal.until(lambda: shoal.of(StartSequence))
        number = shoal.of(StartSequence)[0][1].sequence
        await shoal.said("d", TokenSampled(first.epoch, number, 0, 5, ""))
        await shoal.said("d", StageDamaged(first.epoch, "rot"))
        await shoal.until(lambda: shoal.models.serving is None)
        await shoal.operations.unload()
        with pytest.raises(CoordinatorError):
            await answer
        second = await shoal.load(plan_of(ALONE))
        shoal.told.clear()
        answer = asyncio.ensure_future(ask(shoal, Sampling(4, ())))
        await shoal.until(lambda: shoal.of(StartSequence))
        start = next(one for _, one in shoal.of(StartSequence) if one.prompt)
        assert start.prompt == (1, 2)
        await shoal.said("d", TokenSampled(second.epoch, start.sequence, 0, 5, ""))
        await shoal.said("d", StageDamaged(second.epoch, "rot"))
        shoal.operations.plans.append(plan_of(ALONE))
        await shoal.until(lambda: shoal.models.serving not in (None, second))
        # The right tokens are kept again, as soon as they are known to be right.
        third = shoal.models.serving
        assert third is not None
        await shoal.until(lambda: len(shoal.of(StartSequence)) == 4)
        start = [one for _, one in shoal.of(StartSequence) if one.prompt][1]
        assert start.prompt == (1, 2)
        assert list((tmp_path / "answers").iterdir()) == []
        for index, token in enumerate((5, 6)):
            await shoal.said("d", TokenSampled(third.epoch, start.sequence, index, token, ""))
        await shoal.member("d").lives()
        shoal.keeper.close()
        with pytest.raises(NotLoaded):
            await answer
        (path,) = (tmp_path / "answers").iterdir()
        assert path.read_bytes() == array("q", (5, 6)).tobytes()

    with_journal(tmp_path, test)

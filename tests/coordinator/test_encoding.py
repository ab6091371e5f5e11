"""Passes of texts over a deployment of two members, which a test plays over real sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coordinator.errors import AgentFailed, AgentLied, AgentLost, NotLoaded, TextsWait
from coordinator.loading.deployment import Deployment
from coordinator.loading.idling import Idling
from coordinator.loading.state import (
    Asleep,
    LoadBegan,
    Lost,
    Place,
    Placed,
    Rest,
    Serving,
    Slept,
    Unloaded,
)
from coordinator.loading.turns import Turns
from coordinator.serving import encoding
from coordinator.serving.encoding import Encoders, Result, TextTokens
from model.families import load_spec
from model.texts import PASS_ROWS
from planning.request import LoadRequest
from tests.coordinator.test_gateway import EPOCH, Cluster, running, said
from tests.encoder_cases import ENCODERS
from wire import limits
from wire.messages import EncodeTexts, PassFailed, TextsEncoded

Test = Callable[["Texts"], Awaitable[None]]


class Texts:
    """Encoders over a cluster whose model is one of the random encoders."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.encoders = Encoders(cluster.roster, cluster.models)
        self.deployment = self.deploy()

    def deploy(self, epoch: int = EPOCH, keep_s: float | None = None) -> Deployment:
        made = replace(
            self.cluster.made(epoch=epoch),
            request=LoadRequest(ENCODERS / self.name, keep_s=keep_s),
            spec=load_spec(ENCODERS / self.name),
        )
        self.cluster.models.apply(self.name, LoadBegan(made.request))
        self.cluster.models.apply(self.name, Placed(made))
        return made

    def ask(self, *lengths: int) -> asyncio.Task[list[Result]]:
        texts = [TextTokens(tuple(range(length)), length) for length in lengths]
        return asyncio.ensure_future(self.encoders.encode(self.deployment, texts))

    async def order(self) -> EncodeTexts:
        message = await said(self.cluster.agents[0])
        assert isinstance(message, EncodeTexts)
        return message

    async def answer(self, order: EncodeTexts, *, rows: int | None = None) -> None:
        """The result of a text is its length, in all 32 values."""
        values = np.repeat(np.array(order.lengths, "<f4")[:rows, None], 32, axis=1)
        await self.tell(TextsEncoded(order.epoch, order.number, 0, values.tobytes()))

    async def tell(self, message: TextsEncoded | PassFailed, agent: int = 1) -> None:
        await self.cluster.agents[agent].send(message)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    def run(test: Test, name: str = "minilm") -> None:
        async def main() -> None:
            async with running(tmp_path) as cluster:
                await asyncio.wait_for(test(Texts(cluster, name)), 30)

        asyncio.run(main())

    return run


def test_a_long_text_shares_no_pass_with_many_short_ones(run: Callable[..., None]) -> None:
    """Attention lays texts side by side, each as long as the longest."""

    async def test(texts: Texts) -> None:
        lengths = (*[2] * 40, *[60] * 12)
        asked = texts.ask(*lengths)
        told = 0
        while told < len(lengths):
            order = await texts.order()
            assert len(order.lengths) * max(order.lengths) <= PASS_ROWS
            told += len(order.lengths)
            await texts.answer(order)
        assert [result[0] for result in await asked] == list(lengths)

    run(test)


def test_a_result_for_an_earlier_coordinator_is_no_result(run: Callable[..., None]) -> None:
    """The stages go on under the next one, and may tell what the one before has asked."""

    async def test(texts: Texts) -> None:
        before = texts.ask(3)
        earlier = await texts.order()
        texts.encoders = Encoders(texts.cluster.roster, texts.cluster.models)
        asked = texts.ask(5)
        order = await texts.order()
        await texts.answer(earlier)
        await texts.answer(order)
        assert (await asked)[0][0] == 5
        assert (await before)[0][0] == 3

    run(test)


def test_texts_of_several_requests_share_a_pass(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        # With two stages three passes are in flight. What comes meanwhile shares the next one.
        early = [texts.ask(3) for _ in range(3)]
        orders = [await texts.order() for _ in early]
        late = texts.ask(5, 2), texts.ask(4)
        await asyncio.sleep(0)
        for order in orders:
            await texts.answer(order)
        shared = await texts.order()
        assert shared.lengths == (2, 5, 4)  # Those of a request by their length.
        assert shared.tokens == (0, 1, 0, 1, 2, 3, 4, 0, 1, 2, 3)
        await texts.answer(shared)
        assert [int(result[0]) for result in await late[0]] == [5, 2]
        assert [int(result[0]) for result in await late[1]] == [4]
        assert [len((await task)[0]) for task in early] == [32, 32, 32]
        assert texts.encoders.waiting == 0

    run(test)


def test_long_lines_are_spread_over_the_stages(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(*[20] * 60)
        rows = []
        for _ in range(3):
            order = await texts.order()
            rows.append(len(order.tokens))
            await texts.answer(order)
        assert max(rows) <= 512
        assert min(rows) >= 64
        task.cancel()

    run(test)


def test_results_of_tokens_come_in_parts(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(3, 2)
        order = await texts.order()
        values = np.arange(10, dtype="<f4").reshape(5, 2)
        for first, last in ((0, 2), (2, 5)):
            part = values[first:last].tobytes()
            await texts.tell(TextsEncoded(EPOCH, order.number, first, part))
        long, short = await task
        np.testing.assert_array_equal(short, values[:2])
        np.testing.assert_array_equal(long, values[2:])

    run(test, "bert-span")


@pytest.mark.parametrize(
    ("first", "values"),
    [
        (0, b""),
        (0, bytes(127)),
        (1, bytes(128)),
        (0, bytes(2 * 128)),
        (-1, bytes(128)),
        (0, np.full(32, np.nan, "<f4").tobytes()),
        (0, np.full(32, np.inf, "<f4").tobytes()),
    ],
)
def test_what_no_agent_sends_ends_the_pass(
    run: Callable[..., None], first: int, values: bytes
) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(3)
        order = await texts.order()
        await texts.tell(TextsEncoded(EPOCH, order.number, first, values))
        with pytest.raises(AgentLied, match="last"):
            await task
        assert len(values) < limits.RESULT_BYTES

    run(test)


def test_only_the_last_stage_tells_results(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(3)
        order = await texts.order()
        wrong = np.ones(32, "<f4").tobytes()
        await texts.tell(TextsEncoded(EPOCH, order.number, 0, wrong), agent=0)
        await texts.tell(TextsEncoded(EPOCH + 1, order.number, 0, wrong))
        await texts.tell(TextsEncoded(EPOCH, order.number + 7, 0, wrong))
        await texts.answer(order)
        assert (await task)[0][0] == 3

    run(test)


def test_a_failed_pass_is_told_to_its_texts_alone(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        bad = texts.ask(3)
        failed = await texts.order()
        good = texts.ask(4)
        await texts.tell(PassFailed(EPOCH, failed.number, "no memory"), agent=0)
        with pytest.raises(AgentFailed, match="first: no memory"):
            await bad
        await texts.answer(await texts.order())
        assert (await good)[0][0] == 4

    run(test)


def test_a_text_that_cannot_be_computed_takes_no_other_with_it(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        early = [texts.ask(3) for _ in range(3)]
        orders = [await texts.order() for _ in early]
        hostile, innocent = texts.ask(7), texts.ask(5, 4)
        await asyncio.sleep(0)
        for order in orders:
            await texts.answer(order)
        shared = await texts.order()
        assert shared.lengths == (7, 4, 5)
        failed = PassFailed(EPOCH, shared.number, "the stage's results are not finite")
        await texts.tell(failed)
        for _ in range(3):
            order = await texts.order()
            (length,) = order.lengths
            if length == 7:
                await texts.tell(replace(failed, number=order.number))
            else:
                await texts.answer(order)
        assert [int(result[0]) for result in await innocent] == [5, 4]
        with pytest.raises(AgentFailed, match="not finite"):
            await hostile
        assert [len(await task) for task in early] == [1, 1, 1]
        assert texts.encoders.waiting == 0

    run(test)


def test_texts_without_a_result_run_again_on_the_next_deployment(
    run: Callable[..., None],
) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(3)
        await texts.order()
        texts.cluster.models.carry_out(Place, lambda action: None)
        texts.cluster.models.apply("minilm", Lost(AgentLost("last", "gone")))
        await asyncio.sleep(0)
        texts.deploy(EPOCH + 1)
        again = await texts.order()
        assert (again.epoch, again.lengths) == (EPOCH + 1, (3,))
        await texts.answer(again)
        assert (await task)[0][0] == 3

    run(test)


def test_an_unloaded_model_ends_what_waits(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        tasks = [texts.ask(3) for _ in range(5)]
        for _ in range(3):
            await texts.order()
        texts.cluster.models.apply("minilm", Unloaded(NotLoaded("unloaded")))
        for task in tasks:
            with pytest.raises(NotLoaded):
                await task
        assert texts.encoders.waiting == 0

    run(test)


def test_a_request_without_a_name_means_a_model_that_can_answer_it(
    run: Callable[..., None],
) -> None:
    async def test(texts: Texts) -> None:
        models = texts.cluster.models
        texts.cluster.deploy(epoch=EPOCH + 1)  # It generates.
        assert models.named(None, "vector") == "minilm"
        assert models.named(None, None) == "llama"
        assert models.named("minilm", None) == "minilm"
        assert models.named("unknown", "vector") == "minilm"
        assert models.named(None, "span") in ("minilm", "llama")

    run(test)


def test_an_encoder_that_sleeps_is_still_one(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        models = texts.cluster.models
        models.carry_out(Rest, lambda action: None)
        texts.cluster.deploy(epoch=EPOCH + 1)  # It generates.
        texts.deploy(keep_s=60.0)
        models.apply("minilm", Slept(texts.deployment.request))
        assert isinstance(models["minilm"], Asleep)
        assert models.named(None, "vector") == "minilm"
        assert models.named(None, None) == "llama"

    run(test)


def test_an_encoder_at_work_is_busy_beside_a_model_of_its_devices(
    run: Callable[..., None],
) -> None:
    async def test(texts: Texts) -> None:
        models = texts.cluster.models
        texts.cluster.deploy(epoch=EPOCH + 1)
        generates = next(one for one in models.all_serving if one.name == "llama")
        assert not models.is_busy_beside(generates)
        task = texts.ask(3)
        order = await texts.order()
        assert models.is_busy_beside(generates)
        await texts.answer(order)
        await task
        assert not models.is_busy_beside(generates)

    run(test)


def test_a_pass_counts_as_work_although_its_request_was_cancelled(
    run: Callable[..., None],
) -> None:
    async def test(texts: Texts) -> None:
        task = texts.ask(3)
        order = await texts.order()
        task.cancel()
        await asyncio.wait({task})
        assert not texts.deployment.slots.is_idle
        (passes,) = texts.encoders._tasks
        await texts.answer(order)
        await passes
        assert texts.deployment.slots.is_idle

    run(test)


def test_the_line_is_bounded(run: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MOST_WAITING", 4)

    async def test(texts: Texts) -> None:
        early = [texts.ask(3) for _ in range(3)]
        orders = [await texts.order() for _ in early]
        waiting = texts.ask(1, 2, 3, 4)
        await asyncio.sleep(0)
        with pytest.raises(TextsWait):
            await texts.ask(5)
        for order in orders:
            await texts.answer(order)
        await texts.answer(await texts.order())
        assert len(await waiting) == 4

    run(test)


def test_a_client_that_goes_away_takes_its_texts_along(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        early = [texts.ask(3) for _ in range(3)]
        orders = [await texts.order() for _ in early]
        gone, stays = texts.ask(5), texts.ask(6)
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        await texts.answer(orders[0])
        order = await texts.order()
        assert order.lengths == (6,)
        await texts.answer(order)
        assert (await stays)[0][0] == 6

    run(test)


def test_a_model_falls_asleep_after_its_last_text(run: Callable[..., None]) -> None:
    async def test(texts: Texts) -> None:
        models, name = texts.cluster.models, texts.name
        models.apply(name, Unloaded(NotLoaded("another load")))
        texts.deployment = texts.deploy(keep_s=60.0)
        slots = texts.deployment.slots
        idling = Idling(models, Turns())
        task = texts.ask(3)
        order = await texts.order()
        slots.used_s = time.monotonic() - 120  # It was loaded long ago.
        idling.look(time.monotonic())
        assert isinstance(models[name], Serving)
        await texts.answer(order)
        await task
        idling.look(time.monotonic())
        assert isinstance(models[name], Serving)
        idling.look(time.monotonic() + 61)
        assert isinstance(models[name], Asleep)

    run(test)

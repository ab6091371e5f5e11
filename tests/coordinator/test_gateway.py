"""Generations over real control connections, whose other ends answer as stages do."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coordinator.errors import (
    AgentFailed,
    AgentLied,
    AgentLost,
    Busy,
    CoordinatorError,
    FormatFailed,
    LinkFailed,
    NotLoaded,
    Stalled,
)
from coordinator.files.artifacts import ArtifactStore
from coordinator.loading import keeper
from coordinator.loading.deployment import Deployment
from coordinator.loading.keeper import Keeper
from coordinator.loading.models import Models
from coordinator.loading.operations import Operations
from coordinator.loading.recovery import LoadedFile
from coordinator.loading.slots import Slots
from coordinator.loading.state import LoadBegan, Lost, Place, Placed, Replacing
from coordinator.loading.turns import Turns
from coordinator.quality.store import QualityStore
from coordinator.roster import links
from coordinator.roster.members import Member, Roster
from coordinator.serving import gateway
from coordinator.serving.answer import room_for_answer
from coordinator.serving.gateway import Gateway
from coordinator.serving.pieces import Piece, StopFilter, Timing
from coordinator.story import Story
from model.checkpoint import Checkpoint
from model.tokenizer import Tokenizer
from planning.errors import RequestInvalid
from planning.plan import Plan, Proof, Stage
from planning.prompt import Passage
from planning.request import LoadRequest
from wire.async_connection import AsyncConnection, serve
from wire.errors import ConnectionLost
from wire.logprobs import encode_logprobs
from wire.messages import (
    AgentHello,
    Done,
    Endpoint,
    FindBlocks,
    FinishReason,
    Heartbeat,
    LinkMeasured,
    LoadStage,
    MeasureLink,
    MeasureModel,
    Message,
    PeerLost,
    PromptScored,
    ReleaseSequence,
    RequestFailed,
    Sampling,
    SequenceFailed,
    StageDamaged,
    StartSequence,
    TokenSampled,
    UnloadStage,
)
from wire.profile import DeviceProfile

LLAMA = Path(__file__).parents[1] / "fixtures" / "llama"
EPOCH = 3
CONTEXT = 32
VOCAB = Checkpoint.open(LLAMA).spec.vocab
SAMPLING = Sampling(8, ())
STAGES = tuple(
    Stage(name, block, (8,), 1.0, 1.0, 0, 0, 0, 0, passage=Passage(0.0, 1.0))
    for block, name in enumerate(("first", "last"))
)
"""Two, to which a row costs the same in any number."""
PLAN = Plan(STAGES, (), 0.0, 0.0, 0.0, None, Proof("", 0.0, 0.0))
PROFILE = DeviceProfile(
    "x86_64", "test", 1, 1, "onnx_cpu", "1", ((32, 32),), 1 << 30, 1 << 30, 1 << 30, 1e9, 1e9
)


# ---- stop strings ------------------------------------------------------------------------------


def shown(stop: list[str], *texts: str) -> tuple[str, bool]:
    """All that a filter lets through of ``texts``, and whether it met a stop string."""
    stops, result = StopFilter(stop), ""
    for text in texts:
        piece, stopped = stops.feed(text)
        result += piece
        if stopped:
            assert stopped in stop
            return result, True
    return result + stops.rest(), False


@pytest.mark.parametrize(
    ("stop", "texts", "expected"),
    [
        ([], ["a", "b"], ("ab", False)),
        (["x"], ["abc"], ("abc", False)),
        (["END"], ["one E", "N", "D two"], ("one ", True)),
        (["END"], ["one E", "N", " two"], ("one EN two", False)),
        (["END"], ["EEND"], ("E", True)),
        (["END"], ["E", "E", "N", "D"], ("E", True)),
        (["aab"], ["a", "a", "a", "b"], ("a", True)),
        (["END"], ["to the E"], ("to the E", False)),
        (["b", "abc"], ["xab"], ("xa", True)),
        (["abc", "b"], ["xa", "bc"], ("x", True)),
        (["\n\n"], ["a\n", "\nb"], ("a", True)),
        (["é"], ["caf", "é!"], ("caf", True)),
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_shown(
    stop: list[str], texts: list[str], expected: tuple[str, bool]
) -> None:
    assert shown(stop, *texts) == expected


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopFilter(["END"])
    assert stops.feed("an EN") == ("an ", "")
    assert stops.feed("E") == ("EN", "")
    assert stops.feed("ND") == ("", "END")


# ---- room and timing ---------------------------------------------------------------------------


def test_room_for_an_answer() -> None:
    spec = Checkpoint.open(LLAMA).spec
    assert room_for_answer(CONTEXT - 1, CONTEXT, spec) == 1
    with pytest.raises(RequestInvalid, match="larger --context"):
        room_for_answer(CONTEXT, CONTEXT, spec)
    with pytest.raises(RequestInvalid, match=r"shorten it$"):
        room_for_answer(spec.max_context, spec.max_context, spec)
    with pytest.raises(RequestInvalid, match="empty"):
        room_for_answer(0, CONTEXT, spec)
    with pytest.raises(RequestInvalid, match=f"has at least {CONTEXT} tokens") as refused:
        room_for_answer(CONTEXT, CONTEXT, spec, at_least=True)
    assert refused.value.code == "context_length_exceeded"


def test_speeds_are_known_once_they_can_be() -> None:
    timing = Timing(prompt_tokens=10, started_s=1.0)
    assert (timing.prefill_tokens_per_s, timing.decode_tokens_per_s) == (None, None)
    timing.first_s = 3.0
    assert (timing.prefill_tokens_per_s, timing.decode_tokens_per_s) == (5.0, None)
    timing.decoded, timing.decoding_us = 4, 1_000_000
    assert timing.decode_tokens_per_s == 4.0


def test_tokens_that_arrive_all_at_once_were_not_made_at_once(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        timing = Timing()
        task = asyncio.ensure_future(collect(cluster, sampling=Sampling(4, ()), timing=timing))
        begun = await cluster.begun()
        finishes: tuple[FinishReason, ...] = ("", "", "", "length")
        # Nothing takes -5 µs: that device's clock or word counts for nothing.
        for index, (after_us, finish) in enumerate(
            zip((0, 20_000, -5, 30_000), finishes, strict=True)
        ):
            await cluster.agents[1].send(
                TokenSampled(EPOCH, begun.sequence, index, 65, finish, after_us)
            )
        await task
        assert timing.decode_tokens_per_s == 2 / 0.05

    run(test)


# ---- sequences ---------------------------------------------------------------------------------


class Cluster:
    """A gateway over a deployment of two members; a test plays the agents."""

    def __init__(self, directory: Path) -> None:
        self.roster = Roster("test")
        store = ArtifactStore(directory)
        store.prepare()
        self.models, self.turns = Models(Story()), Turns()
        self.operations = Operations(
            self.roster, store, QualityStore(directory), self.models, self.turns
        )
        self.keeper = Keeper(
            self.roster, self.models, self.turns, self.operations, LoadedFile(directory), 0
        )
        self.gateway = Gateway(self.roster, self.models)
        self.agents: list[AsyncConnection] = []
        self.playing: list[asyncio.Task[None]] = []

    async def handle(self, connection: AsyncConnection) -> None:
        message, _ = await connection.receive(5)
        assert isinstance(message, AgentHello)
        await self.roster.serve(message, connection)

    async def join(self, port: int) -> None:
        for name in ("first", "last"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            agent = AsyncConnection(reader, writer)
            await agent.send(AgentHello(name, name, "1", (Endpoint("127.0.0.1", 1),), PROFILE))
            await agent.receive(5)
            self.agents.append(agent)

    def play_helpless(self, *agents: AsyncConnection) -> None:
        """Agents that can no more than unload from now on."""

        async def answer(agent: AsyncConnection) -> None:
            while True:
                message = await said(agent)
                if isinstance(message, UnloadStage):
                    await agent.send(Done(message.request))
                elif isinstance(message, (MeasureModel, MeasureLink, FindBlocks, LoadStage)):
                    await agent.send(RequestFailed(message.request, "no room"))

        self.playing += [asyncio.ensure_future(answer(agent)) for agent in agents]

    def deploy(self, slots: int = 1, epoch: int = EPOCH) -> Deployment:
        """Have the model served, as after a load or a recovery."""
        deployment = self.made(slots, epoch)
        self.models.apply("llama", LoadBegan(deployment.request))
        self.models.apply("llama", Placed(deployment))
        assert self.models.serving is deployment
        return deployment

    def made(self, slots: int = 1, epoch: int = EPOCH) -> Deployment:
        return Deployment(
            request=LoadRequest(LLAMA),
            spec=Checkpoint.open(LLAMA).spec,
            tokenizer=Tokenizer.load(LLAMA),
            plan=PLAN,
            epoch=epoch,
            slots=Slots(slots),
            context_tokens=CONTEXT,
            teams=tuple((member,) for member in self.roster.members),
            loaded=(),
            sums=(),
        )

    def member(self, name: str) -> Member:
        return next(member for member in self.roster.members if member.name == name)

    async def begun(self) -> StartSequence:
        """What the first stage is told; the other one hears the same, without the prompt."""
        message = await said(self.agents[0])
        assert isinstance(message, StartSequence)
        assert await said(self.agents[1]) == replace(message, prompt=())
        return message

    async def sample(
        self,
        number: int,
        text: str,
        finish: FinishReason = "",
        *,
        cut: int | None = None,
        first: int = 0,
        epoch: int = EPOCH,
    ) -> None:
        """The last stage's tokens, one per byte (up to ``cut``); the last one has ``finish``.

        ``first`` of them were there before.
        """
        tokens = Tokenizer.load(LLAMA).encode(text, add_special=False)[:cut]
        assert cut is not None or len(tokens) == len(text.encode())
        for index, token in enumerate(tokens):
            reason: FinishReason = finish if index == len(tokens) - 1 else ""
            await self.agents[1].send(TokenSampled(epoch, number, first + index, token, reason))


async def said(agent: AsyncConnection) -> Message:
    """What the coordinator says next, heartbeats aside."""
    while True:
        message, _ = await agent.receive(5)
        if not isinstance(message, Heartbeat):
            return message


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(directory)
    server, port = await serve("127.0.0.1", 0, cluster.handle)
    try:
        await cluster.join(port)
        yield cluster
    finally:
        server.close()
        cluster.keeper.close()
        cluster.roster.close()
        for task in cluster.playing:
            task.cancel()
        for agent in cluster.agents:
            agent.close()


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[Cluster], Awaitable[None]]], None]:
    def run(test: Callable[[Cluster], Awaitable[None]]) -> None:
        async def main() -> None:
            async with running(tmp_path) as cluster:
                await asyncio.wait_for(test(cluster), 30)

        asyncio.run(main())

    return run


Run = Callable[[Callable[[Cluster], Awaitable[None]]], None]


async def collect(
    cluster: Cluster,
    prompt: tuple[int, ...] = (1, 2),
    sampling: Sampling = SAMPLING,
    stop: tuple[str, ...] = (),
    timing: Timing | None = None,
) -> list[Piece]:
    deployment = await cluster.models.deployment()
    pieces = cluster.gateway.generate(deployment, prompt, sampling, stop, timing)
    return [piece async for piece in pieces]


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_an_answer_and_its_release(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, (1,) * (CONTEXT - 3)))
        begun = await cluster.begun()
        assert begun.sampling.max_tokens == 3
        assert (
            begun.chunk_tokens == 16
        )  # 29 rows in one chunk would keep one of the stages waiting.
        await cluster.sample(begun.sequence, "é!", "length")
        pieces = await task
        assert [(piece.text, piece.finish) for piece in pieces] == [
            ("", ""),
            ("é", ""),
            ("!", "length"),
        ]
        for agent in cluster.agents:
            assert await said(agent) == ReleaseSequence(EPOCH, begun.sequence)

    run(test)


def test_half_a_character_at_the_end(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, sampling=Sampling(2, ())))
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "aé", "length", cut=2)
        assert text_of(await task) == "a\N{REPLACEMENT CHARACTER}"

    run(test)


def test_a_stop_string_cancels_the_sequence(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, stop=("END",)))
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "an END of")
        pieces = await task
        assert text_of(pieces) == "an "
        assert (pieces[-1].finish, pieces[-1].stop) == ("stop", "END")
        assert sum(len(piece.tokens) for piece in pieces) == len(b"an END")
        for agent in cluster.agents:
            assert await said(agent) == ReleaseSequence(EPOCH, begun.sequence)

    run(test)


def test_a_stop_token_is_no_part_of_the_answer_and_frees_what_was_held(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        newline = Tokenizer.load(LLAMA).encode("\n", add_special=False)[0]
        sampling = Sampling(8, (newline,))
        task = asyncio.ensure_future(collect(cluster, sampling=sampling, stop=("END",)))
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "an EN\n", "stop")
        pieces = await task
        assert text_of(pieces) == "an EN"
        assert pieces[-1] == Piece("EN", (), "stop")

    run(test)


def test_closing_cancels_and_the_next_in_line_has_its_turn(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        async with aclosing(cluster.gateway.generate(deployment, (1, 2), SAMPLING)) as pieces:
            waiting = asyncio.ensure_future(anext(pieces))
            begun = await cluster.begun()
            task = asyncio.ensure_future(collect(cluster, (5,), Sampling(3, ())))
            await cluster.sample(begun.sequence, "a")
            assert (await waiting).text == "a"
        for agent in cluster.agents:
            assert await said(agent) == ReleaseSequence(EPOCH, begun.sequence)
        following = await cluster.begun()
        assert following.prompt == (5,)
        # What the first one's stages had on the way, another epoch's, and who must not sample.
        await cluster.sample(begun.sequence, "old", "length")
        await cluster.agents[1].send(TokenSampled(EPOCH - 1, following.sequence, 0, 65, "length"))
        await cluster.agents[0].send(TokenSampled(EPOCH, following.sequence, 0, 65, "length"))
        await cluster.sample(following.sequence, "new", "length")
        assert text_of(await task) == "new"

    run(test)


def test_a_client_that_reads_slowly_holds_no_slot(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        ended = asyncio.Event()

        def notice(member: Member, message: Message) -> None:
            if isinstance(message, TokenSampled) and message.finish:
                ended.set()

        cluster.roster.subscribe(notice, lambda *_: None)
        pieces = cluster.gateway.generate(deployment, (1, 2), Sampling(4, ()))
        async with aclosing(pieces):
            waiting = asyncio.ensure_future(anext(pieces))
            begun = await cluster.begun()
            await cluster.sample(begun.sequence, "slow", "length")
            await ended.wait()
            assert (await waiting).text == "s"
            assert (await anext(pieces)).text == "l"
            for agent in cluster.agents:
                assert await said(agent) == ReleaseSequence(EPOCH, begun.sequence)
            task = asyncio.ensure_future(collect(cluster, (5,), Sampling(3, ())))
            following = await cluster.begun()
            await cluster.sample(following.sequence, "new", "length")
            assert text_of(await task) == "new"
            assert text_of([piece async for piece in pieces]) == "ow"

    run(test)


async def loss(cluster: Cluster) -> None:
    cluster.agents[1].close()
    cluster.play_helpless(cluster.agents[0])


async def beat(agent: AsyncConnection) -> None:
    while True:
        await agent.send(Heartbeat())
        await asyncio.sleep(0.05)


async def lost_hop(cluster: Cluster) -> None:
    """Both devices live on."""
    cluster.play_helpless(*cluster.agents)
    cluster.playing += [asyncio.ensure_future(beat(agent)) for agent in cluster.agents]
    # Who is not the next device is none of the first one's business.
    await cluster.agents[0].send(PeerLost(EPOCH, "first", "reset"))
    await cluster.agents[0].send(PeerLost(EPOCH, "last", "10.0.0.2:4100: reset"))


async def silent_hop(cluster: Cluster) -> None:
    """The device says nothing more to anybody."""
    cluster.play_helpless(cluster.agents[0])
    cluster.playing.append(asyncio.ensure_future(beat(cluster.agents[0])))
    await cluster.agents[0].send(PeerLost(EPOCH, "last", "no answer in time"))


async def unload(cluster: Cluster) -> None:
    async def answer(agent: AsyncConnection) -> None:
        message = await said(agent)
        while not isinstance(message, UnloadStage):
            message = await said(agent)
        await agent.send(Done(message.request))

    unloading = asyncio.ensure_future(cluster.operations.unload())
    await asyncio.gather(*(answer(agent) for agent in cluster.agents))
    assert await unloading == ("llama",)


async def stop(cluster: Cluster) -> None:
    cluster.keeper.close()


@pytest.mark.parametrize(
    ("end", "error", "words"),
    [
        (loss, AgentLost, "last: device lost .*others cannot take its place: first: no room"),
        (
            lost_hop,
            LinkFailed,
            r"link lost: first cannot reach last \(10.0.0.2:4100: reset\), and both are alive"
            ".*no plan does without this link: ",
        ),
        (silent_hop, AgentLost, r"last: device lost \(.* silent .*others cannot take its place"),
        (unload, NotLoaded, "unloaded"),
        (stop, NotLoaded, "stopped"),
    ],
)
def test_whatever_ends_a_deployment_ends_its_sequences(
    run: Run,
    end: Callable[[Cluster], Awaitable[None]],
    error: type[CoordinatorError],
    words: str,
) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        running_one = asyncio.ensure_future(collect(cluster))
        begun = await cluster.begun()
        waiting_one = asyncio.ensure_future(collect(cluster))
        await cluster.sample(begun.sequence, "a")
        await end(cluster)
        for task in (running_one, waiting_one):
            with pytest.raises(error, match=words):
                await task
        with pytest.raises(error, match=words):
            cluster.models.require(deployment)

    run(test)


def test_only_the_last_stage_is_told_what_a_penalty_is_for(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        sampling = replace(SAMPLING, max_tokens=2, repetition_penalty=1.2)
        task = asyncio.ensure_future(collect(cluster, (7, 2, 7, 5), sampling))
        first, last = [await said(agent) for agent in cluster.agents]
        assert isinstance(first, StartSequence)
        assert isinstance(last, StartSequence)
        assert (first.prompt, first.sampling.penalized) == ((7, 2, 7, 5), ())
        assert (last.prompt, last.sampling.penalized) == ((), (2, 5, 7))
        assert first.sampling.repetition_penalty == last.sampling.repetition_penalty == 1.2
        await cluster.sample(first.sequence, "ab", "length")
        assert text_of(await task) == "ab"

    run(test)


async def next_begun(cluster: Cluster) -> StartSequence:
    while not isinstance(message := await said(cluster.agents[0]), StartSequence):
        pass
    return message


def test_answers_go_on_where_the_model_is_placed_anew(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        broken = cluster.deploy()
        pieces = cluster.gateway.generate(broken, (1, 2), Sampling(4, ()))
        first = asyncio.ensure_future(anext(pieces))
        begun = await cluster.begun()
        in_line = asyncio.ensure_future(collect(cluster, (7,), Sampling(2, ())))
        await cluster.sample(begun.sequence, "ab")
        shown = [await first, await anext(pieces)]
        # Here the test places the model.
        cluster.models.carry_out(Place, lambda action: None)
        cluster.models.apply("llama", Lost(AgentLost("last", "gone")))

        async def rest() -> list[Piece]:
            return [*shown, *[piece async for piece in pieces]]

        running_one = asyncio.ensure_future(rest())
        late = asyncio.ensure_future(collect(cluster, (8,), Sampling(2, ())))
        await ended(cluster, begun.sequence)
        await cluster.sample(begun.sequence, "too late")
        cluster.deploy(epoch=EPOCH + 1)
        letters = Tokenizer.load(LLAMA).encode("ab", add_special=False)
        left = {(1, 2, *letters): 2, (7,): 2, (8,): 2}
        for _ in range(3):
            message = await next_begun(cluster)
            assert message.epoch == EPOCH + 1
            assert message.sampling.max_tokens == left.pop(message.prompt)
            await cluster.sample(message.sequence, "cd", "length", epoch=EPOCH + 1)
        assert text_of(await running_one) == "abcd"
        assert text_of(await in_line) == text_of(await late) == "cd"
        (notice,) = [piece.notice for piece in await running_one if piece.notice]
        assert "last: device lost (gone)" in notice

    run(test)


def test_a_new_last_stage_is_told_the_answer_so_far_if_it_is_penalized(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        broken = cluster.deploy()
        sampling = Sampling(3, (), repetition_penalty=1.2)
        pieces = cluster.gateway.generate(broken, (1, 2), sampling)
        first = asyncio.ensure_future(anext(pieces))
        begun = await next_begun(cluster)
        told = await said(cluster.agents[1])
        assert isinstance(told, StartSequence)
        assert told.sampling.penalized == (1, 2)
        await cluster.sample(begun.sequence, "a")
        assert (await first).text == "a"
        cluster.models.carry_out(Place, lambda action: None)
        cluster.models.apply("llama", Lost(AgentLost("last", "gone")))
        rest = asyncio.ensure_future(collect_rest(pieces))
        await ended(cluster, begun.sequence)
        cluster.deploy(epoch=EPOCH + 1)
        again = await next_begun(cluster)
        (letter,) = Tokenizer.load(LLAMA).encode("a", add_special=False)
        assert again.prompt == (1, 2, letter)
        told = await said(cluster.agents[1])
        assert isinstance(told, StartSequence)
        assert told.sampling.penalized == tuple(sorted((1, 2, letter)))
        await cluster.sample(again.sequence, "bc", "length", epoch=EPOCH + 1)
        assert text_of(await rest) == "bc"

    run(test)


async def collect_rest(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def test_damage_that_a_failed_attempt_has_mended_makes_answers_suspect_too(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(cluster: Cluster) -> None:
        broken = cluster.deploy()
        cluster.play_helpless(*cluster.agents)
        failed = asyncio.Event()

        async def place(request: LoadRequest, tokenizer: Tokenizer) -> Deployment:
            if failed.is_set():
                return cluster.made(epoch=EPOCH + 2)
            assert not cluster.models.is_suspect(broken)
            await cluster.agents[0].send(StageDamaged(EPOCH + 1, "a file was damaged"))
            with cluster.models.changed.watch() as changed:
                while not cluster.models.is_suspect(broken):
                    await changed.wait()
                    changed.clear()
            failed.set()
            raise AgentFailed("last", "no room")

        monkeypatch.setattr(cluster.operations, "place", place)
        cluster.models.apply("llama", Lost(LinkFailed("first", "last", "reset")))
        await failed.wait()
        while cluster.models.serving is None:
            cluster.roster.changed.fire()
            await asyncio.sleep(0)
        assert cluster.models.is_suspect(broken)

    run(test)


def test_an_unload_that_has_to_wait_for_others_ends_no_recovery(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        with cluster.models.changed.watch() as changed:
            async with cluster.turns.asked(lambda step: None):
                await loss(cluster)
                while cluster.models.serving is not None:
                    changed.clear()
                    await changed.wait()
                with pytest.raises(Busy):
                    await cluster.operations.unload()
                assert isinstance(cluster.models.current, Replacing)
        with pytest.raises(AgentLost, match="no room"):
            await cluster.models.latest(deployment)
        # Attempts go on as devices join, until somebody says what he wants.
        assert await cluster.operations.unload() == ("llama",)
        with pytest.raises(NotLoaded):
            await cluster.models.deployment()

    run(test)


def test_a_link_that_failed_is_tried_again_while_nothing_else_is_done(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "WATCH_S", 0.01)
    monkeypatch.setattr(links, "RETRY_S", (0.0,))

    async def test(cluster: Cluster) -> None:
        first, last = cluster.member("first"), cluster.member("last")
        cluster.roster.fail_link(first, last, "refused")
        deployment = cluster.deploy()
        answering = asyncio.ensure_future(collect(cluster, sampling=Sampling(1, ())))
        watching = asyncio.ensure_future(cluster.keeper.watch_links())
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "a", "length")
        await answering
        assert await said(cluster.agents[0]) == ReleaseSequence(EPOCH, begun.sequence)
        message = await said(cluster.agents[0])
        assert isinstance(message, MeasureLink)
        # Who asks for something now is not refused.
        unloading = asyncio.ensure_future(cluster.operations.unload())
        await cluster.agents[0].send(RequestFailed(message.request, "refused again"))
        message = await said(cluster.agents[0])
        cluster.play_helpless(cluster.agents[1])
        if isinstance(message, MeasureLink):
            await cluster.agents[0].send(LinkMeasured(message.request, 1e-3, 1e8))
            message = await said(cluster.agents[0])
        assert isinstance(message, UnloadStage)
        await cluster.agents[0].send(Done(message.request))
        assert await unloading == (deployment.name,)
        with cluster.roster.changed.watch() as changed:
            while cluster.roster.link(first, last) is None:
                message = await said(cluster.agents[0])
                assert isinstance(message, MeasureLink)
                await cluster.agents[0].send(LinkMeasured(message.request, 1e-3, 1e8))
                await changed.wait()
        assert cluster.roster.failed_links() == ()
        watching.cancel()

    run(test)


def test_a_broken_deployment_keeps_nothing_of_who_asked(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        await stop(cluster)
        for _ in range(3):
            with pytest.raises(NotLoaded) as raised:
                cluster.models.require(deployment)
            assert len(raised.traceback) == 2

    run(test)


def test_a_stage_that_cannot_go_on_ends_one_sequence_only(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        task = asyncio.ensure_future(collect(cluster))
        begun = await cluster.begun()
        await cluster.agents[0].send(SequenceFailed(EPOCH, begun.sequence, "no memory"))
        with pytest.raises(AgentFailed, match="first: no memory"):
            await task
        cluster.models.require(deployment)

    run(test)


@pytest.mark.parametrize("grammar", [b'start: "a"', b""])
def test_a_format_that_cannot_be_kept_is_no_devices_fault(run: Run, grammar: bytes) -> None:
    """Without a format, a device that says so is at fault itself."""

    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        sampling = replace(SAMPLING, grammar=grammar)
        task = asyncio.ensure_future(collect(cluster, sampling=sampling))
        begun = await said(cluster.agents[0])
        assert isinstance(begun, StartSequence)
        await cluster.sample(begun.sequence, "a")
        reason = "the answer's format allows no token here"
        failed = SequenceFailed(EPOCH, begun.sequence, reason, format_failed=True)
        await cluster.agents[1].send(failed)
        with pytest.raises(CoordinatorError) as raised:
            await task
        assert str(raised.value) == (reason if grammar else f"last: {reason}")
        assert type(raised.value) is (FormatFailed if grammar else AgentFailed)
        cluster.models.require(deployment)

    run(test)


LIES: dict[str, tuple[list[tuple[int, int, FinishReason]], str]] = {
    "below the vocabulary": ([(0, -1, "")], "token -1, of a vocabulary"),
    "beyond the vocabulary": ([(0, 2**63 - 1, "")], "token 9223372036854775807, of a vocabulary"),
    "just beyond": ([(0, VOCAB, "")], f"token {VOCAB}, of a vocabulary of {VOCAB}"),
    "late start": ([(1, 65, "")], "token number 1, where 0 of 3 had come"),
    "repeated": ([(0, 65, ""), (0, 65, "")], "token number 0, where 1 of 3 had come"),
    "skipped": ([(0, 65, ""), (2, 65, "")], "token number 2, where 1 of 3 had come"),
    "negative": ([(-1, 65, "")], "token number -1"),
    "endless": ([(index, 65, "") for index in range(20)], "token 65, 3 of 3, as ''"),
    "cut short": ([(0, 65, "length")], "token 65, 1 of 3, as 'length'"),
    "stopped by nothing": ([(0, 65, "stop")], "token 65, 1 of 3, as 'stop'"),
    "not stopped": ([(0, 66, "")], "token 66, 1 of 3, as ''"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_device_that_lies_about_tokens_ends_the_answer_and_is_dropped(
    run: Run, lie: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokens, said_so = LIES[lie]

    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, sampling=Sampling(3, (66,))))
        begun = await cluster.begun()
        with contextlib.suppress(ConnectionLost):  # It is dropped as soon as it lies.
            for index, token, finish in tokens:
                sampled = TokenSampled(EPOCH, begun.sequence, index, token, finish)
                await cluster.agents[1].send(sampled)
        with pytest.raises(AgentLied, match=f"last: it sent {re.escape(said_so)}"):
            await task
        assert [member.name for member in cluster.roster.members] == ["first"]
        assert sum("last: device lost (it sent" in line for line in caplog.messages) == 1
        assert not any(record.exc_info for record in caplog.records)

    run(test)


def test_tokens_after_the_end_reach_nobody(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, sampling=Sampling(2, ())))
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "ab", "length")
        await cluster.sample(begun.sequence, "cd", "length", first=2)
        assert text_of(await task) == "ab"

    run(test)


def test_a_stranger_to_the_ring_cannot_fail_a_sequence(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        stranger = replace(deployment.leads[0], name="stranger")
        task = asyncio.ensure_future(collect(cluster, sampling=Sampling(1, ())))
        begun = await cluster.begun()
        failure = SequenceFailed(EPOCH, begun.sequence, "no")
        cluster.gateway.on_event(stranger, failure)
        await cluster.sample(begun.sequence, "a", "length")
        assert text_of(await task) == "a"

    run(test)


def test_devices_that_live_and_give_no_token_are_not_waited_for_for_ever(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "STALL_S", 0.2)

    async def test(cluster: Cluster) -> None:
        deployment = cluster.deploy()
        task = asyncio.ensure_future(collect(cluster))
        begun = await cluster.begun()
        await cluster.sample(begun.sequence, "a")
        with pytest.raises(Stalled, match="no token came"):
            await task
        for agent in cluster.agents:
            assert await said(agent) == ReleaseSequence(EPOCH, begun.sequence)
        cluster.models.require(deployment)

    run(test)


async def begun_as(cluster: Cluster, prompt: int) -> StartSequence:
    begun = await cluster.begun()
    assert begun.prompt == (prompt,)
    return begun


async def ended(cluster: Cluster, number: int) -> None:
    """Both agents hear that a sequence is over."""
    for agent in cluster.agents:
        assert await said(agent) == ReleaseSequence(EPOCH, number)


def test_as_many_sequences_as_slots_and_the_rest_in_line(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        slots = cluster.deploy(2).slots
        tasks = [
            asyncio.ensure_future(collect(cluster, (prompt,), Sampling(max_tokens, ())))
            for prompt, max_tokens in enumerate((2, 1, 1, 1, 1), start=1)
        ]
        first, second = [await begun_as(cluster, prompt) for prompt in (1, 2)]
        assert (first.slot, second.slot) == (0, 1)
        assert (slots.total, slots.used, slots.waiting) == (2, 2, 3)
        # Tokens of both, in turns; and who leaves the line holds nobody up.
        await cluster.sample(first.sequence, "a")
        await cluster.sample(second.sequence, "b", "length")
        tasks[2].cancel()
        assert text_of(await tasks[1]) == "b"
        await ended(cluster, second.sequence)
        fourth = await begun_as(cluster, 4)
        assert fourth.slot == 1
        # One that fails leaves its neighbour, and its slot serves the next.
        await cluster.agents[0].send(SequenceFailed(EPOCH, fourth.sequence, "no memory"))
        with pytest.raises(AgentFailed, match="first: no memory"):
            await tasks[3]
        await ended(cluster, fourth.sequence)
        fifth = await begun_as(cluster, 5)
        assert fifth.slot == 1
        # As does one whose user goes away.
        tasks[4].cancel()
        await ended(cluster, fifth.sequence)
        await cluster.sample(first.sequence, "c", "length", first=1)
        assert text_of(await tasks[0]) == "ac"
        await ended(cluster, first.sequence)
        assert (slots.used, slots.waiting) == (0, 0)

    run(test)


def test_a_lost_device_ends_all_that_run_and_all_in_line(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        slots = cluster.deploy(2).slots
        tasks = [asyncio.ensure_future(collect(cluster, (prompt,))) for prompt in range(1, 5)]
        for prompt in (1, 2):
            await begun_as(cluster, prompt)
        await loss(cluster)
        for task in tasks:
            with pytest.raises(AgentLost, match="last: device lost"):
                await task
        assert (slots.used, slots.waiting) == (0, 0)

    run(test)


def test_a_slot_given_to_somebody_who_leaves_at_that_moment_goes_to_the_next() -> None:
    async def hold(slots: Slots) -> int:
        async with slots.one() as held:
            return held.slot

    async def test() -> None:
        slots = Slots(1)
        async with slots.one():
            leaving, following = [asyncio.ensure_future(hold(slots)) for _ in range(2)]
            await asyncio.sleep(0)
            assert slots.waiting == 2
        leaving.cancel()
        assert await following == 0
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert (slots.used, slots.waiting) == (0, 0)

    asyncio.run(test())


# ---- what users may ask -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", "a/relative/path"),
        ("model", 7),
        ("bits", []),
        ("bits", [7]),
        ("bits", [4.0]),
        ("bits", [[4]]),
        ("bits", [True]),
        ("scheme", "nope"),
        ("scheme", []),
        ("max_weight_error", -1),
        ("max_weight_error", "none"),
        ("context_tokens", 0),
        ("context_tokens", 1.5),
        ("slots", 0),
        ("slots", 65),
        ("slots", True),
        ("time_limit_s", 0),
        ("time_limit_s", None),
        ("colour", "red"),
    ],
)
def test_a_plan_request_that_makes_no_sense_is_refused(field: str, value: object) -> None:
    values: dict[str, object] = {"model": "/models/llama", field: value}
    with pytest.raises(RequestInvalid, match=field):
        LoadRequest.from_dict(values)


def test_the_default_of_slots_goes_with_the_objective() -> None:
    def slots(**values: object) -> int:
        return LoadRequest.from_dict({"model": "/models/llama", **values}).slots

    assert slots() == 1
    assert slots(objective={"kind": "throughput"}) == 4
    assert slots(objective={"kind": "throughput"}, slots=1) == 1
    assert slots(slots=64) == 64


# ---- log-probabilities -------------------------------------------------------------------------

TOLD = Sampling(2, (), top_logprobs=1, prompt_logprobs=True)


def scores(token: int, value: float = -1.0, other: int = 9, best: float = -0.5) -> bytes:
    return encode_logprobs((token, other), (value, best))


def test_scores_of_the_prompt_come_before_those_of_the_answer(run: Run) -> None:
    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, (7, 2, 5), TOLD))
        first, last = [await said(agent) for agent in cluster.agents]
        assert isinstance(first, StartSequence)
        assert isinstance(last, StartSequence)
        assert first.prompt == last.prompt == (7, 2, 5)
        agent, number = cluster.agents[1], first.sequence
        await agent.send(PromptScored(EPOCH, number, 1, scores(2)))
        await agent.send(PromptScored(EPOCH, number, 2, scores(5, -2.0)))
        await agent.send(TokenSampled(EPOCH, number, 0, 65, "", 0, scores(65, -3.0)))
        await agent.send(TokenSampled(EPOCH, number, 1, 66, "length", 9, scores(66, 1e-4)))
        prompt, *answer = await task
        assert prompt.tokens == ()
        assert [(told.token, told.logprob) for told in prompt.prompt_logprobs] == [(2, -1), (5, -2)]
        found = [told for piece in answer for told in piece.logprobs]
        assert [(told.token, told.logprob) for told in found] == [(65, -3), (66, 0)]
        assert all(told.top == ((9, -0.5),) for told in (*found, *prompt.prompt_logprobs))

    run(test)


SCORE_LIES: dict[str, tuple[Sampling, tuple[int, int, bytes]]] = {
    "scores nobody wanted": (Sampling(2, ()), (0, 65, scores(65))),
    "no scores": (replace(TOLD, prompt_logprobs=False), (0, 65, b"")),
    "too many": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65) * 2)),
    "half of one": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65)[:-3])),
    "another token's": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(66))),
    "no token's": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65, other=VOCAB))),
    "not a number": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65, math.nan))),
    "infinite": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65, -math.inf))),
    "above 1": (replace(TOLD, prompt_logprobs=False), (0, 65, scores(65, 0.5))),
    "before the prompt's": (TOLD, (0, 65, scores(65))),
    "of no such place": (TOLD, (-1, 2, scores(2))),
}


@pytest.mark.parametrize("lie", SCORE_LIES)
def test_a_device_that_lies_about_scores_ends_the_answer_and_is_dropped(run: Run, lie: str) -> None:
    sampling, (index, token, data) = SCORE_LIES[lie]

    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        task = asyncio.ensure_future(collect(cluster, (7, 2), sampling))
        begun = await said(cluster.agents[0])
        assert isinstance(begun, StartSequence)
        message: Message = TokenSampled(EPOCH, begun.sequence, index, token, "", 0, data)
        if index < 0:
            message = PromptScored(EPOCH, begun.sequence, 2, data)
        await cluster.agents[1].send(message)
        with pytest.raises(AgentLied):
            await task
        assert [member.name for member in cluster.roster.members] == ["first"]

    run(test)


def test_only_the_last_stage_is_told_what_only_it_needs(run: Run) -> None:
    """A long grammar and the biases would cross every link for nothing."""

    async def test(cluster: Cluster) -> None:
        cluster.deploy()
        sampling = replace(SAMPLING, max_tokens=1, grammar=b'start: "a"', logit_bias=((3, 1.0),))
        task = asyncio.ensure_future(collect(cluster, (7, 2), sampling))
        first, last = [await said(agent) for agent in cluster.agents]
        assert isinstance(first, StartSequence)
        assert isinstance(last, StartSequence)
        assert (first.sampling.grammar, first.sampling.logit_bias) == (b"", ())
        assert last.sampling == sampling
        assert last.prompt == ()
        await cluster.sample(first.sequence, "a", "length")
        assert text_of(await task) == "a"

    run(test)


@pytest.mark.parametrize("setting", [{"grammar": b"x"}, {"presence_penalty": 1.0}])
def test_a_new_last_stage_follows_the_answer_so_far(run: Run, setting: dict[str, Any]) -> None:
    async def test(cluster: Cluster) -> None:
        broken = cluster.deploy()
        pieces = cluster.gateway.generate(broken, (1, 2), replace(Sampling(3, ()), **setting))
        first = asyncio.ensure_future(anext(pieces))
        begun = await said(cluster.agents[0])
        assert isinstance(begun, StartSequence)
        await said(cluster.agents[1])
        await cluster.sample(begun.sequence, "a")
        assert (await first).text == "a"
        # Here the test places the model.
        cluster.models.carry_out(Place, lambda action: None)
        cluster.models.apply("llama", Lost(AgentLost("last", "gone")))
        assert (await anext(pieces)).notice
        more = asyncio.ensure_future(anext(pieces))
        cluster.deploy(epoch=EPOCH + 1)
        last: Message = begun
        while not isinstance(last, StartSequence) or last.epoch == EPOCH:
            last = await said(cluster.agents[1])
        (token,) = Tokenizer.load(LLAMA).encode("a", add_special=False)
        assert last.sampling.answer == (token,)
        assert last.sampling.max_tokens == 2
        more.cancel()
        await asyncio.gather(more, return_exceptions=True)
        await pieces.aclose()

    run(test)

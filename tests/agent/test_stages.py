"""An agent holds stages of several deployments; the test is its coordinator and its peers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest

from agent.peers import connect_peer
from tests.agent.teams import CONTEXT
from tests.agent.test_kept_stage import (
    EPOCH,
    EXPECTED,
    PROMPT,
    SPEC,
    Shoal,
    WholeBackend,
    said,
    shoal,
)
from wire.errors import ConnectFailed
from wire.messages import (
    BlockRef,
    BlocksFetched,
    CoordinatorWelcome,
    Done,
    Endpoint,
    FetchBlocks,
    Heartbeat,
    KeptStage,
    LoadStage,
    Message,
    RequestFailed,
    Sampling,
    SequenceFailed,
    StageLoaded,
    StartSequence,
    TokenSampled,
    UnloadStage,
)

__all__ = ["said", "shoal"]

OTHER = 78
GONE = "the stage is not loaded"


def order(shoal: Shoal, epoch: int, keeps: tuple[int, ...], **changes: object) -> LoadStage:
    """A request for the whole model, whose blocks are in the agent's cache."""
    made = shoal.agent._config.state_dir / f"made-{epoch}"
    made.mkdir()
    device = shoal.agent._device
    key = b"key of %d" % epoch
    blocks = shoal.place(made)
    load = LoadStage(2, epoch, SPEC.to_dict(), blocks, 1, CONTEXT, device, key, keeps=keeps)
    return replace(load, **changes)  # type: ignore[arg-type]  # Fields by name.


def ask(shoal: Shoal, request: Message) -> Message:
    shoal.coordinator.send(request)
    return shoal.coordinator.answer()


def loaded_beside(shoal: Shoal) -> None:
    assert isinstance(ask(shoal, order(shoal, OTHER, (EPOCH,))), StageLoaded)


def start(shoal: Shoal, epoch: int, number: int) -> None:
    shoal.coordinator.send(StartSequence(epoch, number, 0, PROMPT, Sampling(len(EXPECTED), ())))


def is_loaded(shoal: Shoal, epoch: int, number: int) -> bool:
    """Whether a sequence can be started on a stage. If so, its answer must be right."""
    start(shoal, epoch, number)
    message = shoal.coordinator.answer()
    if message == SequenceFailed(epoch, number, GONE):
        return False
    tokens = list[int]()
    while isinstance(message, TokenSampled):
        tokens.append(message.token)
        if message.finish:
            break
        message = shoal.coordinator.answer()
    assert tokens == EXPECTED
    return True


def test_two_stages_answer_at_the_same_time(shoal: Shoal) -> None:
    loaded_beside(shoal)
    for number in (5, 6):
        start(shoal, EPOCH, number)
        start(shoal, OTHER, number)
        answers: dict[int, list[int]] = {EPOCH: [], OTHER: []}
        ended = 0
        while ended < 2:
            message = shoal.coordinator.answer()
            assert isinstance(message, TokenSampled), message
            answers[message.epoch].append(message.token)
            ended += bool(message.finish)
        assert answers == {EPOCH: EXPECTED, OTHER: EXPECTED}


def test_a_load_unloads_the_stages_that_it_does_not_keep(shoal: Shoal) -> None:
    loaded_beside(shoal)
    assert is_loaded(shoal, EPOCH, 5)
    assert isinstance(ask(shoal, order(shoal, OTHER + 1, (OTHER,))), StageLoaded)
    assert [is_loaded(shoal, epoch, 6) for epoch in (EPOCH, OTHER, OTHER + 1)] == [
        False,
        True,
        True,
    ]
    assert isinstance(ask(shoal, order(shoal, OTHER + 2, ())), StageLoaded)
    assert not is_loaded(shoal, OTHER, 7)


def test_a_load_of_the_same_deployment_replaces_its_stage(shoal: Shoal) -> None:
    again = order(shoal, EPOCH, (EPOCH,))
    assert isinstance(ask(shoal, again), StageLoaded)
    assert [stage.epoch for stage in shoal.agent._stages] == [EPOCH]
    assert is_loaded(shoal, EPOCH, 5)


def test_one_stage_or_all_are_unloaded(shoal: Shoal) -> None:
    loaded_beside(shoal)
    assert ask(shoal, UnloadStage(3, EPOCH)) == Done(3)
    assert not is_loaded(shoal, EPOCH, 5)
    assert is_loaded(shoal, OTHER, 5)
    assert ask(shoal, UnloadStage(4)) == Done(4)
    assert not is_loaded(shoal, OTHER, 6)


def test_heartbeats_tell_of_each_stage(shoal: Shoal) -> None:
    loaded_beside(shoal)
    assert is_loaded(shoal, OTHER, 5)
    connection = shoal.coordinator.connection
    assert connection is not None
    while True:
        message, _ = connection.receive()
        assert isinstance(message, Heartbeat)
        connection.send(Heartbeat())
        assert [stage.epoch for stage in message.stages] == [EPOCH, OTHER]
        passes = [stage.counts.passes for stage in message.stages if stage.counts is not None]
        if passes == [0, len(EXPECTED)]:
            return


@pytest.mark.parametrize("keeps", [(EPOCH,), (OTHER,), (EPOCH, OTHER), ()])
def test_the_next_coordinator_says_which_stages_stay(shoal: Shoal, keeps: tuple[int, ...]) -> None:
    loaded_beside(shoal)
    assert is_loaded(shoal, OTHER, 9)
    shoal.coordinator.close()
    hello = shoal.coordinator.hello()
    assert hello.kept == (KeptStage(EPOCH), KeptStage(OTHER, 9))
    shoal.coordinator.send(CoordinatorWelcome("test", hello.name, keeps))
    assert is_loaded(shoal, EPOCH, 10) == (EPOCH in keeps)
    assert is_loaded(shoal, OTHER, 10) == (OTHER in keeps)


def test_a_key_leads_to_its_stage_only(shoal: Shoal) -> None:
    loaded_beside(shoal)
    device = shoal.agent._device
    endpoints = [Endpoint("127.0.0.1", shoal.agent._listener.port)]
    for key in (b"key", b"key of %d" % OTHER):
        connect_peer(device, device, endpoints, hop_key=key).close()
    assert ask(shoal, UnloadStage(3, EPOCH)) == Done(3)
    with pytest.raises(ConnectFailed, match="not the previous device"):
        connect_peer(device, device, endpoints, hop_key=b"key")


def test_a_failed_load_leaves_the_kept_stage(shoal: Shoal) -> None:
    request = order(shoal, OTHER, (EPOCH,))
    failed = ask(shoal, replace(request, blocks=request.blocks[1:] + request.blocks[:1]))
    assert failed == RequestFailed(2, "the blocks of a stage must be contiguous")
    assert is_loaded(shoal, EPOCH, 5)


def test_a_stage_gets_the_memory_that_the_others_leave(
    shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Queue[int | None]()
    load = WholeBackend.load

    def noted(self, spec, artifacts, options):  # type: ignore[no-untyped-def]  # As the method.
        given.put(options.memory_bytes)
        return load(self, spec, artifacts, options)

    monkeypatch.setattr(WholeBackend, "load", noted)
    (stage,) = shoal.agent._stages
    stage.memory_bytes = 12345
    loaded_beside(shoal)
    assert given.get_nowait() == shoal.agent._figures.profile.memory_bytes - 12345


def test_files_are_fetched_beside_those_of_loaded_stages(shoal: Shoal) -> None:
    cache = shoal.agent._cache
    (stage,) = shoal.agent._stages
    refs = shoal.place(shoal.agent._config.state_dir)
    assert ask(shoal, FetchBlocks(3, refs)) == BlocksFetched(3, 0)
    # There is no room for a large file without removing files of the stage.
    cache._limit_bytes = sum(ref.size_bytes for ref in refs) + 10
    refused = ask(shoal, FetchBlocks(4, (BlockRef("0" * 64, 1000, 0),)))
    assert isinstance(refused, RequestFailed)
    assert "storage limit" in refused.reason
    assert set(cache.find(stage.files)) == stage.files
    assert is_loaded(shoal, EPOCH, 5)


def test_an_impossible_fetch_changes_nothing(shoal: Shoal, tmp_path: Path) -> None:
    refused = ask(shoal, FetchBlocks(3, (BlockRef("../x", 5, 0),)))
    assert isinstance(refused, RequestFailed)
    assert is_loaded(shoal, EPOCH, 5)

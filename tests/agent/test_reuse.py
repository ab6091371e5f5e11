"""Experts that files of the cache have are not sent again, and damaged ones do no harm."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.blocks import BlockCache
from agent.reuse import HEAD_BYTES, ExpertsHere, Run
from coordinator.files.artifacts import ArtifactStore, Wanted
from model.artifact import file_sha256
from model.checkpoint import Checkpoint
from model.expert_parts import HASH_BYTES, expert_parts
from model.quantize import Format
from model.safetensors import read_safetensors
from model.share import Share
from tests.parity import FAMILIES
from tests.thorough import some
from wire.chunks import file_chunks
from wire.connection import Listener
from wire.errors import WireError
from wire.messages import BlockRef, BlocksHello, Endpoint, FetchBlock

EXPERTS = 5
FORMATS = {32: Format.of(32), 8: Format.of(8, group_size=32), 4: Format.of(4, group_size=32)}


class Sender:
    """Sends the coordinator's files, and counts their bytes."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.sent_bytes = 0
        self._listener = Listener("127.0.0.1", 0)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self._listener.port)

    def close(self) -> None:
        self._listener.close()
        self._thread.join()

    def _serve(self) -> None:
        while (connection := self._listener.accept()) is not None:
            with connection:
                try:
                    assert connection.receive()[0] == BlocksHello("device")
                    while True:
                        request, _ = connection.receive()
                        assert isinstance(request, FetchBlock)
                        path = self.store.path(request.sha256)
                        assert path is not None
                        for chunk, payload in file_chunks(path, request.offset, request.end):
                            self.sent_bytes += len(payload)
                            connection.send(chunk, payload)
                except WireError:
                    continue


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "coordinator")
    store.prepare()
    return store


@pytest.fixture
def sender(store: ArtifactStore) -> Iterator[Sender]:
    sender = Sender(store)
    yield sender
    sender.close()


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "device", 1 << 30)


def made(
    store: ArtifactStore, *spans: tuple[int, int] | None, bits: int = 32, family: str = "qwen3_moe"
) -> list[BlockRef]:
    """The first layer's artifacts with these experts and all heads. None: whole."""
    checkpoint = Checkpoint.open(FAMILIES / family)
    shares = [span and Share((0, 2), span, (0, checkpoint.spec.vocab)) for span in spans]
    wanted = [Wanted(1, FORMATS[bits], share) for share in shares]
    return list(store.quantize(checkpoint, wanted, lambda *_: None, lambda: False, keep=True))


def fetch(cache: BlockCache, sender: Sender, *refs: BlockRef) -> int:
    """The bytes that came, which are those that were sent. The files are checked."""
    before = sender.sent_bytes
    came = cache.fetch(refs, sender.endpoint, "device", lambda *_: None)
    assert came == sender.sent_bytes - before
    for ref in refs:
        assert file_sha256(cache.path(ref.sha256)) == ref.sha256
    return came


def experts_bytes(store: ArtifactStore, ref: BlockRef) -> int:
    """The bytes of one expert in a file."""
    path = store.path(ref.sha256)
    assert path is not None
    parts = expert_parts(read_safetensors(path), len(ref.experts) // HASH_BYTES)
    return sum(step for _, step in parts.steps)


def test_hashes_are_those_of_the_experts(store: ArtifactStore) -> None:
    whole, middle, again = made(store, None, (1, 4), (1, 4))
    assert len(whole.experts) == EXPERTS * HASH_BYTES
    assert len(set(whole.experts[at : at + HASH_BYTES] for at in range(0, 80, 16))) == EXPERTS
    assert middle.experts == whole.experts[HASH_BYTES : 4 * HASH_BYTES]
    assert again == middle  # It was made by the call before, and the index has it.
    (other,) = made(store, None, bits=8)
    assert len(other.experts) == len(whole.experts)
    assert other.experts != whole.experts


@pytest.mark.parametrize("bits", some(FORMATS, 4))
@pytest.mark.parametrize("family", some(["qwen3_moe", "gpt_oss"], "gpt_oss"))
@pytest.mark.parametrize(
    ("here", "wanted", "new"),
    [
        ([(0, 2)], (0, 3), 1),
        ([(0, 2), (3, 5)], (1, 5), 1),
        ([(2, 5)], (0, 4), 2),
        ([None], (1, 4), 0),
        ([(0, 4)], None, 1),
    ],
)
def test_only_experts_that_are_not_here_are_sent(
    store: ArtifactStore,
    sender: Sender,
    cache: BlockCache,
    here: list[tuple[int, int] | None],
    wanted: tuple[int, int] | None,
    new: int,
    family: str,
    bits: int,
) -> None:
    (ref,) = made(store, wanted, bits=bits, family=family)
    fetch(cache, sender, *made(store, *here, bits=bits, family=family))
    step, count = experts_bytes(store, ref), len(ref.experts) // HASH_BYTES
    beside = ref.size_bytes - count * step
    came = fetch(cache, sender, ref)
    assert beside + new * step <= came <= beside + new * step + HEAD_BYTES
    assert fetch(cache, sender, ref) == 0


def test_other_blocks_formats_and_files_have_nothing_in_common(
    store: ArtifactStore, sender: Sender, cache: BlockCache
) -> None:
    (eight,) = made(store, (0, 3), bits=8)
    fetch(cache, sender, eight)
    cache.path("0" * 64).write_bytes(b"no artifact")
    cache.path("1" * 64).mkdir()
    (ref,) = made(store, (0, 3))
    assert fetch(cache, sender, ref) == ref.size_bytes


def test_damaged_experts_are_not_used(
    store: ArtifactStore, sender: Sender, cache: BlockCache
) -> None:
    small, large = made(store, (0, 2), (0, 3))
    fetch(cache, sender, small)
    parts = expert_parts(read_safetensors(cache.path(small.sha256)), 2)
    with cache.path(small.sha256).open("r+b") as file:
        file.seek(parts.of(1)[0][0])
        file.write(b"rot!")
    came = fetch(cache, sender, large)
    assert came >= large.size_bytes - experts_bytes(store, large)


def test_a_file_that_rots_while_it_is_copied_costs_a_download(
    store: ArtifactStore,
    sender: Sender,
    cache: BlockCache,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    small, large = made(store, (0, 2), (0, 3))
    fetch(cache, sender, small)
    runs = ExpertsHere.runs

    def rotting(here: ExpertsHere, ref: BlockRef, head: Path) -> list[Run]:
        found = runs(here, ref, head)
        path = cache.path(small.sha256)
        path.write_bytes(bytes(path.stat().st_size))
        return found

    monkeypatch.setattr(ExpertsHere, "runs", rotting)
    with caplog.at_level(logging.WARNING):
        cache.fetch([large], sender.endpoint, "device", lambda *_: None)
    assert file_sha256(cache.path(large.sha256)) == large.sha256
    assert "experts that were here are damaged" in caplog.text


def test_a_file_that_goes_while_it_is_copied_costs_a_download(
    store: ArtifactStore, sender: Sender, cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, large = made(store, (0, 2), (0, 3))
    fetch(cache, sender, small)
    runs = ExpertsHere.runs

    def going(here: ExpertsHere, ref: BlockRef, head: Path) -> list[Run]:
        found = runs(here, ref, head)
        cache.remove(cache.path(small.sha256))
        return found

    monkeypatch.setattr(ExpertsHere, "runs", going)
    assert fetch(cache, sender, large) == large.size_bytes


@pytest.mark.parametrize("experts", [b"", b"x", bytes(HASH_BYTES * 7), bytes(HASH_BYTES * 3)])
def test_wrong_hashes_cost_nothing_but_the_download(
    store: ArtifactStore, sender: Sender, cache: BlockCache, experts: bytes
) -> None:
    small, large = made(store, (0, 2), (0, 3))
    fetch(cache, sender, small)
    lying = BlockRef(large.sha256, large.size_bytes, large.block, experts)
    assert fetch(cache, sender, lying) == large.size_bytes


def test_a_download_that_was_cut_off_goes_on_among_copies(
    store: ArtifactStore, sender: Sender, cache: BlockCache
) -> None:
    small, large = made(store, (0, 2), (0, 3))
    fetch(cache, sender, small)
    begun = int(0.6 * large.size_bytes)
    data = store.path(large.sha256)
    assert data is not None
    part = cache.path(large.sha256).with_name(f"{large.sha256}.part")
    part.write_bytes(data.read_bytes()[:begun])
    before = sender.sent_bytes
    cache.fetch([large], sender.endpoint, "device", lambda *_: None)
    assert sender.sent_bytes - before < large.size_bytes - begun
    assert file_sha256(cache.path(large.sha256)) == large.sha256

"""The state directory's files are written by a thread, in order, and a slow disk stops nobody."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest

from coordinator.disk import Disk
from coordinator.loading.recovery import LoadedFile
from coordinator.loading.turns import Turns
from coordinator.roster.members import Roster
from coordinator.roster.names import NameBook
from planning.request import LoadRequest
from tests.coordinator.test_members import Coordinator, hello, next_message
from wire.async_connection import serve
from wire.messages import CoordinatorWelcome

REQUEST = LoadRequest(Path("/models/llama"))


@pytest.fixture
def stuck() -> threading.Event:
    """The disk does nothing until it is set."""
    return threading.Event()


def slow(stuck: threading.Event) -> Disk:
    disk = Disk()
    disk.executor.submit(stuck.wait, 30)
    return disk


def test_only_the_newest_content_is_written_and_all_at_the_end(
    tmp_path: Path, stuck: threading.Event
) -> None:
    disk = slow(stuck)
    failures: list[OSError] = []
    for number in range(100):
        disk.replace(tmp_path / "one", str(number), failures.append)
        disk.replace(tmp_path / "two", str(-number), failures.append)
    disk.replace(tmp_path / "gone", "", failures.append)
    disk.replace(tmp_path / "gone", None, failures.append)
    disk.replace(tmp_path / "missing" / "three", "", failures.append)
    waiting = disk.executor._work_queue.qsize()
    assert not list(tmp_path.iterdir())
    stuck.set()
    disk.close()
    assert sorted((one.name, one.read_text()) for one in tmp_path.iterdir()) == [
        ("one", "99"),
        ("two", "-99"),
    ]
    assert [type(error) for error in failures] == [FileNotFoundError]
    assert waiting == 4
    disk.replace(tmp_path / "one", "late", failures.append)  # As a load that ends with the process.
    assert (tmp_path / "one").read_text() == "late"
    # As a device does that joins while the coordinator stops.
    assert asyncio.run(disk.run(lambda: "done")) == "done"


def test_a_device_is_welcomed_once_its_name_is_written(
    tmp_path: Path, stuck: threading.Event
) -> None:
    async def test() -> None:
        coordinator, disk = Coordinator(), slow(stuck)
        coordinator.roster = Roster("test", NameBook(tmp_path, disk), disk=disk)
        server, coordinator.port = await serve("127.0.0.1", 0, coordinator.handle)
        connection = await coordinator.join(hello("0123", "attic"))
        welcome = asyncio.ensure_future(next_message(connection))
        done, _ = await asyncio.wait({welcome}, timeout=0.2)
        assert not done
        assert not coordinator.roster.members
        stuck.set()
        assert isinstance(await welcome, CoordinatorWelcome)
        assert json.loads((tmp_path / "names.json").read_text())["devices"]["0123"][0] == "attic"
        connection.close()
        server.close()
        await coordinator.ended.get()
        disk.close()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_user_hears_of_a_load_once_it_is_written(tmp_path: Path, stuck: threading.Event) -> None:
    async def test() -> None:
        disk, turns = slow(stuck), Turns()
        turns.settle = disk.flush
        kept = LoadedFile(tmp_path, disk)

        async def load() -> None:
            async with turns.asked(lambda step: None):
                kept.keep(REQUEST, ["attic"])

        loading = asyncio.ensure_future(load())
        done, _ = await asyncio.wait({loading}, timeout=0.2)
        assert not done
        stuck.set()
        await loading
        assert LoadedFile(tmp_path).read() == [(REQUEST, ("attic",))]
        disk.close()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_failed_load_is_heard_of_once_what_it_changed_is_written(
    tmp_path: Path, stuck: threading.Event
) -> None:
    async def test() -> None:
        disk, turns = slow(stuck), Turns()
        turns.settle = disk.flush
        kept = LoadedFile(tmp_path, disk)

        async def asked() -> None:
            async with turns.asked(lambda step: None):
                kept.keep(REQUEST, ["attic"])
                raise ValueError("the load failed")

        async def unasked() -> None:
            async with turns.unasked("recovery"):
                kept.keep(REQUEST, ["attic", "cellar"])
                raise ValueError("the recovery failed")

        loading = asyncio.ensure_future(asked())
        recovering = asyncio.ensure_future(unasked())
        done, _ = await asyncio.wait({loading, recovering}, timeout=0.2)
        assert not done
        stuck.set()
        with pytest.raises(ValueError, match="the load failed"):
            await loading
        assert LoadedFile(tmp_path).read() == [(REQUEST, ("attic",))]
        with pytest.raises(ValueError, match="the recovery failed"):
            await recovering
        assert LoadedFile(tmp_path).read() == [(REQUEST, ("attic", "cellar"))]
        disk.close()

    asyncio.run(asyncio.wait_for(test(), 30))


def test_a_full_disk_is_still_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    missing = tmp_path / "missing"
    LoadedFile(missing, disk).keep(REQUEST, ["attic"])
    NameBook(missing, disk).assign("0123", "attic", ())
    disk.close()
    assert "a restart will load what it has now" in caplog.text
    assert "a restart may rename devices" in caplog.text

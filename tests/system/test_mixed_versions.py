"""Machines that run another version: the one before, and one with the same protocol."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.system.cluster import ROOT, TINY_OPT, Cluster, last_json, wait_for
from tests.wire.test_versions import HERE
from wire.versions import shoal_version

LAST_OF_0_1_0 = "29f39780384df93d51fa10c9b07ee3f7aa4fed01"
"""The commit before the protocol became version 3."""

PROMPT = "The lamp is in the attic. Where is the lamp?"
OTHER_VERSION = "0.2.77"


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree of the version before this one."""
    archive = subprocess.run(
        ["git", "archive", LAST_OF_0_1_0], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip("the history of this tree does not reach back to the version before")
    directory: Path = tmp_path_factory.mktemp("before")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(directory)  # noqa: S202 - our own files
    return directory


class MixedCluster(Cluster):
    """Some of its processes run from another tree, or call themselves another version."""

    def __init__(self, directory: Path, tree: Path, others: tuple[str, ...]) -> None:
        super().__init__(directory)
        self._tree = tree
        self._others = others

    def command(self, name: str) -> list[str]:
        if name not in self._others:
            return super().command(name)
        script = f"import sys; sys.path.insert(0, {str(self._tree)!r}); from cli.main import main"
        return [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c",
                f"{script}; sys.exit(main())"]  # fmt: skip

    def measurements(self) -> tuple[str, ...]:
        return ()  # The version before has no such option, and keeps figures of another form.


class RenamedCluster(Cluster):
    """One of its agents finds the metadata of another version before its own."""

    def __init__(self, directory: Path, renamed: str, metadata: Path) -> None:
        super().__init__(directory)
        self._renamed = renamed
        self._metadata = metadata

    def command(self, name: str) -> list[str]:
        if name != self._renamed:
            return super().command(name)
        script = f"import sys; sys.path[:0] = {[str(self._metadata), str(ROOT)]!r}"
        return [sys.executable, "-c", f"{script}; from cli.main import main; sys.exit(main())"]


def old_agent(cluster: MixedCluster, directory: Path) -> None:
    """Start an agent of the version before, with options that it knows."""
    cluster.spawn(
        "old", "agent", "--name=old", "--bind=127.0.0.1", "--threads=1",
        f"--coordinator=127.0.0.1:{cluster.control_port}", f"--state-dir={directory / 'old'}",
    )  # fmt: skip


def old_coordinator(cluster: MixedCluster, directory: Path) -> None:
    """Start a coordinator of the version before, with options that it knows."""
    process = cluster.spawn(
        "coordinator", "coordinator", "--json", "--no-mdns", "--bind=127.0.0.1", "--port=0",
        "--http=127.0.0.1:0", f"--state-dir={directory / 'old-coordinator'}",
    )  # fmt: skip
    assert process.stdout is not None
    cluster.control_port = json.loads(process.stdout.readline())["control_port"]


def test_an_agent_of_the_version_before_is_refused_and_named(before: Path, tmp_path: Path) -> None:
    cluster = MixedCluster(tmp_path, before, ("old",))
    try:
        cluster.start_coordinator()
        old_agent(cluster, tmp_path)
        said = f"(protocol 2), this machine runs {HERE}: install"
        wait_for(lambda: said in cluster.log("coordinator"), 60, "the coordinator's line")
        wait_for(lambda: f"runs {HERE}" in cluster.log("old"), 60, "the old agent's line")
        assert cluster.names() == []
    finally:
        cluster.stop()


def test_a_coordinator_of_the_version_before_is_named(before: Path, tmp_path: Path) -> None:
    cluster = MixedCluster(tmp_path, before, ("coordinator",))
    try:
        old_coordinator(cluster, tmp_path)
        cluster.start_agent("new")
        said = f"127.0.0.1 runs an older shoal (protocol 2), this machine runs {HERE}: install"
        wait_for(lambda: said in cluster.log("new"), 60, "the agent's line")
    finally:
        cluster.stop()


def test_versions_with_the_same_protocol_work_together(tmp_path: Path) -> None:
    """One agent is of another version, whose messages are the same."""
    metadata = tmp_path / "other" / f"shoal_llm-{OTHER_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: shoal-llm\nVersion: {OTHER_VERSION}\n")
    cluster = RenamedCluster(tmp_path, "two", metadata.parents[1])
    try:
        cluster.start_coordinator()
        where, limit = f"--coordinator=127.0.0.1:{cluster.control_port}", "--memory=4500000"
        cluster.start_agent("one", where, limit)
        cluster.start_agent("two", where, limit)
        cluster.wait_for_agents("one", "two")
        devices = cluster.get("/shoal/v1/devices")["devices"]
        versions = {item["name"]: item["version"] for item in devices}
        assert versions == {"one": shoal_version(), "two": OTHER_VERSION}
        loaded = cluster.load(TINY_OPT, "--bits=8", "--max-weight-error=none")
        assert len(loaded["plan"]["stages"]) == 2
        answer = last_json(cluster.run("run", loaded["model"], PROMPT, "--json"))
        assert "attic" in answer["text"], json.dumps(answer)
    finally:
        cluster.stop()

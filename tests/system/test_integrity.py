"""Files that rot: on a device, at the coordinator, before and while a model answers."""

from __future__ import annotations

import json
import random
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.cluster import COMMAND, FIXTURES, ROOT, TINY_OPT, Cluster, wait_for

CONTEXT = 2000
TOKENS = 400
BEGUN = 20
# Wrong tokens may repeat. Guessed ahead, they would all be there before the damage is found.
ENDLESS = {
    "prompt": "The lamp",
    "temperature": 0,
    "max_tokens": TOKENS,
    "speculative.n_max": 0,
}
QUESTION = {"prompt": "the lamp in the attic is", "temperature": 0, "max_tokens": 12}


def tokens(cluster: Cluster, request: dict[str, Any] = QUESTION) -> list[int]:
    """The tokens of an answer that comes whole."""
    body = {**request, "return_token_ids": True}
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    answer = response.json()
    assert response.status_code == 200, answer
    found: list[int] = answer["shoal"]["tokens"]
    return found


def artifacts(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if len(path.name) == 64)


def prepared(cluster: Cluster) -> list[Path]:
    return sorted(cluster.directory.glob("pi/blocks/prepared/*/*/weights-*.bin"))


def flip_bytes(path: Path, first: int = 2000) -> None:
    """Damage 40 bytes behind ``first``; no header of an artifact is longer than 4 KiB."""
    data = bytearray(path.read_bytes())
    places = random.Random(0).sample(range(min(first, len(data) // 2), len(data)), 40)
    for place in places:
        data[place] ^= 0x55
    path.write_bytes(data)


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[20] ^= 0x55
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def become_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [flip_bytes, flip_header, truncate, become_directory]


@pytest.fixture
def one(cluster: Cluster) -> Cluster:
    cluster.start_coordinator()
    cluster.start_agent("pi")
    cluster.wait_for_agents("pi")
    return cluster


@pytest.mark.parametrize("bits", [4, 16])
def test_damaged_files_of_a_device_are_fetched_or_made_again(one: Cluster, bits: int) -> None:
    one.load(TINY_OPT, f"--bits={bits}", "--max-weight-error=1")
    expected = tokens(one)
    blocks = artifacts(one.directory / "pi" / "blocks")
    assert blocks
    for number, path in enumerate(blocks):
        DAMAGES[number % len(DAMAGES)](path)
    assert prepared(one)
    for path in prepared(one):
        flip_bytes(path)
    one.load(TINY_OPT, f"--bits={bits}", "--max-weight-error=1")
    assert tokens(one) == expected
    # One line for each file.
    log = one.log("pi")
    for path in blocks:
        assert log.count(f"{path} is damaged") == 1, log
    assert "damaged files were fetched or made again" in one.log("coordinator")
    lines = len(log.splitlines())
    one.load(TINY_OPT, f"--bits={bits}", "--max-weight-error=1")
    assert tokens(one) == expected
    assert "damaged" not in "\n".join(one.log("pi").splitlines()[lines:])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_of_the_coordinator_are_made_again(
    one: Cluster, damage: Callable[[Path], None]
) -> None:
    one.load(TINY_OPT, "--bits=8")
    expected = tokens(one)
    own = artifacts(one.directory / "coordinator" / "artifacts")
    for path in own:
        damage(path)
    one.run("unload")
    for path in artifacts(one.directory / "pi" / "blocks"):
        path.unlink()
    one.load(TINY_OPT, "--bits=8")
    assert tokens(one) == expected
    log = one.log("coordinator")
    for path in own:
        assert log.count(f"{path} is damaged") == 1, log


# ---- damage that is found while the model answers -----------------------------------------------


class LateCluster(Cluster):
    """Its agents hash a stage's files once they are told to."""

    def command(self, name: str) -> list[str]:
        if name == "coordinator":
            return COMMAND
        script = ROOT / "tests" / "system" / "late_check.py"
        return [sys.executable, str(script), str(self.directory / name)]

    def go(self) -> None:
        (self.directory / "pi" / "go").touch()


@pytest.fixture
def late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = LateCluster(tmp_path)
    yield cluster
    cluster.stop()


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A model that talks as long as it is let."""
    model = Path(shutil.copytree(FIXTURES / "llama", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    changes = {"max_position_embeddings": CONTEXT, "eos_token_id": None}
    (model / "config.json").write_text(json.dumps(config | changes))
    return model


def stream(cluster: Cluster, begun: threading.Event) -> tuple[list[int], Any]:
    """(the tokens of a streamed answer, its error), with ``begun`` once some are there."""
    body = {**ENDLESS, "stream": True}
    url, pieces, found = f"{cluster.url}/v1/completions", 0, list[int]()
    with httpx.stream(
        "POST", url, json={**body, "return_token_ids": True}, timeout=60, trust_env=False
    ) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return found, event["error"]
                found = event.get("shoal", {}).get("tokens", found)
                pieces += 1
            if pieces == BEGUN:
                begun.set()
    return found, None


@pytest.mark.parametrize("harmful", [True, False], ids=["other-tokens", "same-tokens"])
def test_answers_in_flight_begin_again(late: LateCluster, endless: Path, harmful: bool) -> None:
    late.start_coordinator()
    late.start_agent("pi")
    late.wait_for_agents("pi")
    options = ("--bits=32", f"--context={CONTEXT}", "--slots=2")
    late.load(endless, *options)
    right = tokens(late, ENDLESS)
    late.run("unload")
    # The last values of a block in use, or a block whose values are never read again.
    blocks = artifacts(late.directory / "pi" / "blocks")
    for path in prepared(late) if harmful else blocks[:1]:
        flip_bytes(path, path.stat().st_size // 2)
    (late.directory / "pi" / "hold").touch()
    late.load(endless, *options)
    begun = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        shown = pool.submit(stream, late, begun)
        unseen = pool.submit(tokens, late, ENDLESS)
        assert begun.wait(60)
        late.go()
        assert unseen.result(60) == right
        found, error = shown.result(60)
    if error is None:
        assert found == right
    else:
        assert harmful
        assert "damaged" in error["message"]
    log = late.log("coordinator")
    assert log.count("was damaged in its cache") == 1, log
    assert "is loaded again, on pi" in log
    assert late.log("pi").count("is damaged: the stage stops") == 1
    wait_for(lambda: late.get("/shoal/v1/ps")["model"]["state"] == "ready", 60, "being ready")
    assert tokens(late, ENDLESS) == right

"""``shoal pull``, ``models`` and ``rm`` as real processes, with a local server as the hub."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cli import render
from model.checkpoint import Checkpoint
from model.hub import this_machine
from tests.hub_server import COMMIT, PIECE, Hub, Repo, serve, sha256
from tests.system.cluster import COMMAND, FIXTURES, ROOT, last_json, shoal, wait_for

LAB = ROOT / "examples" / "labs" / "home-4-pis.yaml"
LARGE = bytes(range(256)) * (16 * PIECE // 256)
NOWHERE = "--url=http://127.0.0.1:9"
OTHER = "f" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "200")
    with serve() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def fixture(name: str = "llama") -> dict[str, bytes]:
    files = (FIXTURES / name).iterdir()
    return {path.name: path.read_bytes() for path in files if path.suffix != ".npz"}


def large(hub: Hub) -> str:
    """Serve a model with large weights that is none, and return the name of their blob."""
    hub.repos["org/large"] = Repo({"config.json": b"{}", "model.safetensors": LARGE})
    return sha256(LARGE)


def line(completed: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The only line of a command that failed with ``code``."""
    assert completed.returncode == code, completed.stderr
    assert completed.stderr.count("\n") == 1, completed.stderr
    assert completed.stdout == ""
    return completed.stderr.removesuffix("\n")


class Terminal:
    """A command whose input and output are a terminal."""

    def __init__(self, *arguments: str) -> None:
        self.end, other = pty.openpty()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=other, stdout=other, stderr=other, cwd=ROOT
        )
        os.close(other)
        self.text = ""

    def read_to(self, wanted: str, timeout_s: float = 60.0) -> None:
        """Read until ``wanted`` was shown."""
        deadline = time.monotonic() + timeout_s
        while wanted not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.end], [], [], 0.1)[0]:
                try:
                    self.text += os.read(self.end, 1 << 16).decode(errors="replace")
                except OSError:  # The command has ended.
                    pytest.fail(f"it ended with {self.process.wait(60)}: {self.text}")

    def close(self) -> int:
        """Wait for the command's end, and return its code."""
        try:
            while piece := os.read(self.end, 1 << 16):
                self.text += piece.decode(errors="replace")
        except OSError:  # The other end is closed.
            pass
        os.close(self.end)
        return self.process.wait(60)


# ---- pull --------------------------------------------------------------------------------------


def test_a_model_is_pulled_and_listed_and_removed(hub: Hub, tmp_path: Path) -> None:
    files = fixture()
    hub.repos["org/tiny"] = Repo(files)
    told = last_json(shoal("pull", "org/tiny", "--json"))
    size = sum(map(len, files.values()))
    path = tmp_path / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    assert told == {
        "model": "org/tiny",
        "revision": "main",
        "commit": COMMIT,
        "path": str(path),
        "files": told["files"],
        "size_bytes": size,
        "fetched_bytes": size,
    }
    assert set(told["files"]) == set(files)
    assert Checkpoint.open(path).tensors
    again = shoal("pull", "org/tiny")
    assert again.stdout.startswith("org/tiny: ")
    assert "(was here)" in again.stdout

    listed = last_json(shoal("models", "--json", NOWHERE))
    (row,) = listed["models"]
    assert listed["devices"] is None
    assert row["needed_bytes"] < listed["memory_bytes"]
    assert (row["name"], row["revision"], row["path"]) == ("org/tiny", "main", str(path))
    assert (row["family"], row["supported"], row["fits"]) == ("llama", True, True)
    table = shoal("models", NOWHERE).stdout
    assert "org/tiny" in table
    assert "no coordinator answers: compared with " in table

    assert "give --yes" in line(shoal("rm", "org/tiny", NOWHERE), 2)
    assert line(shoal("rm", "org/other", NOWHERE)).startswith("error: org/other is not in ")
    removed = shoal("rm", "org/tiny", "--yes", NOWHERE)
    assert removed.stdout.startswith("org/tiny is removed: ")
    assert not path.parents[1].exists()
    assert "`shoal pull ORG/NAME` fetches one" in shoal("models", NOWHERE).stdout


def test_one_revision_is_removed_and_the_other_stays(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = Repo(fixture(), revisions={"v2": OTHER, OTHER: OTHER})
    for more in ([], ["--revision=v2"]):
        last_json(shoal("pull", "org/tiny", "--json", *more))
    rows = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert {row["revision"] for row in rows} == {"main", "v2"}
    assert "without the revision v3" in line(
        shoal("rm", "org/tiny", "--revision=v3", "--yes", NOWHERE)
    )
    last_json(shoal("rm", "org/tiny", "--revision=v2", "--yes", "--json", NOWHERE))
    (row,) = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert row["revision"] == "main"
    assert Checkpoint.open(Path(row["path"])).tensors


def test_a_copy_of_a_repository_stays_when_the_other_is_removed(hub: Hub, tmp_path: Path) -> None:
    """A copy that was pushed has the same commits."""
    hub.repos["org/tiny"] = hub.repos["org/copy"] = Repo(fixture())
    for name in ("org/tiny", "org/copy"):
        last_json(shoal("pull", name, "--json"))
    last_json(shoal("rm", "org/copy", "--yes", "--json", NOWHERE))
    assert not (tmp_path / "hub" / "models--org--copy").exists()
    (row,) = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert "models--org--tiny" in row["path"]
    assert Checkpoint.open(Path(row["path"])).tensors


def test_progress_is_shown_on_a_terminal(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setenv(limit, "120")  # The server waits for this test, which may be slow.
    large(hub)
    hub.held_after = 8 * PIECE
    terminal = Terminal("pull", "org/large")
    assert hub.is_held.wait(60)
    terminal.read_to("/1.0 MiB")  # Although no news comes.
    terminal.read_to("0:00:03")  # From now on, there is a rate.
    hub.held_after = 12 * PIECE
    hub.go_on.set()
    hub.go_on.clear()
    terminal.read_to("KiB/1.0 MiB")
    hub.held_after = None
    hub.go_on.set()
    assert terminal.close() == 0
    assert "fetching" in terminal.text
    assert "KiB/1.0 MiB" in terminal.text
    assert "/s, 0:0" in terminal.text


def test_slow_work_says_nothing_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(render, "BAR_AFTER_S", -1.0)
    with render.Screen(json_output=False).counting("fetch") as report:
        report(1, 2)
        report(2, 2)
    assert capfd.readouterr() == ("", "")


def test_a_download_goes_on_after_its_process_was_killed(hub: Hub, tmp_path: Path) -> None:
    blob = tmp_path / "hub" / "models--org--large" / "blobs" / large(hub)
    partial = blob.with_name(f"{blob.name}.incomplete")
    hub.held_after = 8 * PIECE
    process = subprocess.Popen([*COMMAND, "pull", "org/large"], cwd=ROOT)
    try:
        wait_for(lambda: partial.exists() and partial.stat().st_size >= 8 * PIECE, 60, "the half")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    hub.held_after = None
    hub.go_on.set()
    (row,) = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert (row["whole"], row["size_bytes"]) == (False, 8 * PIECE + len(b"{}"))
    assert "`shoal pull org/large` fetches the rest" in row["reason"]
    told = last_json(shoal("pull", "org/large", "--json"))
    assert told["fetched_bytes"] == len(LARGE) - 8 * PIECE
    assert blob.read_bytes() == LARGE
    assert not partial.exists()
    last = [headers for _, path, headers in hub.requests if path.startswith("/storage/")][-1]
    assert last["range"] == f"bytes={8 * PIECE}-"


def test_ctrl_c_ends_a_download_that_can_go_on(hub: Hub) -> None:
    large(hub)
    hub.held_after = 8 * PIECE
    process = subprocess.Popen(
        [*COMMAND, "pull", "org/large"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert hub.is_held.wait(60)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted\n")


def test_a_full_disk_ends_the_download_and_keeps_its_part(hub: Hub, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's end."""
    blob = tmp_path / "hub" / "models--org--large" / "blobs" / large(hub)
    limit = 5 * PIECE
    completed = subprocess.run(
        [*COMMAND, "pull", "org/large"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    text = line(completed)
    assert f"org/large: the disk of {tmp_path / 'hub'} is full" in text
    assert "it goes on where it was" in text
    assert blob.with_name(f"{blob.name}.incomplete").stat().st_size == limit
    assert last_json(shoal("pull", "org/large", "--json"))["fetched_bytes"] < len(LARGE)
    assert blob.read_bytes() == LARGE


@pytest.mark.netns
def test_a_small_disk_is_told_before_the_download(hub: Hub, tmp_path: Path) -> None:
    large(hub)
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = f'mount -t tmpfs -o size=512k none {disk} && HF_HOME={disk} exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mounted, "sh", *COMMAND]
    text = line(shoal("pull", "org/large", command=command))
    assert f"org/large needs 1.0 MiB more on the disk of {disk / 'hub'}, which has" in text
    assert hub.fetched() == []


def test_refusals_are_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(fixture(), gated=True)
    assert "accept its licence" in line(shoal("pull", "org/tiny"))
    assert last_json(shoal("models", "--json", NOWHERE))["models"] == []
    assert "has no model org/none" in line(shoal("pull", "org/none"))
    hub.repos["org/tiny"] = Repo(fixture())
    assert "has no revision v9" in line(shoal("pull", "org/tiny", "--revision", "v9"))
    hub.damaged = {"model.safetensors"}
    assert "model.safetensors came damaged" in line(shoal("pull", "org/tiny"))
    hub.status = 503
    assert "answers 503 for org/tiny: try again later" in line(shoal("pull", "org/tiny"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "where there is a network" in line(shoal("pull", "org/tiny"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE forbids the network" in line(shoal("pull", "org/tiny"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["qwen3:0.6b"], "Ollama's name for Qwen/Qwen3-0.6B"),
        (["nobody:7b"], "https://huggingface.co/models?search=nobody finds"),
        (["tiny"], "give a model's name on the hub, as ORG/NAME"),
        (["org/tiny@v1", "--revision=v2"], "says v1 already"),
        (["org/tiny", "--revision=../../x"], "no name that a hub can have"),
    ],
)
def test_what_is_no_name_is_a_wrong_argument(arguments: list[str], said: str) -> None:
    assert said in line(shoal("pull", *arguments), 2)


def test_a_terminal_is_asked_which_gguf_file(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo({f"tiny-{kind}.gguf": LARGE for kind in ("Q4_0", "Q8_0")})
    assert "has several models: Q4_0, Q8_0" in line(shoal("pull", "org/tiny"))
    terminal = Terminal("pull", "org/tiny")
    terminal.read_to("Which one of 1 to 2? ")
    os.write(terminal.end, b"2\n")
    assert terminal.close() == 0
    assert "tiny-Q8_0.gguf" in terminal.text.splitlines()[-1]
    rows = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert [Path(row["path"]).name for row in rows] == ["tiny-Q8_0.gguf"]
    last_json(shoal("pull", "org/tiny:Q4_0", "--json"))
    rows = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert [row["name"] for row in rows] == ["org/tiny:Q4_0", "org/tiny:Q8_0"]


def test_a_gguf_file_is_listed_and_planned_by_its_quantization(hub: Hub) -> None:
    content = (ROOT / "tests" / "gguf" / "qwen3.gguf").read_bytes()
    hub.repos["org/tiny"] = Repo({"tiny-F16.gguf": content, "tiny-Q4_0.gguf": LARGE})
    planned = shoal("plan", "org/tiny:F16", f"--devices={LAB}", "--bits=8", "--json")
    assert "has no config.json to plan from: run `shoal pull org/tiny:F16`" in line(planned)
    last_json(shoal("pull", "org/tiny", "--file=F16", "--json"))
    (row,) = last_json(shoal("models", "--json", NOWHERE))["models"]
    assert (row["name"], row["whole"]) == ("org/tiny", True)
    assert (row["size_bytes"], row["supported"], row["fits"]) == (len(content), True, True)
    for model in ("org/tiny:f16", "org/tiny", row["path"], str(Path(row["path"]).parents[2])):
        planned = shoal("plan", model, f"--devices={LAB}", "--bits=8", "--json")
        assert last_json(planned)["model"] == "tiny-F16"


# ---- names where a model is taken --------------------------------------------------------------


def test_a_plan_needs_only_the_config(hub: Hub) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    planned = shoal("plan", "org/tiny", f"--devices={LAB}")
    assert planned.returncode == 0, planned.stderr
    assert "plan for tiny, predicted from" in planned.stdout
    assert "org/tiny is not downloaded: its config.json alone is read" in planned.stderr
    assert {Path(path).name for path in hub.fetched()} <= {"config.json", "generation_config.json"}


def test_a_shape_is_planned_without_any_file(tmp_path: Path) -> None:
    planned = shoal("plan", "--shape=llama-1b", f"--devices={LAB}", "--json")
    assert last_json(planned)["model"] == "llama-1b"
    config = tmp_path / "mine" / "config.json"
    config.parent.mkdir()
    config.write_bytes(fixture()["config.json"])
    planned = shoal("plan", f"--shape={config}", f"--devices={LAB}", "--json")
    assert last_json(planned)["model"] == "mine"
    assert "known are gemma2-2b" in line(shoal("plan", "--shape=llama", f"--devices={LAB}"))
    assert "add --devices" in line(shoal("plan", "--shape=llama-1b"), 2)
    assert "give a MODEL" in line(shoal("plan", f"--devices={LAB}"), 2)


def test_what_is_in_the_cache_needs_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    path = Path(last_json(shoal("pull", "org/tiny", "--json"))["path"])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for model in ("org/tiny", str(path), str(path.parents[1])):
        planned = shoal("plan", model, f"--devices={LAB}", "--bits=8", "--json")
        assert last_json(planned)["model"] == "tiny"


def test_a_model_is_fetched_to_be_measured(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    found = last_json(
        shoal("calibrate", "--quality", "--model=org/tiny", "--bits=4", "--check-plans=0",
              "--max-tokens=64", "--threads=1", f"--state-dir={tmp_path / 'agent'}", "--json")
    )  # fmt: skip
    assert found["model"].startswith(str(tmp_path / "hub" / "models--org--tiny"))
    assert json.dumps(found["blocks"])


class _ServiceHere(BaseHTTPRequestHandler):
    """What a coordinator says that runs on this machine as another user."""

    def do_GET(self) -> None:
        there = {"path": None, "cache": "/var/lib/hub", "host": "here", "user": "shoal"}
        body = json.dumps({**there, "machine": this_machine()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_service_that_may_not_read_this_users_cache_is_told_first(
    hub: Hub, tmp_path: Path
) -> None:
    hub.repos["org/tiny"] = Repo(fixture())
    (tmp_path / "hub").mkdir(mode=0o700)
    with ThreadingHTTPServer(("127.0.0.1", 0), _ServiceHere) as server:
        server.daemon_threads = False
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            url = f"--url=http://127.0.0.1:{server.server_address[1]}"
            assert line(shoal("load", "org/tiny", url)) == (
                "error: the coordinator runs as the user shoal, who may not read"
                f" {tmp_path / 'hub'}: run `sudo HF_HUB_CACHE=/var/lib/hub shoal pull org/tiny`,"
                " then the same command again"
            )
        finally:
            server.shutdown()
            thread.join()
    assert hub.requests == []

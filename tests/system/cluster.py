"""Real processes for system tests: a coordinator, agents, and the command line."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from cli.main import _parser
from cli.render import Screen
from coordinator.roster.book import DeviceBook
from model.durable import replace_text
from model.errors import ModelError
from model.families import load_spec
from tests.system import forked, made_up
from wire.identity import own_identity

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
TINY_OPT = ROOT / "examples" / "tiny-opt" / "model"

COMMAND = [sys.executable, "-m", "cli"]
Process = forked.Forked | subprocess.Popen[str]
START_TIMEOUT_S = 60.0

PLAIN = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Knows no authority. Reading those of the machine would take 30 ms of each poll."""


def wait_for(
    condition: Callable[[], Any], timeout_s: float, what: str, every_s: float = 0.02
) -> Any:
    """Poll another process's state, which no event of ours announces."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(every_s)


def shoal(
    *arguments: str, timeout_s: float = 120.0, command: Sequence[str] = COMMAND
) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    if command is COMMAND:
        return forked.run(arguments, timeout_s)
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_s,
        check=False,
    )


def last_json(completed: subprocess.CompletedProcess[str]) -> Any:
    """The JSON object on the last line of stdout of a command that must have worked."""
    assert completed.returncode == 0, completed.stderr
    return json.loads(completed.stdout.splitlines()[-1])


def demo_processes() -> list[psutil.Process]:
    """Living processes of demos that this test run started."""
    marker = os.path.join(os.environ["TMPDIR"], "shoal-demo-")  # noqa: PTH118 - matches text
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if process.info["status"] != psutil.STATUS_ZOMBIE
        and any(marker in part for part in process.info["cmdline"] or ())
    ]


class Answered(Screen):
    """A screen that keeps the JSON object it is given."""

    answer: Any = None

    def json(self, values: Mapping[str, Any]) -> None:
        self.answer = values


MERGED = ("entries", "conditions")
"""Parts of a calibration store that hold what was measured, by what it depends on."""

LOG_CHARACTERS = 6000
"""Of each process, for the report of a test that failed."""


class Cluster:
    """A coordinator and agents of this test, on the loopback interface.

    The agents join by a token, unless a test brings its own, or says --insecure. They share what
    they measure and try. They begin with what agents of earlier clusters of this run have left, as
    one that is started again does, and with made-up figures of the device and of the models in
    ``run``'s arguments. ``measures`` True: each has nothing.
    """

    def __init__(self, directory: Path, *, measures: bool = False) -> None:
        _clusters.add(self)
        self.measures = measures
        self.directory = directory
        self.processes: dict[str, Process] = {}
        self.control_port = 0
        self.url = ""
        self._made_up = set[str]()
        """The names of made-up figures, which are not kept for other clusters."""
        self._known_models = set[Path]()
        self.backends = [made_up.BACKEND]
        """The backends with made-up figures."""

    def start_coordinator(self, *options: str) -> None:
        losses = self.directory / "coordinator" / "losses"
        if not (self.measures or losses.exists()):
            losses.parent.mkdir(parents=True, exist_ok=True)
            losses.symlink_to(_kept / "losses")
        process = self.spawn(
            "coordinator",
            "coordinator",
            "--json",
            "--bind=127.0.0.1",
            "--port=0",
            "--http=127.0.0.1:0",
            f"--state-dir={self.directory / 'coordinator'}",
            "--rebalance=off",  # Most tests want a model to stay where they have put it.
            *(options or ("--no-mdns",)),
        )
        assert process.stdout is not None
        ready = json.loads(process.stdout.readline())
        self.control_port, self.url = ready["control_port"], ready["http"]

    def start_agent(self, name: str, *options: str) -> Process:
        return self.spawn(
            name,
            "agent",
            f"--name={name}",
            "--bind=127.0.0.1",
            "--threads=1",
            f"--state-dir={self.directory / name}",
            *self.measurements(),
            *self._joining(name, options),
            *(options or (f"--coordinator=127.0.0.1:{self.control_port}",)),
        )

    def token(self) -> Path:
        """A file with a token by which any number of devices join, also before it has started."""
        path = self.directory / "token"
        if not path.exists():
            state_dir = self.directory / "coordinator"
            state_dir.mkdir(parents=True, exist_ok=True)
            fingerprint = own_identity(state_dir / "identity.pem").fingerprint
            replace_text(path, self.book().invite(fingerprint, ttl_s=None, uses=None).text)
        return path

    def book(self) -> DeviceBook:
        """The devices and tokens that the coordinator knows."""
        return DeviceBook(self.directory / "coordinator")

    def _joining(self, name: str, options: Sequence[str]) -> tuple[str, ...]:
        """The options with which an agent joins, unless the test gives its own or it is known."""
        is_known = (self.directory / name / "coordinator-fingerprint").exists()
        if is_known or any("token" in option or option == "--insecure" for option in options):
            return ()
        return (f"--token-file={self.token()}",)

    def measurements(self) -> tuple[str, ...]:
        """The option that lets an agent find what was measured before."""
        if self.measures:
            return ()
        directory = self.directory / "measurements"
        if not directory.exists():
            directory.mkdir(parents=True)
            with _kept_stores() as stores:
                for path in stores:
                    shutil.copy(path, directory)
            for backend in self.backends:
                self._made_up |= made_up.add_device(directory / "calibration.json", backend)
        return (f"--measurements-dir={directory}",)

    def command(self, name: str) -> list[str]:
        """How the command line of the process ``name`` begins."""
        return COMMAND

    def spawn(self, name: str, *arguments: str) -> Process:
        log = (self.directory / f"{name}.log").open("a")
        # Only the coordinator has something to say on stdout: where it listens.
        stdout = subprocess.PIPE if name == "coordinator" else subprocess.DEVNULL
        with log:
            command = self.command(name)
            self.processes[name] = (
                forked.Forked(arguments, stdout=stdout, stderr=log.fileno())
                if command is COMMAND and not self.measures
                else subprocess.Popen(
                    [*command, *arguments], stdout=stdout, stderr=log, text=True, cwd=ROOT
                )
            )
        return self.processes[name]

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=60, trust_env=False, verify=PLAIN).json()

    def names(self) -> list[str]:
        return [device["name"] for device in self.get("/shoal/v1/devices")["devices"]]

    def wait_for_agents(self, *names: str, timeout_s: float = START_TIMEOUT_S) -> None:
        # A state that lasts. Each look takes the coordinator and us 3 ms.
        joined = sorted(names)
        wait_for(lambda: self.names() == joined, timeout_s, f"agents {names}", every_s=0.1)

    def know(self, model: Path) -> None:
        """Spare the agents to measure this model, if it is one."""
        directory = self.directory / "measurements"
        if self.measures or model in self._known_models or not directory.exists():
            return
        self._known_models.add(model)
        with contextlib.suppress(ModelError, OSError):  # A test may have damaged it.
            spec = load_spec(model)
            for backend in self.backends:
                self._made_up |= made_up.add_model(directory / "calibration.json", spec, backend)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        for argument in arguments:
            if os.path.exists(os.path.join(argument, "config.json")):  # noqa: PTH110, PTH118 - a prompt may be no path
                self.know(Path(argument))
        return shoal(*arguments, f"--url={self.url}", command=self.command("coordinator"))

    def load(self, model: Path, *options: str) -> Any:
        """Do as ``shoal load`` does, in this process. To start another takes half a second."""
        self.know(model)
        words = ["load", str(model), "--json", f"--url={self.url}", *options]
        load = _parser("load").parse_args(words)
        screen = Answered(json_output=True)
        load.run(load, screen)
        return screen.answer

    def keep_measurements(self) -> None:
        """Let agents that start from now on have what these have measured."""
        directory = self.directory / "measurements"
        if self.measures or not directory.exists():
            return
        with _kept_stores() as stores:
            kept = {path.name: json.loads(path.read_bytes()) for path in stores}
            for path in directory.glob("*.json"):
                known = kept.get(path.name, {})
                for key, value in json.loads(path.read_bytes()).items():
                    if key in MERGED:
                        new = {name: of for name, of in value.items() if name not in self._made_up}
                        known[key] = {**known.get(key, {}), **new}
                    elif key != "models":  # They would be measured again in quiet moments.
                        known[key] = value
                (_kept / path.name).write_text(json.dumps(known))

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """Stop everything as a service manager does; all must end by themselves."""
        self.keep_measurements()
        for name in sorted(self.processes, key=lambda name: name == "coordinator"):
            self.processes[name].terminate()
        for name, process in self.processes.items():
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                pytest.fail(f"{name} did not end on SIGTERM:\n{self.log(name)}")
            finally:
                if process.stdout is not None:
                    process.stdout.close()
        for name in self.processes:
            assert "Traceback" not in self.log(name), self.log(name)


def streamed_tokens(
    cluster: Cluster, request: dict[str, Any], begun: threading.Event, begun_after: int
) -> list[int]:
    """The tokens of a streamed answer. ``begun`` is set once it has so many pieces."""
    body = {**request, "stream": True, "return_token_ids": True}
    url, pieces, tokens = f"{cluster.url}/v1/completions", 0, list[int]()
    with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                tokens = event.get("shoal", {}).get("tokens", tokens)
                pieces += 1
            if pieces == begun_after:
                begun.set()
    return tokens


_kept = Path(tempfile.gettempdir()) / (
    f"shoal-kept-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
)
"""What agents and coordinators of this run have measured and tried, in all its workers."""

(_kept / "losses").mkdir(parents=True, exist_ok=True)
_in_use = (_kept / "in use").open("w")
fcntl.flock(_in_use, fcntl.LOCK_SH)


@atexit.register
def _remove_kept() -> None:
    """Remove the directory at the end of the last worker that uses it."""
    with _in_use, contextlib.suppress(BlockingIOError):
        fcntl.flock(_in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(_kept, ignore_errors=True)


@contextlib.contextmanager
def _kept_stores() -> Iterator[list[Path]]:
    """The files of measurements of this run, while no other worker uses them."""
    with (_kept / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield list(_kept.glob("*.json"))


_clusters: weakref.WeakSet[Cluster] = weakref.WeakSet()


def logs() -> Iterator[tuple[str, str]]:
    """(name, end of its log) of every process of every cluster that is still in use."""
    for cluster in _clusters:
        for name in cluster.processes:
            yield name, cluster.log(name)[-LOG_CHARACTERS:]


def interrupt_at(
    arguments: list[str], condition: Callable[[], bool], timeout_s: float = 60.0
) -> tuple[int, str, float]:
    """Run a command, press Ctrl-C once ``condition``; (exit code, stderr, seconds it took)."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        wait_for(condition, timeout_s, "the moment to interrupt")
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
        # Interrupted within `exec`, as dataclasses use it, Python ends by the signal although the
        # command has handled it. For a shell both are 130.
        code = 128 - process.returncode if process.returncode < 0 else process.returncode
        return code, stderr, time.monotonic() - started
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()

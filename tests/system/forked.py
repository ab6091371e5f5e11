"""``python -m cli`` without the start of an interpreter, which takes longer than most tests' work.

Each process is forked from one that has shoal's modules and has done nothing with them.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[2]
MODULES = (
    *("api.site", "agent.daemon", "coordinator.server", "httpx", "httpcore", "rich.progress"),
    *("backends.onnx_cpu", "numpy.random", "anyio._backends._asyncio"),
    *sorted(f"cli.commands.{path.stem}" for path in (ROOT / "cli" / "commands").glob("[a-z]*.py")),
)
"""What commands import, and agents once they have a stage. None of it starts a thread."""


class Forked:
    """A process with the interface of subprocess.Popen, as far as tests use it."""

    def __init__(self, arguments: Sequence[str], *, stdout: int, stderr: int) -> None:
        """Start it. stdout, stderr: descriptors. stdout may also be subprocess.PIPE or DEVNULL."""
        self.args = list(arguments)
        self.stdout: IO[str] | None = None
        own = -1
        if stdout == subprocess.PIPE:
            read, own = os.pipe()
            self.stdout = os.fdopen(read)
        elif stdout == subprocess.DEVNULL:
            own = os.open(os.devnull, os.O_WRONLY)
        streams = (stdout if own < 0 else own, stderr)
        self._process = _context.Process(target=_Command(self.args, dict(os.environ), streams))
        try:
            self._process.start()
        finally:
            if own >= 0:
                os.close(own)
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        if self.stdout is not None:
            self.stdout.close()
        self.wait()

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(arguments: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run one command to its end. Raises subprocess.TimeoutExpired."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = Forked(arguments, stdout=stdout.fileno(), stderr=stderr.fileno())
        try:
            code = process.wait(timeout_s)
        finally:
            process.kill()
            process.wait()
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(process.args, code, *texts)


class _Command:
    """What the new process does. It is sent there by pickle."""

    def __init__(
        self, arguments: list[str], environment: dict[str, str], streams: Sequence[int]
    ) -> None:
        """streams: the descriptors of standard output and error."""
        self._arguments, self._environment = arguments, environment
        self._streams: Sequence[Any] = streams

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": tuple(DupFd(fd) for fd in self._streams)}

    def __call__(self) -> None:
        for number, stream in enumerate(self._streams, 1):
            source = stream.detach()
            os.dup2(source, number)
            os.close(source)
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(ROOT)
        sys.argv = ["shoal", *self._arguments]
        runpy.run_module("cli", run_name="__main__", alter_sys=True)


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*MODULES, __name__])

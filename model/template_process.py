"""A child process that renders chat templates. A template that takes too much ends the child.

One child serves all templates of this process. It waits between renderings, so that none pays for
its start. Requests and answers go through its standard streams, each after its length:

    request   (text, values or None) by pickle; None only compiles
    answer    one byte, then text as UTF-8. 1: the prompt, or a compiled template's variables, one a
              line. 0: the reason of a failure. 2: the fields that the template ignored, one a line

The parent unpickles nothing. A template that escapes from its sandbox gains only a limited process
without the token.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from model.template_values import MAX_PROMPT_CHARS, FieldsIgnored, TemplateFailed, one_line

MAX_CPU_S = 3.0
"""The processor time of one rendering. Real ones take milliseconds, the longest prompt 0.2 s."""

MAX_WALL_S = 20.0
"""The time limit of a child without processor time. A busy machine is no fault of the template."""

MAX_MEMORY_BYTES = 512 << 20
"""The address space of the child. The interpreter and jinja take about 40 MiB of it."""

MAX_ANSWER_BYTES = 4 * MAX_PROMPT_CHARS + 1

_LENGTH = struct.Struct("<Q")
_SUCCEEDED, _IGNORED = 1, 2
_CACHED_TEMPLATES = 4

_CHILD = """
import json, sys
settings = json.loads(sys.stdin.buffer.readline())
sys.path[:] = settings["path"]
from model.template_process import serve
serve(sys.stdin.buffer, sys.stdout.buffer, settings["max_cpu_s"])
"""
"""The child finds modules where its parent does, and never in its working directory."""


class TemplateProcess:
    """The parent's side. Threads may share it, and take turns."""

    def __init__(self, max_cpu_s: float = MAX_CPU_S, max_wall_s: float = MAX_WALL_S) -> None:
        self._max_cpu_s = max_cpu_s
        self._max_wall_s = max_wall_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, text: str) -> frozenset[str]:
        """Compile a template, and return its variables. Raises TemplateFailed if it is invalid."""
        return frozenset(self._ask(text, None).splitlines())

    def render(self, text: str, values: Mapping[str, Any]) -> str:
        """Render a template with these variables. Raises TemplateFailed, FieldsIgnored."""
        return self._ask(text, dict(values))

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _ask(self, text: str, values: dict[str, Any] | None) -> str:
        request = pickle.dumps((text, values))
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._restart()
            try:
                kind, answer = _exchange(self._child, request, self._max_wall_s)
            except (OSError, EOFError, UnicodeDecodeError):
                reason = self._restart()  # The next request must find the child ready.
                raise TemplateFailed(reason) from None
        if kind == _IGNORED:
            raise FieldsIgnored(answer.splitlines())
        if kind != _SUCCEEDED:
            raise TemplateFailed(answer)
        return answer

    def _restart(self) -> str:
        """Start a new child in place of the old one, and return why that one failed."""
        reason = self._end()
        try:
            self._child = _start(self._max_cpu_s)
        except OSError as error:
            raise TemplateFailed(f"no process to render it: {error.strerror}") from error
        return reason

    def _end(self) -> str:
        """Kill the child, if there is one, and return why it failed."""
        child, self._child = self._child, None
        if child is None:
            return ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.1)  # Its streams end a moment before the child.
        child.kill()
        code = child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if code == -signal.SIGPROF:
            return f"it takes more than {self._max_cpu_s:g} s of processor time"
        if code == -signal.SIGKILL:
            return f"it did not end within {self._max_wall_s:g} s, or the system ended it"
        return f"the process that renders it ended ({code})"


@functools.cache
def template_process() -> TemplateProcess:
    """Return the only one of this process."""
    process = TemplateProcess()
    atexit.register(process.close)
    return process


def _start(max_cpu_s: float) -> subprocess.Popen[bytes]:
    """Start a child that imports its modules before it is needed."""
    # The child must not have the token.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")}
    child = subprocess.Popen(  # noqa: S603 - this interpreter, with our own code
        [sys.executable, "-I", "-c", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert child.stdin is not None  # noqa: S101 - it is a pipe
    paths = [str(Path(path).resolve()) for path in sys.path]
    settings = json.dumps({"path": paths, "max_cpu_s": max_cpu_s})
    with contextlib.suppress(BrokenPipeError):  # The next request notices that it ended.
        child.stdin.write(settings.encode() + b"\n")
        child.stdin.flush()
    return child


def _exchange(
    child: subprocess.Popen[bytes] | None, request: bytes, max_wall_s: float
) -> tuple[int, str]:
    """Send a request and await its answer. Raises OSError or EOFError if the child ends."""
    if child is None or child.stdin is None or child.stdout is None:
        raise EOFError
    limit = threading.Timer(max_wall_s, child.kill)
    limit.start()
    try:
        child.stdin.write(_LENGTH.pack(len(request)) + request)
        child.stdin.flush()
        (size_bytes,) = _LENGTH.unpack(_read(child.stdout, _LENGTH.size))
        if not 0 < size_bytes <= MAX_ANSWER_BYTES:
            raise EOFError
        answer = _read(child.stdout, size_bytes)
        return answer[0], answer[1:].decode()
    finally:
        limit.cancel()


def _read(stream: IO[bytes], count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


# ---- the child ---------------------------------------------------------------------------------


def serve(requests: IO[bytes], answers: IO[bytes], max_cpu_s: float) -> None:
    """Answer requests until the stream ends. SIGPROF kills the child after ``max_cpu_s``."""
    from model.template_sandbox import Sandbox  # With jinja, which the parent never needs.

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MAX_MEMORY_BYTES)
    compiled = functools.lru_cache(_CACHED_TEMPLATES)(Sandbox)
    while len(prefix := requests.read(_LENGTH.size)) == _LENGTH.size:
        request = requests.read(_LENGTH.unpack(prefix)[0])
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)
        answer = _answer(compiled, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(_LENGTH.pack(len(answer)) + answer)
        answers.flush()


def _limit(kind: int, most: int) -> None:
    """Limit a resource of this process, unless it is more limited already."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    # A service manager may forbid the call, and then has limits of its own.
    with contextlib.suppress(PermissionError):
        resource.setrlimit(kind, (most, most))


def _answer(compiled: Any, request: bytes) -> bytes:
    """Answer one request. ``compiled`` returns the Sandbox of a template's text."""
    try:
        text, values = pickle.loads(request)  # noqa: S301 - from our parent
        sandbox = compiled(text)
        names = "\n".join(sorted(sandbox.variables)) if values is None else None
        return b"\1" + (sandbox.render(values) if names is None else names).encode()
    except FieldsIgnored as error:
        return b"\2" + "\n".join(error.fields).encode(errors="replace")
    except TemplateFailed as error:
        return b"\0" + str(error).encode(errors="replace")
    except MemoryError:
        return b"\0" + f"it takes more than {MAX_MEMORY_BYTES >> 20} MiB of memory".encode()
    except UnicodeEncodeError:
        return b"\0it produces text that is no Unicode"
    except Exception as error:  # The child survives any error of a stranger's program.
        return b"\0" + one_line(error).encode(errors="replace")

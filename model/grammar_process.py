"""A child process that keeps answers to grammars, by llguidance. A hostile grammar ends the child.

A grammar comes from a stranger. It may take any time and memory to compile or to follow, and what
llguidance does not bound ends the child only: its processor time, its memory, its stack. The next
request starts another child. Answers that were under way go on in it, because the parent knows
their tokens.

One child serves all grammars of a vocabulary, one request after the other. A thread of the parent
waits for it. So the tokens that may follow are computed while the stage runs.

    request   by pickle, after its length
    answer    one byte, 1 for success and 0 for a failure, then the result or the reason, after the
              length of all

The parent unpickles nothing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from model.memory import memory_bytes

MAX_CPU_S = 10.0
"""The processor time of one request. Real grammars take milliseconds, the vocabulary up to 2 s."""

MAX_WALL_S = 60.0
"""The time limit of a child without processor time. A busy machine is no fault of the grammar."""

MAX_MEMORY_BYTES = 1 << 30
"""The address space of the child."""

MAX_ANSWER_BYTES = 1 << 20
"""More than a bit for each token of any vocabulary."""

CHILD_BYTES = 24 << 20
CHILD_FACTOR = 64
"""A child's memory: so much, and so many times the file of the vocabulary.

Measured on x86-64: 22, 45, 111 and 199 MiB for 300, 32000, 128256 and 256000 tokens.
"""

LIBRARY = "llguidance"

_LENGTH = struct.Struct("<Q")
_CLOSED = "the stage has ended"

_CHILD = """
import json, sys
settings = json.loads(sys.argv[1])
sys.path[:] = settings["path"]
from model.grammar_child import serve
serve(0, settings)
"""
"""The child finds modules where its parent does, and never in its working directory."""


class GrammarFailed(Exception):
    """A grammar is invalid or takes too much. The message says why, in one line."""


class GrammarProcessLost(GrammarFailed):
    """No process can follow grammars here now. No grammar is at fault."""


def library_version() -> str:
    """Return the version of the library that reads grammars, or "" if it is not installed."""
    try:
        return importlib.metadata.version(LIBRARY)
    except importlib.metadata.PackageNotFoundError:
        return ""


class GrammarProcess:
    """The parent's side. The child starts with the first grammar. Threads may share it."""

    def __init__(
        self, vocabulary: Path, *, max_cpu_s: float = MAX_CPU_S, max_wall_s: float = MAX_WALL_S
    ) -> None:
        """``vocabulary`` is a file of model.token_bytes, which may be removed. Raises OSError."""
        self._vocabulary = vocabulary.open("rb")
        self._max_cpu_s, self._max_wall_s = max_cpu_s, max_wall_s
        self._numbers = itertools.count(1)
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._lock = threading.Lock()
        """Guards the following fields. The thread alone talks to the child."""
        self._child: _Child | None = None
        self._closed = False
        self._gone: deque[int] = deque()
        """The numbers of matchers that are gone. The next request has the child forget them."""

    def check(self, grammar: str) -> None:
        """Compile a grammar, and begin to follow it. Raises GrammarFailed."""
        self.open(grammar).allowed()

    def lark(self, form: Literal["regex", "grammar"], text: str) -> str:
        """Return a regular expression, or a grammar in GBNF or Lark, as a grammar in Lark.

        Raises GrammarFailed.
        """
        return self.submit(lambda: self.ask(self.child(), "lark", form, text)).result().decode()

    def open(self, grammar: str, answer: Sequence[int] = ()) -> Matcher:
        """Return what follows answers through a grammar, from behind the tokens ``answer`` on.

        It does not wait: ``Matcher.allowed`` raises what is wrong with the grammar.
        """
        number = next(self._numbers)
        matcher = Matcher(self, number, grammar, answer)
        # It may be collected at any point of any thread, which may hold any lock.
        weakref.finalize(matcher, self._gone.append, number).atexit = False
        return matcher

    def close(self) -> None:
        """End the child and the thread. Whoever waits for a grammar gets GrammarFailed."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._child is not None:
            self._child.end()
        self._vocabulary.close()

    def submit(self, work: Callable[[], bytes]) -> Future[bytes]:
        """Have the thread do ``work``, which may use ``child``."""
        try:
            return self._thread.submit(work)
        except RuntimeError:  # It is closed.
            failed: Future[bytes] = Future()
            failed.set_exception(GrammarProcessLost(_CLOSED))
            return failed

    def ask(self, child: _Child, *request: Any) -> bytes:
        """Return the child's answer, for the thread only. Raises GrammarFailed."""
        gone = [self._gone.popleft() for _ in range(len(self._gone))]
        return child.ask((gone, request))

    def child(self) -> _Child:
        """Return a living child, for the thread only. Raises GrammarFailed."""
        with self._lock:
            if self._closed:
                raise GrammarProcessLost(_CLOSED)
            if self._child is None or self._child.ended:
                self._require_memory()
                settings = {
                    "vocabulary": self._vocabulary.fileno(),
                    "max_cpu_s": self._max_cpu_s,
                    "max_memory_bytes": MAX_MEMORY_BYTES,
                }
                self._child = _Child(settings, self._max_wall_s)
            return self._child

    def _require_memory(self) -> None:
        """Raise GrammarFailed if a child would take memory that this machine does not have."""
        file_bytes = os.fstat(self._vocabulary.fileno()).st_size
        needed_bytes, (free_bytes, _) = CHILD_BYTES + CHILD_FACTOR * file_bytes, memory_bytes()
        if free_bytes < needed_bytes:
            raise GrammarProcessLost(
                f"the process that follows it takes about {needed_bytes >> 20} MiB of memory, and "
                f"{free_bytes >> 20} MiB are free: free memory there, or load the model again with "
                "less on that device"
            )


class Matcher:
    """Follows one answer through a grammar."""

    def __init__(
        self, process: GrammarProcess, number: int, grammar: str, answer: Sequence[int]
    ) -> None:
        self._process = process
        self._number = number
        self._grammar = grammar
        self._answer = list(answer)
        self._child: _Child | None = None
        """The child that has followed the whole answer. Only the thread uses these fields."""
        self._next = process.submit(self._open)

    @property
    def is_ready(self) -> bool:
        """Whether ``allowed`` would not wait."""
        return self._next.done()

    def allowed(self) -> bytes:
        """Return a bit for each token that may come next, the lowest id in the lowest bit.

        Raises GrammarFailed.
        """
        try:
            return self._next.result()
        except CancelledError:
            raise GrammarProcessLost(_CLOSED) from None

    def accept(self, token: int) -> None:
        """Go on behind ``token``, which was allowed, and begin to compute what may follow."""
        self._next = self._process.submit(lambda: self._follow(token))

    def _open(self) -> bytes:
        child = self._process.child()
        allowed = self._process.ask(child, "open", self._number, self._grammar, self._answer)
        self._child = child
        return allowed

    def _follow(self, token: int) -> bytes:
        self._answer.append(token)
        child = self._process.child()
        if child is not self._child:  # Another grammar has ended the child that followed this one.
            return self._open()
        return self._process.ask(child, "accept", self._number, token)


class _Child:
    """A process that serves one request at a time."""

    def __init__(self, settings: dict[str, Any], max_wall_s: float) -> None:
        """Start it. Raises GrammarFailed."""
        # The child must not have the token.
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith("SHOAL_")
        }
        paths = [str(Path(path).resolve()) for path in sys.path]
        self._settings = {**settings, "path": paths}
        self._max_wall_s = max_wall_s
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(max_wall_s)
        self.ended = False
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with our code
                    [sys.executable, "-I", "-c", _CHILD, json.dumps(self._settings)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env=environment,
                    pass_fds=[settings["vocabulary"]],
                )
            except OSError as error:
                self._socket.close()
                raise GrammarProcessLost(f"no process to follow it: {error.strerror}") from error

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: tuple[Any, ...]) -> bytes:
        """Return the child's answer. Raises GrammarFailed, also if the child ends."""
        data = pickle.dumps(request)
        try:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)
            (size_bytes,) = _LENGTH.unpack(self._read(_LENGTH.size))
            if not 0 < size_bytes <= MAX_ANSWER_BYTES:
                raise EOFError
            answer = self._read(size_bytes)
        except (OSError, EOFError):
            raise self.end() from None
        if not answer[0]:
            raise GrammarFailed(answer[1:].decode(errors="replace"))
        return answer[1:]

    def kill(self) -> None:
        """Make the running request fail soon. Any thread may call it."""
        self._process.kill()

    def end(self) -> GrammarFailed:
        """Kill the child, and return why it failed."""
        self.ended = True
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.1)  # Its socket ends a moment before the child.
        self._process.kill()
        code = self._process.wait()
        self._socket.close()
        if code == -signal.SIGPROF:
            limit_s = self._settings["max_cpu_s"]
            return GrammarFailed(f"it takes more than {limit_s:g} s of processor time")
        if code in (-signal.SIGABRT, -signal.SIGSEGV):
            return GrammarFailed(
                "it takes more memory or is nested deeper than its process may have"
            )
        if code == -signal.SIGKILL:
            return GrammarProcessLost(
                f"it did not end within {self._max_wall_s:g} s, or the system ended it"
            )
        return GrammarProcessLost(f"the process that follows it ended ({code})")

    def _read(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            part = self._socket.recv(count - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

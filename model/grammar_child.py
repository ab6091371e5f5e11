"""The child of model.grammar_process: follows answers through grammars, by llguidance."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import signal
import socket
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import llguidance

from model.token_bytes import MAX_BYTES, TokenBytes, decode_token_bytes

_LENGTH = struct.Struct("<Q")

LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
"""llguidance's own limits of steps and sizes. They hold anywhere, unlike limits of time.

A state takes up to 2 kB.
"""

MAX_REASON_CHARS = 500

_NO_TOKENS = "no token of this model can begin such an answer, or go on with it"


class _Spelled:
    """A vocabulary in the form that llguidance asks for.

    It splits text that a grammar forces into the longest tokens. Grammars should rather leave that
    to the model, by the option no_forcing.
    """

    bos_token_id = None
    tokenizer: llguidance.LLTokenizer | None = None

    def __init__(self, tokens: TokenBytes) -> None:
        self.eos_token_id = tokens.end
        self.tokens = tokens.tokens
        self.special_token_ids = [token for token, is_one in enumerate(tokens.special) if is_one]

    def __call__(self, text: bytes) -> list[int]:
        if self.tokenizer is None:
            return []
        return self.tokenizer.greedy_tokenize(text.decode(errors="replace"))


class Follower:
    """The grammars that are followed, by their numbers."""

    def __init__(self, vocabulary: bytes) -> None:
        """Raises ValueError if ``vocabulary`` is no file of model.token_bytes."""
        spelled = _Spelled(decode_token_bytes(vocabulary))
        wrapper = llguidance.TokenizerWrapper(spelled)
        self._tokenizer = llguidance.LLTokenizer(wrapper)
        spelled.tokens = wrapper.tokens = ()  # The library has its own.
        spelled.tokenizer = self._tokenizer
        self._matchers: dict[int, llguidance.LLMatcher] = {}

    def answer(self, request: tuple[Any, ...]) -> bytes:
        """Carry out a request. Raises ValueError with the reason if the grammar does not allow."""
        match request:
            case ("open", int(number), str(grammar), list(tokens)):
                matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=LIMITS)
                self._matchers[number] = matcher
                return self._follow(matcher, tokens)
            case ("accept", int(number), int(token)):
                return self._follow(self._matchers[number], [token])
            case ("lark", str(form), str(text)):
                return _lark(form, text).encode()
            case _:
                raise ValueError("an unknown request")

    def forget(self, numbers: Iterable[int]) -> None:
        """Free the grammars of these numbers."""
        for number in numbers:
            self._matchers.pop(number, None)

    def _follow(self, matcher: llguidance.LLMatcher, tokens: Sequence[int]) -> bytes:
        matcher.consume_tokens(list(tokens))
        allowed = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(_reason(matcher.get_error()))
        return allowed


def _reason(error: str) -> str:
    """Return why a grammar ended. A bare name is llguidance's word for tokens that are missing."""
    first, _, _ = error.strip().partition("\n")
    return _NO_TOKENS if first == "NoExtensionBias" else error


def _lark(form: str, text: str) -> str:
    """Return a regular expression ("regex"), or a grammar in GBNF or Lark ("grammar"), as Lark."""
    try:
        converted = llguidance.grammar_from(form, text)  # type: ignore[arg-type]  # a name
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if converted.startswith("{"):
        converted = json.loads(converted)["grammars"][0]["lark_grammar"]
    return converted


def serve(descriptor: int, settings: dict[str, Any]) -> None:
    """Answer requests until the socket ends. SIGPROF kills the process after ``max_cpu_s``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, settings["max_memory_bytes"])
    with contextlib.suppress(OSError):  # A system that is out of memory ends this process first.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    follower: Follower | None = None
    with socket.socket(fileno=descriptor) as connection, connection.makefile("rb") as requests:
        while len(prefix := requests.read(_LENGTH.size)) == _LENGTH.size:
            request = requests.read(_LENGTH.unpack(prefix)[0])
            signal.setitimer(signal.ITIMER_PROF, settings["max_cpu_s"])
            try:
                if follower is None:
                    follower = Follower(_read(settings["vocabulary"]))
                gone, wanted = pickle.loads(request)  # noqa: S301 - from our parent
                follower.forget(gone)
                answer = b"\1" + follower.answer(wanted)
            except MemoryError:
                answer = b"\0it takes more memory than its process may have"
            except (OSError, ValueError, KeyError) as error:
                answer = b"\0" + _one_line(error).encode(errors="replace")
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(_LENGTH.pack(len(answer)) + answer)


def _read(descriptor: int) -> bytes:
    """Return the bytes of an open file, whose position another process may have moved."""
    size_bytes = min(os.fstat(descriptor).st_size, MAX_BYTES)
    return os.pread(descriptor, size_bytes, 0)


def _one_line(error: Exception) -> str:
    """Return the first line. llguidance shows the place in the grammar in others."""
    first, *_ = str(error).splitlines() or [type(error).__name__]
    return first[:MAX_REASON_CHARS]


def _limit(kind: int, most: int) -> None:
    """Limit a resource of this process, unless it is more limited already."""
    _, hard = resource.getrlimit(kind)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    # A service manager may forbid the call, and then has limits of its own.
    with contextlib.suppress(PermissionError):
        resource.setrlimit(kind, (most, most))

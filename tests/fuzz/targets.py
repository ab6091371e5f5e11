"""What reads bytes of others, in memory: the codec, the introduction, TLS below it, and stages.

Each target's ``step`` makes hostile bytes, and returns how many frames it has read. Only an error
that its callers expect may leave the code under test. Whatever else comes is a finding.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable

from tests.fuzz import stages
from tests.fuzz.frames import Frames
from tests.machines import answering, calling, identity_of
from wire import introduction
from wire.codec import encode
from wire.errors import WireError
from wire.framing import Framer
from wire.hygiene import clean
from wire.introduction import COORDINATOR
from wire.messages import AuthAnswer, AuthChallenge, Introduction, Message
from wire.tls import TlsChannel, client_context, server_context

Step = Callable[[], int]

BATCH = 50


def feed(framer: Framer, data: bytes, cut: int) -> list[Message]:
    """The messages in ``data``, which comes in pieces of at most ``cut`` bytes."""
    messages: list[Message] = []
    rest = memoryview(data)
    while rest:
        space, _ = framer.space()
        count = min(len(space), len(rest), cut)
        space[:count] = rest[:count]
        rest = rest[count:]
        framer.received(count)
        while (frame := framer.next_frame()) is not None:
            messages.append(frame[0])
    return messages


def codec(seed: int) -> Step:
    """Frames after the handshake. What is decoded is cleaned, as every reader does."""
    frames = Frames(seed)

    def step() -> int:
        for _ in range(BATCH):
            framer = Framer("peer:1")
            data = frames.any()
            cut = frames.random.choice((max(len(data) // 9, 1), 1 << 20))
            try:
                for message in feed(framer, data, cut):
                    clean(message)
            except WireError:
                pass
        return BATCH

    return step


def introductions(seed: int) -> Step:
    """The handshake inside TLS: nobody gets through it by a changed or foreign message."""
    frames = Frames(seed)
    answerer = answering()
    kinds = (AuthChallenge, AuthAnswer, Introduction)

    def step() -> int:
        framer = Framer("caller:1", introduction.answer(answerer))
        steps = introduction.call(calling())
        first = next(steps)
        assert isinstance(first, AuthChallenge)
        try:
            if frames.random.random() < 0.5:
                feed(framer, frames.any(frames.random.choice(kinds)), 1 << 20)
            else:
                feed(framer, introduction_of(framer, first, frames), 1 << 20)
        except WireError:
            pass
        assert framer.claim is None, "a changed introduction got through"
        assert framer.is_proving
        return 2

    def introduction_of(framer: Framer, challenge: AuthChallenge, frames: Frames) -> bytes:
        feed(framer, encode(challenge), 1 << 20)
        framer.take_outgoing()
        # It is signed for other nonces, and then damaged.
        steps = introduction.call(calling())
        next(steps), next(steps)
        said = steps.send(AuthAnswer(bytes(32)))
        assert isinstance(said, Introduction)
        whole = bytearray(encode(said))
        for _ in range(frames.random.randrange(4)):
            whole[frames.random.randrange(len(whole))] = frames.random.randrange(256)
        return bytes(whole)

    return step


def channels(seed: int) -> Step:
    """TLS itself: changed bytes of the handshake, or of records, never become other text."""
    frames = Frames(seed)
    random_ = frames.random
    server = server_context(identity_of(COORDINATOR))
    client = client_context()
    view = memoryview(bytearray(1 << 16))

    def damaged(data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(random_.randint(1, 4)):
            changed[random_.randrange(len(changed))] ^= random_.randrange(1, 256)
        return bytes(changed)

    def pass_on(sender: TlsChannel, receiver: TlsChannel, *, bad: bool) -> None:
        data = sender.take()
        receiver.feed(damaged(data) if bad else data)
        receiver.shake()

    def step() -> int:
        caller = TlsChannel(client, "answerer", is_server=False)
        answerer = TlsChannel(server, "caller", is_server=True)
        bad = random_.choice(("hello", "answer", "finish", "records"))
        try:
            caller.shake()
            pass_on(caller, answerer, bad=bad == "hello")
            pass_on(answerer, caller, bad=bad == "answer")
            pass_on(caller, answerer, bad=bad == "finish")
            for _ in range(10):
                text = frames.whole()[:16000]
                sealed = caller.seal(text)
                changed = damaged(sealed) if bad == "records" else sealed
                answerer.feed(changed)
                count = answerer.read_into(view)
                if count:
                    assert changed == sealed, "a changed record was read"
                    assert view[:count] == text, "other text than was sent"
        except (OSError, WireError):
            pass
        return 10

    return step


TARGETS: dict[str, Callable[[int], Step]] = {
    "codec": codec,
    "introduction": introductions,
    "TLS": channels,
    "rows and tokens": stages.rows_and_tokens,
    "texts": stages.texts,
}

SHARES = {"codec": 0.6, "introduction": 0.1, "TLS": 0.1, "rows and tokens": 0.1, "texts": 0.1}
"""Of the time."""


def in_memory(seed: int, seconds: float, told: multiprocessing.SimpleQueue[dict[str, int]]) -> None:
    """Run the targets that need no process, one after the other."""
    frames = {}
    for name, target in TARGETS.items():
        step, count = target(seed), 0
        deadline_s = time.monotonic() + SHARES[name] * seconds
        while time.monotonic() < deadline_s:
            count += step()
        if isinstance(step, stages.StageSteps):  # Native code must not run while the process ends.
            step.close()
        frames[f"{name}, in memory"] = count
    told.put(frames)

"""Runs whole texts through an encoder: texts of several requests share passes.

Texts wait in a line for each deployment. A few passes are in flight, one more than there are
stages, so that no stage waits. Whenever one ends, the next takes what waits, up to PASS_ROWS rows.
So passes grow with the load, and a text that is alone never waits for others.

If a device is lost, texts without a result run again once the model is placed anew. If a pass of
several texts fails, each runs again alone, because they may be of several clients.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from coordinator.errors import (
    AgentFailed,
    AgentLied,
    AgentLost,
    CoordinatorError,
    Stalled,
    TextsWait,
)
from coordinator.loading.deployment import Deployment
from coordinator.loading.models import Models
from coordinator.loading.state import EndAnswers
from coordinator.roster.members import Member, Roster
from coordinator.serving import requests
from coordinator.serving.gateway import STALL_FACTOR, STALL_S
from model.texts import PASS_ROWS
from wire.errors import ProtocolError
from wire.messages import EncodeTexts, Message, PassFailed, TextsEncoded
from wire.patience import within

log = logging.getLogger(__name__)

LEAST_ROWS = 64
"""Texts are spread over the stages' passes only if each pass has so many rows."""

MOST_WAITING = 16384
"""Texts that wait before further requests are refused: eight of the largest requests."""

RETRY_S = 2
"""The time after which a refused client may ask again."""

NUMBER_BITS = 48
"""The bits of the first pass's number. JSON holds larger numbers less exactly."""

Result = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class TextTokens:
    """The tokens of a text, and where its second part begins: their number if it has none."""

    tokens: tuple[int, ...]
    second: int


@dataclass(slots=True, eq=False)
class _Waiting:
    """A text that waits for a pass, or runs in one."""

    text: TextTokens
    result: asyncio.Future[Result]
    request: requests.InFlight
    runs_alone: bool = False
    """Whether it shares no pass, because one that it shared has failed."""


@dataclass(slots=True, eq=False)
class _Pass:
    """A pass in flight. It checks each message that the last stage sends."""

    deployment: Deployment
    texts: list[_Waiting]
    done: asyncio.Future[Result]
    parts: list[Result] = field(default_factory=list)
    rows: int = 0
    """Rows of the result that have come."""

    def take(self, message: TextsEncoded) -> str | None:
        """Take the next rows. Returns what is wrong with them, or None."""
        spec = self.deployment.spec
        lengths = [len(one.text.tokens) for one in self.texts]
        expected = sum(lengths) if self._per_token else len(lengths)
        row_bytes = 4 * spec.output_width
        count, rest = divmod(len(message.values), row_bytes)
        if rest or not count or message.first != self.rows or self.rows + count > expected:
            return f"sent {len(message.values)} bytes of a result, from row {message.first} on"
        rows = np.frombuffer(message.values, "<f4").reshape(count, spec.output_width)
        if not np.isfinite(rows).all():
            return "sent a result that is not finite"
        self.parts.append(rows)
        self.rows += count
        if self.rows == expected and not self.done.done():
            self.done.set_result(np.concatenate(self.parts))
        return None

    def spread(self, result: Result) -> None:
        """Give each text its part of the result: [width], or [tokens, width]."""
        begin = 0
        for index, one in enumerate(self.texts):
            count = len(one.text.tokens)
            part = result[begin : begin + count] if self._per_token else result[index]
            begin += count
            if not one.result.done():
                one.result.set_result(part)

    @property
    def _per_token(self) -> bool:
        output = self.deployment.spec.output
        return output is not None and output.per_token

    def fail(self, error: CoordinatorError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


@dataclass(slots=True, eq=False)
class _Line:
    """The texts that wait for one deployment, and its passes in flight by number."""

    deployment: Deployment
    waiting: deque[_Waiting] = field(default_factory=deque)
    running: dict[int, _Pass] = field(default_factory=dict)

    def run_alone(self, failed: _Pass) -> None:
        """Take the texts of a pass that failed back. The text at fault ends by itself."""
        for one in reversed(failed.texts):
            one.runs_alone = True
            self.waiting.appendleft(one)
        failed.texts.clear()

    def next_texts(self) -> list[_Waiting]:
        """Take texts for one pass, in order. A text that nobody waits for is dropped."""
        while self.waiting and self.waiting[0].result.done():
            self.waiting.popleft()
        stages = len(self.deployment.leads)
        left = sum(len(one.text.tokens) for one in self.waiting)
        most = min(PASS_ROWS, max(LEAST_ROWS, -(-left // stages)))
        texts: list[_Waiting] = []
        rows = longest = 0
        while self.waiting:
            count = len(self.waiting[0].text.tokens)
            longest = max(longest, count)
            if texts and (texts[0].runs_alone or self.waiting[0].runs_alone):
                break
            # Buffers are for so many rows, and short texts are padded to the longest one.
            if texts and (rows + count > most or (len(texts) + 1) * longest > PASS_ROWS):
                break
            one = self.waiting.popleft()
            if not one.result.done():
                texts.append(one)
                rows += count
        return texts


class Encoders:
    """Runs texts on deployments of encoders."""

    def __init__(self, roster: Roster, models: Models) -> None:
        self._models = models
        self._newest = secrets.randbits(NUMBER_BITS)
        """The number of the newest pass. An earlier coordinator's passes may still be on their way
        between stages that this one has taken over. So each coordinator begins elsewhere."""
        self._lines: dict[int, _Line] = {}
        """Maps an epoch to its line."""
        self._tasks: set[asyncio.Task[None]] = set()
        roster.subscribe(self.on_event, lambda *_: None)  # Losses end passes by EndAnswers.
        models.follow(EndAnswers, self._end)

    @property
    def waiting(self) -> int:
        """The texts that wait for a pass."""
        return sum(len(line.waiting) for line in self._lines.values())

    async def encode(self, deployment: Deployment, texts: Sequence[TextTokens]) -> list[Result]:
        """Return each text's result, [width] or [tokens, width], in the order of ``texts``.

        Each text fits the deployment's context. Raises CoordinatorError.
        """
        if self.waiting >= MOST_WAITING:
            raise TextsWait(self.waiting, RETRY_S)
        request = requests.current()
        request.asks(deployment.name, sum(len(text.tokens) for text in texts))
        loop = asyncio.get_running_loop()
        found: list[Result | None] = [None] * len(texts)
        while True:
            deployment = await self._models.latest(deployment)
            # Texts of similar length share passes, because attention is as wide as the longest.
            order = sorted(
                (index for index, result in enumerate(found) if result is None),
                key=lambda index: len(texts[index].tokens),
            )
            waiting = {
                index: _Waiting(texts[index], loop.create_future(), request) for index in order
            }
            line = self._lines.setdefault(deployment.epoch, _Line(deployment))
            line.waiting.extend(waiting.values())
            self._pump(line)
            futures = [one.result for one in waiting.values()]
            try:
                with deployment.slots.in_use():
                    await asyncio.gather(*futures, return_exceptions=True)
            finally:
                for future in futures:
                    future.cancel()
            error = None
            for index, one in waiting.items():
                if one.result.exception() is None:
                    found[index] = one.result.result()
                else:
                    error = one.result.exception()
            if error is None:
                return [result for result in found if result is not None]
            if isinstance(error, AgentLied) or not self._models.is_replaced(deployment):
                raise error.with_traceback(None)
            if self._models.is_suspect(deployment):
                found = [None] * len(texts)

    def on_event(self, member: Member, message: Message) -> None:
        """Take a result or a failure from an agent. A message of no known pass is dropped.

        Raises ProtocolError for a result that no working agent sends. It ends the pass.
        """
        if not isinstance(message, (TextsEncoded, PassFailed)):
            return
        line = self._lines.get(message.epoch)
        one = None if line is None else line.running.get(message.number)
        if one is None or one.done.done():
            return
        if isinstance(message, PassFailed):
            if member in one.deployment.devices:
                one.fail(AgentFailed(member.name, message.reason))
        elif member is one.deployment.leads[-1]:
            lie = one.take(message)
            if lie is not None:
                one.fail(AgentLied(member.name, lie))
                raise ProtocolError(f"it {lie}")

    def _pump(self, line: _Line) -> None:
        """Begin passes while texts wait and there are few in flight."""
        while len(line.running) <= len(line.deployment.leads) and (texts := line.next_texts()):
            self._newest += 1
            number = self._newest
            done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
            line.running[number] = _Pass(line.deployment, texts, done)
            task = asyncio.create_task(self._run(line, number))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not line.running and not line.waiting:
            self._lines.pop(line.deployment.epoch, None)

    async def _run(self, line: _Line, number: int) -> None:
        """Run a pass to its end, and give each text its result or the error."""
        one = line.running[number]
        try:
            try:
                self._models.require(line.deployment)
                # Whoever asked may have gone, and the stages are busy all the same.
                with line.deployment.slots.in_use():
                    one.spread(await self._result(line, number, one))
            except CoordinatorError as error:
                # A device that is lost, damaged or lies fails every pass.
                if type(error) is AgentFailed and len(one.texts) > 1:
                    log.info(
                        "a pass of %d texts failed, each runs alone: %s", len(one.texts), error
                    )
                    line.run_alone(one)
                for text in one.texts:
                    if not text.result.done():
                        text.result.set_exception(error.with_traceback(None))
        finally:
            for text in one.texts:
                if not text.result.done():  # A bug must not let anybody wait for ever.
                    bug = CoordinatorError("internal error in the coordinator; see its log")
                    text.result.set_exception(bug)
            del line.running[number]
            self._pump(line)

    async def _result(self, line: _Line, number: int, one: _Pass) -> Result:
        """Send a pass to the first stage and wait for its result. Raises CoordinatorError."""
        for request in {id(text.request): text.request for text in one.texts}.values():
            request.starts(line.deployment.epoch, number)
        texts = [waiting.text for waiting in one.texts]
        message = EncodeTexts(
            line.deployment.epoch,
            number,
            tuple(token for text in texts for token in text.tokens),
            tuple(len(text.tokens) for text in texts),
            tuple(text.second for text in texts),
        )
        try:
            await line.deployment.leads[0].send(message)
        except AgentLost as error:
            one.fail(error)
        limit_s = STALL_S + STALL_FACTOR * line.deployment.plan.decode_s
        try:
            return await within(asyncio.shield(one.done), limit_s)
        except asyncio.TimeoutError:
            raise Stalled(
                f"no result came for {limit_s:.0f} s although all devices answer: "
                "see the agents' logs, then run `shoal load` again"
            ) from None

    def _end(self, action: EndAnswers) -> None:
        """End every pass of a deployment that has ended, and what waits for it."""
        line = self._lines.get(action.deployment.epoch)
        if line is None:
            return
        for one in line.running.values():
            one.fail(action.error)
        while line.waiting:
            text = line.waiting.popleft()
            if not text.result.done():
                text.result.set_exception(action.error)

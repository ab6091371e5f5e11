"""Shared by all HTTP routes: JSON bodies, errors in OpenAI's form, and clients that go away.

Routes accept only bodies with the JSON content type. A web page cannot send that to a loopback
address without asking first (CORS preflight), and such a request is never allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Scope, Send

from coordinator.errors import CoordinatorError
from coordinator.loading.state import State, error_of, waiting_for
from coordinator.serving import requests
from coordinator.serving.requests import InFlight
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.plan import InfeasiblePlan, PlanError
from wire.hygiene import clean_text

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""More text than any context holds."""

MAX_DIGITS = 1000
"""More than any whole number of a request needs. Those of JSON schemas may be large."""

CLIENT_CLOSED_REQUEST = 499
"""A status for a client that closed first, which nobody reads (Source: nginx's log)."""

COMMENT_S = 5.0
"""A stream that has sent nothing for so long sends a comment. So no proxy takes it for dead."""

SCOPE_KEY = "shoal.request"

MESSAGES = "/v1/messages"
"""Errors of this path and those below have Anthropic's form."""

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Anthropic's words for statuses. Others are api_error or invalid_request_error."""

Result = TypeVar("Result")

_abandoned: set[asyncio.Task[Any]] = set()
"""Work of clients that went away, until it has ended. The event loop keeps only weak references."""


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


def tracked(scope: Scope) -> InFlight:
    """The request of an ASGI scope, as api.tracking made it."""
    request: InFlight = scope.setdefault(SCOPE_KEY, InFlight(""))
    return request


def model_state(state: State) -> dict[str, Any]:
    """The JSON of a model's state, the same in every route."""
    error = error_of(state)
    return {
        "state": state.word,
        "reason": None if error is None else str(error),
        "waiting_for": list(waiting_for(state)),
    }


def read_query(request: Request, *known: str) -> dict[str, str]:
    """The parameters of a request's URL. Raises RequestInvalid for others than ``known``."""
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known or name in found:
            wrong = f"there are two parameters {name!r}"
            if name not in known:
                expected = f": expected {', '.join(known)}" if known else ""
                wrong = f"unknown parameter {clean_text(name, 40)!r}{expected}"
            raise RequestInvalid(wrong, clean_text(name, 40))
        found[name] = value
    return found


async def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises RequestInvalid."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestInvalid("send JSON, with the header Content-Type: application/json")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RequestInvalid(
            f"Content-Encoding: {clean_text(encoding, 40)!r} is not read: send the JSON as it is"
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestInvalid(f"the request is larger than {MAX_BODY_BYTES} bytes")
    values = _parsed(body)
    if not isinstance(values, dict):
        raise RequestInvalid("the request must be a JSON object")
    if b"\\u" in body and not _is_unicode(values):
        raise RequestInvalid("the request has text that is not Unicode: half of a surrogate pair")
    return values


def _parsed(body: bytearray) -> Any:
    """The value of a JSON text. Raises RequestInvalid."""
    try:
        # `json` would also take UTF-16, and bytes of half a surrogate pair.
        text = body.decode("utf-8-sig")
        return json.loads(
            text,
            parse_constant=_no_number,
            parse_float=_finite,
            parse_int=_short,
            object_pairs_hook=_each_once,
        )
    except UnicodeDecodeError as error:
        message = f"the request is not valid JSON: byte {error.start} is not UTF-8"
        raise RequestInvalid(message) from error
    except RecursionError as error:
        raise RequestInvalid("the request is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise RequestInvalid(f"the request is not valid JSON: {error}") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Of a field that is there twice, Python would drop the first one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        met: set[str] = set()
        for name, _ in pairs:
            if name in met:
                raise ValueError(f"the field {name[:40]!r} is there twice")
            met.add(name)
    return found


def _short(text: str) -> int:
    """Return a whole number. Python refuses thousands of digits in words of its own."""
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {text[:20]}... has {len(text)} digits")
    return int(text)


def _no_number(text: str) -> float:
    """Refuse NaN and Infinity, which Python reads although they are not JSON."""
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    """Return a number. One that is too large would become infinite."""
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"the number {text[:40]} is too large")
    return number


def _is_unicode(values: dict[str, Any]) -> bool:
    """Whether all texts can be encoded. JSON's escapes can make text that cannot."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the OpenAI error object of an error."""
    if isinstance(error, CoordinatorError):
        status, code, param = error.status, error.code, None
    elif isinstance(error, RequestInvalid):
        status, code, param = 400, error.code, error.param
    elif isinstance(error, ModelError):
        status, code, param = 400, "invalid_model", "model"
    elif isinstance(error, PlanError):
        status, param = 422, None
        code = "infeasible" if isinstance(error, InfeasiblePlan) else "no_plan"
    elif isinstance(error, OSError):
        status, code, param = 507, "storage_error", None
        where = f" ({error.filename})" if error.filename else ""
        error = CoordinatorError(
            f"the coordinator cannot use its disk: {(error.strerror or str(error)).lower()}{where}"
        )
    else:
        log.error("request failed", exc_info=error)
        status, code, param = 500, "internal_error", None
        error = CoordinatorError("internal error; see the coordinator's log")
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    if status == 429:
        kind = "rate_limit_error"
    return status, {"message": str(error), "type": kind, "param": param, "code": code}


def messages_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """The body of Anthropic's API for an error of OpenAI's."""
    kind = _KINDS.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error["message"]}}


def error_response(
    path: str, status: int, error: Mapping[str, Any], headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer to a request that failed, in the form of the API at ``path``."""
    is_messages = path == MESSAGES or path.startswith(f"{MESSAGES}/")
    body = messages_error(status, error) if is_messages else {"error": error}
    return JSONResponse(body, status_code=status, headers=headers)


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for every route."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail.lower()}"
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return error_response(request.url.path, error.status_code, body, error.headers)
    if isinstance(error, (ClientGone, ClientDisconnect)):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    status, described = describe(error)
    tracked(request.scope).error = described["message"]
    return error_response(request.url.path, status, described, retry_header(error))


def retry_header(error: Exception) -> dict[str, str]:
    """The header Retry-After for an error that says when to try again."""
    seconds = error.retry_after_s if isinstance(error, CoordinatorError) else None
    return {} if seconds is None else {"Retry-After": str(seconds)}


HANDLERS = {
    kind: on_error
    for kind in (
        CoordinatorError,
        RequestInvalid,
        ModelError,
        PlanError,
        OSError,
        ClientGone,
        ClientDisconnect,
        HTTPException,
        Exception,
    )
}
"""An application's ``exception_handlers``. Every error of a route gets an answer."""


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``. If the client goes away first, cancel it and raise ClientGone.

    The request's body must have been read before.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for item in (task, watch):
            item.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await asyncio.gather(task, watch, return_exceptions=True)


def _data(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


@dataclass(frozen=True, slots=True)
class EventForm:
    """How an API writes its server-sent events: one event, an error, and the end of the stream."""

    event: Callable[[dict[str, Any]], str] = _data
    error: Callable[[Exception], str] = lambda error: _data({"error": describe(error)[1]})
    end: str = "data: [DONE]\n\n"


def server_sent_events(
    events: AsyncIterator[dict[str, Any] | str],
    form: EventForm = EventForm(),
) -> StreamingResponse:
    """Stream JSON objects as server-sent events, in OpenAI's form unless another is given.

    An error becomes an event. A text becomes a comment, which clients ignore. A comment is also
    sent when nothing else was for COMMENT_S.
    """

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f": {event}\n\n" if isinstance(event, str) else form.event(event)
        except Exception as error:
            requests.current().error = describe(error)[1]["message"]
            yield form.error(error)
        yield form.end

    return _EventStream(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


class _EventStream(StreamingResponse):
    """A stream that says why it pauses, while it has nothing else to say."""

    async def stream_response(self, send: Send) -> None:
        sent_s = time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal sent_s
            sent_s = time.monotonic()
            await send(message)

        async def comment() -> None:
            while True:
                await asyncio.sleep(sent_s + COMMENT_S - time.monotonic())
                if time.monotonic() - sent_s >= COMMENT_S:
                    text = f": {requests.current().doing}\n\n"
                    await noted(
                        {"type": "http.response.body", "body": text.encode(), "more_body": True}
                    )

        comments = asyncio.ensure_future(comment())
        try:
            await super().stream_response(noted)
        finally:
            comments.cancel()
            await asyncio.gather(comments, return_exceptions=True)


def json_lines(
    work: Callable[[Callable[[dict[str, Any]], None]], Awaitable[dict[str, Any]]],
) -> StreamingResponse:
    """Stream progress objects, then {"result": ...} or {"error": ...}, one JSON object a line.

    ``work(emit)`` is cancelled when the client goes away.
    """

    async def lines() -> AsyncIterator[str]:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def run() -> dict[str, Any]:
            try:
                return await work(queue.put_nowait)
            finally:
                queue.put_nowait(None)

        task = asyncio.ensure_future(run())
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event) + "\n"
            try:
                final = {"result": task.result()}
            except Exception as error:
                final = {"error": describe(error)[1]}
            yield json.dumps(final) + "\n"
        finally:
            # It is not awaited, because Starlette would cancel again at every await. The task may
            # have stages to unload.
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_forget)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _forget(task: asyncio.Task[Any]) -> None:
    """Forget abandoned work that has ended. Nobody is left to hear of its error."""
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()

"""What all HTTP routes share: reading JSON, answering errors as OpenAI does, and noticing that the
client has gone away.

Routes accept JSON bodies only, with the JSON content type: a web page that a user happens to visit
cannot send that to a loopback address without asking first (CORS preflight), and is never allowed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from coordinator.errors import CoordinatorError
from coordinator.loading.state import State, error_of, waiting_for
from model.errors import ModelError
from planning.errors import RequestInvalid
from planning.plan import InfeasiblePlan, PlanError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 4 << 20
"""More text than any context here holds."""

CLIENT_CLOSED_REQUEST = 499
"""Status that nobody reads (Source: nginx, which logs it for a client that closed first)."""

Result = TypeVar("Result")

_abandoned: set[asyncio.Task[Any]] = set()
"""Work whose client is gone and that is still ending: the event loop alone would forget it."""


class ClientGone(Exception):
    """The client closed its connection before the answer was ready."""


def model_state(state: State) -> dict[str, Any]:
    """The state of a model, as every route tells it."""
    error = error_of(state)
    return {
        "state": state.word,
        "reason": None if error is None else str(error),
        "waiting_for": list(waiting_for(state)),
    }


async def read_json(request: Request) -> dict[str, Any]:
    """The request's JSON object. Raises RequestInvalid."""
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if content_type != "application/json":
        raise RequestInvalid("send JSON, with the header Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestInvalid(f"the request is larger than {MAX_BODY_BYTES} bytes")
    try:
        values = json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise RequestInvalid(f"the request is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestInvalid("the request must be a JSON object")
    if b"\\u" in body and not _is_unicode(values):
        raise RequestInvalid("the request has text that is no Unicode: half of a surrogate pair")
    return values


def _is_unicode(values: dict[str, Any]) -> bool:
    """False where JSON's escapes made text that cannot be encoded."""
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """(HTTP status, OpenAI error object) of anything a handler may raise."""
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
    return status, {"message": str(error), "type": kind, "param": param, "code": code}


async def on_error(request: Request, error: Exception) -> Response:
    """Starlette's exception handler for every route."""
    if isinstance(error, HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail.lower()}"
        body = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, status_code=error.status_code)
    if isinstance(error, (ClientGone, ClientDisconnect)):
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    status, body = describe(error)
    return JSONResponse({"error": body}, status_code=status)


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
"""For an application's ``exception_handlers``: nothing that a route raises goes unanswered."""


async def while_connected(request: Request, work: Awaitable[Result]) -> Result:
    """Await ``work``; cancelled, with ClientGone raised, when the client goes away first.

    The request's body must have been read.
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


def server_sent_events(
    events: AsyncIterator[dict[str, Any] | str],
) -> StreamingResponse:
    """Stream JSON objects as server-sent events, closed by OpenAI's [DONE]; errors come as one.

    A plain line becomes a comment, which clients that do not know it pass over.
    """

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                if isinstance(event, str):
                    yield f": {event}\n\n"
                else:
                    yield f"data: {json.dumps(event)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps({'error': describe(error)[1]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


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
            # Not awaited: what Starlette has cancelled it cancels again at every await, and the
            # task has stages to unload.
            task.cancel()
            _abandoned.add(task)
            task.add_done_callback(_forget)

    return StreamingResponse(lines(), media_type="application/x-ndjson")


def _forget(task: asyncio.Task[Any]) -> None:
    """Let go of abandoned work that has ended; nobody is left to be told how."""
    _abandoned.discard(task)
    if not task.cancelled():
        task.exception()

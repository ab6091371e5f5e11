"""One HTTP API for answers: how its requests are read, and how its answers are written."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from api.common import EventForm
from api.openai.events import Event, Outcome
from api.openai.jobs import Job
from coordinator.loading.deployment import Deployment
from planning.errors import RequestInvalid


class Api(abc.ABC):
    """One request of an API. The order of calls is read, then whole, or begin, add, ..., end."""

    form = EventForm()
    names: Mapping[str, str] = {}
    """Fields of chats and completions that have another name in this API."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body

    @property
    def wants_stream(self) -> bool:
        return self.body.get("stream") is True

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Have errors name fields as this API does."""
        try:
            yield
        except RequestInvalid as error:
            named = self.names.get(error.param or "")
            if error.param is None or named is None:
                raise
            message = str(error)
            if message.startswith(error.param):
                message = named + message[len(error.param) :]
            raise RequestInvalid(message, named, error.code) from error

    def named(self, job: Job) -> Job:
        """Return a job whose format is named as this API does."""
        return replace(job, format_field=self.names.get(job.format_field, job.format_field))

    @abc.abstractmethod
    def read(self, deployment: Deployment) -> Job:
        """Check the request. It runs in a thread. Raises RequestInvalid."""

    @abc.abstractmethod
    def whole(self, job: Job, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""

    @abc.abstractmethod
    def begin(self, job: Job, outcomes: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
        """Yield the first events of a stream. ``outcomes`` fill while it lasts."""

    @abc.abstractmethod
    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the events for what an answer adds."""

    @abc.abstractmethod
    def end(self) -> Iterator[dict[str, Any]]:
        """Yield the last events of a stream."""

"""Lets the coordinator's machine make files for backends, which the coordinator cannot import."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from backends.base import BackendError
from backends.registry import backend_class
from coordinator.errors import MakingFailed
from model.spec import ModelSpec

log = logging.getLogger(__name__)


class LocalMakers:
    """The ``coordinator.files.compiled.Makers`` of the installed backends."""

    def version(self, backend: str) -> str | None:
        try:
            return backend_class(backend).maker()
        except BackendError as error:
            log.info("no files for %s are made here: %s", backend, error)
            return None

    def make(
        self,
        backend: str,
        spec: ModelSpec,
        artifacts: Sequence[tuple[int, Path]],
        directory: Path,
        tick: Callable[[], None],
    ) -> Sequence[Path]:
        try:
            return backend_class(backend).make_files(spec, artifacts, directory, tick)
        except BackendError as error:
            raise MakingFailed(str(error)) from error

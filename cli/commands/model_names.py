"""Turns the MODEL that a user gives into a path: of this machine, or of the coordinator's.

A path is taken as it is. A hub's name is looked for in the cache, and fetched if it is not there.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cli.errors import CommandFailed
from cli.render import Screen
from model.errors import ModelError
from model.hub import (
    HubName,
    cache_directory,
    cached_model,
    is_open_to_others,
    named_model,
    resolved,
    this_machine,
    user_name,
)
from wire.sizes import format_size

if TYPE_CHECKING:
    from cli.client import Client
    from model.hub_download import Pulled

_RATE_AFTER_S = 1.0
_REPORTED_EACH_S = 0.1


def path_given(given: str) -> Path:
    """The absolute path that a user gives, with a cache's folder resolved. Raises CommandFailed."""
    try:
        return resolved(Path(given).absolute())
    except ModelError as error:
        raise CommandFailed(str(error)) from error


def model_here(given: str | Path, screen: Screen) -> Path:
    """The path of a model for a command that reads it itself. A hub's name is fetched if needed.

    A path that does not exist is returned too: its reader says what is there. Raises CommandFailed.
    """
    try:
        name = named_model(str(given))
        if name is None:
            return resolved(Path(given))
        return cached_model(name) or fetched(name, screen).path
    except ModelError as error:
        raise CommandFailed(str(error)) from error


def config_here(given: str | Path, screen: Screen, *, tell: bool = True) -> Path:
    """The path of a model, or of a folder with only its config.json if it is not downloaded yet.

    tell: say so in the latter case.
    """
    from model.hub_download import fetch_config

    try:
        name = named_model(str(given))
        found = resolved(Path(given)) if name is None else cached_model(name)
        if name is None or found is not None:
            return found or Path(given)
        quiet()
        folder, size_bytes = fetch_config(name)
    except ModelError as error:
        raise CommandFailed(str(error)) from error
    if tell:
        _tell(name, size_bytes, screen)
    return folder


@contextmanager
def model_to_plan(options: argparse.Namespace, screen: Screen) -> Iterator[None]:
    """Put the path of a folder with a config.json into ``options.model``, for the block's time.

    It is that of the model, or one made for --shape. Raises CommandFailed.
    """
    from calibration.shapes import write_shape

    if options.shape is None:
        options.model = str(config_here(options.model, screen))
        yield
        return
    with TemporaryDirectory(prefix="shoal-shape-") as directory:
        try:
            options.model = str(write_shape(options.shape, Path(directory)))
        except ModelError as error:
            raise CommandFailed(str(error)) from error
        yield


def locate(
    options: argparse.Namespace, client: Client, screen: Screen, *, weights: bool = True
) -> None:
    """Put the path that the coordinator reads in place of a hub's name in ``options.model``.

    So it does with ``options.draft``, if there is one.

    A name is looked for in the coordinator's cache, then in this user's. It is fetched if the
    coordinator runs here. ``options.shape_from`` is then a path here with the model's config.json.
    weights: without them, its config.json is enough. Raises CommandFailed.
    """
    draft = getattr(options, "draft", None)
    if draft is not None:
        own = argparse.Namespace(model=draft)
        locate(own, client, screen, weights=weights)
        options.draft = own.model
    name = named_model(options.model)
    if name is None:
        return
    there = client.get(f"/shoal/v1/found?model={quote(str(name), safe='')}")
    here = there["machine"] == this_machine()
    if there["path"] is not None:
        path = Path(there["path"])
    elif here and _is_readable(there):
        path = model_here(options.model, screen) if weights else config_here(options.model, screen)
    elif not weights:
        described = client.post("/shoal/v1/describe", {"model": str(name)})
        path = Path(described["path"])
        _tell(name, described["size_bytes"], screen)
    elif here:
        raise CommandFailed(
            f"the coordinator runs as the user {there['user']}, who may not read"
            f" {cache_directory()}: run `sudo HF_HUB_CACHE={there['cache']} shoal pull {name}`,"
            " then the same command again"
        )
    else:
        raise CommandFailed(
            f"{name} is not in {there['cache']} on {there['host']}, where the coordinator runs:"
            f" run `shoal pull {name}` there"
        )
    needs_shape = bool(getattr(options, "pin", ())) or getattr(options, "sensitivities", None)
    if not here and needs_shape:
        options.shape_from = config_here(options.model, screen, tell=False)
    options.model = str(path)


def path_there(given: str, here: Path, client: Client) -> Path:
    """The coordinator's path of a model that is ``here`` on this machine. Raises CommandFailed."""
    name = named_model(given)
    if name is None:
        return here.absolute()
    there = client.get(f"/shoal/v1/found?model={quote(str(name), safe='')}")["path"]
    return here.absolute() if there is None else Path(there)


def fetched(name: HubName, screen: Screen) -> Pulled:
    """Fetch a model into this user's cache, with progress. Raises ModelError."""
    from model.hub_download import pull

    quiet()
    with screen.progress() as on_step:
        return pull(name, _reporter(on_step))


def quiet() -> None:
    """Keep the library from logging what the one line of an error says anyway."""
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _is_readable(there: Mapping[str, Any]) -> bool:
    """Whether the coordinator, which runs on this machine, may read this user's cache."""
    return there["user"] == user_name() or is_open_to_others(cache_directory())


def _tell(name: HubName, size_bytes: int | None, screen: Screen) -> None:
    size = "it" if size_bytes is None else format_size(size_bytes)
    screen.note(
        f"{name} is not downloaded: its config.json alone is read. `shoal pull {name}` fetches"
        f" {size}"
    )


def _reporter(on_step: Callable[[Mapping[str, Any]], None]) -> Callable[[int, int], None]:
    """Make a function that takes the fetched and all bytes, and reports them with their rate."""
    start: list[tuple[float, int]] = []
    last_s = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if not start:
            start.append((now_s, done))
        if now_s - last_s < _REPORTED_EACH_S and done < total:
            return
        last_s = now_s
        passed_s, came = now_s - start[0][0], done - start[0][1]
        note = ""
        if passed_s > _RATE_AFTER_S and came > 0:
            rate = came / passed_s
            note = f" {format_size(int(rate))}/s, {_duration((total - done) / rate)} left"
        on_step(
            {
                "phase": "fetch",
                "label": "",
                "done": done,
                "total": total,
                "unit": "bytes",
                "note": note,
            }
        )

    return report


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""Turns the MODEL that a user gives into a path: of this machine, or of the coordinator's.

A path is taken as it is. A hub's name is looked for in the cache, and fetched if it is not there.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cli.errors import CommandFailed
from cli.render import Screen
from model.errors import ModelError
from model.hub import HubName, cached_model, named_model, resolved, this_machine
from wire.sizes import format_size

if TYPE_CHECKING:
    from cli.client import Client
    from model.hub_download import Pulled

_RATE_AFTER_S = 1.0


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


def config_here(given: str | Path, screen: Screen) -> Path:
    """The path of a model, or of a folder with only its config.json if it is not downloaded yet."""
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
    screen.note(
        f"{name} is not downloaded: planned from its config.json alone. `shoal pull {name}` fetches"
        f" {format_size(size_bytes)}"
    )
    return folder


def locate(
    options: argparse.Namespace, client: Client, screen: Screen, *, weights: bool = True
) -> None:
    """Put the path that the coordinator reads in place of a hub's name in ``options.model``.

    A name is looked for in the coordinator's cache, then in this user's. It is fetched if the
    coordinator runs here. ``options.shape_from`` is then a path here with the model's config.json.
    weights: without them, its config.json is enough. Raises CommandFailed.
    """
    name = named_model(options.model)
    if name is None:
        return
    there = client.get(f"/shoal/v1/found?model={quote(str(name), safe='')}")
    here = there["machine"] == this_machine()
    if there["path"] is not None:
        path = Path(there["path"])
    elif here:
        path = model_here(options.model, screen) if weights else config_here(options.model, screen)
    else:
        raise CommandFailed(
            f"{name} is not in {there['cache']} on {there['host']}, where the coordinator runs:"
            f" run `shoal pull {name}` there"
        )
    needs_shape = bool(getattr(options, "pin", ())) or getattr(options, "sensitivities", None)
    if not here and needs_shape:
        options.shape_from = config_here(options.model, screen)
    options.model = str(path)


def fetched(name: HubName, screen: Screen) -> Pulled:
    """Fetch a model into this user's cache, with progress. Raises ModelError."""
    from model.hub_download import pull

    quiet()
    with screen.progress() as on_step:
        return pull(name, _reporter(on_step))


def quiet() -> None:
    """Keep the library from logging what the one line of an error says anyway."""
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def _reporter(on_step: Callable[[Mapping[str, Any]], None]) -> Callable[[int, int], None]:
    """Make a function that takes the fetched and all bytes, and reports them with their rate."""
    start: list[tuple[float, int]] = []

    def report(done: int, total: int) -> None:
        now_s = time.monotonic()
        if not start:
            start.append((now_s, done))
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

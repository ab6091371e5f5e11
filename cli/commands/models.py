"""``shoal pull``, ``models`` and ``rm``: the models in this machine's cache of the hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from cli.commands.model_names import fetched
from cli.errors import CommandFailed, UsageError
from cli.parser import add_url_argument
from cli.render import Screen, titled_table
from model.errors import ModelError
from model.hub import (
    HubName,
    SeveralFiles,
    cache_directory,
    model_in,
    ollama_advice,
    parse_name,
    pieces_of,
    quantization_of,
)
from wire.sizes import format_size

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

    from model.spec import ModelSpec

PULL_ABOUT = (
    "It fetches what shoal needs into the cache that huggingface_hub shares with other programs. "
    "Settings are that library's: HF_TOKEN, HF_ENDPOINT for a mirror, HF_HOME for another disk. "
    "A download that was stopped goes on where it was."
)
PULL_EXAMPLES = (
    "  shoal pull Qwen/Qwen3-0.6B\n"
    "  shoal pull Qwen/Qwen3-0.6B --revision refs/pr/3\n"
    "  shoal pull unsloth/Qwen3-0.6B-GGUF:Q4_K_M  # one GGUF file of several\n"
    "  HF_HOME=/srv/hf shoal pull Qwen/Qwen3-4B   # onto another disk\n"
)
MODELS_ABOUT = (
    "Each model of the cache is compared with the memory of the devices that have joined, or of "
    "this machine if no coordinator answers. `shoal plan` decides exactly."
)
MODELS_EXAMPLES = "  shoal models\n  shoal models --json | jq -r '.models[].path'\n"
RM_EXAMPLES = "  shoal rm Qwen/Qwen3-0.6B\n  shoal rm Qwen/Qwen3-0.6B --revision refs/pr/3 --yes\n"

COMPARED_BITS = 4
"""The width at which ``shoal models`` compares models with the memory."""


# ---- pull --------------------------------------------------------------------------------------


def add_pull_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="ORG/NAME", help="The model's name on the hub.")
    parser.add_argument(
        "--revision", metavar="R", help="A branch, a tag or a commit. Default: main."
    )
    parser.add_argument(
        "--file",
        metavar="FILE",
        help="The GGUF file to fetch, or its quantization such as Q4_K_M. Default: safetensors, "
        "else the only GGUF file.",
    )


def run_pull(options: argparse.Namespace, screen: Screen) -> None:
    """Fetch a model, and say where it is. Raises CommandFailed."""
    name = _name(options.name, options.revision, options.file)
    try:
        try:
            pulled = fetched(name, screen)
        except SeveralFiles as error:
            name = _asked(name, error, screen)
            pulled = fetched(name, screen)
    except ModelError as error:
        raise CommandFailed(str(error)) from error
    size_bytes = sum(file.size_bytes for file in pulled.files)
    if screen.json_output:
        screen.json(
            {
                "model": name.repo,
                "revision": name.revision or "main",
                "commit": pulled.repository.commit,
                "path": str(pulled.path),
                "files": [file.path for file in pulled.files],
                "size_bytes": size_bytes,
                "fetched_bytes": pulled.fetched_bytes,
            }
        )
        return
    came = f"{format_size(pulled.fetched_bytes)} came now" if pulled.fetched_bytes else "was here"
    screen.out.print(
        escape(f"{name}: {format_size(size_bytes)} ({came}), in {pulled.path}"), soft_wrap=True
    )


def _name(text: str, revision: str | None = None, file: str | None = None) -> HubName:
    """The name that the arguments give. Raises UsageError."""
    name = parse_name(text)
    if name is None:
        advice = ollama_advice(text) or f"{text}: give a model's name on the hub, as ORG/NAME"
        raise UsageError(advice)
    for option, given, own in (
        ("--revision", revision, name.revision),
        ("--file", file, name.file),
    ):
        if given and own and given != own:
            raise UsageError(f"{option} {given}: {text} says {own} already, drop one")
    whole = replace(name, revision=revision or name.revision, file=file or name.file)
    if parse_name(str(whole)) != whole:
        raise UsageError(f"{whole}: the revision or the file is no name that a hub can have")
    return whole


def _asked(name: HubName, error: SeveralFiles, screen: Screen) -> HubName:
    """Let the user choose a GGUF file. Raises CommandFailed if nobody can be asked."""
    if screen.json_output or not sys.stdin.isatty() or not error.models:
        raise CommandFailed(str(error)) from error
    models = list(error.models)
    for number, model in enumerate(models, 1):
        screen.out.print(escape(f"{number:3}  {model}"), soft_wrap=True)
    answer = input(f"Which one of 1 to {len(models)}? ").strip()
    if not answer.isdigit() or not 1 <= int(answer) <= len(models):
        raise CommandFailed(f"{answer!r} is none of them: nothing was fetched")
    return replace(name, file=error.models[models[int(answer) - 1]][0])


# ---- models ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Memory:
    """The memory that models are compared with. ``devices`` 0 or None: this machine's.

    None: no coordinator answers.
    """

    available_bytes: int
    devices: int | None

    @property
    def text(self) -> str:
        size = format_size(self.available_bytes)
        if not self.devices:
            why = "no coordinator answers" if self.devices is None else "no device has joined"
            return f"{why}: compared with {size} that are free on this machine"
        joined = "1 device that has" if self.devices == 1 else f"{self.devices} devices that have"
        return f"compared with {size} of {joined} joined"


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    add_url_argument(parser)


def run_models(options: argparse.Namespace, screen: Screen) -> None:
    """List the models of the cache. Raises CommandFailed."""
    memory = _memory(options)
    rows = [row for repo in _repos(_scanned()) for row in _rows(repo, memory)]
    if screen.json_output:
        screen.json(
            {
                "cache": str(cache_directory()),
                "memory_bytes": memory.available_bytes,
                "devices": memory.devices,
                "bits": COMPARED_BITS,
                "models": rows,
            }
        )
        return
    if not rows:
        screen.out.print(
            f"no model in {cache_directory()}: `shoal pull ORG/NAME` fetches one", soft_wrap=True
        )
        return
    table = titled_table(f"models in {cache_directory()}")
    table.add_column("model", overflow="fold", min_width=12)
    table.add_column("revision", no_wrap=True)
    table.add_column("on disk", justify="right", no_wrap=True)
    table.add_column("family", no_wrap=True)
    table.add_column(f"at {COMPARED_BITS} bits", justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for row in rows:
        needed = row["needed_bytes"]
        table.add_row(
            escape(row["name"]),
            escape(row["revision"]),
            format_size(row["size_bytes"]),
            escape(row["family"] or "-"),
            "-" if needed is None else format_size(needed),
            "-" if row["fits"] is None else "yes" if row["fits"] else "no",
        )
    screen.table(table)
    screen.out.print(memory.text, soft_wrap=True)
    for row in rows:
        if row["reason"]:
            screen.out.print(escape(f"{row['name']}: {row['reason']}"), soft_wrap=True)


def _memory(options: argparse.Namespace) -> _Memory:
    """The memory of the joined devices, or of this machine if there are none."""
    from cli.client import Client, default_url
    from model.memory import memory_bytes

    try:
        with Client(options.url or default_url()) as client:
            devices = client.get("/shoal/v1/devices")["devices"]
    except CommandFailed:
        return _Memory(memory_bytes()[0], None)
    joined_bytes = sum(device["memory_bytes"] for device in devices)
    return _Memory(joined_bytes if devices else memory_bytes()[0], len(devices))


def _rows(repo: CachedRepoInfo, memory: _Memory) -> list[dict[str, Any]]:
    """The lines of a repository: one for each revision, or for each of its GGUF models."""
    rows: list[dict[str, Any]] = []
    partials = list((Path(repo.repo_path) / "blobs").glob("*.incomplete"))
    for revision in sorted(repo.revisions, key=lambda item: item.last_modified, reverse=True):
        snapshot = Path(revision.snapshot_path)
        for name, path, is_whole in _models(repo.repo_id, snapshot):
            files = () if path == snapshot else pieces_of(path)
            size = sum(file.stat().st_size for file in files) or revision.size_on_disk
            unfinished = 0 if is_whole else sum(file.stat().st_size for file in partials)
            row = {
                "name": str(name),
                "revision": ", ".join(sorted(revision.refs)) or revision.commit_hash[:12],
                "commit": revision.commit_hash,
                "path": str(path),
                "size_bytes": size + unfinished,
                "whole": is_whole,
            }
            rows.append(row | _described(path, memory))
            if not is_whole:
                rows[-1]["reason"] = f"only a part is here: `shoal pull {name}` fetches the rest"
    return rows


def _models(repo: str, snapshot: Path) -> list[tuple[HubName, Path, bool]]:
    """The models of a snapshot with their names, and whether all their files are here."""
    try:
        found = model_in(snapshot, HubName(repo))
        return [(HubName(repo), found or snapshot, found is not None)]
    except SeveralFiles as error:
        short = [quantization_of(model) for model in error.models]
        names = short if len(set(short)) == len(short) else list(error.models)
        found_models = []
        for file, files in zip(names, error.models.values(), strict=True):
            name = HubName(repo, file=file)
            found = model_in(snapshot, name)
            found_models.append((name, found or snapshot / files[0], found is not None))
        return found_models


def _described(path: Path, memory: _Memory) -> dict[str, Any]:
    """Whether a model's family is supported, and whether its memory would fit."""
    from model.families import load_spec

    try:
        needed = needed_bytes(load_spec(path))
    except ModelError as error:
        reason = str(error).replace(f"{path}: ", "").replace(f"{path}/", "")
        unknown = {"needed_bytes": None, "fits": None}
        return {"family": _family(path), "supported": False, "reason": reason, **unknown}
    return {
        "family": _family(path),
        "supported": True,
        "reason": None,
        "needed_bytes": needed,
        "fits": needed <= memory.available_bytes,
    }


def needed_bytes(spec: ModelSpec) -> int:
    """The memory of a whole model at COMPARED_BITS, with the default context."""
    from model.costs import kv_bytes, stored_bytes
    from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, Format
    from planning.request import DEFAULT_CONTEXT_TOKENS

    fmt = Format.of(COMPARED_BITS, DEFAULT_SCHEME, DEFAULT_GROUP_SIZE)
    tokens = min(DEFAULT_CONTEXT_TOKENS, spec.max_context)
    return sum(
        stored_bytes(spec, block, fmt) + kv_bytes(spec, block, tokens)
        for block in range(spec.block_count)
    )


def _family(path: Path) -> str | None:
    """The model_type in a folder's config.json, or None."""
    from model.families import read_config

    try:
        return read_config(path).model_type
    except ModelError:
        return None


# ---- rm ----------------------------------------------------------------------------------------


def add_rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="ORG/NAME", help="The model's name on the hub.")
    parser.add_argument(
        "--revision", metavar="R", help="Remove only this revision. Default: all of them."
    )
    parser.add_argument("--yes", action="store_true", help="Remove it without asking.")
    add_url_argument(parser)


def run_rm(options: argparse.Namespace, screen: Screen) -> None:
    """Remove a model from the cache, after asking. Raises CommandFailed."""
    name = _name(options.name, options.revision)
    cache = _scanned()
    repo = next((repo for repo in _repos(cache) if repo.repo_id == name.repo), None)
    if cache is None or repo is None:
        raise CommandFailed(
            f"{name.repo} is not in {cache_directory()}: `shoal models` lists what is"
        )
    commits = [
        revision.commit_hash
        for revision in repo.revisions
        if name.revision is None
        or name.revision in revision.refs
        or (len(name.revision) >= 7 and revision.commit_hash.startswith(name.revision))
    ]
    if not commits:
        known = ", ".join(sorted({ref for item in repo.revisions for ref in item.refs}))
        raise CommandFailed(f"{name.repo} is here without the revision {name.revision}: {known}")
    _require_unused(options, Path(repo.repo_path))
    # A copy of the repository may have the same commits, which the whole cache would remove, too.
    strategy = replace(cache, repos=frozenset((repo,))).delete_revisions(*commits)
    size = format_size(strategy.expected_freed_size)
    if not options.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"{name.repo} has {size}: give --yes to remove it")
        if input(f"Remove {name}, {size}? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandFailed("nothing was removed")
    strategy.execute()
    if screen.json_output:
        screen.json({"removed": str(name), "freed_bytes": strategy.expected_freed_size})
    else:
        screen.out.print(escape(f"{name} is removed: {size} are free again"), soft_wrap=True)


def _require_unused(options: argparse.Namespace, folder: Path) -> None:
    """Raise CommandFailed if the coordinator has loaded a model from this folder."""
    from cli.client import Client, default_url

    try:
        with Client(options.url or default_url()) as client:
            answer = client.get("/shoal/v1/ps")
    except CommandFailed:
        return  # Nothing is loaded without a coordinator.
    loaded: Sequence[Mapping[str, Any] | None] = (answer["model"], *answer.get("beside", ()))
    for model in loaded:
        if model is not None and folder in Path(model["directory"]).parents:
            raise CommandFailed(
                f"{model['model']} is loaded from {folder}: run `shoal unload` first"
            )


# ---- the cache ---------------------------------------------------------------------------------


def _scanned() -> HFCacheInfo | None:
    """The contents of the cache, or None if there is no cache yet."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir(cache_directory())
    except CacheNotFound:
        return None
    except ValueError as error:
        raise CommandFailed(f"{cache_directory()}: it is a file, not the hub's cache") from error


def _repos(cache: HFCacheInfo | None) -> list[CachedRepoInfo]:
    found = [] if cache is None else [repo for repo in cache.repos if repo.repo_type == "model"]
    return sorted(found, key=lambda repo: repo.repo_id)

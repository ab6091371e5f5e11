"""Fetches a model's files from the Hugging Face Hub into the cache that huggingface_hub shares.

That library finds the hub, its token and the cache, by its own settings (HF_ENDPOINT, HF_TOKEN,
HF_HOME). It neither goes on with a file after its process was killed nor compares a file with its
hash. Both are done here: a file grows as ``blobs/HASH.incomplete`` until it is whole, and gets its
place only if its hash is right. The library is imported when a function is called.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import urlsplit

from model.durable import replace_text
from model.errors import CheckpointError, HubError, UnsupportedModelError
from model.hub import (
    ADAPTER,
    CONFIG,
    DESCRIPTIONS,
    INDEX,
    MAIN,
    MODULES,
    SINGLE,
    HubName,
    cache_directory,
    choose_gguf,
    model_in,
    snapshot,
    user_name,
)

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_PIECE_BYTES = 1 << 18
_RETRIES = 5
"""Broken connections in a row, without a byte in between, before the download ends."""
_PAUSE_S = 0.5
"""The wait before the first new try. Each further one is as much longer."""

OnBytes = Callable[[int, int], None]
"""Gets the bytes of the wanted files that are here, and the bytes of all. May raise Cancelled."""


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a repository.

    digest: its SHA-256 if it is in large file storage, else its git blob id (SHA-1). It is also the
    name of the file's blob in the cache.
    """

    path: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Repository:
    """One commit of a repository, with all its files."""

    name: HubName
    commit: str
    files: tuple[HubFile, ...]

    @property
    def snapshot(self) -> Path:
        return self.name.folder / "snapshots" / self.commit


@dataclass(frozen=True, slots=True)
class Pulled:
    """A model in the cache.

    path: its folder or GGUF file.
    fetched_bytes: what came over the network for it now.
    """

    path: Path
    repository: Repository
    files: tuple[HubFile, ...]
    fetched_bytes: int


def pull(name: HubName, on_bytes: OnBytes = lambda done, total: None) -> Pulled:
    """Fetch what a model needs, and point the revision at it once everything is here.

    Raises HubError with one line, also for a model that is not supported: its weights are not
    fetched.
    """
    repository = look_up(name)
    files = needed_files(repository)
    fetched = _fetch(repository, files, on_bytes)
    _refer(repository)
    path = model_in(repository.snapshot, name)
    if path is None:
        raise HubError(
            f"{name}: its files in {repository.snapshot} are no whole model: the index lists others"
        )
    return Pulled(path, repository, files, fetched)


def fetch_config(name: HubName) -> tuple[Path, int | None]:
    """Fetch only config.json and generation_config.json, to plan a model before its download.

    Returns their folder, and the size in bytes of everything that ``pull`` would fetch. If the hub
    cannot be asked, those of an earlier call do, and the size is None. The revision is not pointed
    at them. Raises HubError.
    """
    try:
        repository = look_up(name)
    except HubError:
        known = snapshot(name.folder, name.revision)
        if known is None or not (known / CONFIG).exists():
            raise
        return known, None
    by_path = {file.path: file for file in repository.files}
    if CONFIG not in by_path:
        raise HubError(
            f"{name.repo} has no {CONFIG} to plan from: run `shoal pull {name}`, then plan it"
        )
    names = (CONFIG, "generation_config.json", MODULES, *_steps(by_path))
    wanted = [by_path[path] for path in names if path in by_path]
    _fetch(repository, wanted, lambda done, total: None)
    return repository.snapshot, sum(file.size_bytes for file in needed_files(repository))


def look_up(name: HubName) -> Repository:
    """Return what the hub says about a repository: its commit and files. Raises HubError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError

    try:
        with _explained(name):
            info = HfApi(endpoint=_endpoint()).model_info(
                name.repo,
                revision=name.revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        files = [
            HubFile(
                item.rfilename,
                (item.lfs.size if item.lfs else item.size) or 0,
                item.lfs.sha256 if item.lfs else item.blob_id or "",
            )
            for item in info.siblings or ()
        ]
        commit = info.sha or ""
        is_sound = _is_hex(commit, 40) and all(_is_sound(file) for file in files)
    except HFValidationError as error:
        raise HubError(f"{name.repo} is no name that a hub can have: check it") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another service.
        raise HubError(f"{_host()} does not answer like a hub: is HF_ENDPOINT right?") from error
    if not is_sound:
        raise HubError(f"{_host()} does not answer like a hub: is HF_ENDPOINT right?")
    return Repository(name, commit, tuple(files))


def needed_files(repository: Repository) -> tuple[HubFile, ...]:
    """Return the files that a model needs, small ones first. Raises HubError if it has no weights.

    These are the descriptions and safetensors, or one GGUF model if the name asks for one, or if
    there are no safetensors.
    """
    name, by_path = repository.name, {file.path: file for file in repository.files}
    top = [path for path in by_path if "/" not in path]
    tensors = [path for path in top if path.endswith(".safetensors")]
    if name.file is not None or not tensors:
        ggufs = [path for path in by_path if path.lower().endswith(".gguf")]
        if not ggufs:
            raise HubError(_without_weights(name, top))
        return tuple(by_path[path] for path in choose_gguf(ggufs, name))
    if SINGLE in tensors:
        weights = [SINGLE]
    elif ADAPTER in tensors and INDEX not in top:
        weights = [ADAPTER]
    else:
        parts = [path for path in tensors if path.startswith("model-") and "-of-" in path]
        weights = sorted(parts if INDEX in top and parts else tensors)
    described = [path for path in (*DESCRIPTIONS, INDEX) if path in by_path]
    if SINGLE in tensors and INDEX in described:
        described.remove(INDEX)
    return tuple(by_path[path] for path in (*described, *_steps(by_path), *weights))


def _steps(paths: Iterable[str]) -> list[str]:
    """Return the files of a sentence encoder's steps, such as 1_Pooling/config.json.

    A linear layer has weights in its folder.
    """
    known = set(paths)
    if MODULES not in known:
        return []
    found = [path for path in known if path.count("/") == 1 and path.endswith(f"/{CONFIG}")]
    weights = (f"{path.removesuffix(CONFIG)}{SINGLE}" for path in found)
    return sorted([*found, *known.intersection(weights)])


def _without_weights(name: HubName, top: Iterable[str]) -> str:
    pickles = sorted(path for path in top if path.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if name.file is not None:
        return f"{name.repo} has no GGUF files: leave out `:{name.file}`"
    if pickles:
        return (
            f"{name.repo} has only pickles ({pickles[0]}), which can run any code and are never"
            f" read: look for a copy in safetensors at https://huggingface.co/models?search="
            f"{name.repo.rpartition('/')[2]}"
        )
    return f"{name.repo} has no weights in safetensors or GGUF: give another repository"


# ---- into the cache ----------------------------------------------------------------------------


def _fetch(repository: Repository, files: Iterable[HubFile], on_bytes: OnBytes) -> int:
    """Bring files into the snapshot, in their order. Returns the bytes that came over the network.

    Raises HubError, and Cancelled if ``on_bytes`` does. Parts of files stay, to go on with.
    """
    from huggingface_hub.utils import WeakFileLock

    name, wanted = repository.name, tuple(files)
    blobs = name.folder / "blobs"
    locks = cache_directory() / ".locks" / name.folder.name
    total, done, fetched = sum(file.size_bytes for file in wanted), 0, 0
    with _explained(name), _writing(name):
        _require_space(name, wanted)
        for folder in (blobs, locks):
            folder.mkdir(parents=True, exist_ok=True)
        for file in wanted:
            blob, before = blobs / file.digest, done

            def moved(count: int, before: int = before) -> None:
                on_bytes(before + count, total)

            with WeakFileLock(locks / f"{file.digest}.lock"):
                if not blob.exists():
                    fetched += _fetch_blob(repository, file, blob, moved)
            _link(blob, repository.snapshot / PurePosixPath(file.path))
            if file.path == CONFIG:
                _require_supported(repository)
            done = before + file.size_bytes
            on_bytes(done, total)
    return fetched


def _require_supported(repository: Repository) -> None:
    """Raise HubError if config.json describes a model that is not implemented."""
    from model.families import load_spec

    try:
        load_spec(repository.snapshot)
    except UnsupportedModelError as error:
        reason = str(error).replace(f"{repository.snapshot}/", "")
        raise HubError(f"{repository.name} is not fetched: {reason}") from error
    except CheckpointError:
        pass  # Another file may be what describes the model.


def _fetch_blob(
    repository: Repository, file: HubFile, blob: Path, moved: Callable[[int], None]
) -> int:
    """Fetch one file, from where an earlier try ended. Returns the bytes that came now."""
    partial = blob.with_name(f"{blob.name}.incomplete")
    fetched = 0
    for _ in range(2):
        resumed = partial.exists() and partial.stat().st_size > 0
        try:
            with partial.open("a+b") as out:
                count, digest = _receive(repository, file, out, moved)
        finally:
            if partial.stat().st_size == 0:
                partial.unlink()
        fetched += count
        if digest == file.digest:
            partial.replace(blob)
            return fetched
        partial.unlink(missing_ok=True)
        if not resumed:  # Else the earlier part may be what is wrong.
            break
    kind = "SHA-256" if len(file.digest) == 64 else "git id"
    raise HubError(
        f"{repository.name.repo}: {file.path} came damaged, its {kind} is not the hub's: it was"
        " removed, run the same command again"
    )


def _receive(
    repository: Repository, file: HubFile, out: BinaryIO, moved: Callable[[int], None]
) -> tuple[int, str]:
    """Fetch the rest of a file behind what ``out`` has. Returns the bytes that came, and its hash.

    A broken connection is tried again. Every piece is written at once, so that it survives the end
    of this process.
    """
    from huggingface_hub.utils import httpx

    digest = _hash(file)
    out.seek(0)
    for piece in iter(lambda: out.read(_PIECE_BYTES), b""):
        digest.update(piece)
    have, fetched, failures = out.tell(), 0, 0
    moved(min(have, file.size_bytes))
    while have < file.size_bytes:
        try:
            for start, piece in _pieces(repository, file, have):
                if start < have:  # The server sends the whole file again.
                    out.truncate(0)
                    digest, have = _hash(file), 0
                if not fetched:  # From now on, the cache's lists show the repository.
                    repository.snapshot.mkdir(parents=True, exist_ok=True)
                out.write(piece)
                out.flush()
                digest.update(piece)
                have += len(piece)
                fetched += len(piece)
                failures = 0
                moved(min(have, file.size_bytes))
                if have > file.size_bytes:
                    return fetched, ""
            failures += have < file.size_bytes
            if failures > _RETRIES:
                return fetched, ""
        except (httpx.TransportError, httpx.StreamError) as error:
            failures += 1
            if failures > _RETRIES and have:
                raise HubError(
                    f"{repository.name}: {_host()} broke off {file.path} again and again, at"
                    f" {_size(have)} of {_size(file.size_bytes)}: run the same command again, it"
                    " goes on where it was"
                ) from error
            if failures > _RETRIES:
                raise
            time.sleep(failures * _PAUSE_S)  # The hub gets rest.
    os.fsync(out.fileno())
    return fetched, digest.hexdigest() if have == file.size_bytes else ""


def _pieces(repository: Repository, file: HubFile, have: int) -> Iterator[tuple[int, bytes]]:
    """Yield a file's bytes behind the first ``have``, each piece with its place in the file."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(
        repository.name.repo, file.path, revision=repository.commit, endpoint=_endpoint()
    )
    # Compressed answers could not be continued.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        max_retries=2,
    ) as response:
        hf_raise_for_status(response)
        place = have if response.status_code == 206 else 0
        for piece in response.iter_bytes():  # As they come: a broken connection loses nothing.
            yield place, piece
            place += len(piece)


def _hash(file: HubFile) -> hashlib._Hash:
    """Return the beginning of the hash that ``file.digest`` is."""
    if len(file.digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)


def _link(blob: Path, place: Path) -> None:
    """Put a blob into a snapshot, as huggingface_hub does: a link, or a copy where none can be."""
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except PermissionError:  # A FAT file system has no links.
        shutil.copyfile(blob, place)


def _refer(repository: Repository) -> None:
    """Point the revision's name at the commit, whose files are all here."""
    revision = repository.name.revision or MAIN
    if revision != repository.commit:
        with _writing(repository.name):
            ref = repository.name.folder / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            replace_text(ref, repository.commit)


def _require_space(name: HubName, files: Iterable[HubFile]) -> None:
    """Raise HubError if the disk has less room than the files still need."""
    blobs, needed = name.folder / "blobs", 0
    for file in files:
        if not (blobs / file.digest).exists():
            partial = blobs / f"{file.digest}.incomplete"
            held = partial.stat().st_size if partial.exists() else 0
            needed += max(file.size_bytes - held, 0)
    cache = cache_directory()
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{name} needs {_size(needed)} more on the disk of {cache}, which has"
            f" {_size(free)} free: remove a model with `shoal rm`, or set HF_HOME to a folder"
            " on another disk"
        )


# ---- what went wrong ---------------------------------------------------------------------------


@contextmanager
def _writing(name: HubName) -> Iterator[None]:
    """Turn errors of the disk into HubError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, ConnectionError) or error.errno is None:
            raise
        cache = cache_directory()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise HubError(
                f"{name}: the disk of {cache} is full ({(error.strerror or '').lower()}): free some"
                " space, as with `shoal rm`, and run the same command again: it goes on where it"
                " was"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise HubError(
                f"{name}: the user {user_name()} may not write to {error.filename or cache}: set"
                " HF_HOME to a folder where it may"
            ) from error
        raise HubError(f"{name}: {error.filename or cache}: {error.strerror or error}") from error


@contextmanager
def _explained(name: HubName) -> Iterator[None]:
    """Turn errors of the hub and of the network into HubError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(_refused(name, error)) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"{_elsewhere(name, 'HF_HUB_OFFLINE forbids the network')}") from error
    except httpx.TransportError as error:
        why = f"{_host()} cannot be reached from {socket.gethostname()}"
        raise HubError(_elsewhere(name, why)) from error
    except (httpx.HTTPError, httpx.InvalidURL, json.JSONDecodeError) as error:
        raise HubError(f"{_host()} does not answer like a hub: is HF_ENDPOINT right?") from error


def _refused(name: HubName, error: HfHubHTTPError) -> str:
    """Say what an answer of the hub means, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import get_token

    status = error.response.status_code
    login = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, GatedRepoError):
        page = f"{_endpoint() or 'https://huggingface.co'}/{name.repo}"
        if get_token() is None:
            return f"{name.repo} is gated: accept its licence at {page}, then {login}"
        return (
            f"{name.repo} is gated, and the owner of your token has no access yet: accept its"
            f" licence at {page}, or {login} with another account's token"
        )
    if status == 401 and get_token() is not None:
        return f"{_host()} does not accept your token for {name.repo}: {login} with a valid one"
    if isinstance(error, RepositoryNotFoundError):
        private = "" if get_token() else f", or if it is private, {login}"
        return f"{_host()} has no model {name.repo}: check the name{private}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name.repo} has no revision {name.revision or MAIN}: give a branch, a tag or a commit"
            f" of it; without one it is {MAIN}"
        )
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{name.repo} has lost a file meanwhile: run the same command again"
    if status == 403:
        return f"{_host()} forbids your token to read {name.repo}: {login} with one that may"
    if status == 429:
        return f"{_host()} has had too many requests from here: wait some minutes, and try again"
    return f"{_host()} answers {status} for {name.repo}: try again later"


def _elsewhere(name: HubName, why: str) -> str:
    """Say how to bring a model to a machine that does not reach the hub."""
    return (
        f"{name} is not in the cache of {socket.gethostname()}, and {why}: run `shoal pull {name}`"
        f" where there is a network, and copy its ~/.cache/huggingface/hub/{name.folder.name} to"
        f" {name.folder.parent} here"
    )


def _endpoint() -> str | None:
    """The hub's address that HF_ENDPOINT says now, or None for the public one."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or None


def _host() -> str:
    return urlsplit(_endpoint() or "https://huggingface.co").netloc


def _size(count: int) -> str:
    """Return bytes as text in GiB, or in MiB if they are fewer than one."""
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.1f} MiB"


def _is_hex(text: str, length: int) -> bool:
    return len(text) == length and set(text) <= set("0123456789abcdef")


def _is_sound(file: HubFile) -> bool:
    """Whether a hub's description of a file can be used as a path and a blob's name."""
    path = PurePosixPath(file.path)
    inside = bool(file.path) and not path.is_absolute() and ".." not in path.parts
    return (
        inside
        and file.path.isprintable()
        and file.size_bytes >= 0
        and (_is_hex(file.digest, 64) or _is_hex(file.digest, 40))
    )

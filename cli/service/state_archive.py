"""``shoal coordinator export`` and ``import``: a coordinator moves to another machine.

The archive is a tar of small files of the state directory: the key, the devices and open tokens,
names, API keys, the loaded models, and what quality was measured. Agents know a coordinator by its
key. So they join the new machine without a new token. Models and quantized blocks are not in it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from api.key_book import FILE as KEYS_FILE
from api.key_book import LOCAL_FILE
from cli.argument_types import new_file
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.service.running import FILE as RUNNING_FILE
from cli.service.running import running_in
from cli.shared_arguments import add_book_argument
from coordinator.claim import claim
from coordinator.config import ConfigError
from coordinator.roster.book import FILE as BOOK_FILE
from coordinator.roster.book import BadBook, DeviceBook
from model.aging import by_use
from model.bounded import read_bytes
from model.durable import remove, replace_bytes
from wire.claim import shown
from wire.identity import Identity, IdentityError, own_identity
from wire.versions import shoal_version

IDENTITY = "identity.pem"
MANIFEST = "shoal-coordinator.json"
VERSION = 1

LEFT_OUT = (LOCAL_FILE, RUNNING_FILE)
"""Files that each start makes anew."""

OWN = frozenset((IDENTITY, BOOK_FILE, KEYS_FILE, "names.json", "loaded.json", "deployment.json"))
"""The files of a coordinator outside of folders. A user may keep others beside them."""

NOT_STATE = (".damaged", ".lock")

FOLDERS = ("quality", "losses")
"""Folders of small files that took long to measure."""

LARGEST_FILE_BYTES = 16 << 20
LARGEST_ARCHIVE_BYTES = 256 << 20
MOST_FILES = 16384
STREAM = Path("-")

_NAME = re.compile(rf"(?:(?:{'|'.join(FOLDERS)})/)?[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}")

_ABOUT = {
    "export": (
        "Write this coordinator's key and what it knows into a file.",
        "Whoever has the file is this coordinator for all agents, so keep it secret. Models and "
        "blocks are not in it. Stop the coordinator before another one takes its place.",
        "  sudo shoal coordinator export nano.tar\n"
        "  sudo shoal coordinator export - | ssh new-nano sudo shoal coordinator import -\n",
    ),
    "import": (
        "Take another coordinator's place, from a file of `shoal coordinator export`.",
        "The coordinator of this machine must be stopped. Agents that look for it by mDNS then "
        "join by themselves. Others need the new address.",
        "  sudo shoal coordinator import nano.tar  # stop the one of this machine before\n",
    ),
}


def add_archive_actions(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``export`` and ``import`` to the actions of ``shoal coordinator``."""
    for name, run in (("export", run_export), ("import", run_import)):
        summary, about, examples = _ABOUT[name]
        action = actions.add_parser(
            name, help=summary, description=f"{summary}\n\n{about}", epilog=f"examples:\n{examples}"
        )
        action.add_argument(
            "file",
            type=Path if name == "import" else new_file,
            metavar="FILE",
            help="The file. - is a pipe.",
        )
        if name == "import":
            action.add_argument(
                "--replace",
                action="store_true",
                help="Do it although devices have joined the coordinator of this machine. They "
                "need new tokens then.",
            )
        add_book_argument(action, argparse.SUPPRESS)
        action.set_defaults(run=run, config=None)


def run_export(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands.keys import coordinator_state_dir

    directory: Path = options.state_dir or coordinator_state_dir()
    if options.file == STREAM and sys.stdout.isatty():
        raise UsageError("the archive is no text: name a file, or send it through a pipe")
    if options.file != STREAM and options.file.exists():
        raise CommandFailed(f"{options.file} exists already: name another file")
    if options.file != STREAM and options.file.absolute().parent == directory.absolute():
        raise CommandFailed(f"{directory} is what is exported: name a file outside of it")
    with _reporting(directory):
        if not (directory / IDENTITY).exists():
            raise CommandFailed(f"{directory} has no coordinator's key: name its --state-dir")
        identity = own_identity(directory / IDENTITY)
        data = _packed(dict(_files(directory)))
        if options.file == STREAM:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        else:
            replace_bytes(options.file.absolute(), data)
    screen.note(
        f"exported the coordinator with the key {shown(identity.fingerprint)}; "
        "whoever has the archive can take its place"
    )
    if running_in(directory) is not None:
        screen.note("it runs: stop it before another one takes its place")


def run_import(options: argparse.Namespace, screen: Screen) -> None:
    from cli.commands.keys import coordinator_state_dir

    directory: Path = options.state_dir or coordinator_state_dir()
    with _reporting(directory):
        if options.file == STREAM:
            data = sys.stdin.buffer.read(LARGEST_ARCHIVE_BYTES + 1)
        else:
            data = read_bytes(options.file, LARGEST_ARCHIVE_BYTES)
        files = _unpacked(data)
        identity = _checked(files)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _claimed(directory):
            if not options.replace:
                _require_free(directory, identity)
            _write(directory, files)
    screen.note(
        f"this machine's coordinator has the key {shown(identity.fingerprint)} now; start it, and "
        "never the old one again; models must be at the same paths as there, copied with their "
        "times (rsync -a), or they are measured anew"
    )


@contextmanager
def _reporting(directory: Path) -> Iterator[None]:
    """Turn errors into CommandFailed."""
    try:
        yield
    except PermissionError as error:
        raise CommandFailed(
            f"{error.filename or directory}: permission denied: run this with sudo, or name "
            "another state directory with --state-dir"
        ) from error
    except (BadBook, IdentityError, ValueError) as error:
        raise CommandFailed(str(error)) from error


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Keep coordinators from starting with this state directory. Raises CommandFailed."""
    try:
        lock = claim(directory)
    except ConfigError as error:
        raise CommandFailed(str(error)) from error
    if lock is None:
        raise CommandFailed("a coordinator runs with this state directory: stop it first")
    with lock:
        yield


def _files(directory: Path) -> Iterator[tuple[str, bytes]]:
    """The names and contents of all files that belong into an archive. Raises ValueError.

    Those of a folder are in the order of their times.
    """
    for folder in ("", *FOLDERS):
        if (directory / folder).is_symlink() and folder:
            continue  # Root exports, and a service that was taken over may have made links.
        found = (directory / folder).glob("*")
        # Of measurements the newest counts.
        for path in by_use(one for one in found if one.is_file() and not one.is_symlink()):
            name = f"{folder}/{path.name}" if folder else path.name
            is_taken = _NAME.fullmatch(name) and path.suffix not in NOT_STATE
            if is_taken and name not in LEFT_OUT:
                try:
                    yield name, read_bytes(path, LARGEST_FILE_BYTES)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}: move it elsewhere") from error


def _packed(files: Mapping[str, bytes]) -> bytes:
    listed = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = json.dumps({"version": VERSION, "shoal": shoal_version(), "files": listed}).encode()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, data in {MANIFEST: manifest, **files}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
    return made.getvalue()


def _unpacked(data: bytes) -> dict[str, bytes]:
    """The files in an archive, which may be anybody's. Raises ValueError."""
    if len(data) > LARGEST_ARCHIVE_BYTES:
        raise ValueError("the archive is larger than any of `shoal coordinator export`")
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for member in archive:
                files[member.name] = _content(archive, member, files)
        manifest = json.loads(files.pop(MANIFEST))
        if manifest["version"] != VERSION:
            raise ValueError(f"it is of version {manifest['version']!r:.20}")
        if IDENTITY not in files:
            raise ValueError("it has no key")
        # The end of a file that was cut looks like the end of an archive.
        for name, sha256 in manifest.get("files", {}).items():
            if name not in files or hashlib.sha256(files[name]).hexdigest() != sha256:
                raise ValueError(f"its {name!r:.60} is not whole")
    except (
        tarfile.TarError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        EOFError,
        RecursionError,
    ) as error:
        reason = "it has no list" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"this is no whole archive of `shoal coordinator export` of this version ({reason})"
        ) from error
    return {name: content for name, content in files.items() if name not in LEFT_OUT}


def _content(
    archive: tarfile.TarFile, member: tarfile.TarInfo, before: Mapping[str, bytes]
) -> bytes:
    """The content of a member that a state directory may have. Raises ValueError, TarError."""
    is_plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if not _NAME.fullmatch(member.name) or member.name in FOLDERS or not is_plain:
        raise ValueError(f"it has {member.name!r:.60}")
    if member.name in before:
        raise ValueError(f"it has {member.name!r:.60} twice")
    if not 0 <= member.size <= LARGEST_FILE_BYTES or len(before) >= MOST_FILES:
        raise ValueError(f"its {member.name!r:.60} is too large, or one of too many")
    content = archive.extractfile(member)
    return b"" if content is None else content.read()


def _checked(files: Mapping[str, bytes]) -> Identity:
    """The identity in an archive. Raises IdentityError, BadBook if what counts is damaged."""
    with tempfile.TemporaryDirectory(prefix="shoal-import-") as name:
        for file, content in files.items():
            if "/" not in file:
                replace_bytes(Path(name, file), content)
        DeviceBook(Path(name)).devices()
        return own_identity(Path(name, IDENTITY))


def _require_free(directory: Path, identity: Identity) -> None:
    """Raise CommandFailed if devices know this machine's coordinator by another key."""
    if not (directory / IDENTITY).exists():
        return
    own = own_identity(directory / IDENTITY)
    devices = DeviceBook(directory).devices()
    if devices and own.fingerprint != identity.fingerprint:
        joined = "1 device has" if len(devices) == 1 else f"{len(devices)} devices have"
        raise CommandFailed(
            f"{joined} joined the coordinator of this machine, whose key is "
            f"{shown(own.fingerprint)}: --replace forgets what has joined"
        )


def _write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files, the key last, for the owner of the directory."""
    owner = directory.stat()

    def give(descriptor: int) -> None:
        if os.geteuid() == 0:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)

    for name in files:
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a folder, and the archive has a file: move it")
        folder = (directory / name).parent
        if folder != directory and folder.is_symlink():
            raise ValueError(f"{folder} is a link: remove it")
    # Whatever fails, such as a full disk, fails before anything is changed.
    with tempfile.TemporaryDirectory(dir=directory, prefix=".import-") as staged:
        for index, content in enumerate(files.values()):
            path = Path(staged, str(index))
            replace_bytes(path, content, prepare=give)
            time_s = path.stat().st_mtime - len(files) + index
            os.utime(path, (time_s, time_s))  # One file after the other, in their order.
        for folder in {path.parent for path in map(directory.joinpath, files)}:
            if not folder.exists():
                folder.mkdir(mode=0o750)
                if os.geteuid() == 0:
                    os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)
        for name in OWN - files.keys():  # What else this machine knew, such as a loaded model.
            remove(directory / name)
        for index, name in sorted(enumerate(files), key=lambda item: item[1] == IDENTITY):
            Path(staged, str(index)).replace(directory / name)

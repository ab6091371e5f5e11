"""``install`` and ``uninstall`` of ``shoal agent`` and ``shoal coordinator``, as systemd services.

The files and commands are planned first, and then carried out. So ``--dry-run`` shows exactly what
would happen, and ``--root`` does the same below a directory. Templates are in systemd/.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.doctor.hardware import corals, has_nvidia_driver, is_jetson
from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.service.settings import parse_toml, settings_of
from cli.service.token_input import given_invite
from model.durable import replace_text
from wire.invite import TokenError
from wire.messages import Endpoint
from wire.sizes import parse_size

DEFAULT_COMMAND = Path("/opt/shoal/bin/shoal")
"""The command in the templates, where install.sh puts it."""

KINDS = ("agent", "coordinator")
UNITS = Path("/etc/systemd/system")
SYSUSERS = Path("/etc/sysusers.d/shoal.conf")
TMPFILES = Path("/etc/tmpfiles.d/shoal.conf")
CONFIG = Path("/etc/shoal")
TOKEN = CONFIG / "token"
STATE = Path("/var/lib/shoal")
_GIVEN = "given_"
"""The beginning of an attribute with a setting that is given behind ``install``."""

_EXAMPLE = {
    "agent": "--token-file -  # asks for the token",
    "coordinator": "--http 0.0.0.0:7421",
}

OWN_MEMORY_BYTES = 384 << 20
"""The memory of an agent beside its stage, which --memory bounds.

It covers the interpreter and libraries (95 MB with ONNX Runtime), two segments of 128 MiB during a
load, and files that were just read."""

GROWING_PAUSES_VERSION = 254
"""The first version of systemd with RestartSteps."""


@dataclass(frozen=True, slots=True)
class File:
    """A file to write. Its owner is root, and systemd-tmpfiles sets its group."""

    path: Path
    text: str
    mode: int = 0o644


@dataclass(slots=True)
class Work:
    """The steps of an installation or a removal, in this order."""

    commands_before: list[list[str]] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    links: dict[Path, str] = field(default_factory=dict)
    removed: list[Path] = field(default_factory=list)
    removed_if_empty: list[Path] = field(default_factory=list)
    commands: list[list[str]] = field(default_factory=list)


def add_service_actions(parser: argparse.ArgumentParser) -> None:
    """Add ``install`` and ``uninstall`` to the command of a service."""
    kind = parser.prog.rpartition(" ")[2]
    settings = settings_of(parser)
    settings.pop("state_dir", None)
    is_coordinator = kind == "coordinator"
    more = " | export | import" if is_coordinator else ""
    actions = parser.add_subparsers(dest="action", metavar=f"install | uninstall{more}")
    install = actions.add_parser(
        "install",
        help=f"Make the {kind} a systemd service of this machine, or upgrade it.",
        description=f"Make the {kind} a systemd service of this machine, or upgrade it.\n\n"
        f"The options given here are written to {CONFIG}/{kind}.toml. Other settings in that file "
        "stay as they are. It needs root, except with --dry-run or --root.",
        epilog="examples:\n"
        f"  sudo shoal {kind} install --dry-run\n"
        f"  sudo shoal {kind} install {_EXAMPLE[kind]}\n"
        f"  shoal {kind} install --root image/  # for packagers\n",
    )
    for action in settings.values():
        install._add_action(_as_setting(action))
    install.add_argument(
        "--cpu-weight",
        type=int,
        metavar="1..10000",
        help="The service's share of a busy processor, where other services have 100. "
        "Default: as the unit file says.",
    )
    install.add_argument(
        "--command",
        dest="executable",
        type=Path,
        metavar="FILE",
        help="The shoal command that the service starts. Default: the running one.",
    )
    install.add_argument(
        "--no-start", action="store_true", help="Enable the service, but do not start it now."
    )
    summary = "Remove the service, its settings and its data."
    uninstall = actions.add_parser(
        "uninstall",
        help=summary,
        description=summary,
        epilog="examples:\n"
        f"  sudo shoal {kind} uninstall --dry-run\n"
        f"  sudo shoal {kind} uninstall --keep-data\n",
    )
    uninstall.add_argument("--yes", action="store_true", help="Remove data without asking.")
    uninstall.add_argument("--keep-data", action="store_true", help="Keep blocks and settings.")
    for sub, run in ((install, run_install), (uninstall, run_uninstall)):
        sub.add_argument("--dry-run", action="store_true", help="Show what would be done.")
        sub.add_argument(
            "--root",
            type=Path,
            metavar="DIR",
            help="Treat DIR as the root of the system. Start and stop nothing.",
        )
        # It changes the settings file, and does not obey it.
        sub.set_defaults(run=run, kind=kind, parser=parser, config=None, settings=settings)
    if is_coordinator:
        # It needs packages that a machine with an agent alone does not have.
        from cli.service.state_archive import add_archive_actions

        add_archive_actions(actions)


def _as_setting(action: argparse.Action) -> argparse.Action:
    """The same option with the same checks, whose value is None unless it is given.

    So a default that is given replaces what the settings file says.
    """
    copied = copy.copy(action)
    copied.dest = f"{_GIVEN}{action.dest}"
    copied.default = None
    # Help texts have % signs, and name the default of the service.
    copied.help = (str(action.help) % {"default": action.default}).replace("%", "%%")
    if action.nargs != 0 and action.metavar is None and action.choices is None:
        copied.metavar = action.dest.upper()
    return copied


def run_install(options: argparse.Namespace, screen: Screen) -> None:
    _require_systemd(options)
    work = plan_install(options, options.root or Path("/"))
    _carry_out(work, options, screen)
    if options.dry_run:
        return
    if options.root is not None:
        screen.note(f"shoal-{options.kind} is installed below {options.root}")
        return
    screen.note(
        f"shoal-{options.kind} is installed and enabled; "
        f"`systemctl status shoal-{options.kind}` shows its state, "
        f"settings are in {CONFIG}/{options.kind}.toml"
    )
    if options.kind == "coordinator":
        screen.note("`sudo shoal token create` lets a device join, and prints what to type there")
    elif not TOKEN.exists() and not (STATE / "agent" / "coordinator-fingerprint").exists():
        screen.note(
            "this device has no token yet: `sudo shoal token create` where the coordinator runs "
            "prints one, and what to type here"
        )


def run_uninstall(options: argparse.Namespace, screen: Screen) -> None:
    _require_systemd(options)
    root = options.root or Path("/")
    data = [path for path in _data(options.kind) if _below(root, path).exists()]
    if not (options.yes or options.keep_data or options.dry_run or not data):
        if not sys.stdin.isatty():
            raise UsageError("the data would be removed too: give --yes, or --keep-data to keep it")
        names = ", ".join(map(str, data))
        if input(f"Remove {names} for good? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CommandFailed("nothing was removed; --keep-data removes all but the data")
    _carry_out(plan_uninstall(options, root), options, screen)
    if not options.dry_run:
        screen.note(f"shoal-{options.kind} is removed")


def plan_install(options: argparse.Namespace, root: Path) -> Work:
    """Plan an installation. Raises UsageError, CommandFailed."""
    kind: str = options.kind
    if options.state_dir is not None:
        raise UsageError(f"--state-dir: a service keeps its state in {STATE / kind}")
    work = Work()
    command = _command(options)
    unit = f"shoal-{kind}.service"
    drop_ins = UNITS / f"{unit}.d"
    work.files.append(
        File(UNITS / unit, template(unit).replace(str(DEFAULT_COMMAND), str(command)))
    )
    work.files.append(File(SYSUSERS, template("shoal.sysusers")))
    work.files.append(File(TMPFILES, template("shoal.tmpfiles")))

    given = _given(options)
    token_file = given.pop("token_file", None)
    if kind == "agent":
        token = _token(token_file)
        if token is not None:
            work.files.append(File(TOKEN, token + "\n", 0o600))
        if token is not None or _below(root, TOKEN).exists():
            given["token_file"] = str(TOKEN)
    elif token_file is not None:
        raise UsageError(
            "--token-file: an installed coordinator needs no token: `sudo shoal token create` "
            "makes one for each device"
        )
    config = CONFIG / f"{kind}.toml"
    before = _existing(_below(root, config)) or template(f"{kind}.toml")
    if kind == "coordinator":
        before = _without_setting(before, "token_file")  # Of a version in which all had one token.
    text = with_settings(before, given)
    work.files.append(File(config, text))

    wanted = _wanted_drop_ins(options, root, text)
    for name, content in wanted.items():
        work.files.append(File(drop_ins / name, content))
    for name in ("limits.conf", "backoff.conf", "coral.conf", "jetson.conf", "nvidia.conf"):
        if name not in wanted and _below(root, drop_ins / name).exists():
            work.removed.append(drop_ins / name)

    if options.root is not None:
        work.links[UNITS / "multi-user.target.wants" / unit] = f"../{unit}"
        return work
    work.commands = [
        ["systemd-sysusers", str(SYSUSERS)],
        ["systemd-tmpfiles", "--create", str(TMPFILES)],
        ["systemctl", "daemon-reload"],
        ["systemctl", "--quiet", "enable", unit],
    ]
    if not options.no_start:
        work.commands.append(["systemctl", "restart", unit])
    return work


def _wanted_drop_ins(options: argparse.Namespace, root: Path, text: str) -> dict[str, str]:
    """Return the drop-ins of a unit whose settings are ``text``, by file name."""
    config = CONFIG / f"{options.kind}.toml"
    before = UNITS / f"shoal-{options.kind}.service.d" / "limits.conf"
    limits = _limits(options, text, config, _existing(_below(root, before)))
    wanted = {"limits.conf": limits} if limits else {}
    if options.root is None and _systemd_version() >= GROWING_PAUSES_VERSION:
        wanted["backoff.conf"] = template("backoff.conf")
    if options.kind == "agent":
        # ``root`` is / unless an image is prepared.
        hardware = {
            "coral.conf": bool(corals(root)),
            "jetson.conf": is_jetson(root),
            "nvidia.conf": has_nvidia_driver(root),
        }
        wanted |= {name: template(name) for name, present in hardware.items() if present}
    return wanted


def plan_uninstall(options: argparse.Namespace, root: Path) -> Work:
    """Plan a removal. Files that the other service needs stay."""
    kind: str = options.kind
    unit = f"shoal-{kind}.service"
    other = next(name for name in KINDS if name != kind)
    last = not _below(root, UNITS / f"shoal-{other}.service").exists()
    work = Work()
    work.removed = [
        UNITS / unit,
        UNITS / f"{unit}.d",
        UNITS / "multi-user.target.wants" / unit,
    ]
    if not options.keep_data:
        work.removed += _data(kind)
        if last:
            work.removed += [TOKEN, SYSUSERS, TMPFILES]
            # The other service's data may still be there.
            work.removed_if_empty = [CONFIG, STATE, SYSUSERS.parent]
    if options.root is None:
        if _below(root, UNITS / unit).exists():
            work.commands_before = [["systemctl", "--quiet", "disable", "--now", unit]]
        work.commands = [["systemctl", "daemon-reload"]]
        if last and not options.keep_data and _has_user():
            work.commands.append(["userdel", "shoal"])
    work.removed = [path for path in work.removed if os.path.lexists(_below(root, path))]
    return work


def template(name: str) -> str:
    """The text of a template, from the installed package or the source tree."""
    package = Path(__file__).parents[1]
    for directory in (package / "units", package.parent / "systemd"):
        if (directory / name).exists():
            return (directory / name).read_text(encoding="utf-8")
    raise CommandFailed(f"this installation lacks its template {name}: install it again")


def with_settings(text: str, settings: dict[str, Any]) -> str:
    """A settings file's ``text`` with these values. They replace lines, also commented ones."""
    for name, value in settings.items():
        line = f"{name} = {_toml(value)}"
        pattern = re.compile(rf"^#?[ \t]*{re.escape(name)}[ \t]*=.*$", re.MULTILINE)
        found = pattern.search(text)
        if found is None:
            text += f"{line}\n"
        else:
            text = text[: found.start()] + line + text[found.end() :]
    return text


def _without_setting(text: str, name: str) -> str:
    """A settings file's ``text`` with the lines that set ``name`` made comments."""
    return re.sub(rf"^(?=[ \t]*{re.escape(name)}[ \t]*=)", "#", text, flags=re.MULTILINE)


def _toml(value: object) -> str:
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Endpoint):
        host = f"[{value.host}]" if ":" in value.host else value.host
        return json.dumps(f"{host}:{value.port}" if value.port else host)
    if isinstance(value, list):
        return json.dumps(",".join(value))
    return json.dumps(str(value))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings given behind ``install`` or before it, with sizes such as 3G."""
    given = {}
    for name, action in options.settings.items():
        value, before = getattr(options, f"{_GIVEN}{name}"), getattr(options, name)
        if value is None and before == action.default:
            continue
        value = before if value is None else value
        if isinstance(value, int) and action.metavar == "SIZE":
            value = _exact_size(value)
        given[name] = value
    return given


def _exact_size(size_bytes: int) -> str:
    for unit, shift in (("G", 30), ("M", 20), ("K", 10)):
        if size_bytes % (1 << shift) == 0:
            return f"{size_bytes >> shift}{unit}"
    return str(size_bytes)


def _token(token_file: Path | None) -> str | None:
    """The token to write, or None to keep the present one. Raises UsageError."""
    try:
        invite = given_invite(token_file)
    except TokenError as error:
        raise UsageError(str(error)) from error
    return None if invite is None else invite.text


def _limits(options: argparse.Namespace, text: str, config: Path, before: str) -> str:
    """The drop-in with the service's limits, or "" if it has none."""
    lines = []
    memory = parse_toml(text, config).get("memory")
    if options.kind == "agent" and memory is not None:
        try:
            limit_bytes = parse_size(str(memory)) + OWN_MEMORY_BYTES
        except ValueError as error:
            raise UsageError(f"{config}: memory: {error}") from error
        lines.append(f"MemoryMax={limit_bytes >> 20}M")
    weight = options.cpu_weight
    if weight is None:
        found = re.search(r"^CPUWeight=(\d+)$", before, re.MULTILINE)
        weight = int(found[1]) if found else None
    if weight is not None:
        if not 1 <= weight <= 10000:
            raise UsageError(f"--cpu-weight {weight}: must be between 1 and 10000")
        lines.append(f"CPUWeight={weight}")
    if not lines:
        return ""
    return "\n".join(["# From the settings, by `shoal install`.", "[Service]", *lines, ""])


def _command(options: argparse.Namespace) -> Path:
    if options.executable is not None:
        executable: Path = options.executable
        return executable.absolute()
    if options.root is not None:
        return DEFAULT_COMMAND
    command = Path(sys.prefix, "bin", "shoal")
    if not command.exists():
        raise CommandFailed(
            f"{command} does not exist: install shoal with install.sh, or name its command with "
            "--command"
        )
    if command.is_relative_to("/home") or command.is_relative_to("/root"):
        raise CommandFailed(
            f"{command} is in a home directory, which the service cannot see: "
            f"install into {DEFAULT_COMMAND.parents[1]} with install.sh"
        )
    return command


def _require_systemd(options: argparse.Namespace) -> None:
    if options.root is not None or options.dry_run:
        return
    if not Path("/run/systemd/system").is_dir():
        raise CommandFailed(
            "this machine does not run systemd: start `shoal` with its own service manager, "
            "or prepare an image with --root"
        )
    if os.geteuid() != 0:
        raise CommandFailed(f"only root can change services: sudo shoal {options.kind} ...")


def _systemd_version() -> int:
    try:
        shown = subprocess.run(
            ["systemctl", "--version"],  # noqa: S607 - its path differs by system
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    found = re.match(r"systemd (\d+)", shown)
    return int(found[1]) if found else 0


def _carry_out(work: Work, options: argparse.Namespace, screen: Screen) -> None:
    root: Path = options.root or Path("/")
    if options.dry_run:
        _show(work, root, screen)
        return
    _run(work.commands_before)
    for path in work.removed:
        target = _below(root, path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)
    for path in work.removed_if_empty:
        with contextlib.suppress(OSError):
            _below(root, path).rmdir()
    for file in work.files:
        target = _below(root, file.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, file.text, mode=file.mode)
    for path, points_to in work.links.items():
        target = _below(root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(points_to)
    _run(work.commands)


def _run(commands: Sequence[Sequence[str]]) -> None:
    for command in commands:
        try:
            completed = subprocess.run(  # noqa: S603 - built here
                command, capture_output=True, text=True, check=False
            )
        except FileNotFoundError as error:
            raise CommandFailed(f"{command[0]} is missing on this machine") from error
        if completed.returncode:
            said = (completed.stderr or completed.stdout).strip().splitlines()
            reason = said[0] if said else f"exit code {completed.returncode}"
            raise CommandFailed(f"`{' '.join(command)}` failed: {reason}")


def _show(work: Work, root: Path, screen: Screen) -> None:
    """Print the steps like shell commands."""
    for command in work.commands_before:
        screen.text(f"$ {' '.join(command)}\n")
    for path in work.removed:
        screen.text(f"remove {_below(root, path)}\n")
    for path in work.removed_if_empty:
        screen.text(f"remove {_below(root, path)} if it is empty\n")
    for file in work.files:
        hidden = file.path == TOKEN
        text = "(the token)\n" if hidden else file.text
        screen.text(f"--- {_below(root, file.path)} (mode {file.mode:04o})\n{text}\n")
    for path, target in work.links.items():
        screen.text(f"link {_below(root, path)} -> {target}\n")
    for command in work.commands:
        screen.text(f"$ {' '.join(command)}\n")


def _data(kind: str) -> list[Path]:
    """The data that a user may want to keep."""
    return [STATE / kind, CONFIG / f"{kind}.toml"]


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _existing(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _has_user() -> bool:
    return any(entry.pw_name == "shoal" for entry in pwd.getpwall())

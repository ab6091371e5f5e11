"""A coordinator's archive: what is in it, who may read it, and archives that are none."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cli.main import main
from cli.service.running import Running, told
from cli.service.state_archive import MANIFEST, VERSION
from coordinator.roster.book import DeviceBook
from coordinator.roster.names import NameBook
from model.aging import by_use
from wire.claim import Claim, prove_invite
from wire.identity import own_identity

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The state of a coordinator that one device has joined."""
    return coordinator(tmp_path / "old", "attic")


def coordinator(directory: Path, *devices: str) -> Path:
    directory.mkdir()
    fingerprint = own_identity(directory / "identity.pem").fingerprint
    book = DeviceBook(directory)
    for device in devices:
        invite = book.invite(fingerprint)
        proof = prove_invite(invite.secret, b"text")
        book.admit(Claim(b"k" * 32, "control", device, invite.id, b"text", proof))
        NameBook(directory).assign(device, f"{device}-pi", ())
    return directory


def state(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.suffix != ".lock"
    }


def export(directory: Path, file: Path) -> int:
    return main(["coordinator", "export", str(file), f"--state-dir={directory}"])


def take(directory: Path, file: Path, *options: str) -> int:
    return main(["coordinator", "import", str(file), f"--state-dir={directory}", *options])


def test_a_coordinator_is_the_same_on_another_machine(old: Path, tmp_path: Path) -> None:
    (old / "quality").mkdir()
    (old / "quality" / "x.json").write_text("{}")
    (old / "loaded.json").write_text('{"request": 1}')
    kept = state(old)
    (old / "artifacts").mkdir()
    (old / "artifacts" / ("a" * 64)).write_bytes(b"a block")
    (old / "local-key").write_text("of this machine")
    (old / "names.damaged").write_text("")
    (old / "coordinator.lock").write_text("")
    file = tmp_path / "old.tar"
    assert export(old, file) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    new = tmp_path / "new"
    assert take(new, file) == 0
    assert state(new) == kept
    assert stat.S_IMODE((new / "identity.pem").stat().st_mode) == 0o600
    assert [item.device for item in DeviceBook(new).devices()] == ["attic"]
    assert take(new, file) == 0  # Again is the same.
    assert state(new) == kept


def test_what_was_measured_last_is_so_on_the_other_machine(old: Path, tmp_path: Path) -> None:
    """Plans take the newest measurements of a model."""
    (old / "quality").mkdir()
    for age_s, name in enumerate(("b.json", "c.json", "a.json")):
        (old / "quality" / name).write_text("{}")
        os.utime(old / "quality" / name, (1e9 - age_s, 1e9 - age_s))
    file, new = tmp_path / "old.tar", tmp_path / "new"
    assert export(old, file) == 0
    assert take(new, file) == 0
    assert [path.name for path in by_use((new / "quality").iterdir())] == [
        *("a.json", "c.json", "b.json")
    ]


def test_an_archive_is_not_made_inside_of_what_it_holds(
    old: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Each later one would hold it, and an import would put it, with its key, on the machine."""
    assert export(old, old / "backup") == 1
    assert "name a file outside of it" in capsys.readouterr().err
    assert not (old / "backup").exists()
    with (old / "core").open("wb") as file:
        file.truncate(1 << 30)
    assert export(old, tmp_path / "old.tar") == 1
    assert f"{old / 'core'}: larger than 16 MiB" in capsys.readouterr().err


def test_a_users_own_files_survive_an_import(old: Path, tmp_path: Path) -> None:
    """A certificate for HTTPS, for instance, lies where the service can read it."""
    file, new = tmp_path / "old.tar", coordinator(tmp_path / "new")
    (new / "fullchain.pem").write_text("a certificate")
    (new / "loaded.json").write_text("a model")
    assert export(old, file) == 0
    assert take(new, file) == 0
    assert (new / "fullchain.pem").read_text() == "a certificate"
    assert not (new / "loaded.json").exists()


def test_it_passes_through_a_pipe(
    old: Path,
    tmp_path: Path,
    capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert export(old, Path("-")) == 0
    data = capfdbinary.readouterr().out
    with io.TextIOWrapper(io.BytesIO(data)) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert take(tmp_path / "new", Path("-")) == 0
    assert state(tmp_path / "new") == state(old)


def test_a_coordinator_with_devices_is_not_replaced_unasked(
    old: Path, tmp_path: Path, capsys: Capture
) -> None:
    """One that nobody has joined is, because an installation makes one."""
    file = tmp_path / "old.tar"
    assert export(old, file) == 0
    fresh, used = coordinator(tmp_path / "fresh"), coordinator(tmp_path / "used", "cellar")
    (fresh / "loaded.json").write_text("a model of its own")
    assert take(fresh, file) == 0
    assert state(fresh) == state(old)
    before = state(used)
    assert take(used, file) == 1
    assert "1 device has joined the coordinator of this machine" in capsys.readouterr().err
    assert state(used) == before
    assert take(used, file, "--replace") == 0
    assert state(used) == state(old)


def test_a_running_coordinator_is_left_alone(old: Path, tmp_path: Path, capsys: Capture) -> None:
    file, new = tmp_path / "old.tar", coordinator(tmp_path / "new")
    with told(old, Running(os.getpid(), "", 7420, "shoal", "", "")):
        assert export(old, file) == 0
        assert "it runs: stop it" in capsys.readouterr().err
    before = state(new)
    # Its own lock says so. The file of a killed one may name another process.
    (new / "running.json").write_text("nonsense")
    code = (
        "import sys; from coordinator.claim import *; "
        "lock = claim(Path(sys.argv[1])); print(flush=True); input()"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        [*command, str(new)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as runs:
        assert runs.stdout is not None
        runs.stdout.readline()
        assert take(new, file) == 1
        assert "stop it first" in capsys.readouterr().err
        runs.communicate(b"\n")
    (new / "running.json").unlink()
    assert state(new) == before
    with told(new, Running(os.getpid(), "", 7420, "shoal", "", "")):
        assert take(new, file) == 0
    assert export(old, file) == 1  # It never overwrites a file.
    assert "exists already" in capsys.readouterr().err


def archive(path: Path, *members: tuple[str, bytes, bytes]) -> Path:
    """A tar of (name, type, content)."""
    with tarfile.open(path, "w") as made:
        for name, kind, content in members:
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, len(content)
            member.linkname = "/etc/passwd"
            made.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/b", "quality/../../evil", ".ssh", "quality/.x", ""]
)
def test_an_archive_writes_nowhere_else(
    name: str, old: Path, tmp_path: Path, capsys: Capture
) -> None:
    manifest = json.dumps({"version": VERSION}).encode()
    key = (old / "identity.pem").read_bytes()
    regular = tarfile.REGTYPE
    parts = [(MANIFEST, regular, manifest), ("identity.pem", regular, key)]
    file = archive(tmp_path / "x.tar", *parts, (name, regular, b"x"))
    assert take(tmp_path / "new", file) == 1
    assert "this is no whole archive" in capsys.readouterr().err
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        file = archive(tmp_path / "x.tar", *parts, ("loaded.json", kind, b""))
        assert take(tmp_path / "new", file) == 1
    assert not (tmp_path / "new").exists()


def test_an_archive_that_is_cut_or_damaged_changes_nothing(
    old: Path, tmp_path: Path, capsys: Capture
) -> None:
    file = tmp_path / "old.tar"
    assert export(old, file) == 0
    data = file.read_bytes()
    key = data.index(b"PRIVATE KEY") + 40
    for wrong in (b"", b"x" * 2000, data[:700], data[:key] + b"####" + data[key + 4 :]):
        file.write_bytes(wrong)
        assert take(tmp_path / "new", file) == 1
        assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert export(tmp_path / "nowhere", tmp_path / "y.tar") == 1
    assert "has no coordinator's key" in capsys.readouterr().err


def parts(old: Path) -> list[tuple[str, bytes, bytes]]:
    """An archive's list and key, as members."""
    manifest = json.dumps({"version": VERSION}).encode()
    key = (old / "identity.pem").read_bytes()
    return [(MANIFEST, tarfile.REGTYPE, manifest), ("identity.pem", tarfile.REGTYPE, key)]


def test_an_archive_cannot_fill_the_memory(old: Path, tmp_path: Path, capsys: Capture) -> None:
    """A sparse file of a few bytes says that it has a terabyte of zeros."""
    file = tmp_path / "x.tar"
    with tarfile.open(file, "w", format=tarfile.PAX_FORMAT) as made:
        for name, _, content in parts(old):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
        sparse = tarfile.TarInfo("loaded.json")
        sparse.pax_headers = {
            "GNU.sparse.major": "0",
            "GNU.sparse.minor": "1",
            "GNU.sparse.map": "0,0",
            "GNU.sparse.size": str(64 << 20),
        }
        made.addfile(sparse)
    assert take(tmp_path / "new", file) == 1
    assert "it has 'loaded.json'" in capsys.readouterr().err
    large = [("loaded.json", tarfile.REGTYPE, bytes((16 << 20) + 1))]
    assert take(tmp_path / "new", archive(file, *parts(old), *large)) == 1
    assert "its 'loaded.json' is too large" in capsys.readouterr().err
    twice = [("loaded.json", tarfile.REGTYPE, b"{}")] * 2
    assert take(tmp_path / "new", archive(file, *parts(old), *twice)) == 1
    assert "it has 'loaded.json' twice" in capsys.readouterr().err
    deep = [(MANIFEST, tarfile.REGTYPE, b"[" * 200_000), parts(old)[1]]
    assert take(tmp_path / "new", archive(file, *deep)) == 1
    assert "this is no whole archive" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_archive_that_lacks_its_end_is_not_taken(
    old: Path, tmp_path: Path, capsys: Capture
) -> None:
    """It is cut between two files, so each of those that are there is whole."""
    file = tmp_path / "old.tar"
    assert export(old, file) == 0
    with tarfile.open(file) as made:
        last = made.getmembers()[-1]
    file.write_bytes(file.read_bytes()[: last.offset])
    assert take(tmp_path / "new", file) == 1
    assert f"its {last.name!r} is not whole" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_nothing_is_half_imported(old: Path, tmp_path: Path, capsys: Capture) -> None:
    """The archive has a file where this machine has a folder."""
    new = coordinator(tmp_path / "new")
    (new / "artifacts").mkdir()
    before = state(new)
    for name in ("artifacts", "quality"):
        wrong = archive(tmp_path / "x.tar", *parts(old), (name, tarfile.REGTYPE, b"x"))
        assert take(new, wrong) == 1
        assert "error:" in capsys.readouterr().err
        assert state(new) == before


def test_links_of_a_service_that_was_taken_over_are_not_followed(
    old: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Root exports and imports, and reaches more files than the service."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "secret.json").write_text("of another user")
    (old / "names.json").unlink()
    (old / "names.json").symlink_to(precious / "secret.json")
    (old / "quality").symlink_to(precious)
    file = tmp_path / "old.tar"
    assert export(old, file) == 0
    assert b"of another user" not in file.read_bytes()

    (old / "quality").unlink()
    (old / "quality").mkdir()
    (old / "quality" / "x.json").write_text("{}")
    file = tmp_path / "with-quality.tar"
    assert export(old, file) == 0
    new = coordinator(tmp_path / "new")
    (new / "quality").symlink_to(precious)
    assert take(new, file) == 1
    assert "quality is a link: remove it" in capsys.readouterr().err
    assert [path.name for path in precious.iterdir()] == ["secret.json"]


def test_a_small_archive_of_a_huge_file_is_none(old: Path, tmp_path: Path, capsys: Capture) -> None:
    """A sparse file of any size takes 512 bytes in a tar."""
    manifest = json.dumps({"version": VERSION}).encode()
    key = (old / "identity.pem").read_bytes()
    parts = [(MANIFEST, tarfile.REGTYPE, manifest), ("identity.pem", tarfile.REGTYPE, key)]
    file = archive(tmp_path / "x.tar", *parts, ("loaded.json", tarfile.GNUTYPE_SPARSE, b""))
    data = bytearray(file.read_bytes())
    header = data.index(b"loaded.json")
    data[header + 483 : header + 495] = b"%011o\0" % (64 << 20)
    data[header + 148 : header + 156] = b" " * 8
    data[header + 148 : header + 156] = b"%06o\0 " % sum(data[header : header + 512])
    file.write_bytes(data)
    assert take(tmp_path / "new", file) == 1
    assert "this is no whole archive" in capsys.readouterr().err

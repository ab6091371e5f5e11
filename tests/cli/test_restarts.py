"""Which failures at a start end with 2, after which a service is not restarted (cli/errors.py).

What may mend itself ends with 1: a disk that is mounted later, another process that is ending.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from agent.config import claim
from cli.main import main
from wire.invite import new_invite

Capture = pytest.CaptureFixture[str]
MENDS_ITSELF, NEEDS_A_PERSON = 1, 2


def _token(directory: Path, text: str, mode: int = 0o600) -> Path:
    path = directory / "token"
    path.write_text(text)
    path.chmod(mode)
    return path


def _damaged(name: str) -> Callable[[Path], list[str]]:
    def damage(state: Path) -> list[str]:
        (state / "coordinator-fingerprint").write_text(bytes(32).hex())
        path = state / name
        path.write_text("")
        path.chmod(0o600)
        return []

    return damage


def _with_token(text: str, mode: int = 0o600) -> Callable[[Path], list[str]]:
    return lambda state: [f"--token-file={_token(state, text, mode)}"]


VALID = new_invite(bytes(32)).text

WRONG_AGENTS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "name": (lambda state: ["--name", "my pi"], "name 'my pi'"),
    "memory": (lambda state: ["--memory", "0"], "memory 0"),
    "no token": (lambda state: [], "a token is needed"),
    "a token that is none": (_with_token("hello"), "this is no token"),
    "a token for everybody": (_with_token(VALID, 0o644), "chmod o="),
    "fingerprint": (_damaged("coordinator-fingerprint"), "is damaged"),
    "identity": (_damaged("identity.pem"), "is damaged"),
    "device-id": (_damaged("device-id"), "is damaged"),
}
WRONG_COORDINATORS: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "cluster": (lambda state: ["--cluster", "my shoal"], "cluster 'my shoal'"),
    "storage": (lambda state: ["--storage", "0"], "storage 0"),
    "certificate": (lambda state: [f"--http-cert={_token(state, 'x')}"], "expected a certificate"),
    "another one's token": (_with_token(VALID), "of another coordinator"),
    "identity": (_damaged("identity.pem"), "is damaged"),
}


@pytest.mark.parametrize("what", WRONG_AGENTS)
def test_an_agent_that_only_a_person_can_mend_ends_for_good(
    what: str, tmp_path: Path, capsys: Capture
) -> None:
    make, words = WRONG_AGENTS[what]
    assert main(["agent", f"--state-dir={tmp_path}", *make(tmp_path)]) == NEEDS_A_PERSON
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("what", WRONG_COORDINATORS)
def test_a_coordinator_that_only_a_person_can_mend_ends_for_good(
    what: str, tmp_path: Path, capsys: Capture
) -> None:
    make, words = WRONG_COORDINATORS[what]
    arguments = ["coordinator", f"--state-dir={tmp_path}", "--port=0", "--http=127.0.0.1:0"]
    assert main([*arguments, "--no-mdns", *make(tmp_path)]) == NEEDS_A_PERSON
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["agent", "coordinator"])
def test_what_may_come_later_is_waited_for(kind: str, tmp_path: Path, capsys: Capture) -> None:
    """A first boot may write the token or mount the disk when the service already runs."""
    (tmp_path / "file").touch()
    assert main([kind, f"--state-dir={tmp_path / 'file' / 'state'}"]) == MENDS_ITSELF
    assert "is not usable" in capsys.readouterr().err
    assert (
        main([kind, f"--state-dir={tmp_path}", f"--token-file={tmp_path / 'later'}"])
        == MENDS_ITSELF
    )
    assert "no such file" in capsys.readouterr().err


def test_hardware_may_be_plugged_in_later(tmp_path: Path, capsys: Capture) -> None:
    """At boot, a driver may be slower than the service."""
    arguments = ["agent", f"--state-dir={tmp_path}", "--insecure", "--backend=edgetpu"]
    assert main(arguments) == MENDS_ITSELF
    assert "no Edge TPU on USB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "name", "said"),
    [(Path.touch, "artifacts", "file exists"), (Path.mkdir, "local-key", "is a directory")],
)
def test_what_is_in_the_place_of_a_file_or_folder_is_named(
    make: Callable[[Path], None], name: str, said: str, tmp_path: Path, capsys: Capture
) -> None:
    make(tmp_path / name)
    arguments = ["coordinator", f"--state-dir={tmp_path}", "--port=0", "--http=127.0.0.1:0"]
    assert main([*arguments, "--no-mdns"]) == MENDS_ITSELF
    assert f"{tmp_path / name}: {said}" in " ".join(capsys.readouterr().err.split())


def test_another_agent_may_be_about_to_end(tmp_path: Path, capsys: Capture) -> None:
    with claim(tmp_path):
        assert main(["agent", f"--state-dir={tmp_path}", "--insecure"]) == MENDS_ITSELF
    assert "another agent runs" in capsys.readouterr().err


def test_a_token_that_was_removed_after_joining_is_not_missed(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "coordinator-fingerprint").write_text("damaged")  # So it ends here.
    arguments = [f"--state-dir={tmp_path}", f"--token-file={tmp_path / 'removed'}"]
    assert main(["agent", *arguments]) == NEEDS_A_PERSON
    said = capsys.readouterr().err
    assert "this device has joined before" in said
    assert "coordinator-fingerprint is damaged" in said

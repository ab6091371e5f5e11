"""The command line's side of the API: addresses, keys and texts that cannot be sent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from api.key_book import LOCAL_FILE
from cli import client
from cli.client import Client, default_url
from cli.errors import UsageError
from cli.main import main
from cli.parser import DEFAULT_URL
from cli.service.running import Running, running_in, told


@pytest.mark.parametrize(
    "url",
    [
        *("127.0.0.1:7421", "localhost", "ftp://localhost", "http://", "http:///v1", "http://[::1"),
        *("http://localhost:99999", "http://localhost:0", "http://localhost:x", "http://\udcff"),
    ],
)
def test_what_is_no_address_is_not_called_an_absent_coordinator(url: str) -> None:
    with pytest.raises(UsageError, match="is no address of a coordinator: give one such as http"):
        Client(url)


@pytest.mark.parametrize("key", ["\N{LATIN SMALL LETTER E WITH ACUTE}", "a\nb", "\udcff"])
def test_a_key_that_no_header_can_hold_is_named(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_API_KEY", key)
    with pytest.raises(UsageError, match="SHOAL_API_KEY: a key has only printable ASCII"):
        Client(DEFAULT_URL)


def test_the_key_of_the_coordinator_that_runs_comes_before_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board that starts without a clock writes a key that looks older than one of last year."""
    runs, ended = tmp_path / "service", tmp_path / "coordinator"
    for directory, when_s in ((runs, 1e9), (ended, 2e9)):
        directory.mkdir()
        (directory / LOCAL_FILE).write_text(f"sk-of-{directory.name}\n")
        os.utime(directory / LOCAL_FILE, (when_s, when_s))
    monkeypatch.delenv("SHOAL_API_KEY", raising=False)
    monkeypatch.setattr(client, "_state_dirs", lambda: (runs, ended))
    assert client.api_key(DEFAULT_URL) == "sk-of-coordinator"
    with told(runs, Running(os.getpid(), "", 7420, "shoal", DEFAULT_URL, "")):
        assert client.api_key(DEFAULT_URL) == "sk-of-service"


def test_a_folder_in_the_place_of_a_file_stops_no_coordinator(tmp_path: Path) -> None:
    (tmp_path / "running.json").mkdir()
    with told(tmp_path, Running(os.getpid(), "", 7420, "shoal", DEFAULT_URL, "")):
        assert running_in(tmp_path) is None


def test_an_empty_setting_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_COORDINATOR", "")
    assert default_url().endswith(DEFAULT_URL.partition(":")[2])


@pytest.mark.parametrize("words", [("trace",), ("unload",), ("devices", "--measure")])
def test_an_argument_of_other_bytes_is_named(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code = main([*words, os.fsdecode(b"\xff"), "--url=http://127.0.0.1:9"])
    assert code == 2
    assert capsys.readouterr().err == "error: an argument has bytes that are not UTF-8 text\n"


@pytest.mark.parametrize("columns", ["0", "1"])
def test_a_width_of_nothing_leaves_nothing_out(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    lab = "examples/labs/home-4-pis.yaml"
    assert main(["plan", "examples/tiny-opt/model", "--devices", lab, "--no-teams"]) == 0
    assert "pi" in "".join(capsys.readouterr().out.split())

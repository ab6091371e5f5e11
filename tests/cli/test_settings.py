"""Configuration files of the services, and what the journal gets from them."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import pytest

from cli.argument_types import Several, host_names
from cli.errors import UsageError
from cli.main import main
from cli.service.journal import JournalFormatter, under_journal
from cli.service.settings import read_settings, settings_of
from wire.sizes import parse_size


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", type=parse_size)
    parser.add_argument("--name")
    parser.add_argument("--no-mdns", action="store_true")
    parser.add_argument("--state-dir", type=Path)
    parser.add_argument("--mode", choices=("auto", "off"))
    parser.add_argument("--host", type=host_names, action=Several, default=[])
    return parser


def written(directory: Path, text: str) -> Path:
    path = directory / "agent.toml"
    path.write_text(text)
    return path


def test_a_file_gives_defaults_that_the_command_line_overrides(
    parser: argparse.ArgumentParser, tmp_path: Path
) -> None:
    text = 'memory = "1.5G"\nname = "pi-1"\nno_mdns = true\nstate_dir = "/srv/x"\n'
    parser.set_defaults(**read_settings(written(tmp_path, text), parser))
    options = parser.parse_args(["--name", "other"])
    assert options.memory == 1536 << 20
    assert options.name == "other"
    assert options.no_mdns is True
    assert options.state_dir == Path("/srv/x")
    assert set(settings_of(parser)) == {*("memory", "name", "no_mdns", "state_dir", "mode", "host")}


@pytest.mark.parametrize("text", ['host = "a.lan, b"', 'host = ["a.lan", "b"]'])
def test_host_names_are_a_list_or_a_text(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str
) -> None:
    settings = read_settings(written(tmp_path, text), parser)
    assert settings == {"host": ["a.lan", "b"]}
    parser.set_defaults(**settings)
    assert parser.parse_args([]).host == ["a.lan", "b"]
    assert parser.parse_args(["--host=c,d", "--host", "e"]).host == ["c", "d", "e"]


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("", [], ()),
        ("", ["--at=a", "--at", "b"], ("a", "b")),
        ('at = "x"', [], ("x",)),
        ('at = ["x", "y"]', [], ("x", "y")),
        ('at = ["x", "y"]', ["--at=a", "--at=b"], ("a", "b")),
    ],
)
def test_an_option_that_may_be_repeated_is_a_list_in_a_file(
    parser: argparse.ArgumentParser,
    tmp_path: Path,
    text: str,
    arguments: list[str],
    expected: tuple[str, ...],
) -> None:
    parser.add_argument("--at", action=Several, default=())
    parser.set_defaults(**read_settings(written(tmp_path, text), parser))
    assert parser.parse_args(arguments).at == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory = ", "is not TOML"),
        ('memry = "1G"', "unknown setting 'memry'; known are memory, name"),
        ('json = "1G"', "unknown setting 'json'"),
        ('memory = "much"', "memory: size 'much': expected a number and a unit"),
        ("memory = [1]", "memory: expected a text or a number"),
        ('mode = "atuo"', "mode: 'atuo': expected one of auto, off"),
        ("no_mdns = 1", "no_mdns: expected true or false"),
        ("name = true", "name: expected a text or a number"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    parser: argparse.ArgumentParser, tmp_path: Path, text: str, said: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as raised:
        read_settings(path, parser)
    assert str(path) in str(raised.value)
    assert said in str(raised.value)


@pytest.mark.parametrize("kind", ["agent", "coordinator"])
def test_a_service_with_a_wrong_file_ends_with_2(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([kind, "--config", str(written(tmp_path, 'colour = "red"'))]) == 2
    assert "unknown setting 'colour'" in capsys.readouterr().err
    assert main([kind, "--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: no such file" in capsys.readouterr().err


def test_the_journal_is_recognized_by_its_stream(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        ours = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}
        assert under_journal(ours, stream)
        assert not under_journal({"JOURNAL_STREAM": "1:2"}, stream)
        assert not under_journal({}, stream)


def test_every_line_of_a_record_has_its_priority() -> None:
    record = logging.LogRecord("agent", logging.ERROR, "", 0, "one\ntwo", (), None)
    assert JournalFormatter("%(name)s: %(message)s").format(record) == "<3>agent: one\n<3>two"

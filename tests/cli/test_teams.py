"""Devices that share layers, as the command line plans, shows, saves and refuses them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.commands.plan_arguments import request_of
from cli.errors import CommandFailed, UsageError
from cli.main import _parser
from cli.render import Screen
from planning.saved import read_plan

LAB = Path(__file__).parents[2] / "examples" / "labs" / "four-pis-8b.yaml"
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def wide_terminal_and_own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "llama-3-8b"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return directory


def run(*arguments: str | Path) -> None:
    parsed = _parser().parse_args([str(argument) for argument in arguments])
    parsed.run(parsed, Screen(json_output=parsed.json))


def load_options(model: Path, *arguments: str) -> argparse.Namespace:
    """The options of ``shoal load`` for one model, as ``run_load`` passes them on."""
    options = _parser().parse_args(["load", str(model), *arguments])
    (options.model,) = options.models
    return options


def plan(model: Path, *arguments: str | Path) -> None:
    usual = ("--bits", "4", "--objective", "latency")
    run("plan", model, "--devices", LAB, *usual, *arguments)


def plan_json(
    capsys: pytest.CaptureFixture[str], model: Path, *arguments: str | Path
) -> dict[str, Any]:
    plan(model, *arguments, "--json")
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_team_is_shown_explained_drawn_and_saved(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    saved, drawn = tmp_path / "plan.json", tmp_path / "plan.svg"
    plan(model, "--explain", "--save", saved, "--plot", drawn, "--simulate", "2")
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines()]
    assert ["team", "of", "4", "embedding", "..", "head", "4x34"] in [row[:7] for row in rows]
    for name in ("pi-1", "pi-2", "pi-3", "pi-4"):
        assert [name, "25%", "of", "each", "layer"] in [row[:5] for row in rows]
    assert ["sums", "16"] in [row[:2] for row in rows]
    assert "sharing layers between pi-1, pi-2, pi-3 and pi-4 gains 2.8 x: " in shown
    assert "pi-1, pi-2, pi-3 and pi-4 sharing no layers: +" in shown
    assert "is left out" not in shown
    texts = {item.text for item in ElementTree.fromstring(drawn.read_text()).iter()}  # noqa: S314 - our own
    assert "team of 4" in texts
    assert not any((text or "").startswith("not used") for text in texts)
    answer = plan_json(capsys, model, "--plan", saved)["plan"]
    assert len(answer["stages"][0]["members"]) == 4
    assert answer["stages"][0]["sums_s"] > 0
    assert answer["shares"] == {f"pi-{i}": pytest.approx(0.25) for i in (1, 2, 3, 4)}


def test_wishes_about_teams_are_kept(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    pair = plan_json(capsys, model, "--team", "pi-2, pi-3", "--exclude", "pi-4")["plan"]
    names = [{one["device"] for one in stage["members"]} for stage in pair["stages"]]
    assert {"pi-2", "pi-3"} in names
    apart = plan_json(capsys, model, "--no-teams")["plan"]
    assert not any(stage["members"] for stage in apart["stages"])
    assert apart["decode_s"] > pair["decode_s"]
    two = plan_json(capsys, model, "--team", "pi-1,pi-4", "--team", "pi-2,pi-3")["plan"]
    teams = {frozenset(one["device"] for one in stage["members"]) for stage in two["stages"]}
    assert teams == {frozenset(("pi-1", "pi-4")), frozenset(("pi-2", "pi-3"))}
    pinned = plan_json(capsys, model, "--team", "pi-2,pi-3", "--pin", "layers=0-19:pi-2")["plan"]
    placed = {block["device"] for block in pinned["blocks"][1:21]}
    assert len(placed) == 1
    assert placed <= {"pi-2", "pi-3"}


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        (["--team", "pi-2"], "a team of pi-2: a team has at least two devices"),
        (["--team", "pi-2,pi-2"], "pi-2 is named twice"),
        (["--team", "pi-1,pi-2", "--team", "pi-2,pi-3"], "pi-2 is named twice"),
        (["--team", "pi-1,"], "has no name"),
        (["--team", "pi-1,pi-2", "--no-teams"], "no_teams excludes all: drop one"),
        (["--team", "pi-1,pi-2", "--exclude", "pi-2"], "pi-2 is to share layers with a team"),
    ],
)
def test_wishes_that_contradict_are_refused(model: Path, wishes: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(model, *wishes)
    load = load_options(model, *wishes)
    with pytest.raises(UsageError, match=message):
        request_of(load)
    # ``run`` and ``demo`` refuse them before they ask or start anything.
    if "--exclude" not in wishes:
        with pytest.raises(UsageError, match=message):
            run("run", model, "hello", *wishes)
        with pytest.raises(UsageError, match=message):
            run("demo", *wishes)


def test_devices_that_cannot_share_are_named(model: Path) -> None:
    with pytest.raises(CommandFailed, match=r"nano .*no device has that name .*known are pi-1"):
        plan(model, "--team", "pi-2,nano")
    with pytest.raises(UsageError, match="--team does not go with --formulation dilemma"):
        plan(model, "--team", "pi-1,pi-2", "--formulation", "dilemma")


def test_a_request_has_the_wishes(model: Path) -> None:
    options = load_options(model, "--team", "pi-1,pi-2", "--team", "a, b")
    assert request_of(options).teams == (("pi-1", "pi-2"), ("a", "b"))
    options = load_options(model, "--no-teams")
    assert request_of(options).no_teams


def test_a_saved_plan_brings_the_width_of_its_sums(model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    plan(model, "--save", saved)
    text = saved.read_text()
    for bits, expected in ((16, (16,)), (8, (8, 16)), (32, (32,))):
        saved.write_text(text.replace('"sum_bits": 16', f'"sum_bits": {bits}'))
        options = load_options(model, "--plan", str(saved))
        assert request_of(options).hop_bits == expected


def test_plans_with_and_without_teams_are_compared(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    team, pair = tmp_path / "team.json", tmp_path / "pair.json"
    plan(model, "--save", team)
    plan(model, "--team", "pi-1,pi-2", "--exclude", "pi-3", "--exclude", "pi-4", "--save", pair)
    assert read_plan(pair).used == ("pi-1", "pi-2")
    capsys.readouterr()
    run("diff", team, pair)
    shown = capsys.readouterr().out
    assert "pi-1 25% + pi-2 25% + pi-3 25% + pi-4 25% 4 bit" in shown
    assert "pi-1 50% + pi-2 50% 4 bit" in shown
    run("diff", team, pair, "--json")
    (change,) = json.loads(capsys.readouterr().out)["changes"]
    assert change["after"] == {"device": "pi-1 50% + pi-2 50%", "bits": 4}


def test_sums_that_were_measured_are_shown_beside_the_prediction(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    """A load measures sums over the real connections of a team."""
    found = plan_json(capsys, model)["plan"]
    found["stages"][0]["measured_sum"] = {"row_s": 5e-4, "chunk_rows": 64, "chunk_s": 3e-3}
    Screen(json_output=False).plan(found, "predicted plan")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["sums,", "measured", "32.00"] in rows

"""The planning commands without any agent: what they print, write and refuse."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from cli.commands import plan_arguments, planning
from cli.commands.plan_arguments import pins_of, request_of
from cli.errors import CommandFailed, UsageError
from cli.main import main
from cli.render import Screen
from cli.results_folder import results_folder
from model import costs
from model.families import load_spec
from paper.study import opt_350m
from planning.request import LoadRequest
from planning.saved import read_plan
from planning.sensitivity import DEFAULT_QUALITY_BUDGET

CONFIG = Path(__file__).parents[1] / "fixtures" / "opt-pre" / "config.json"

LAB = """\
devices:
  - &pi
    name: pi-1
    memory: 440K
    storage: 1M
    bits: [4, 8]
    layer_ms: {decode: {4: 2, 8: 3}}
    embed_ms: 1
    head_ms: 1
    watts: 5
  - {<<: *pi, name: pi-2}
  - {<<: *pi, name: "[attic]", layer_ms: {decode: {4: 9, 8: 9}}}
default_link: {rtt_ms: 1, mbit_per_s: 100}
"""


@pytest.fixture(autouse=True)
def wide_terminal_and_own_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    shutil.copy(CONFIG, directory)
    return directory


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    path = tmp_path / "lab.yaml"
    path.write_text(LAB)
    return path


def options(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("model")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--bits", type=lambda text: [int(text)])
    parser.set_defaults(
        max_weight_error=1e-3,
        scheme="rtn",
        scheme_text=None,
        group_size=32,
        context=64,
        time_limit=20.0,
        adapter=None,
    )
    plan_arguments.add_planning_arguments(parser)
    plan_arguments.add_objective_arguments(parser)
    plan_arguments.add_hop_argument(parser, with_budget=True)
    return parser.parse_args([str(argument) for argument in arguments])


def plan(*arguments: str | Path) -> None:
    parsed = options(*arguments)
    planning.run_offline_plan(parsed, Screen(json_output=parsed.json))


def plan_json(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    plan(*arguments, "--json")
    values: dict[str, Any] = json.loads(capsys.readouterr().out)
    return values


def test_a_plan_without_any_agent(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    plan(model, "--devices", lab)
    shown = capsys.readouterr()
    assert "plan for tiny, predicted from" in shown.out
    assert "ms per token" in shown.out
    assert "its weights" not in shown.out
    assert "--max-weight-error 0.001 is not applied" in shown.err


def test_without_weights_the_default_budget_is_kept_by_a_rule(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    parsed = options(model, "--devices", lab)
    parsed.max_weight_error = None
    planning.run_offline_plan(parsed, Screen(json_output=False))
    shown = " ".join(capsys.readouterr().out.split())
    assert "loss not measured (tiny has no weights here): by the rule for a typical model" in shown
    assert shown.count("assumed); allowed: 0.03") == 1
    parsed.json = True
    planning.run_offline_plan(parsed, Screen(json_output=True))
    answer = json.loads(capsys.readouterr().out)
    assert answer["quality"]["kind"] == "assumed"
    assert answer["quality"]["budget"] == DEFAULT_QUALITY_BUDGET
    assert 0 < answer["plan"]["total_sensitivity"] <= DEFAULT_QUALITY_BUDGET
    # The paper's own program has the paper's bound.
    parsed.formulation = "dilemma"
    planning.run_offline_plan(parsed, Screen(json_output=True))
    assert "--max-weight-error 0.001 is not applied" in capsys.readouterr().err


def test_json_is_one_object_that_says_what_its_figures_are(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    answer = plan_json(capsys, model, "--devices", lab, "--explain", "--simulate", "3")
    assert answer["figures"] == "predicted from described devices"
    assert answer["plan"]["proven_optimal"]
    assert answer["simulation"]["kept"]["runs"] == 3
    texts = [item["text"] for item in answer["explanation"]["marginals"]]
    assert any(text.startswith("dropping ") for text in texts)


def test_a_plan_says_whose_times_it_was_made_from(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    """What is proven of assumed times is not proven of the model."""
    plan(model, "--devices", lab)
    shown = " ".join(capsys.readouterr().out.split())
    assert "proven optimal for assumed times by" in shown
    assert "does not say which model its times are for" in shown
    big = "model: {name: big, hidden: 2048, ffn: 8192, heads: 32, kv_heads: 8, vocab: 128256}\n"
    lab.write_text(big + LAB)
    times = plan_json(capsys, model, "--devices", lab)["times"]
    assert times["model"] == "big"
    assert times["assumed"]
    assert times["text"].startswith("scaled from big by weights (layers x ")
    plan(model, "--devices", lab)
    assert "proven optimal for assumed times by" in " ".join(capsys.readouterr().out.split())
    plan(model, "--devices", lab, "--formulation", "dilemma")
    assert "optimal for assumed times, by" in " ".join(capsys.readouterr().out.split())


def test_names_that_no_device_has_are_answered_with_those_there_are(model: Path, lab: Path) -> None:
    with pytest.raises(CommandFailed, match=r"cannot pin head to nano: no device .*known are pi-1"):
        plan(model, "--devices", lab, "--pin", "head:nano")
    with pytest.raises(CommandFailed, match=r"cannot exclude nano: no device .*known are pi-1"):
        plan(model, "--devices", lab, "--exclude", "nano")


def test_slots_take_memory_and_let_more_tokens_through(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    lab.write_text(LAB.replace("440K", "4M"))
    wishes = (model, "--devices", lab, "--bits", "4", "--exclude", "[attic]")
    one = plan_json(capsys, *wishes)["plan"]
    two = plan_json(capsys, *wishes, "--slots", "2")["plan"]
    assert (one["slots"], two["slots"]) == (1, 2)

    def memory(plan: dict[str, Any]) -> int:
        return sum(stage["memory_bytes"] for stage in plan["stages"])

    spec = load_spec(model)
    tokens = plan_json(capsys, *wishes)["context_tokens"]
    kv_bytes = sum(costs.kv_bytes(spec, block, tokens) for block in range(spec.block_count))
    assert memory(two) - memory(one) == kv_bytes
    assert one["predicted_tokens_per_s"] == pytest.approx(1e3 / one["predicted_ms_per_token"])
    assert two["predicted_tokens_per_s"] == pytest.approx(
        min(2e3 / two["predicted_ms_per_token"], 1 / two["bottleneck_s"])
    )
    throughput = plan_json(capsys, *wishes, "--objective", "throughput")["plan"]
    assert throughput["slots"] == 4
    plan(*wishes, "--slots", "2")
    assert "2 sequences at once" in capsys.readouterr().out
    with pytest.raises(UsageError, match="at most 64"):
        plan(*wishes, "--slots", "65")


def test_everything_at_once(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    drawing, saved = tmp_path / "plan.svg", tmp_path / "plan.json"
    plan(
        model, "--devices", lab, "--explain", "--simulate", "4",
        "--plot", drawing, "--save", saved,
    )  # fmt: skip
    shown = capsys.readouterr().out
    for part in (
        "where a token's predicted time goes", "bottleneck:", "solved again with one thing",
        "4 draws of link speeds, predicted ms", "planned anew", " J ",
    ):  # fmt: skip
        assert part in shown
    ElementTree.parse(drawing)  # noqa: S314 - our own
    assert json.loads(saved.read_text())["model"] == "tiny"


def test_a_saved_plan_is_taken_and_compared_with_the_best(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    best = plan_json(capsys, model, "--devices", lab)["plan"]
    plan_json(capsys, model, "--devices", lab, "--save", saved, "--pin", "layers=0-2:[attic]")
    given = plan_json(capsys, model, "--devices", lab, "--plan", saved)["plan"]
    assert "[attic]" in {stage["device"] for stage in given["stages"]}
    assert given["predicted_ms_per_token"] > best["predicted_ms_per_token"]
    assert given["gap"] > 0
    assert given["proof"]["bound"] == pytest.approx(best["proof"]["bound"])


def test_a_saved_plan_is_for_as_many_sequences_as_it_was_made_for(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"

    def made(context: int | None, *wishes: str | Path) -> tuple[int, int]:
        parsed = options(model, "--devices", lab, "--json", *wishes)
        parsed.context = context
        planning.run_offline_plan(parsed, Screen(json_output=True))
        values = json.loads(capsys.readouterr().out)
        return values["plan"]["slots"], values["context_tokens"]

    assert made(40, "--save", saved, "--slots", "3") == (3, 40)
    assert made(None, "--plan", saved) == (3, 40)
    assert made(30, "--plan", saved, "--slots", "2") == (2, 30)
    parsed = options(model, "--plan", saved)
    parsed.context = None
    request = request_of(parsed)
    assert (request.slots, request.context_tokens) == (3, 40)


def test_a_saved_plan_that_does_not_fit_is_refused(model: Path, lab: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    plan(model, "--devices", lab, "--save", saved)
    saved.write_text(saved.read_text().replace('"bits": "', '"bits": "8x9 '))
    with pytest.raises(CommandFailed, match=r"plan\.json: its stages have \d+ blocks"):
        plan(model, "--devices", lab, "--plan", saved)


def test_what_of_a_saved_plan_is_not_taken_is_told(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "plan.json"
    plan(model, "--devices", lab, "--save", saved)
    capsys.readouterr()
    plan(model, "--devices", lab, "--plan", saved)
    assert "was saved for" not in capsys.readouterr().err
    draft = '"draft": {"model": "/models/small", "bits": 4}, "model": "Qwen3-8B"'
    saved.write_text(saved.read_text().replace('"model": "tiny"', draft))
    plan(model, "--devices", lab, "--plan", saved)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{saved} was saved for Qwen3-8B, and is used for tiny" in said
    assert f"{saved} has a draft model, which is planned for the shoal's agents" in said


def test_advice_on_widths_and_budgets_is_true_when_it_is_followed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lab = tmp_path / "one.yaml"
    lab.write_text(
        "devices: [{name: pi, memory: 1100M, storage: 8G, layer_ms: {decode: {4: 2, 8: 3}},"
        " embed_ms: 1, head_ms: 1}]"
    )

    def said(*arguments: str) -> str:
        shape = ["plan", "--shape=llama-1b", f"--devices={lab}", "--context=256", "--time-limit=5"]
        return capsys.readouterr().err if main([*shape, *arguments]) else "it fits"

    # With two widths there is a choice, and so the default budget.
    assert "allow 4 bits (with --quality-budget none)" in said("--bits=8")
    assert said("--bits=4,8", "--quality-budget=none") == "it fits"
    error = said("--bits=4,8")
    assert "raise the quality budget to 0.0528" in error
    assert "These losses are assumed, and no budget that is given takes such" in error
    assert "--quality-budget needs --sensitivities" in said("--bits=4,8", "--quality-budget=0.06")


def test_weights_are_measured_where_there_are_some(
    capsys: pytest.CaptureFixture[str], lab: Path
) -> None:
    parsed = options(CONFIG.parent, "--devices", lab, "--json")
    parsed.max_weight_error = 0.5
    planning.run_offline_plan(parsed, Screen(json_output=True))
    values = json.loads(capsys.readouterr().out)
    assert 0 < values["plan"]["worst_weight_error"] <= 0.5


def write_sensitivities(path: Path, **changes: object) -> Path:
    """Five blocks; 4 bits cost ten times what 8 cost."""
    blocks = [
        {"block": block, "bits": bits, "kl": kl, "normalized_weight_error": kl / 100}
        for block in range(5)
        for bits, kl in ((4, 0.1), (8, 0.01))
    ]
    path.write_text(json.dumps({"scheme": "rtn", "group_size": 32, "blocks": blocks} | changes))
    return path


def test_a_quality_budget_is_kept(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    file = write_sensitivities(tmp_path / "quality.json")
    answer = plan_json(
        capsys, model, "--devices", lab, "--sensitivities", file, "--quality-budget", "0.3",
        "--explain",
    )  # fmt: skip
    assert 0 < answer["plan"]["total_sensitivity"] <= 0.3
    parts = [stage["sensitivity"] for stage in answer["explanation"]["stages"]]
    assert sum(parts) == pytest.approx(answer["plan"]["total_sensitivity"])
    plan(model, "--devices", lab, "--sensitivities", file, "--explain")
    shown = capsys.readouterr().out
    assert "predicted KL divergence" in shown
    assert "stages that round activations lose more" in shown


def sent_at(answer: dict[str, Any]) -> list[int | None]:
    return [stage["hop_bits"] for stage in answer["plan"]["stages"]]


def test_widths_of_hops_are_asked_for_or_follow_from_the_budget(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    split = (
        "--devices", lab, "--bits", "8",
        "--pin", "head:[attic]", "--pin", "embedding:pi-1", "--pin", "layers=0-2:pi-1",
    )  # fmt: skip
    lab.write_text(LAB.replace("440K", "4M").replace("1M", "8M"))

    def found(*more: str | Path) -> list[int | None]:
        return sent_at(plan_json(capsys, model, *split, *more))

    assert found() == [16, None]
    assert found("--hop-bits", "32") == [32, None]
    assert found("--hop-bits", "8,32") == [8, None]
    # With a budget every width whose divergence is known, which is scaled like that of blocks.
    blocks = 5 * 0.01
    worst = {"16": 0.0, "8": 0.02}
    file = write_sensitivities(tmp_path / "quality.json", worst_hops=worst)
    measured = "--sensitivities", file, "--quality-budget"
    for budget, expected in ((blocks + 0.021, 8), (blocks + 0.019, 16)):
        answer = plan_json(capsys, model, *split, *measured, str(1.5 * budget))
        assert sent_at(answer) == [expected, None]
        total = 1.5 * (blocks + worst[str(expected)])
        assert answer["plan"]["total_sensitivity"] == pytest.approx(total)
    known = write_sensitivities(tmp_path / "older.json")
    assert found("--sensitivities", known, "--quality-budget", "9") == [16, None]
    # What the lab permits is the default here; what was measured of the model comes first.
    lab.write_text(lab.read_text() + "hops: {8: 0.5, 32: 0}\n")
    assert found() == [8, None]
    assert found("--hop-bits", "16") == [16, None]
    enough = str(1.5 * (blocks + 0.021))
    assert found(*measured, enough) == [8, None]
    assert found("--sensitivities", known, "--quality-budget", enough) == [32, None]


def test_a_saved_plan_brings_the_widths_of_its_hops(model: Path, lab: Path, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    plan(model, "--devices", lab, "--hop-bits", "8", "--save", saved, "--pin", "head:[attic]")
    request = request_of(options(model, "--plan", saved))
    assert request.hop_bits == (8, 16)
    assert LoadRequest.from_dict(request.to_dict()).hop_bits == (8, 16)
    assert request_of(options(model, "--plan", saved, "--hop-bits", "32,8")).hop_bits == (8, 32)
    assert request_of(options(model)).hop_bits is None
    file = write_sensitivities(tmp_path / "quality.json", worst_hops={"8": 0.25})
    sent = LoadRequest.from_dict(request_of(options(model, "--sensitivities", file)).to_dict())
    assert sent.hop_sensitivities == {8: 0.25}


def test_sensitivities_that_do_not_fit_are_refused(model: Path, lab: Path, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    with pytest.raises(UsageError, match="--quality-budget needs --sensitivities"):
        plan(model, "--devices", lab, "--quality-budget", "1")
    write_sensitivities(file, group_size=64)
    with pytest.raises(UsageError, match="was measured with group_size 64: plan with --group-size"):
        plan(model, "--devices", lab, "--sensitivities", file)
    good = {"block": 0, "bits": 4, "kl": 0.1, "normalized_weight_error": 0.1}
    for bad, message in (
        (3, "has no list of blocks"),
        ([3], r"blocks\[0\]: expected an object"),
        ([good | {"block": 5}], "block 5, the model has 5"),
        ([good, good | {"bits": 7}], r"blocks\[1\]: 7 is no width"),
        ([good | {"kl": -1}], "kl: expected a number from 0 up"),
        ([good | {"kl": True}], "kl: expected a number from 0 up"),
    ):
        write_sensitivities(file, blocks=bad)
        with pytest.raises(CommandFailed, match=message):
            plan(model, "--devices", lab, "--sensitivities", file)
    for hops, message in (
        ([3], "worst_hops: expected an object"),
        ({"4": 0.1}, "worst_hops: 4: known are"),
        ({"8": -1}, "worst_hops: 8: expected a number from 0 up"),
        ({"8": True}, "worst_hops: 8: expected a number from 0 up"),
    ):
        write_sensitivities(file, blocks=[good], worst_hops=hops)
        with pytest.raises(CommandFailed, match=message):
            plan(model, "--devices", lab, "--sensitivities", file)
    file.write_text("{")
    with pytest.raises(CommandFailed, match="not valid JSON"):
        plan(model, "--devices", lab, "--sensitivities", file)


def test_pins_exclusions_and_objectives(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path
) -> None:
    answer = plan_json(
        capsys, model, "--devices", lab, "--pin", "layers=0-1:[attic]", "--exclude", "pi-1",
        "--objective", "request", "--prompt-tokens", "10", "--output-tokens", "2",
    )  # fmt: skip
    places = {item["name"]: item["device"] for item in answer["plan"]["blocks"]}
    assert places["layer 0"] == places["layer 1"] == "[attic]"
    assert "pi-1" not in places.values()


def test_plans_say_what_a_prompt_takes(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    lab.write_text(LAB.replace("440K", "4M"))
    wishes = (model, "--devices", lab, "--bits", "4")
    usual = plan_json(capsys, *wishes)["plan"]
    # 512 + 128 tokens in the ratio of a context of 64.
    assert usual["objective"]["kind"] == "request"
    assert (usual["prompt_tokens"], usual["objective"]["output_tokens"]) == (51, 13)
    assert 0 < usual["predicted_prompt_s"] < usual["predicted_first_token_s"]
    asked = (*wishes, "--objective", "latency", "--prompt-tokens", "40", "--output-tokens", "1")
    one = plan_json(capsys, *asked)["plan"]
    assert one["objective"]["kind"] == "latency"
    assert one["prompt_tokens"] == 40
    saved = tmp_path / "plan.json"
    plan(*asked, "--save", saved, "--explain")
    shown = capsys.readouterr().out
    assert "s for a prompt of 40 tokens, its first token after" in shown
    assert "prompt: 40 tokens in chunks of " in shown
    predicted = read_plan(saved).predicted
    assert predicted["prompt_tokens"] == 40
    assert predicted["first_token_s"] == pytest.approx(one["predicted_first_token_s"])


def test_what_needs_agents_says_so(model: Path, lab: Path) -> None:
    for asked, message in (
        (["--check-quality"], "drop --devices"),
        (["--migration-weight", "1"], "described devices hold nothing"),
        (["--quality-budget", "1"], "--quality-budget needs --sensitivities"),
        (["--objective", "energy", "--simulate", "2"], "energy does not depend on them"),
    ):
        with pytest.raises(UsageError, match=message):
            plan(model, "--devices", lab, *asked)
    with pytest.raises(UsageError, match="--check-quality needs --quality-budget"):
        request_of(options(model, "--check-quality"))
    with pytest.raises(UsageError, match="--objective energy: cannot minimise"):
        request_of(options(model, "--objective", "energy", "--migration-weight", "1"))


def test_pins_name_blocks() -> None:
    parsed = options("m", "--pin", "layers=0-1:a", "--pin", "embedding:b", "--pin", "head:c")
    assert pins_of(parsed, opt_350m(3)) == {0: "b", 1: "a", 2: "a", 4: "c"}
    assert pins_of(options("m", "--pin", "layer=2:a"), opt_350m(3)) == {3: "a"}
    with pytest.raises(UsageError, match="layers 0 to 2"):
        pins_of(options("m", "--pin", "layers=2-3:a"), opt_350m(3))
    with pytest.raises(UsageError, match="layer 1 is pinned to two devices"):
        pins_of(options("m", "--pin", "layers=0-1:a", "--pin", "layer=1:b"), opt_350m(3))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pin", "layers=3-1:a"],
        ["--pin", "layers=a:b"],
        ["--pin", "embedding"],
        ["--repair", "2g"],
        ["--simulate", "0"],
        ["--quality-budget", "-1"],
        ["--quality-budget", "nan"],
        ["--hop-bits", "4"],
        ["--hop-bits", ""],
    ],
)
def test_arguments_that_mean_nothing(arguments: list[str]) -> None:
    with pytest.raises(argparse.ArgumentError):
        options("m", *arguments)


def test_mistakes_are_one_line(model: Path, lab: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match="no such file"):
        plan(model, "--devices", tmp_path / "none.yaml")
    with pytest.raises(CommandFailed, match=r"no config\.json"):
        plan(tmp_path, "--devices", lab)
    lab.write_text(LAB.replace("watts", "wats"))
    with pytest.raises(CommandFailed, match=r"lab\.yaml:10: unknown key 'wats'"):
        plan(model, "--devices", lab)
    lab.write_text(LAB.replace("440K", "20K"))
    with pytest.raises(CommandFailed, match="no plan fits"):
        plan(model, "--devices", lab)


def test_the_papers_program(capsys: pytest.CaptureFixture[str], model: Path, lab: Path) -> None:
    answer = plan_json(capsys, model, "--devices", lab, "--formulation", "dilemma")
    assert answer["proven_optimal"]
    assert [item["block"] for item in answer["choices"]] == [0, 1, 2, 3, 4]
    assert answer["objective_ms"] == pytest.approx(answer["with_every_transfer_ms"])
    plan(model, "--devices", lab, "--formulation", "dilemma", "--repair", "none")
    assert "so no model can run" in capsys.readouterr().out
    with pytest.raises(CommandFailed, match=r"\(2d\) gives each device one layer"):
        plan(model, "--devices", lab, "--formulation", "dilemma", "--repair", "2c")
    with pytest.raises(UsageError, match="--explain does not go with --formulation dilemma"):
        plan(model, "--devices", lab, "--formulation", "dilemma", "--explain")


def test_a_difference_is_shown(
    capsys: pytest.CaptureFixture[str], model: Path, lab: Path, tmp_path: Path
) -> None:
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    plan(model, "--devices", lab, "--save", before)
    plan(model, "--devices", lab, "--save", after, "--pin", "head:[attic]")
    parser = argparse.ArgumentParser()
    plan_arguments.add_diff_arguments(parser)
    parsed = parser.parse_args([str(before), str(after)])
    capsys.readouterr()
    parsed.json = False
    planning.run_plan_diff(parsed, Screen(json_output=False))
    shown = capsys.readouterr().out
    assert "[attic]" in shown
    assert "as predicted when they were saved" in shown
    parsed.json = True
    planning.run_plan_diff(parsed, Screen(json_output=True))
    answer = json.loads(capsys.readouterr().out)
    assert answer["changes"][-1]["after"]["device"] == "[attic]"
    # The same placement, a hop at other bits.
    saved = json.loads(after.read_text())
    saved["stages"][0]["hop_bits"] = 8
    parsed.before = tmp_path / "c.json"
    parsed.before.write_text(json.dumps(saved))
    planning.run_plan_diff(parsed, Screen(json_output=True))
    answer = json.loads(capsys.readouterr().out)
    assert answer["changes"] == []
    assert [(hop["before"], hop["after"]) for hop in answer["hops"]] == [(8, 16)]
    parsed.json = False
    planning.run_plan_diff(parsed, Screen(json_output=False))
    shown = capsys.readouterr().out
    assert "alike, and send at other bits" in shown
    assert re.search(r"hop behind \d +8 bit +16 bit", shown)
    parsed.after = tmp_path / "none.json"
    with pytest.raises(CommandFailed, match="no such file"):
        planning.run_plan_diff(parsed, Screen(json_output=True))


def test_a_study_is_shown_and_drawn(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cli.commands import study as study_command
    from paper import study

    whole = study.study_dilemma
    monkeypatch.setattr(study, "study_dilemma", lambda **given: whole(layers=3, **given))
    parser = argparse.ArgumentParser()
    study_command.add_study_arguments(parser)
    parsed = parser.parse_args(["dilemma", "--out", str(tmp_path / "figures"), "--runs", "1"])
    parsed.json = False
    study_command.run_study(parsed, Screen(json_output=False))
    shown = capsys.readouterr().out
    assert "37.50%" in shown
    assert "all proven optimal" in shown
    assert len(list((tmp_path / "figures").glob("*.svg"))) == 3
    with results_folder(parsed.out, "study dilemma"):
        message = "figures: another command keeps its results there"
        with pytest.raises(CommandFailed, match=message):
            study_command.run_study(parsed, Screen(json_output=False))
    parsed.out = Path("/dev/null/figures")
    with pytest.raises(CommandFailed, match="--out /dev/null/figures: not a directory"):
        study_command.run_study(parsed, Screen(json_output=False))
    parsed.json, parsed.out = True, None
    study_command.run_study(parsed, Screen(json_output=True))
    assert json.loads(capsys.readouterr().out)["table"][0]["bits"] == [12]

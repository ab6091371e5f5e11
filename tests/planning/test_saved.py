"""Saved plans: read back, edited by hand, compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model.share import Share
from paper.study import opt_350m
from planning.labs.lab_file import parse_lab
from planning.plan import Member, Plan, PlanError, Proof, assess, bits_text
from planning.problem import HopFormat
from planning.saved import (
    Change,
    HopChange,
    SavedPlan,
    difference,
    hop_difference,
    parse_plan,
    plan_text,
    read_plan,
)
from planning.saved_team import SavedTeam
from tests.planning.described import described_problem

LAB = """\
devices:
  - &pi
    name: a
    memory: 1G
    storage: 1G
    layer_ms: {decode: {4: 2, 8: 3}}
    embed_ms: 1
    head_ms: 1
  - {<<: *pi, name: b, memory: 250M}
default_link: {rtt_ms: 1, mbit_per_s: 100}
"""
PROBLEM = described_problem(parse_lab(LAB, "lab.yaml"), opt_350m(4), context_tokens=64)
PLAN = assess(PROBLEM, [(0, 0, (8, 4, 4, 4)), (1, 4, (4, 8))], Proof("test", 0.0, 0.0))


def test_a_saved_plan_is_the_same_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan_text(PLAN, "opt"))
    saved = read_plan(path)
    assert saved.model == "opt"
    assert saved.predicted["ms_per_token"] == pytest.approx(PLAN.decode_s * 1e3)
    plan = saved.to_plan(PROBLEM)
    assert (plan.stages, plan.hops, plan.decode_s) == (PLAN.stages, PLAN.hops, PLAN.decode_s)


def test_hops_are_saved_and_may_be_left_out() -> None:
    problem = replace(PROBLEM, hop_formats=(HopFormat(8), HopFormat(16, 0.0)))
    stages = [(0, 0, (8, 4, 4, 4)), (1, 4, (4, 8))]
    plan = assess(problem, stages, Proof("test", 0.0, 0.0), [16])
    text = plan_text(plan, "opt")
    assert '"bits": "8 4x3", "hop_bits": 16}' in text
    saved = parse_plan(text, "p")
    assert saved.predicted
    assert saved.to_plan(problem).stages == plan.stages
    # As files were before hops had a width: the cheapest one is taken.
    older = parse_plan(text.replace(', "hop_bits": 16', ""), "p")
    assert older.predicted == {}
    assert older.to_plan(problem).stages[0].hop_bits == 8


def test_what_a_plan_was_made_for_is_saved_and_may_be_left_out() -> None:
    text = plan_text(PLAN, "opt", slots=3, context_tokens=64)
    saved = parse_plan(text, "p")
    assert (saved.slots, saved.context_tokens) == (3, 64)
    assert saved.predicted
    older = parse_plan(plan_text(PLAN, "opt"), "p")
    assert (older.slots, older.context_tokens) == (None, None)
    for wrong in ("0", "true", '"3"', "1.5"):
        with pytest.raises(PlanError, match="slots: expected a whole number above 0"):
            parse_plan(text.replace('"slots": 3', f'"slots": {wrong}'), "p")


def test_an_edited_plan_is_priced_anew_and_says_nothing_of_the_old_price() -> None:
    text = plan_text(PLAN, "opt").replace("8 4x3", "8x4")
    saved = parse_plan(text, "plan.json")
    assert saved.predicted == {}
    assert saved.to_plan(PROBLEM).decode_s == pytest.approx(PLAN.decode_s + 3e-3)


def test_bits_may_be_a_list() -> None:
    text = plan_text(PLAN, "opt").replace('"8 4x3"', "[8, 4, 4, 4]")
    assert parse_plan(text, "p").to_plan(PROBLEM).placements == PLAN.placements


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("8 4x3", "8 4x2", "plan.json: its stages have 5 blocks and the model 6"),
        ('"b"', '"c"', "plan.json: unknown device c: there are a, b"),
        ('"b"', '"a"', "plan.json: a has more than one stage"),
        ('"hop_bits": 16', '"hop_bits": 8', "plan.json: a sends at 8 bit: permitted are 16"),
        (
            '"hop_bits": 16',
            '"hop_bits": 12',
            "plan.json: stages[0].hop_bits: 12: known",
        ),
        (
            '"4 8"',
            '"4 8", "hop_bits": 16',
            "plan.json: stages[1].hop_bits: the last",
        ),
        ("8 4x3", "16 4x3", "plan.json: a cannot run embedding at 16 bit"),
        ("8 4x3", "8 4x", "plan.json: stages[0].bits: '4x' is neither a width nor a run"),
        ("8 4x3", "7 4x3", "plan.json: stages[0].bits: 7 is no width"),
        ("8 4x3", "8 4x9999", "plan.json: stages[0].bits: more blocks than any model has"),
        ('"8 4x3"', '""', "plan.json: stages[0].bits: a stage needs at least one block"),
        ('"8 4x3"', "true", "plan.json: stages[0].bits: expected widths such as"),
        ('"8 4x3"', "[8.0]", "plan.json: stages[0].bits: 8.0 is no width"),
        ('"shoal_plan": 1', '"shoal_plan": 2', "plan.json: shoal_plan: 2, this program reads 1"),
        ('"shoal_plan": 1', '"shoal_plan": true', "plan.json: shoal_plan: True, this program"),
        ('"hop_bits": 16', '"hop_bits": 16.0', "plan.json: stages[0].hop_bits: 16.0: known are"),
        ('"bits": "8 4x3"', '"bits": "8", "bits": "8 4x3"', "plan.json: 'bits' is there twice"),
        ('"ms_per_token": ', '"ms_per_token": NaN, "x": ', "plan.json: predicted: expected num"),
        ('"ms_per_token": ', '"ms_per_token": -1, "x": ', "plan.json: predicted: expected num"),
        ('"ms_per_token": ', f'"x": {10**400}, "ms_per_token": ', "plan.json: predicted: expected"),
        ('"stages": [', f'"slots": {"1" * 5000}, "stages": [', "plan.json: exceeds the limit"),
        ('"model"', '"modle"', "plan.json: the plan: unknown key 'modle'"),
        ('"device"', '"devise"', "plan.json: stages[0]: unknown key 'devise'"),
        ('"device": "a", ', "", "plan.json: stages[0]: device is missing"),
        ("{", "[", "plan.json:2: not JSON"),
    ],
)
def test_mistakes_get_one_clear_line(old: str, new: str, message: str) -> None:
    text = plan_text(PLAN, "opt")
    assert old in text
    with pytest.raises(PlanError) as caught:
        parse_plan(text.replace(old, new, 1), "plan.json").to_plan(PROBLEM)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_said() -> None:
    small = parse_lab(LAB.replace("250M", "40M"), "lab.yaml")
    tight = described_problem(small, opt_350m(4), context_tokens=64)
    with pytest.raises(
        PlanError, match=r"plan\.json: b needs \d+ bytes of memory and has 41943040"
    ):
        parse_plan(plan_text(PLAN, "opt"), "plan.json").to_plan(tight)


@pytest.mark.parametrize("text", ["", "3", "[]", '{"shoal_plan": 1}', b"\xff", "[" * 100000])
def test_anything_else_is_refused(text: str | bytes) -> None:
    with pytest.raises(PlanError):
        parse_plan(text, "plan.json")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no such file"):
        read_plan(tmp_path / "plan.json")


def test_a_difference_joins_blocks_that_change_alike() -> None:
    before = parse_plan(plan_text(PLAN, "opt"), "a.json")
    values = json.loads(plan_text(PLAN, "opt"))
    values["stages"] = [{"device": "a", "bits": "8x2"}, {"device": "b", "bits": "4x3 8"}]
    after = parse_plan(json.dumps(values), "b.json")
    assert difference(before, after) == (
        Change(1, 2, ("a", 4), ("a", 8)),
        Change(2, 4, ("a", 4), ("b", 4)),
    )
    assert difference(before, before) == ()


def test_hops_that_change_their_bits_or_place() -> None:
    values = json.loads(plan_text(PLAN, "opt"))

    def saved(*stages: tuple[str, int | None]) -> SavedPlan:
        names = "abc"
        values["stages"] = [
            {"device": names[index], "bits": bits} | ({"hop_bits": hop} if hop else {})
            for index, (bits, hop) in enumerate(stages)
        ]
        return parse_plan(json.dumps(values), "plan.json")

    before = saved(("8x2", 16), ("4x2", 8), ("4x2", None))
    assert hop_difference(before, before) == ()
    assert hop_difference(before, saved(("8x2", 8), ("4x3", None), ("4", None))) == (
        HopChange(1, 16, 8),
        HopChange(3, 8, None),
        HopChange(4, None, "default"),
    )


def test_plans_of_different_models_cannot_be_compared() -> None:
    before = parse_plan(plan_text(PLAN, "opt"), "a.json")
    after = parse_plan(plan_text(PLAN, "opt").replace("4x3", "4x2"), "b.json")
    with pytest.raises(PlanError, match=r"a\.json places 6 blocks and b\.json 5"):
        difference(before, after)


def test_runs_of_bits() -> None:
    assert bits_text([16, 4, 4, 4, 8]) == "16 4x3 8"


IDS = {"a": "a" * 16, "b": "b" * 16, "other": "c" * 16}


def test_a_saved_plan_means_the_devices_that_had_the_names() -> None:
    text = plan_text(PLAN, "opt", devices=IDS)
    saved = parse_plan(text, "p")
    assert saved.devices == {"a": "a" * 16, "b": "b" * 16}
    assert saved.predicted
    sent = SavedPlan.from_dict(saved.to_dict())
    assert (sent.stages, sent.devices) == (saved.stages, saved.devices)
    named = saved.renamed(IDS.__getitem__)
    assert [device for device, _ in named.stages] == ["a" * 16, "b" * 16]
    # A described lab has no ids, and neither have older files.
    assert parse_plan(plan_text(PLAN, "opt"), "p").devices == {}
    for wrong in ("[]", '{"a": 1}', '{"a": ""}', json.dumps({"a": "x" * 65})):
        changed = text.replace(json.dumps(dict(saved.devices)), wrong)
        with pytest.raises(PlanError, match="devices: expected device ids by name"):
            parse_plan(changed, "p")


def test_plans_are_compared_by_device_and_not_by_name() -> None:
    before = parse_plan(plan_text(PLAN, "opt", devices=IDS), "a.json")
    text = plan_text(PLAN, "opt", devices=IDS)
    renamed = parse_plan(text.replace('"a"', '"c"'), "b.json")
    assert renamed.devices == {"c": "a" * 16, "b": "b" * 16}
    assert difference(before, renamed) == ()
    another = parse_plan(plan_text(PLAN, "opt", devices={**IDS, "a": "d" * 16}), "b.json")
    assert difference(before, another)[0].before == ("a (aaaaaaaaaaaaaaaa)", 8)
    assert difference(before, another)[0].after == ("a", 8)


# ---- teams -------------------------------------------------------------------------------------

SHARES = Share((0, 12), (0, 3072), (0, 37000)), Share((12, 16), (3072, 4096), (37000, 50272))


def team_plan(*names: str) -> Plan:
    """PLAN with its first stage on a team of 3/4 and 1/4 of each layer."""
    members = tuple(
        Member(name, share, 1e-3, 10, 20, 10, 20) for name, share in zip(names, SHARES, strict=True)
    )
    first = replace(PLAN.stages[0], device=names[0], members=members, sum_bits=16, sums_s=1e-4)
    return replace(PLAN, stages=(first, replace(PLAN.stages[1], device="c")))


def test_a_team_is_saved_with_what_each_member_has() -> None:
    text = plan_text(team_plan("a", "b"), "opt", devices={"a": "1" * 16, "b": "2" * 16})
    assert '{"device": "b", "kv_heads": 4, "columns": 1024, "vocab": 13272}' in text
    saved = parse_plan(text, "p")
    assert saved.predicted
    assert saved.used == ("a", "b", "c")
    assert saved.devices == {"a": "1" * 16, "b": "2" * 16}
    (team, alone) = saved.teams
    assert alone is None
    assert team == SavedTeam((("a", SHARES[0]), ("b", SHARES[1])), 16)
    sent = SavedPlan.from_dict(json.loads(json.dumps(saved.to_dict())))
    assert (sent.teams, sent.stages) == (saved.teams, saved.stages)
    named = saved.renamed(lambda name: saved.devices.get(name, name))
    assert named.used == ("1" * 16, "2" * 16, "c")
    # Plans without teams are written as before, so older programs read them.
    assert "team" not in plan_text(PLAN, "opt")
    assert parse_plan(plan_text(PLAN, "opt"), "p").teams == ()


def test_an_edited_share_says_nothing_of_the_old_price() -> None:
    text = plan_text(team_plan("a", "b"), "opt")
    edited = text.replace('"kv_heads": 12', '"kv_heads": 11').replace(
        '"kv_heads": 4', '"kv_heads": 5'
    )
    saved = parse_plan(edited, "p")
    assert saved.predicted == {}
    assert saved.teams[0] is not None
    assert [share.kv_heads for _, share in saved.teams[0].members] == [(0, 11), (11, 16)]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sum_bits": 16', '"sum_bits": 12', "p: stages[0].sum_bits: 12: known are"),
        ('"sum_bits": 16', '"sum_bits": 16.0', "p: stages[0].sum_bits: 16.0: known are"),
        ('"kv_heads": 4', '"kv_heads": 0', "p: stages[0].team[1].kv_heads: expected a whole"),
        ('"kv_heads": 4', '"kv_heads": true', "p: stages[0].team[1].kv_heads: expected a whole"),
        ('"kv_heads": 4, ', "", "p: stages[0].team[1]: expected an object of device, kv_heads"),
        ('{"device": "b"', '{"device": 3', "p: stages[0].team[1].device: expected a name"),
        ('{"device": "a", "bits"', '{"device": "b", "bits"', "p: stages[0].team: the first"),
        ('"device": "c"', '"device": "c", "sum_bits": 16', "p: stages[1].sum_bits: a device alone"),
        ('"team": [', '"team": [3, ', "p: stages[0].team[0]: expected an object"),
    ],
)
def test_mistakes_in_a_team_get_one_clear_line(old: str, new: str, message: str) -> None:
    text = plan_text(team_plan("a", "b"), "opt")
    assert old in text
    with pytest.raises(PlanError) as caught:
        parse_plan(text.replace(old, new, 1), "p")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_difference_names_members_and_shares() -> None:
    alone = parse_plan(plan_text(PLAN, "opt"), "a.json")
    team = parse_plan(plan_text(team_plan("a", "b"), "opt"), "b.json")
    first = difference(alone, team)[0]
    assert (first.before, first.after) == (("a", 8), ("a 75% + b 25%", 8))
    assert difference(team, team) == ()
    # Shares that are equal in percent are told apart by their counts.
    text = plan_text(team_plan("a", "b"), "opt").replace("37000", "37001").replace("13272", "13271")
    change = difference(team, parse_plan(text, "c.json"))[0]
    assert change.before == ("a 12/3072/37000 + b 4/1024/13272, sums at 16 bit", 8)
    assert change.after == ("a 12/3072/37001 + b 4/1024/13271, sums at 16 bit", 8)

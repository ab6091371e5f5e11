"""The one request of command line, HTTP and disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.quantize import BITS, GROUP_SIZES
from planning.errors import RequestInvalid
from planning.problem import Objective, ObjectiveKind
from planning.request import MAX_SLOTS, MOST_NAMED, MOST_PINS, LoadRequest
from planning.saved import SavedPlan
from planning.sensitivity import DEFAULT_QUALITY_BUDGET
from wire.activations import HOP_BITS

_names = st.text(min_size=1, max_size=8)
_kl = st.floats(0, 10, allow_subnormal=False)
_row = st.dictionaries(st.sampled_from(BITS), _kl)
_widths = st.sets(st.sampled_from(BITS), min_size=1).map(tuple)
_objectives = st.builds(
    Objective,
    st.sampled_from([kind for kind in get_args(ObjectiveKind) if kind != "energy"]),
    st.integers(0, 1000),
    st.integers(1, 1000),
    st.floats(0, 10, allow_subnormal=False),
)
_plans = st.builds(
    lambda device, bits: SavedPlan("p.json", "m", ((device, bits),), {}, ()), _names, _widths
)
_requests = st.builds(
    LoadRequest,
    model=st.just(Path("/models/one")),
    bits=_widths,
    scheme=st.sampled_from(("rtn", "truncate")),
    group_size=st.sampled_from(GROUP_SIZES),
    adapter=st.sampled_from([None, "none", "/adapters/one"]),
    max_weight_error=st.none() | st.floats(0, 1, allow_subnormal=False),
    context_tokens=st.none() | st.integers(1, 1 << 20),
    time_limit_s=st.floats(0.01, 3600, allow_subnormal=False),
    slots=st.integers(1, MAX_SLOTS),
    objective=_objectives,
    pins=st.dictionaries(st.integers(0, 99), _names, max_size=3),
    exclude=st.lists(_names, max_size=3).map(tuple),
    sensitivities=st.none() | st.lists(_row, max_size=3).map(tuple),
    own_sensitivities=st.dictionaries(_names, st.dictionaries(st.integers(0, 9), _row, max_size=2)),
    hop_sensitivities=st.dictionaries(st.sampled_from(HOP_BITS), _kl),
    hop_bits=st.none() | st.sets(st.sampled_from(HOP_BITS), min_size=1).map(tuple),
    quality_budget=st.floats(0, 10, allow_subnormal=False),
    quality_margin=st.none() | st.floats(1, 10, allow_subnormal=False),
    check_quality=st.booleans(),
    no_teams=st.booleans(),
    plan=st.none() | _plans,
    with_problem=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(_requests)
def test_a_request_survives_json(request: LoadRequest) -> None:
    sent = json.loads(json.dumps(request.to_dict(), allow_nan=False))
    assert LoadRequest.from_dict(sent) == request


def test_what_json_leaves_out_has_the_defaults_of_the_type() -> None:
    assert LoadRequest.from_dict({"model": "/m"}) == LoadRequest(Path("/m"))
    nothing = {"objective": None, "slots": None, "plan": None, "hop_bits": None}
    assert LoadRequest.from_dict({"model": "/m", **nothing}) == LoadRequest(Path("/m"))


def test_the_default_budget_bounds_what_the_request_leaves_open() -> None:
    asked: dict[str, tuple[dict[str, Any], float | None]] = {
        "nothing": ({}, DEFAULT_QUALITY_BUDGET),
        "a budget": ({"quality_budget": 0.1}, 0.1),
        "the paper's bound": ({"max_weight_error": 1e-3}, None),
        "both": ({"max_weight_error": 1e-3, "quality_budget": 0.1}, 0.1),
        "one width": ({"bits": [4]}, None),
        "no bound": ({"unbounded": True}, None),
        "no bound, as older clients say it": ({"max_weight_error": None}, None),
    }
    for what, (fields, budget) in asked.items():
        request = LoadRequest.from_dict({"model": "/m", **fields})
        assert request.loss_budget == budget, what
        assert LoadRequest.from_dict(request.to_dict()) == request


WRONG: list[tuple[str, Any, str]] = [
    ("model", "here", "the absolute path"),
    ("model", 3, "the absolute path"),
    ("bits", [], "a list out of"),
    ("bits", [5.5], r"bits\[0\]: expected int"),
    ("bits", [7], "a list out of"),
    ("scheme", "best", "scheme"),
    ("group_size", 7, "group_size must be one of"),
    ("scheme_text", "", "a text of at most"),
    ("adapter", "here", "the absolute path of a LoRA adapter's folder, none or null is needed"),
    ("max_weight_error", -1, "a number >= 0, or null"),
    ("max_weight_error", "inf", "a number >= 0, or null"),
    ("context_tokens", 0, "a positive whole number"),
    ("time_limit_s", 3601, "at most 3600"),
    ("slots", MAX_SLOTS + 1, "from 1 to 64"),
    ("objective", {"kind": "fame"}, "latency, throughput, request, energy"),
    ("objective", {"kind": "energy", "migration_weight": 1}, "cannot minimise"),
    ("pins", {"head": "pi"}, "block number to device name"),
    ("pins", {"1": 3}, r"pins\.1: expected str"),
    ("pins", {str(block): "a" for block in range(MOST_PINS + 1)}, "at most 8192"),
    ("exclude", "pi", "a list of device names"),
    ("exclude", ["a"] * (MOST_NAMED + 1), "at most 1024"),
    ("teams", ["a", "b"], "a list of teams"),
    ("teams", [["a"]], "a team of a: a team has at least two devices"),
    ("teams", [[]], "a team of no device: a team has at least two"),
    ("teams", [["a", "b"], ["c", "b"]], "b is named twice"),
    ("teams", [["a", ""]], "has no name"),
    ("teams", [[str(number) for number in range(MOST_NAMED + 1)]], "at most 1024 in all"),
    ("no_teams", 1, "true or false"),
    ("sensitivities", {"4": 1}, "for each block"),
    ("sensitivities", [{"4": -1}], "for each block"),
    ("own_sensitivities", {"tflite": {"1": {"8": -1}}}, "arithmetic to block to bits"),
    ("hop_sensitivities", {"4": 0.1}, "an object of bits"),
    ("hop_bits", [], "or null"),
    ("quality_budget", -0.1, "a number >= 0, or null"),
    ("quality_margin", 0.9, "a number >= 1, or null"),
    ("unbounded", 1, "true or false"),
    ("check_quality", True, "needs a quality_budget"),
    ("check_quality", 1, "true or false"),
    ("plan", {"source": "a", "model": "m", "stages": 3}, "stages: expected a list"),
    (
        "plan",
        {"source": "a", "model": "m", "stages": [{"device": "a", "bits": "4x4096"}] * 3},
        r"stages\[2\]\.bits: more blocks than any model has",
    ),
    ("generation_defaults", 0, "true or false"),
    ("with_problem", "yes", "true or false"),
    ("replaces", "a", "true or false"),
    ("together", {"a": 0}, "names to numbers above 0"),
    ("together", ["a"], "an object of at most 8 models' names"),
    ("keep_s", 0.5, "seconds from 1 up, or null"),
    ("draft", "here", "the absolute path of a model, or a hub's name for it"),
    ("draft_bits", 7, "draft_bits: a list out of"),
    ("weight", 0, "a number from"),
]


@pytest.mark.parametrize(("field", "value", "message"), WRONG)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(
    field: str, value: object, message: str
) -> None:
    with pytest.raises(RequestInvalid, match=message) as refused:
        LoadRequest.from_dict({"model": "/m", field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"no_teams": True}, "no_teams excludes all"),
        ({"exclude": ["b"]}, "b is to share layers with a team, and is excluded"),
    ],
)
def test_teams_that_contradict_another_wish_are_refused(wish: dict[str, Any], message: str) -> None:
    teams = {"model": "/m", "teams": [["a", "b"], ["c", "d", "e"]]}
    assert LoadRequest.from_dict(teams).teams == (("a", "b"), ("c", "d", "e"))
    with pytest.raises(RequestInvalid, match=message) as refused:
        LoadRequest.from_dict({**teams, **wish})
    assert refused.value.param == "teams"


def test_teams_are_checked_again_once_names_are_ids() -> None:
    """A device may be called by its name in one place and by its id in another."""
    ids = {"pi-1": "1" * 16, "pi-2": "2" * 16}
    request = LoadRequest(Path("/m"), teams=(("pi-1", "pi-2"),))
    assert request.identified(ids.get).teams == (("1" * 16, "2" * 16),)
    with pytest.raises(RequestInvalid, match="named twice"):
        LoadRequest(Path("/m"), teams=(("pi-1", "1" * 16),)).identified(ids.get)


def test_every_field_has_a_wrong_value_above() -> None:
    assert {field for field, _, _ in WRONG} == set(LoadRequest(Path("/m")).to_dict())


def test_a_request_without_a_model_is_refused() -> None:
    with pytest.raises(RequestInvalid, match="the absolute path of a model") as refused:
        LoadRequest.from_dict({})
    assert refused.value.param == "model"


def test_a_value_made_in_python_is_checked_like_one_from_json() -> None:
    with pytest.raises(RequestInvalid, match="slots"):
        LoadRequest(Path("/m"), slots=0)


def test_a_request_is_the_default_and_is_cut_to_the_context() -> None:
    """One place has the numbers: ``Objective``."""
    usual = LoadRequest(Path("/m")).objective
    assert usual == Objective("request", 512, 128)
    assert LoadRequest.from_dict({"model": "/m"}).objective == usual
    assert (
        LoadRequest.from_dict({"model": "/m", "objective": {"kind": "request"}}).objective == usual
    )
    assert usual.within(640) is usual
    assert usual.within(100) == Objective("request", 80, 20)
    assert usual.within(1) == Objective("request", 0, 1)

"""Plans as values, their verification, and the problem they are made from."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from model import costs
from model.quantize import Format
from model.spec import LayerSpec, ModelSpec
from planning.build import DeviceInput, RequestInput, build_problem
from planning.plan import Plan, PlanError, Proof, assess, verify
from planning.planner import solve
from planning.problem import HopFormat, PlanningProblem
from wire.profile import BlockTiming, DeviceProfile, LinkProfile, TimingKind

LAYER = LayerSpec(
    hidden=64,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn=128,
    norm="rmsnorm",
    norm_eps=1e-6,
    norm_position="pre",
    activation="silu",
    gated=True,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
)
SPEC = ModelSpec(
    vocab=96,
    hidden=64,
    embed_dim=64,
    max_context=128,
    layers=(LAYER, replace(LAYER, ffn=256), LAYER),
    learned_positions=0,
    position_offset=0,
    final_norm=True,
    tied_head=False,
    bos_token=1,
    eos_tokens=(2,),
)
PROFILE = DeviceProfile(
    machine="m",
    processor="p",
    cores=4,
    threads=4,
    backend="onnx-cpu",
    backend_version="1",
    container_bits=((4, 4), (6, 8), (8, 8)),
    memory_bytes=400_000,
    memory_total_bytes=10**9,
    storage_bytes=10**9,
    memory_read_bytes_per_s=1e9,
    disk_write_bytes_per_s=1e8,
)
# At any width.
_MILLISECONDS: tuple[tuple[TimingKind, int, int], ...] = (
    ("embedding", 0, 1),
    ("layer", 0, 2),
    ("layer", 1, 3),
    ("head", 0, 4),
)
TIMINGS = tuple(
    BlockTiming(kind, variant, bits, 1e-3 * ms, 1e-4 * ms)
    for kind, variant, ms in _MILLISECONDS
    for bits in (4, 6, 8)
)
LINKS = (LinkProfile("a", "b", 0.002, 1e6), LinkProfile("b", "a", 0.004, 2e6))
ERRORS = tuple({4: 0.01 * (k + 1), 6: 0.001, 8: 0.0001} for k in range(5))


def problem(**options: Any) -> PlanningProblem:
    arguments: dict[str, Any] = {
        "bits": (4, 8),
        "slots": 2,
        "context_tokens": 32,
        "chunk_tokens": 16,
        "weight_errors": ERRORS,
        "hop_formats": (HopFormat.unmeasured(32),),
    }
    devices = [DeviceInput(name, PROFILE, TIMINGS) for name in "ab"]
    return build_problem(RequestInput(SPEC, **{**arguments, **options}), devices, LINKS)


SPLIT = [(0, 0, (8, 8)), (1, 2, (4, 8, 8))]
PROOF = Proof("by hand", 0.0, 0.0)


def test_layer_variants_number_shapes_by_first_appearance() -> None:
    assert SPEC.layer_variants == (LAYER, replace(LAYER, ffn=256))
    assert [SPEC.block_variant(block) for block in range(5)] == [0, 0, 1, 0, 0]


def test_build_takes_costs_from_the_model_and_seconds_from_timings() -> None:
    built = problem()
    assert [device.name for device in built.devices] == ["a", "b"]
    device = built.devices[0]
    assert [row[0].decode_s for row in device.options] == [0.001, 0.002, 0.003, 0.002, 0.004]
    assert [option.bits for option in device.options[1]] == [4, 6, 8]
    six = device.option(1, 6)
    assert six is not None
    # 6 bit is kept as 8 by this backend.
    assert six.executed_bytes == costs.executed_bytes(SPEC, 1, Format.of(6), 8)
    assert built.stored_bytes[1][6] == costs.stored_bytes(SPEC, 1, Format.of(6))
    # 2 slots x 32 tokens x (key + value) x 2 heads x 16 x 4 bytes; none for embedding and head.
    assert built.kv_bytes == (0, 16_384, 16_384, 16_384, 0)
    assert device.stage_bytes == costs.stage_buffer_bytes(SPEC, range(5), 16, 32)
    assert device.option(1, 16) is None
    assert built.max_weight_error == (math.inf,) * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": ()}, "bits must be some of"),
        ({"bits": (7,)}, "bits must be some of"),
        ({"weight_errors": None, "max_weight_error": 0.1}, "needs the errors"),
        ({"weight_errors": ERRORS[:2]}, "2 blocks, not 5"),
        ({"hop_formats": ()}, "hops need at least one width"),
        ({"hop_formats": (HopFormat(8), HopFormat(8, 0.1))}, "and each once"),
    ],
)
def test_build_refuses_inconsistent_input(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(**options)


def test_build_refuses_impossible_timings() -> None:
    for seconds in (0.0, -1.0, math.nan, math.inf):
        bad = DeviceInput("a", PROFILE, (BlockTiming("layer", 0, 4, seconds, 1e-4),))
        with pytest.raises(ValueError, match="cannot take"):
            build_problem(RequestInput(SPEC, (4,), 8), [bad], ())


def test_what_a_profile_says_is_taken_from_it() -> None:
    profile = replace(PROFILE, call_s=0.25, relay_s=0.125, watts=5.0)
    (device,) = build_problem(RequestInput(SPEC, (4,), 8), [DeviceInput("a", profile)], ()).devices
    assert (device.call_s, device.watts, device.held) == (0.375, 5.0, ())
    for watts in (0.0, -1.0, math.nan, math.inf):
        bad = DeviceInput("a", replace(PROFILE, watts=watts))
        with pytest.raises(ValueError, match="a cannot draw"):
            build_problem(RequestInput(SPEC, (4,), 8), [bad], ())


def test_unknown_errors_do_not_pass_a_bound() -> None:
    built = problem(weight_errors=[{8: 0.1}] * 5, max_weight_error=0.5)
    assert built.within_error(0, 8)
    assert not built.within_error(0, 4)


def test_figures_of_a_split() -> None:
    plan = assess(problem(), SPLIT, PROOF)
    # a: 1 + 2 ms; b: 3 + 2 + 4 ms; hop: 1 ms + 256 bytes at 1 MB/s; return: 2 ms + 4 at 2 MB/s.
    assert [stage.compute_s for stage in plan.stages] == pytest.approx([0.003, 0.009])
    assert plan.hops[0].seconds == pytest.approx(0.001256)
    assert plan.return_s == pytest.approx(0.002002)
    assert plan.decode_s == pytest.approx(0.015258)
    # A tenth of the compute, and the bytes of the hop without its round trip.
    assert plan.prefill_s_per_token == pytest.approx(0.0012 + 0.000256)
    assert plan.worst_weight_error == 0.03
    assert plan.gap == 1.0
    assert not plan.proven_optimal
    verify(plan, problem())


def test_json_form() -> None:
    built = problem()
    plan = solve(built)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_a_plan_from_before_hops_had_widths_is_read() -> None:
    built = problem()
    plan = assess(built, SPLIT, PROOF)
    plain = plan.to_dict()
    for stage in plain["stages"]:
        del stage["hop_bits"]
    plain["proof"]["bound_s"] = plain["proof"].pop("bound")
    assert Plan.from_dict(plain) == plan
    verify(Plan.from_dict(plain), built)


def test_figures_of_hops_by_width() -> None:
    built = problem(
        hop_formats=(HopFormat(8, 0.5), HopFormat(16, 0.25), HopFormat(32, 0.0)),
        sensitivities=[dict.fromkeys((4, 6, 8), 0.0)] * 5,
    )
    # 64 values and one fp32 scale at 1 MB/s, after half a round trip of 2 ms.
    for bits, size, loss in ((8, 68, 0.5), (16, 132, 0.25), (32, 256, 0.0)):
        plan = assess(built, SPLIT, PROOF, [bits])
        assert plan.hops[0].seconds == pytest.approx(0.001 + size * 1e-6)
        assert plan.prefill_s_per_token == pytest.approx(0.0012 + size * 1e-6)
        assert [stage.hop_bits for stage in plan.stages] == [bits, None]
        assert plan.total_sensitivity == pytest.approx(loss)
        verify(plan, built)
        bounded = replace(built, quality_budget=0.3)
        if loss > 0.3:
            with pytest.raises(PlanError, match="the sensitivities add up to"):
                verify(plan, bounded)
        else:
            verify(plan, bounded)
    assert assess(built, SPLIT, PROOF).stages[0].hop_bits == 8
    assert assess(replace(built, quality_budget=0.3), SPLIT, PROOF).stages[0].hop_bits == 32


def test_hops_of_unknown_sensitivity_do_not_pass_a_budget() -> None:
    built = problem(
        hop_formats=(HopFormat(8), HopFormat(16, 0.25)),
        sensitivities=[dict.fromkeys((4, 6, 8), 0.0)] * 5,
    )
    plan = assess(built, SPLIT, PROOF, [8])
    assert plan.total_sensitivity is None
    verify(plan, built)
    with pytest.raises(PlanError, match="a sends at 8 bit: permitted are 16"):
        verify(plan, replace(built, quality_budget=10.0))
    unknown = replace(built, quality_budget=10.0, hop_formats=(HopFormat(8),))
    with pytest.raises(PlanError, match="no width of known sensitivity for the hop from a to b"):
        assess(unknown, SPLIT, PROOF)


@pytest.mark.parametrize(("bits", "loss"), [(4, 0.0), (8, -1.0), (8, math.inf), (16, math.nan)])
def test_hop_formats_are_checked(bits: int, loss: float) -> None:
    with pytest.raises(ValueError, match="a hop cannot be sent as"):
        HopFormat(bits, loss)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("hops"), "plan.hops: missing"),
        (lambda d: d.update(extra=1), "plan.extra: unknown"),
        (lambda d: d.update(decode_s="1"), "plan.decode_s: expected float"),
        (lambda d: d.update(decode_s=math.nan), "plan.decode_s: expected float"),
        (lambda d: d.update(return_s=True), "plan.return_s: expected float"),
        (lambda d: d.update(version=2), "plan.version: 2"),
        (lambda d: d["stages"][0].update(first=0.0), "plan.stages[0].first: expected int"),
        (lambda d: d["stages"][0].update(bits="8"), "plan.stages[0].bits: expected a list"),
        (lambda d: d["stages"][1]["bits"].append(None), "plan.stages[1].bits[3]: expected int"),
        (lambda d: d.update(proof=[]), "plan.proof: expected an object"),
    ],
)
def test_reading_is_strict(damage: Callable[[dict[str, Any]], object], message: str) -> None:
    plain = assess(problem(), SPLIT, PROOF).to_dict()
    damage(plain)
    with pytest.raises(PlanError) as caught:
        Plan.from_dict(plain)
    assert message in str(caught.value)
    with pytest.raises(PlanError, match="plan: expected an object"):
        Plan.from_dict(None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.update(stages=[]), "covers 0 of 5 blocks"),
        (lambda d: d["stages"].pop(), "covers 2 of 5 blocks"),
        (lambda d: d["stages"][1].update(first=3), "starts at 3, not 2"),
        (lambda d: d["stages"].reverse(), "starts at 2, not 0"),
        (lambda d: d["stages"][1]["bits"].append(8), "covers 6 of 5 blocks"),
        (lambda d: d["stages"][0].update(bits=[]), "the stage on a is empty"),
        (lambda d: d["stages"][1].update(device="a"), "a has more than one stage"),
        (lambda d: d["stages"][1].update(device="c"), "unknown device c"),
        (lambda d: d["stages"][0].update(bits=[8, 6]), "layer 0 is at 6 bit, which was not asked"),
        (lambda d: d["stages"][0].update(bits=[8, 4]), "plan.stages[0]"),
        (lambda d: d["stages"][0].update(compute_s=0.001), "plan.stages[0].compute_s: 0.001"),
        (lambda d: d["stages"][0].update(memory_bytes=1), "plan.stages[0].memory_bytes: 1"),
        (lambda d: d["stages"][0].update(storage_bytes=1), "plan.stages[0].storage_bytes: 1"),
        (lambda d: d["stages"][0].update(memory_limit_bytes=10**12), "memory_limit_bytes"),
        (lambda d: d["stages"][0].update(prefill_s_per_token=0.0), "prefill_s_per_token"),
        (lambda d: d["hops"][0].update(seconds=0.0), "plan.hops[0].seconds: 0.0"),
        (lambda d: d["hops"][0].update(target="a"), "plan.hops[0].target: a"),
        (lambda d: d["hops"].clear(), "plan.hops: 0 entries, not 1"),
        (lambda d: d["stages"][0].update(hop_bits=8), "a sends at 8 bit: permitted are 32"),
        (lambda d: d["stages"][1].update(hop_bits=32), "plan.stages[1].hop_bits: 32"),
        (lambda d: d.update(return_s=0.0), "plan.return_s: 0.0"),
        (lambda d: d.update(decode_s=0.01), "plan.decode_s: 0.01"),
        (lambda d: d.update(prefill_s_per_token=0.01), "plan.prefill_s_per_token: 0.01"),
        (lambda d: d.update(worst_weight_error=None), "plan.worst_weight_error: None"),
        (lambda d: d["proof"].update(bound=1.0), "the proved bound 1.0 is above"),
    ],
)
def test_verify_catches_tampering(damage: Callable[[dict[str, Any]], object], message: str) -> None:
    built = problem()
    plain = assess(built, SPLIT, PROOF).to_dict()
    damage(plain)
    with pytest.raises(PlanError) as caught:
        verify(Plan.from_dict(plain), built)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def with_device(built: PlanningProblem, **changes: Any) -> PlanningProblem:
    return replace(built, devices=(replace(built.devices[0], **changes), built.devices[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: with_device(p, memory_bytes=1000), "bytes of memory and has 1000"),
        (lambda p: with_device(p, storage_bytes=1000), "bytes of storage and has 1000"),
        (lambda p: with_device(p, options=((),) * 5), "a cannot run embedding at 8 bit"),
        (lambda p: replace(p, max_weight_error=(0.02,) * 5), "layer 1 at 4 bit has weight error"),
        (lambda p: replace(p, links={}), "no link from a to b"),
        (lambda p: replace(p, links={(0, 1): p.links[0, 1]}), "no link from b to a"),
    ],
)
def test_verify_catches_what_the_problem_forbids(
    change: Callable[[PlanningProblem], PlanningProblem], message: str
) -> None:
    built = problem()
    plan = assess(built, SPLIT, PROOF)
    with pytest.raises(PlanError) as caught:
        verify(plan, change(built))
    assert message in str(caught.value)


def test_a_built_problem_is_planned_on_two_devices_where_one_is_too_small() -> None:
    built = problem()
    whole = assess(built, [(0, 0, (4,) * 5)], PROOF).stages[0].memory_bytes
    devices = tuple(replace(device, memory_bytes=whole - 1) for device in built.devices)
    plan = solve(replace(built, devices=devices, bits=(4,)))
    assert len(plan.stages) == 2
    # Same seconds on both devices: only the wire differs with the order, and both wires are used.
    assert plan.decode_s == pytest.approx(0.012 + min(0.001256 + 0.002002, 0.002128 + 0.001004))
    assert plan.proven_optimal

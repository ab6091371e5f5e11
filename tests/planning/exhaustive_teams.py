"""Every plan of a small problem with teams, tried one after the other.

Nothing here uses the planner's figures of teams: their times and bytes are computed anew.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from model.share import Share
from planning.candidates import Candidate, _Candidates
from planning.problem import BlockOption, HopFormat, Objective, ObjectiveKind, PlanningProblem
from planning.teams import sharing
from tests.planning.test_planner import make_spec, random_extras, random_problem

KV_HEADS, HEAD_DIM, FFN, VOCAB, HIDDEN = 4, 2, 16, 32, 8
ATTENTION, MLP = 4 * HIDDEN * HIDDEN, 2 * HIDDEN * FFN
SENT = {8: HIDDEN + 4, 16: 2 * HIDDEN + 4, 32: 4 * HIDDEN}
"""Bytes of a hidden row on a link."""


def random_teams(seed: int) -> PlanningProblem:
    """A small problem with links that are quick enough for teams, and everything else in it."""
    rng = random.Random(f"teams {seed}")
    problem = (random_extras if rng.random() < 0.7 else random_problem)(seed)
    while len(problem.devices) < 2 or problem.spec.block_count > 5:
        seed += 100_000
        problem = (random_extras if rng.random() < 0.7 else random_problem)(seed)
    layer = replace(problem.spec.layers[0], heads=KV_HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    spec = make_spec(len(problem.spec.layers))
    devices = []
    alike = rng.random() < 0.4
    for device in problem.devices:
        if alike:
            device = replace(problem.devices[0], name=device.name, sum_s=0.0)
        shares = rng.random() < 0.9
        measured = rng.random() < 0.5
        options = tuple(
            tuple(with_shares(option, k, rng) if measured else option for option in row)
            for k, row in enumerate(device.options)
        )
        scale = rng.uniform(1.0, 6.0)
        devices.append(
            replace(
                device,
                options=options,
                shares=shares,
                sum_s=rng.choice([0.0, 2e-5]),
                memory_bytes=int(scale * device.memory_bytes),
            )
        )
    quick = rng.choice([0.003, 0.01, 0.05])
    links = {
        pair: replace(link, rtt_s=quick * link.rtt_s, bytes_per_s=link.bytes_per_s / quick)
        for pair, link in problem.links.items()
    }
    problem = replace(
        problem,
        spec=replace(spec, layers=(layer,) * len(spec.layers)),
        devices=tuple(devices),
        links=links,
        group_size=rng.choice([0, 0, 4, 8]),
        bits=problem.bits[:2],
        excluded=problem.excluded if rng.random() < 0.3 else frozenset(),
        pins=problem.pins if rng.random() < 0.5 else {},
    )
    if rng.random() < 0.8:
        problem = replace(problem, max_weight_error=(math.inf,) * spec.block_count)
    if problem.quality_budget is not None and rng.random() < 0.7:
        known = rng.uniform(0.0, 0.05) * problem.quality_budget
        hops = (HopFormat(8, known), HopFormat(16, 0.0))
        problem = replace(problem, hop_formats=hops)
    if problem.quality_budget is not None:
        kind: ObjectiveKind = rng.choice(get_args(ObjectiveKind))
        weight = 0.0 if kind == "energy" else problem.objective.migration_weight
        aim = Objective(kind, rng.randint(1, 50), rng.randint(1, 9), weight)
        looser = rng.choice([1.0, 2.0, math.inf]) * problem.quality_budget
        problem = replace(problem, objective=aim, quality_budget=looser)
    if rng.random() < 0.1:
        problem = replace(problem, teams=((0, 1),), excluded=frozenset())
    return problem


def with_shares(option: BlockOption, block: int, rng: random.Random) -> BlockOption:
    """The option with shares measured, at times that grow with the share."""
    if not block:
        return option
    points = [
        (f, *(s * (f + rng.uniform(0.0, 0.3) * (1 - f)) for s in whole))
        for whole in [(option.decode_s, option.prefill_s_per_token)]
        for f in (0.25, 0.5, 1.0)
    ]
    return replace(option, shares_s=tuple(points))


@dataclass(frozen=True)
class Way:
    """One block at one width on a unit: times, bytes of each device, loss and loading time."""

    bits: int
    decode_s: float
    prefill_s: float
    sizes: tuple[tuple[int, int], ...]
    loss: float
    load_s: float


@dataclass(frozen=True)
class Unit:
    """A device, or some that share layers: what a stage may run on."""

    members: tuple[int, ...]
    limits: tuple[tuple[int, int], ...]
    ways: tuple[tuple[Way, ...], ...]
    call_s: float
    call_row_s: float
    watts: float | None


def units_of(problem: PlanningProblem) -> list[Unit]:
    """All devices, and all teams with the candidates' shares."""
    found = [alone(problem, i) for i in range(len(problem.devices))]
    candidates = _Candidates(problem).teams() if sharing(problem) else []
    found += [team(problem, one) for one in candidates]
    named = [set(some) for some in problem.teams]
    return [
        unit
        for unit in found
        if not set(unit.members) & problem.excluded
        and all(set(unit.members) == some or not set(unit.members) & some for some in named)
    ]


def alone(problem: PlanningProblem, i: int) -> Unit:
    device = problem.devices[i]
    ways = []
    for k, row in enumerate(device.options):
        ways.append(
            tuple(
                Way(
                    option.bits,
                    option.decode_s,
                    option.prefill_s_per_token,
                    (
                        (
                            option.executed_bytes + problem.kv_bytes[k],
                            problem.stored_bytes[k][option.bits],
                        ),
                    ),
                    loss_of(problem, i, k, option),
                    0.0
                    if device.held and option.bits in device.held[k]
                    else problem.stored_bytes[k][option.bits] / device.load_bytes_per_s,
                )
                for option in row
            )
        )
    limit = (device.memory_bytes - device.stage_bytes, device.storage_bytes)
    return Unit((i,), (limit,), tuple(ways), device.call_s, 0.0, device.watts)


def loss_of(problem: PlanningProblem, i: int, k: int, option: BlockOption) -> float:
    if problem.quality_budget is None:
        return 0.0
    if option.sensitivity is not None:
        return option.sensitivity
    return problem.sensitivities[k].get(option.bits, math.inf)


def part_s(option: BlockOption, part: float, chunk: bool) -> float:
    """Seconds of a share: linear through the measured ones, else a tenth of the whole is fixed."""
    at = 2 if chunk else 1
    if not option.shares_s:
        whole = option.prefill_s_per_token if chunk else option.decode_s
        return whole * (0.1 + 0.9 * part)
    points = list(option.shares_s)
    (x0, y0), (x1, y1) = (
        (point[0], point[at]) for point in (points[:2] if part <= points[1][0] else points[1:])
    )
    return max(0.0, y0 + (y1 - y0) * (part - x0) / (x1 - x0))


def team(problem: PlanningProblem, one: Candidate) -> Unit:
    """A team: per half of a layer the slowest member, then a sum."""
    members, count = one.members, len(one.members)
    devices = [problem.devices[i] for i in members]
    links = [problem.links[a, b] for a, b in itertools.permutations(members, 2)]
    rtt_s, speed = max(link.rtt_s for link in links), min(link.bytes_per_s for link in links)
    software_s = max(device.sum_s for device in devices)
    sent_s = SENT[one.sum_bits] / speed
    sum_s = rtt_s / 2 + software_s + (count - 1) * sent_s
    whole = (count - 1) * 64 * SENT[one.sum_bits]
    assert whole - 2 * whole // count <= 24 * 1024, "so few bytes are sent directly"
    chunk_s = rtt_s / 2 + software_s + whole / speed
    to = [problem.links[members[0], i] for i in members[1:]]
    back_s = max(problem.links[i, members[0]].rtt_s / 2 for i in members[1:]) + software_s
    order_s = (count - 1) * SENT[max(16, one.sum_bits)] / min(link.bytes_per_s for link in to)
    extra = {form.bits: form.sensitivity or 0.0 for form in problem.hop_formats}
    lost = 2 * extra[8] if one.sum_bits == 8 else 0.0
    ways = []
    last = problem.spec.block_count - 1
    for k in range(last + 1):
        row = []
        for bits in sorted({o.bits for o in devices[0].options[k]}):
            options = [device.option(k, bits) for device in devices]
            held = [parts_of(problem, k, share) for share in one.shares]
            if k == 0:
                first = options[0]
                assert first is not None
                size = first.executed_bytes + problem.kv_bytes[0], problem.stored_bytes[0][bits]
                sizes = (size, *[(0, 0)] * (count - 1))
                row.append(
                    Way(
                        bits,
                        first.decode_s,
                        first.prefill_s_per_token,
                        sizes,
                        loss_of(problem, members[0], 0, first),
                        size[1] / devices[0].load_bytes_per_s,
                    )
                )
                continue
            if any(option is None for option in options):
                continue
            known = [option for option in options if option is not None]
            sizes = tuple(
                (
                    math.ceil(all_part * option.executed_bytes)
                    + math.ceil((heads if k < last else 1) * problem.kv_bytes[k]),
                    math.ceil(all_part * problem.stored_bytes[k][bits]),
                )
                for option, (heads, _, _, all_part) in zip(known, held, strict=True)
            )
            halves = (
                [(1.0, 2)]
                if k == last
                else [
                    (ATTENTION / (ATTENTION + MLP), 0),
                    (MLP / (ATTENTION + MLP), 1),
                ]
            )
            times = [
                sum(
                    weight
                    * max(part_s(o, parts[at], chunk) for o, parts in zip(known, held, strict=True))
                    for weight, at in halves
                )
                for chunk in (False, True)
            ]
            times[0] += back_s if k == last else 2 * sum_s
            times[1] += (back_s if k == last else 2 * chunk_s) / 64
            losses = [loss_of(problem, i, k, o) for i, o in zip(members, known, strict=True)]
            row.append(
                Way(
                    bits,
                    times[0],
                    times[1],
                    sizes,
                    max(losses) + (lost if k < last else 0.0)
                    if problem.quality_budget is not None
                    else 0.0,
                    max(
                        size[1] / device.load_bytes_per_s
                        for size, device in zip(sizes, devices, strict=True)
                    ),
                )
            )
        ways.append(tuple(row))
    watts = [device.watts for device in devices]
    return Unit(
        members,
        tuple((d.memory_bytes - d.stage_bytes, d.storage_bytes) for d in devices),
        tuple(ways),
        max(d.call_s for d in devices) + max(link.rtt_s / 2 for link in to) + software_s + order_s,
        order_s,
        None if None in watts else math.fsum(w for w in watts if w is not None),
    )


def parts_of(problem: PlanningProblem, k: int, share: Share) -> tuple[float, float, float, float]:
    """Parts of heads, columns, vocabulary, and of all bytes of the block."""
    heads = (share.kv_heads[1] - share.kv_heads[0]) / KV_HEADS
    columns = (share.columns[1] - share.columns[0]) / FFN
    vocab = (share.vocab[1] - share.vocab[0]) / VOCAB
    vectors = 8 * sum(
        shape[0] for shape in problem.spec.block_tensors(k).values() if len(shape) == 1
    )
    if k == problem.spec.block_count - 1:
        weights = VOCAB * HIDDEN
        return heads, columns, vocab, (vocab * weights + vectors) / (weights + vectors)
    held = heads * ATTENTION + columns * MLP + vectors
    return heads, columns, vocab, held / (ATTENTION + MLP + vectors)


Figures = tuple[float, float, float]


def best_of(found: Sequence[Figures]) -> list[Figures]:
    kept: list[Figures] = []
    for one in sorted(set(found)):
        if not any(all(x <= y for x, y in zip(other, one, strict=True)) for other in kept):
            kept.append(one)
    return kept


def exhaustive(problem: PlanningProblem) -> float:
    """The least objective of all plans; inf if there is none."""
    prompt = problem.objective.tokens[0]
    chunks = [min(rows, prompt) for rows in (64, 32, 16)] if prompt else [0]
    return min(_with_chunks(problem, rows) for rows in dict.fromkeys(chunks))


def _with_chunks(problem: PlanningProblem, rows_in: int) -> float:
    aim, budget, blocks = problem.objective, problem.quality_budget, problem.spec.block_count
    n_in, n_out = aim.tokens
    throughput = aim.kind == "throughput"
    waits = max(n_in / rows_in - 1, 0.0) if rows_in else 0.0
    units = units_of(problem)
    forms = {
        form.bits: form.sensitivity or 0.0
        for form in problem.hop_formats
        if budget is None or form.sensitivity is not None
    }

    def allowed(unit: Unit, k: int) -> bool:
        pinned = problem.pins.get(k)
        if pinned is None or unit.members == (pinned,):
            return True
        asked = any(set(unit.members) == set(some) for some in problem.teams)
        return asked and (unit.members[0] == pinned if k == 0 else pinned in unit.members)

    def chunk_s(k: int, way: Way) -> float:
        if k == blocks - 1:
            return 0.0
        whole_s = 64 * way.prefill_s
        fixed_s = min(max((64 * way.decode_s - whole_s) / 63, 0.0), whole_s)
        return fixed_s + rows_in * (whole_s - fixed_s) / 64

    def stage(unit: Unit, first: int, last: int) -> list[Figures]:
        power = unit.watts if aim.kind == "energy" else 0.0
        if power is None or (len(unit.members) > 1 and last == 1):
            return []
        choices = [
            [
                way
                for way in unit.ways[k]
                if way.bits in problem.bits
                and allowed(unit, k)
                and way.loss < math.inf
                and problem.weight_errors[k].get(way.bits, 0.0) <= problem.max_weight_error[k]
            ]
            for k in range(first, last)
        ]
        found = []
        for chosen in itertools.product(*choices):
            sizes = [
                [sum(way.sizes[m][at] for way in chosen) for at in (0, 1)]
                for m in range(len(unit.members))
            ]
            if any(
                used > limit
                for own, limits in zip(sizes, unit.limits, strict=True)
                for used, limit in zip(own, limits, strict=True)
            ):
                continue
            decode_s = unit.call_s + sum(way.decode_s for way in chosen)
            busy_s = unit.call_s + rows_in * unit.call_row_s
            cost = (n_out + bool(rows_in)) * unit.call_s + rows_in * unit.call_row_s
            cost += power * decode_s
            for k, way in enumerate(chosen, first):
                cost += n_out * way.decode_s + aim.migration_weight * way.load_s
                if rows_in:
                    busy_s += chunk_s(k, way)
                    cost += way.decode_s if k == blocks - 1 else chunk_s(k, way)
            slow = decode_s if throughput else busy_s if waits else 0.0
            found.append((cost, slow, sum(way.loss for way in chosen)))
        return best_of(found)

    stages = {
        (u, first, last): stage(unit, first, last)
        for u, unit in enumerate(units)
        for first, last in itertools.combinations(range(blocks + 1), 2)
    }

    def link_s(i: int, j: int, size: int, rtts: float, times: float) -> float:
        link = problem.links.get((i, j))
        if link is None:
            return math.inf
        return rtts * link.rtt_s / 2 + times * size / link.bytes_per_s

    best = math.inf
    for order in orders(units, len(problem.devices)):
        if any(not any(set(units[u].members) == set(t) for u in order) for t in problem.teams):
            continue
        leads = [units[u].members[0] for u in order]
        for widths in itertools.product(forms, repeat=len(order) - 1):
            hops = [(*p, SENT[b]) for p, b in zip(itertools.pairwise(leads), widths, strict=True)]
            leaving = [link_s(*hop, 1, 1) for hop in hops]
            calls = n_out + bool(rows_in)
            wire = sum(link_s(*hop, calls, rows_in + n_out) for hop in hops)
            sending = max((link_s(*hop, 0, rows_in) for hop in hops), default=0.0)
            lost = sum(forms[bits] for bits in widths) if budget is not None else 0.0
            leaving.append(link_s(leads[-1], leads[0], 4, 1, 1) if len(order) > 1 else 0.0)
            if len(order) > 1:
                wire += link_s(leads[-1], leads[0], 4, n_out, n_out)
            if math.inf in leaving:
                continue
            for cuts in itertools.combinations(range(1, blocks), len(order) - 1):
                found: list[Figures] = [(wire, sending if waits else 0.0, lost)]
                for u, first, last, link in zip(
                    order, (0, *cuts), (*cuts, blocks), leaving, strict=True
                ):
                    found = best_of(
                        [
                            (
                                cost + more,
                                max(slow, busy + link if throughput else busy),
                                loss + extra,
                            )
                            for cost, slow, loss in found
                            for more, busy, extra in stages[u, first, last]
                        ]
                    )
                counts = 1.0 if throughput else waits
                for cost, slow, loss in found:
                    if budget is None or loss <= budget + 1e-12:
                        best = min(best, cost + counts * slow)
    return best


def orders(units: Sequence[Unit], most: int) -> list[tuple[int, ...]]:
    """All orders of units that have no device in common."""
    found = []
    for count in range(1, most + 1):
        for order in itertools.permutations(range(len(units)), count):
            members = [i for u in order for i in units[u].members]
            if len(set(members)) == len(members):
                found.append(order)
    return found

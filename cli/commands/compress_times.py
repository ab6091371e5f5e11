"""The source of a token's predicted time for ``shoal compress``: a lab file, or the live shoal."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from cli.errors import CommandFailed, CoordinatorUnreachable, UsageError
from cli.render import Screen

if TYPE_CHECKING:
    from cli.client import Client
    from compression.choice import Rows
    from compression.run import Planner, TokenTime
    from model.quantize import Format
    from model.spec import ModelSpec
    from planning.plan import Plan

PLAN_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Times:
    """The source of the predicted times of tokens, also in words. devices: ids by their names."""

    token_time: TokenTime
    plan: Planner
    source: str
    devices: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def times_of(options: argparse.Namespace, screen: Screen) -> Iterator[Times | None]:
    """Find what predicts times: --lab, else a coordinator that answers, else None.

    Raises LabError, and UsageError if --at-most has nothing to compare with. A coordinator that is
    named by --url must answer: otherwise raises CoordinatorUnreachable.
    """
    if options.lab is not None:
        if options.url is not None:
            raise UsageError("--lab and --url both give times: drop one of them")
        yield _described(options)
        return
    with ExitStack() as stack:
        client = _coordinator(options, stack)
        if client is None:
            yield None
        elif client.get("/shoal/v1/devices")["devices"]:
            yield _measured(options, screen, client)
        elif _must_have_times(options):
            raise CommandFailed("no times: the coordinator has no devices: start an agent")
        else:
            screen.note("no times of a token, because the coordinator has no devices")
            yield None


def _must_have_times(options: argparse.Namespace) -> bool:
    return is_choosing(options) or options.url is not None


def is_choosing(options: argparse.Namespace) -> bool:
    """Say if one model is to be chosen."""
    return options.at_most is not None or options.quality_budget is not None


def _coordinator(options: argparse.Namespace, stack: ExitStack) -> Client | None:
    """Return the coordinator if one answers. Raises as ``times_of``."""
    from cli.client import Client, default_url

    try:
        client = stack.enter_context(Client(options.url or default_url()))
        client.get("/shoal/v1/devices")
    except CoordinatorUnreachable as error:
        if options.url is not None:
            raise
        if is_choosing(options):
            name = "--quality-budget" if options.at_most is None else "--at-most"
            raise UsageError(
                f"{name} needs --lab LAB.yaml, or a running coordinator, for the times: {error}"
            ) from error
        return None
    return client


def _described(options: argparse.Namespace) -> Times:
    from compression.latency import plan_on
    from planning.labs.lab_file import read_lab
    from planning.plan import InfeasiblePlan

    lab = read_lab(options.lab)

    def plan(
        spec: ModelSpec,
        folder: Path,
        formats: Sequence[Format],
        losses: tuple[Rows, float] | None,
    ) -> Plan:
        return plan_on(lab, spec, formats, options.context, losses)

    def token_time(spec: ModelSpec, folder: Path, fmt: Format) -> float | None:
        try:
            return plan(spec, folder, [fmt], None).decode_s
        except InfeasiblePlan:
            return None

    return Times(token_time, plan, str(options.lab))


def _measured(options: argparse.Namespace, screen: Screen, client: Client) -> Times:
    """Times by plans of the coordinator, whose devices measure shapes that are new to them."""
    from cli.client import Refused
    from model.schemes import DEFAULT_SCHEME
    from planning.plan import InfeasiblePlan, Plan
    from planning.problem import Objective
    from planning.request import LoadRequest

    failed = False
    devices: dict[str, str] = {}

    def plan(
        spec: ModelSpec,
        folder: Path,
        formats: Sequence[Format],
        losses: tuple[Rows, float] | None,
    ) -> Plan:
        rows, budget = losses or (None, None)
        schemes = [fmt.scheme for fmt in formats if fmt.scheme != "float"]
        request = LoadRequest(
            model=folder.absolute(),
            bits=tuple(fmt.bits for fmt in formats),
            # A time depends on the stored format, whatever quantizer chose the codes.
            scheme=schemes[0] if schemes else DEFAULT_SCHEME,
            group_size=options.group_size,
            context_tokens=min(options.context, spec.max_context),
            time_limit_s=PLAN_LIMIT_S,
            objective=Objective("latency"),
            unbounded=budget is None,
            sensitivities=None if rows is None else tuple(rows),
            quality_budget=budget,
            quality_margin=None if rows is None else 1.0,
        )
        try:
            answer = client.operate("/shoal/v1/plan", request.to_dict(), lambda _: None)
        except Refused as error:
            if error.code == "infeasible":
                raise InfeasiblePlan(str(error)) from error
            raise
        devices.update(answer["devices"])
        return Plan.from_dict({item.name: answer["plan"][item.name] for item in fields(Plan)})

    def token_time(spec: ModelSpec, folder: Path, fmt: Format) -> float | None:
        nonlocal failed
        if failed:
            return None
        try:
            return plan(spec, folder, [fmt], None).decode_s
        except InfeasiblePlan:
            return None
        except CommandFailed as error:
            if _must_have_times(options):
                raise
            # The points are worth showing without times, too.
            screen.note(f"no times of a token: {error}")
            failed = True
            return None

    return Times(token_time, plan, "the coordinator's devices, as measured", devices)

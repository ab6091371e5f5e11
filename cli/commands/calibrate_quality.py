"""``shoal calibrate --quality``: measures a model's sensitivities, here or on an agent."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.shared_arguments import adapter_of, scheme_text_of, with_scheme

if TYPE_CHECKING:
    from backends.base import Backend
    from calibration.quality.blocks import BlockSensitivity, PlanCheck
    from calibration.quality.hops import HopSensitivity
    from model.checkpoint import Checkpoint
    from model.spec import ModelSpec

QUALITY_BITS = (2, 3, 4, 6, 8)


class _Found(NamedTuple):
    """The results of one run. ``own`` has the layers of a backend that rounds by itself."""

    qualities: Sequence[BlockSensitivity]
    own: Sequence[BlockSensitivity]
    hops: Sequence[HopSensitivity]
    checks: Sequence[PlanCheck]


def quality_here(options: argparse.Namespace, screen: Screen, state_dir: Path) -> None:
    """Measure in this process. Raises CommandFailed, ModelError, BackendError."""
    from backends.registry import BACKENDS, backend_class
    from calibration.quality.hops import worst_hops
    from model.checkpoint import Checkpoint

    if options.model is None:
        raise UsageError("--quality compares weights: it needs --model DIR")
    checkpoint = with_scheme(options, Checkpoint.open(options.model, adapter_of(options)))
    spec = checkpoint.spec
    sequences = _sequences(options, spec)
    first = next(iter(BACKENDS))
    backend = backend_class(options.backend or first)()
    arithmetic = backend.probe().arithmetic
    # A backend that rounds is measured in addition to the loss of the weights' bits alone.
    plain = backend_class(first)() if arithmetic else backend
    try:
        found = _measured(options, screen, state_dir, checkpoint, sequences, (plain, backend))
    except ValueError as error:
        raise CommandFailed(str(error)) from error
    answer = {
        "model": str(options.model.absolute()),
        "fingerprint": checkpoint.fingerprint,
        "tokens": sum(map(len, sequences)),
        "scheme": options.scheme,
        "group_size": options.group_size,
        "blocks": _described(spec, found.qualities) + _described(spec, found.own, arithmetic),
        "hops": [
            {"after": spec.block_name(hop.boundary), "bits": hop.bits, "kl": hop.kl}
            for hop in found.hops
        ],
        "worst_hops": worst_hops(found.hops),
        "plans": [asdict(check) for check in found.checks],
    }
    _show_quality(options, screen, answer, found.qualities, found.checks)


def _measured(
    options: argparse.Namespace,
    screen: Screen,
    state_dir: Path,
    checkpoint: Checkpoint,
    sequences: Sequence[Sequence[int]],
    backends: tuple[Backend, Backend],
) -> _Found:
    """Measure with ``backends``: the one for all, and the one for the layers of ``own``.

    Raises ValueError for unusable sequences.
    """
    from calibration.quality.blocks import check_plans, measure_quality, random_plans
    from calibration.quality.hops import measure_hops
    from calibration.quality.students import Options
    from calibration.store import CalibrationStore

    bits = options.bits or QUALITY_BITS
    plain, rounding = backends
    form = {"scheme": options.scheme, "group_size": options.group_size, "directory": state_dir}
    store = CalibrationStore(state_dir / "quality.json")
    own: Sequence[BlockSensitivity] = ()
    checks: Sequence[PlanCheck] = ()
    with screen.counting("measuring sensitivities") as on_step:
        how = Options(plain, options.threads, on_step)
        qualities = measure_quality(checkpoint, bits, sequences, how, store=store, **form)
        if rounding is not plain:
            how = Options(rounding, options.threads, on_step, plain=plain)
            taken = rounding.probe().container_bits
            widths = [width for width in bits if width in taken]
            own = measure_quality(checkpoint, widths, sequences, how, store=store, **form)
    with screen.counting("measuring hops") as on_step:
        how = Options(plain, options.threads, on_step)
        hops = measure_hops(checkpoint, sequences, options=how, store=store, directory=state_dir)
    if options.check_plans:
        plans = random_plans(checkpoint.spec.block_count, bits, options.check_plans)
        with screen.counting("measuring plans") as on_step:
            how = Options(plain, options.threads, on_step)
            checks = check_plans(checkpoint, qualities, plans, sequences, how, **form)
    return _Found(qualities, own, hops, checks)


def _described(
    spec: ModelSpec, found: Sequence[BlockSensitivity], arithmetic: str = ""
) -> list[dict[str, Any]]:
    """Describe sensitivities for JSON. Of an ``arithmetic`` with its own losses, only layers."""
    mark = {"arithmetic": arithmetic} if arithmetic else {}
    return [
        asdict(quality)
        | {
            "name": spec.block_name(quality.block),
            "normalized_weight_error": quality.normalized_weight_error,
        }
        | mark
        for quality in found
        if not arithmetic or spec.block_kind(quality.block) == "layer"
    ]


def quality_on_agent(options: argparse.Namespace, screen: Screen) -> None:
    """Let an agent measure and the coordinator keep results. Raises CommandFailed, ModelError."""
    from calibration.quality.blocks import BlockSensitivity, PlanCheck, random_plans
    from cli.client import Client, default_url
    from cli.commands.model_names import path_there
    from model.families import load_spec

    if options.model is None:
        raise UsageError("--quality compares weights: it needs --model DIR")
    bits = options.bits or QUALITY_BITS
    spec = load_spec(options.model)
    sequences = _sequences(options, spec)
    if not sequences:
        raise CommandFailed("no calibration text: at least one sequence of two tokens is needed")
    request = {
        "bits": list(bits),
        "sequences": sequences,
        "plans": random_plans(spec.block_count, bits, options.check_plans),
        "scheme": options.scheme,
        "scheme_text": scheme_text_of(options),
        "group_size": options.group_size,
        "adapter": adapter_of(options),
        "on": None if options.on == "auto" else options.on,
    }
    told = False

    with Client(options.url or default_url()) as client, screen.progress() as on_step:

        def on_agents_step(step: Mapping[str, Any]) -> None:
            nonlocal told
            if step["phase"] == "quality" and not told:
                told = True
                screen.note(f"{step['label']} measures; the coordinator keeps each result at once")
            on_step(step)

        path = path_there(options.given_model, options.model, client)
        request["model"] = str(path)
        answer = client.operate("/shoal/v1/quality", request, on_agents_step)
    if not told:
        screen.note("everything was measured before")
    qualities = [
        BlockSensitivity(item["block"], item["bits"], item["kl"], item["weight_error"])
        for item in answer["blocks"]
        if "arithmetic" not in item
    ]
    checks = [
        PlanCheck(tuple(item["bits"]), item["predicted_kl"], item["measured_kl"])
        for item in answer["plans"]
    ]
    _show_quality(options, screen, answer, qualities, checks)


def _show_quality(
    options: argparse.Namespace,
    screen: Screen,
    answer: Mapping[str, Any],
    qualities: Sequence[BlockSensitivity],
    checks: Sequence[PlanCheck],
) -> None:
    """Print ``answer`` as JSON or as tables, and draw it if asked."""
    from calibration.charts import heatmap_svg
    from planning.request import model_name

    names = list(dict.fromkeys(item["name"] for item in answer["blocks"]))
    bits = sorted({quality.bits for quality in qualities})
    name = model_name(options.model.absolute())
    title = f"{name}: KL(original || one block at b bits), nats per token"
    if options.json:
        screen.json(answer)
    else:
        _show_sensitivities(screen, title, names, bits, qualities)
        _show_own(screen, [item for item in answer["blocks"] if "arithmetic" in item])
        _show_hops(screen, answer["hops"])
        screen.out.print(f"over {answer['tokens']} tokens")
        if checks:
            _show_checks(screen, checks)
    if options.plot is not None:
        rows = sorted(bits, reverse=True)
        values = {(rows.index(quality.bits), quality.block): quality.kl for quality in qualities}
        picture = heatmap_svg(title, names, [f"{width} bits" for width in rows], values)
        options.plot.write_text(picture, encoding="utf-8")
        screen.note(f"drawn to {options.plot}")


def _sequences(options: argparse.Namespace, spec: ModelSpec) -> list[list[int]]:
    from model.passages import SEQUENCE_TOKENS, built_in_text, passages_of, split_passages
    from model.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(options.model)
    if options.text is None:
        passages = built_in_text()
    else:
        try:
            passages = passages_of(options.text.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise CommandFailed(f"{options.text}: not UTF-8 text") from error
    encoded = (tokenizer.encode(passage) for passage in passages)
    return split_passages(encoded, min(SEQUENCE_TOKENS, spec.max_context), options.max_tokens)


def _show_sensitivities(
    screen: Screen,
    title: str,
    names: Sequence[str],
    bits: Sequence[int],
    qualities: Sequence[BlockSensitivity],
) -> None:
    widths = sorted(set(bits))
    kl = {(item.block, item.bits): item.kl for item in qualities}
    errors = {(item.block, item.bits): item.normalized_weight_error for item in qualities}
    for heading, values in ((title, kl), ("max|w - w_b| / 2^b", errors)):
        table = Table(title=escape(heading), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("block", no_wrap=True)
        for width in widths:
            table.add_column(f"{width} bits", justify="right", no_wrap=True)
        for block, name in enumerate(names):
            table.add_row(name, *(f"{values[block, width]:.1e}" for width in widths))
        screen.table(table)


def _show_own(screen: Screen, items: Sequence[Mapping[str, Any]]) -> None:
    """Print the divergences of layers in arithmetics that round."""
    for arithmetic in dict.fromkeys(item["arithmetic"] for item in items):
        some = [item for item in items if item["arithmetic"] == arithmetic]
        title = f"layers as {arithmetic} computes them, KL in nats per token"
        table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("block", no_wrap=True)
        widths = sorted({item["bits"] for item in some})
        for width in widths:
            table.add_column(f"{width} bits", justify="right", no_wrap=True)
        kl = {(item["name"], item["bits"]): f"{item['kl']:.1e}" for item in some}
        for name in dict.fromkeys(item["name"] for item in some):
            table.add_row(name, *(kl.get((name, width), "-") for width in widths))
        screen.table(table)


def _show_hops(screen: Screen, hops: Sequence[Mapping[str, Any]]) -> None:
    widths = sorted({hop["bits"] for hop in hops}, reverse=True)
    kl = {(hop["after"], hop["bits"]): hop["kl"] for hop in hops}
    # The title must not be wider than the table.
    table = Table(title="hops, KL in nats per token", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("behind", no_wrap=True)
    for width in widths:
        table.add_column(f"{width} bits", justify="right", no_wrap=True)
    for name in dict.fromkeys(hop["after"] for hop in hops):
        table.add_row(
            name,
            *(f"{kl[name, width]:.1e}" if (name, width) in kl else "-" for width in widths),
        )
    screen.table(table)


def _show_checks(screen: Screen, checks: Sequence[PlanCheck]) -> None:
    table = Table(title="mixed plans, KL in nats per token", title_justify="left")
    table.box = box.SIMPLE_HEAD
    table.add_column("bits of each block")
    for column in ("predicted sum", "measured", "measured / predicted"):
        table.add_column(column, justify="right", no_wrap=True)
    for check in checks:
        ratio = check.measured_kl / check.predicted_kl if check.predicted_kl else None
        table.add_row(
            " ".join(map(str, check.bits)),
            f"{check.predicted_kl:.3e}",
            f"{check.measured_kl:.3e}",
            "-" if ratio is None else f"{ratio:.2f}",
        )
    screen.table(table)
    ratios = [check.measured_kl / check.predicted_kl for check in checks if check.predicted_kl]
    if ratios:
        screen.out.print(f"plans keep a margin of {max(1.0, *ratios):.2f} against a budget")

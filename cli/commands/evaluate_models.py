"""The subjects of ``shoal eval``: a model, and one run for each set of bits."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.errors import CommandFailed, UsageError
from cli.render import Screen
from cli.shared_arguments import adapter_of, scheme_text_of, with_scheme

if TYPE_CHECKING:
    from cli.client import Client
    from model.checkpoint import Checkpoint
    from model.quantize import Format
    from model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Run:
    """One row of the results: a label, the key of its results, and the bits of every block.

    answers_by: the words that say how its answers were made.
    """

    label: str
    key: str
    bits: tuple[int, ...]
    scheme: str
    group_size: int
    answers_by: str

    def formats(self) -> list[Format]:
        from model.quantize import Format

        return [Format.of(width, self.scheme, self.group_size) for width in self.bits]  # type: ignore[arg-type]  # checked by the planner or the parser


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that a coordinator serves, and how many questions to ask it at once."""

    client: Client
    name: str
    slots: int


@dataclass(frozen=True, slots=True)
class Files:
    """A model's files on this machine."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer


@dataclass(frozen=True, slots=True)
class Model:
    """The model's name, with its files, the loaded model, or both."""

    name: str
    files: Files | None
    loaded: Loaded | None = None
    output: str | None = None
    """The kind of result that the model returns of a text. None: it generates."""


@contextmanager
def model_and_runs(
    options: argparse.Namespace, screen: Screen
) -> Iterator[tuple[Model, list[Run]]]:
    """Find the model and the runs, of which there is one for each set of bits."""
    from cli.client import Client, default_url

    if options.bits is not None or options.plan is not None:
        yield _here(options, screen)
        return
    _refuse_ignored(options)
    with Client(options.url or default_url()) as client:
        yield _loaded(options, client, screen)


def _refuse_ignored(options: argparse.Namespace) -> None:
    """Raise UsageError for an option that the loaded model has decided already."""
    from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME

    decided = {
        "--exact": options.exact,
        "--adapter": options.adapter is not None,
        "--scheme": options.scheme != DEFAULT_SCHEME,
        "--group-size": options.group_size != DEFAULT_GROUP_SIZE,
    }
    for name, is_given in decided.items():
        if is_given:
            raise UsageError(f"{name} goes with --bits or --plan: what is loaded is as it is")


def _here(options: argparse.Namespace, screen: Screen) -> tuple[Model, list[Run]]:
    from cli.commands.model_names import model_here
    from evaluation.work import formats_key
    from model.checkpoint import Checkpoint
    from model.tokenizer import Tokenizer
    from planning.request import model_name
    from planning.saved import read_plan

    path = model_here(options.model, screen)
    checkpoint = with_scheme(options, Checkpoint.open(path, adapter_of(options)))
    blocks = checkpoint.spec.block_count
    if options.plan is not None:
        saved = read_plan(options.plan)
        widths = [(options.plan.name, tuple(bits for _, bits in saved.placements))]
        if len(saved.placements) != blocks:
            raise CommandFailed(
                f"{options.plan}: it has {len(saved.placements)} blocks and the model {blocks}"
            )
    else:
        widths = [(f"{width} bits", (width,) * blocks) for width in options.bits]
    rounding = "not rounded" if options.exact else "rounded as the backend does"
    how = f"on this machine alone, {options.backend}, activations {rounding}"
    runs = []
    for label, bits in widths:
        key = formats_key(bits, options.scheme, options.group_size) + text_key(checkpoint)
        key += f", here by {options.backend}{' exact' if options.exact else ''}"
        runs.append(Run(label, key, bits, options.scheme, options.group_size, how))
    files, output = Files(checkpoint, Tokenizer.load(path)), checkpoint.spec.output
    kind = None if output is None else output.kind
    return Model(model_name(path.absolute()), files, output=kind), runs


def text_key(checkpoint: Checkpoint) -> str:
    """Return the words of a result's key for the text that chose the codes."""
    prepared = checkpoint.prepared
    return "" if prepared is None else f", text {prepared.recipe.text_key[:16]}"


def _as_loaded(
    options: argparse.Namespace, known: Mapping[str, Any], checkpoint: Checkpoint
) -> Checkpoint:
    """The model's files with the codes that are loaded. Raises UsageError, ModelError."""
    from model.quantize import DEFAULT_SCHEME
    from model.quantizers.prepared import quantized
    from planning.request_fields import text_sha256
    from wire.service import default_state_dir

    text, scheme = scheme_text_of(options), known.get("scheme", DEFAULT_SCHEME)
    if text_sha256(text) != known.get("scheme_text_sha256"):
        raise UsageError(
            f"{known['model']} was loaded with --scheme {scheme} and another text: give the same "
            "one with --scheme-text, or drop it if the load had none"
        )
    return quantized(checkpoint, scheme, default_state_dir("coordinator"), text)


def _loaded(options: argparse.Namespace, client: Client, screen: Screen) -> tuple[Model, list[Run]]:
    """The model that is loaded, with its files if they are on this machine too."""
    from evaluation.work import formats_key
    from model.checkpoint import Checkpoint
    from model.errors import ModelError
    from model.hub import is_loaded_from
    from model.quantize import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME
    from model.tokenizer import Tokenizer

    answer = client.get("/shoal/v1/ps")
    models = [one for one in (answer["model"], *answer.get("beside", ())) if one is not None]
    wanted = str(Path(options.model).absolute())
    for known in models:
        names = (known["model"], known["directory"])
        directory = Path(known["directory"])
        if options.model in names or wanted == names[1] or is_loaded_from(directory, options.model):
            break
    else:
        name = models[0]["model"] if models else "nothing"
        raise CommandFailed(
            f"{options.model} is not loaded ({name} is): `shoal load` it, or evaluate it on this "
            "machine alone with --bits or --plan"
        )
    if "stages" not in known:
        raise CommandFailed(f"{known['model']} is {known['state']}: wait, see `shoal ps`")
    slots = options.slots or known["slots"]["total"]
    loaded = Loaded(client, known["model"], slots)
    files = None
    by_devices = options.loss_by == "devices"
    try:
        checkpoint = _as_loaded(options, known, Checkpoint.open(directory, known.get("adapter")))
        files = Files(checkpoint, Tokenizer.load(directory))
    except ModelError as error:
        if {"loss", "kl"} & set(options.metrics) and not by_devices:
            screen.note(
                "no loss and no KL, because they need the model's files here (--loss-by devices "
                f"needs none): {error}"
            )
    bits = tuple(block["bits"] for block in known["plan"]["blocks"])
    # Older coordinators do not say how they quantized.
    scheme = known.get("scheme", DEFAULT_SCHEME)
    group_size = known.get("group_size", DEFAULT_GROUP_SIZE)
    devices = list(dict.fromkeys(stage["device"] for stage in known["stages"]))
    where = f"on what is loaded, over HTTP, {slots} at once: {', '.join(devices)}"
    key = f"{formats_key(bits, scheme, group_size)}, loaded on {' '.join(devices)}"
    key += ", losses by devices" if by_devices else ""
    run = Run("loaded", key, bits, scheme, group_size, where)
    return Model(known["model"], files, loaded, known.get("output")), [run]

"""Options that several commands take: their names, defaults and help are written once, here."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cli import argument_types
from cli.errors import UsageError
from model.schemes import DEFAULT_GROUP_SIZE, DEFAULT_SCHEME, GROUP_SIZES, SCHEMES

if TYPE_CHECKING:
    from model.checkpoint import Checkpoint


def core_count() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def add_scheme_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--scheme",
        choices=SCHEMES,
        default=DEFAULT_SCHEME,
        help="How weights are quantized: rtn rounds to nearest, truncate is the DILEMMA paper's, "
        "and clip searches the range of each group. With gptq, codes are chosen for the outputs on "
        "a text, which takes up to half an hour for a billion weights, once. With auto, each block "
        "gets the best of gptq, clip and rtn. Default: %(default)s.",
    )


def add_scheme_text_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--scheme-text",
        type=Path,
        metavar="FILE",
        help="The text that gptq and auto look at, in UTF-8, with blank lines between passages. It "
        "is best of the kind that the model will read. Default: calibration.txt beside the model, "
        "or else a built-in English text.",
    )


def scheme_text_of(options: argparse.Namespace) -> str | None:
    """The beginning of --scheme-text, as far as it is looked at, or None. Raises UsageError."""
    from planning.request_fields import MAX_TEXT

    if options.scheme_text is None:
        return None
    try:
        with options.scheme_text.open(encoding="utf-8") as file:
            text: str = file.read(MAX_TEXT)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(f"--scheme-text {options.scheme_text}: {reason}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--scheme-text {options.scheme_text}: not UTF-8 text") from error
    if not text.strip():
        raise UsageError(f"--scheme-text {options.scheme_text}: the file holds no text")
    return text


def with_scheme(options: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint on this machine with the codes of --scheme. Raises ModelError.

    Codes are kept where a coordinator on this machine keeps its own.
    """
    from model.quantizers.prepared import quantized
    from wire.service import default_state_dir

    directory = default_state_dir("coordinator")
    return quantized(checkpoint, options.scheme, directory, scheme_text_of(options))


def add_adapter_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="Merge the LoRA adapter in this folder into the weights while they are quantized. "
        "none runs the weights without an adapter that lies beside them.",
    )


def adapter_of(options: argparse.Namespace) -> str | None:
    """The adapter's absolute path, ``none``, or None. Raises UsageError if nothing is there.

    An absolute path may exist on the coordinator alone, so it is not checked here.
    """
    from model.adapters import NO_ADAPTER

    if options.adapter in (None, NO_ADAPTER):
        return None if options.adapter is None else NO_ADAPTER
    path = Path(options.adapter)
    if not path.is_absolute() and not path.is_dir():
        raise UsageError(
            f"--adapter {options.adapter}: no such folder here; give the folder that peft's "
            "save_pretrained wrote"
        )
    return str(path.absolute())


def add_group_size_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=DEFAULT_GROUP_SIZE,
        help="Weights that share one scale, except with truncate. Codes that are kept from the "
        "file have its own groups. Default: %(default)s.",
    )


def add_memory_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory",
        type=argument_types.size,
        metavar="SIZE",
        help="The most memory for weights, KV cache and buffers, such as 3G. Default: what is "
        "free, less some headroom.",
    )


def add_book_argument(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add --state-dir, for what a coordinator on this machine keeps.

    default: argparse.SUPPRESS where the option may stand before the action as well.
    """
    parser.add_argument(
        "--state-dir",
        type=Path,
        default=default,
        metavar="DIR",
        help="The coordinator's state directory. Default: $STATE_DIRECTORY, else that of the "
        "coordinator installed here, else the user's.",
    )


def add_threads_argument(parser: argparse._ActionsContainer, *, of_service: bool = False) -> None:
    """Add --threads. ``of_service`` leaves None as the default, for the agent service's setting."""
    default = "as the agent service here, else one for each core"
    parser.add_argument(
        "--threads",
        type=argument_types.count,
        default=None if of_service else core_count(),
        metavar="N",
        help="Threads that compute. Default: "
        f"{default if of_service else 'one for each core, here %(default)s'}.",
    )


def add_watts_argument(parser: argparse._ActionsContainer, default: str) -> None:
    """Add --watts. ``default`` says what the command does without it."""
    parser.add_argument(
        "--watts",
        type=argument_types.watts,
        metavar="W",
        help=f"What this device draws while it computes, in watts. {default}",
    )

"""The texts in an encoder's folder: the names of classes, and prompts for texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.bounded import read_json
from model.errors import CheckpointError
from model.families import label_names, problem_type, read_config
from model.families.embedders import PROMPTS

_MAX_BYTES = 1 << 20


def label_names_of(directory: Path) -> tuple[str, ...]:
    """Return the names of the classes of a model. Raises CheckpointError."""
    return label_names(read_config(directory))


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of a model.

    problem_type: what a text's scores of them mean, as config.json calls it. "": it says nothing.
    """

    names: tuple[str, ...]
    problem_type: str


def classes_of(directory: Path) -> Classes:
    """Return the classes of a model. Raises CheckpointError."""
    config = read_config(directory)
    return Classes(label_names(config), problem_type(config))


def prompts_of(directory: Path) -> tuple[dict[str, str], str]:
    """Return the texts that belong before texts of a kind, by name, and the default's name.

    They are in config_sentence_transformers.json. "": there is no default. Raises CheckpointError.
    """
    path = directory / PROMPTS
    if not path.is_file():
        return {}, ""
    known: dict[str, str] = {}
    try:
        values: Any = read_json(path, _MAX_BYTES)
        prompts = values.get("prompts") if isinstance(values, dict) else None
        if isinstance(prompts, dict):
            known = {name: text for name, text in prompts.items() if isinstance(text, str)}
        "".join((*known, *known.values())).encode()  # JSON may hold halves of characters.
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; fetch it again") from error
    default = values.get("default_prompt_name") if known else None
    return known, default if isinstance(default, str) else ""

"""Reads what a model's generation_config.json recommends for drawing tokens."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from model.bounded import read_json

log = logging.getLogger(__name__)

FILE = "generation_config.json"

MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1 << 31
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 0.1, 10.0
MAX_PENALTY = 2.0
MAX_BIAS = 100.0
"""OpenAI's limits of presence and frequency penalties, and of the bias of a token."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """The values of a request that does not say them. None: the model recommends nothing.

    Temperature 0 is greedy. top_k 0 is no limit.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    min_p: float | None = None

    def stated(self) -> dict[str, float]:
        """Return the values that the model recommends, by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if value is not None}


_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, MAX_TEMPERATURE),
    "top_k": (0, MAX_TOP_K),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
}


_NOT_DONE: dict[str, float] = {
    "bad_words_ids": 0,
    "begin_suppress_tokens": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": 0,
    "forced_bos_token_id": 0,
    "guidance_scale": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "mirostat": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": 0,
    "stop_strings": 0,
    "suppress_tokens": 0,
    "typical_p": 1,
    "xtc_probability": 0,
}
"""Options of transformers and llama.cpp that are not implemented, with what changes no answer."""


def read_sampling_defaults(directory: Path) -> SamplingDefaults:
    """Read generation_config.json, if the folder has one.

    A value that no request could have is left out, with one warning for all of them.
    """
    path = directory / FILE
    try:
        values = read_json(path) if path.exists() else {}
    except (OSError, ValueError) as error:
        log.warning("%s is ignored: %s", path, error)
        return SamplingDefaults()
    return sampling_defaults(values if isinstance(values, dict) else {}, str(path))


def sampling_defaults(values: Mapping[str, Any], source: str) -> SamplingDefaults:
    """Read the recommendations among ``values``, as of a generation_config.json.

    ``do_sample`` decides about the temperature: false means greedy, and true means 1 where no other
    is given. ``source`` is for the warning.
    """
    used: dict[str, Any] = {}
    wrong = []
    for name, (low, high) in _RANGES.items():
        value = values.get(name)
        if value is None:
            continue
        kinds = (int,) if name == "top_k" else (int, float)
        if type(value) in kinds and math.isfinite(value) and low <= value <= high:
            used[name] = value if name == "top_k" else float(value)
        else:
            wrong.append(f"{name} {str(value)[:40]!r} is not between {low:g} and {high:g}")
    unread = [name for name, plain in _NOT_DONE.items() if (values.get(name) or plain) != plain]
    if unread:
        log.warning("%s: not implemented, so it changes nothing: %s", source, ", ".join(unread))
    if wrong:
        log.warning("%s: ignored, because %s", source, ", and ".join(wrong))
    if values.get("do_sample") is False:
        used["temperature"] = 0.0
    elif values.get("do_sample") is True:
        used.setdefault("temperature", 1.0)
    return SamplingDefaults(**used)

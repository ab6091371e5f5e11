"""What generation_config.json recommends, and what in it is ignored."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from model.generation import SamplingDefaults, read_sampling_defaults


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {}),
        ({"eos_token_id": 2, "max_new_tokens": 8}, {}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        (
            {"temperature": 1, "repetition_penalty": 1.05},
            {"temperature": 1.0, "repetition_penalty": 1.05},
        ),
        ({"do_sample": False}, {"temperature": 0.0}),
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.5},
            {"temperature": 0.0, "top_p": 0.5},
        ),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": None, "temperature": None, "top_k": None}, {}),
        ({"top_k": 0, "top_p": 0}, {"top_k": 0, "top_p": 0.0}),
    ],
)
def test_recommendations(
    tmp_path: Path,
    values: dict[str, Any],
    expected: dict[str, float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert read_sampling_defaults(tmp_path).stated() == expected
    assert not caplog.records


def test_options_that_would_change_answers_and_are_not_implemented_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"num_beams": 1, "typical_p": 1.0, "suppress_tokens": None, "min_length": 0}
    (tmp_path / "generation_config.json").write_text(json.dumps(plain | {"bad_words_ids": []}))
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    assert not caplog.records
    values = {"suppress_tokens": [5, 6], "no_repeat_ngram_size": 3, "num_beams": 4, "top_k": 9}
    (tmp_path / "generation_config.json").write_text(json.dumps(plain | values))
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(top_k=9)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "generation_config.json: not implemented, so it changes nothing: "
        "no_repeat_ngram_size, num_beams, suppress_tokens"
    )


def test_values_that_no_request_could_have_are_ignored_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"temperature": -1, "top_k": 2.5, "top_p": "high", "repetition_penalty": float("nan")}
    (tmp_path / "generation_config.json").write_text(json.dumps({**values, "do_sample": True}))
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults(tmp_path).stated() == {"temperature": 1.0}
    (record,) = caplog.records
    text = record.getMessage()
    assert (
        "generation_config.json: ignored, because temperature '-1' is not between 0 and 2" in text
    )
    assert all(name in text for name in values)


@pytest.mark.parametrize("content", ["", "[", "[]", "7", "{", "\x00"])
def test_a_broken_file_recommends_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()


def test_a_folder_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()

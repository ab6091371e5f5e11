"""Scores of classes become probabilities as the model's config.json says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.openai.encoders import classified
from model.encoder_files import classes_of, prompts_of
from model.errors import CheckpointError
from tests.encoder_cases import ENCODERS

SCORES = np.array([1.5, -0.5, 3.0], np.float32)


def said(folder: Path, scores: np.ndarray, **options: Any) -> dict[str, Any]:
    """What the API says of the scores of a model with these options in its config.json."""
    shutil.copytree(ENCODERS / "bert-class", folder, dirs_exist_ok=True)
    values = json.loads((folder / "config.json").read_text())
    values.pop("problem_type", None)
    (folder / "config.json").write_text(json.dumps(values | options))
    return classified(scores, classes_of(folder))


def test_scores_become_probabilities_by_the_type_of_problem(tmp_path: Path) -> None:
    """As the pipeline of transformers for classes of texts does."""
    shares = np.exp(SCORES) / np.exp(SCORES).sum()
    for kind in (None, "single_label_classification"):
        found = said(tmp_path, SCORES, problem_type=kind)
        np.testing.assert_allclose(found["probs"], shares, atol=1e-6)
        assert (found["label"], found["num_classes"]) == ("blue", 3)
    found = said(tmp_path, SCORES, problem_type="multi_label_classification")
    np.testing.assert_allclose(found["probs"], 1 / (1 + np.exp(-SCORES)), atol=1e-6)
    assert found["label"] == "blue"
    found = said(tmp_path, SCORES, problem_type="regression")
    np.testing.assert_allclose(found["probs"], SCORES, atol=1e-6)


def test_one_score_is_a_probability_unless_it_is_a_value(tmp_path: Path) -> None:
    """A model of one class that was trained for values, such as similarities, gives the value."""
    score, one = np.array([2.5], np.float32), {"0": "LABEL_0"}
    found = said(tmp_path, score, id2label=one)
    np.testing.assert_allclose(found["probs"], 1 / (1 + np.exp(-2.5)), atol=1e-6)
    found = said(tmp_path, score, id2label=one, problem_type="regression")
    assert found == {"label": "LABEL_0", "probs": [2.5], "num_classes": 1}


def test_an_unknown_type_of_problem_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="problem_type must be one of single_label"):
        said(tmp_path, SCORES, problem_type="ranking")


def test_names_and_prompts_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """JSON may hold a half of a character. Each answer with it would fail."""
    with pytest.raises(CheckpointError, match="id2label must name the classes"):
        said(tmp_path, SCORES, id2label={"0": "red", "1": "\ud800", "2": "blue"})
    path = tmp_path / "config_sentence_transformers.json"
    path.write_text(json.dumps({"prompts": {"query": "\ud800", "text": ""}}))
    with pytest.raises(CheckpointError, match=r"transformers\.json: cannot be read"):
        prompts_of(tmp_path)
    prompts = {"query": "find:\n", "text": "", "none": None}
    path.write_text(json.dumps({"prompts": prompts, "default_prompt_name": "query"}))
    assert prompts_of(tmp_path) == ({"query": "find:\n", "text": ""}, "query")
    path.write_text('{"prompts": {}, "default_prompt_name": "query"}')
    assert prompts_of(tmp_path) == ({}, "")

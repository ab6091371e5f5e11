"""Requests that leave open how tokens are drawn take what generation_config.json recommends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx

from tests.system.cluster import TINY_OPT, Cluster, last_json

RECOMMENDED = {
    "temperature": 1.7,
    "top_k": 40,
    "top_p": 0.95,
    "repetition_penalty": 1.3,
    "min_p": 0.1,
}
PROMPT = "The lamp is in the attic. The meter"


def ask(cluster: Cluster, **fields: Any) -> list[int]:
    body = {"prompt": PROMPT, "max_tokens": 24, "seed": 4, "ignore_eos": True, **fields}
    answer = httpx.post(
        f"{cluster.url}/v1/completions",
        json={**body, "return_token_ids": True},
        timeout=60,
        trust_env=False,
    ).json()
    tokens: list[int] = answer["shoal"]["tokens"]
    return tokens


def run_command(cluster: Cluster, model: Path, *options: str) -> list[int]:
    options = ("--seed=4", "--max-tokens=24", "--json", *options)
    tokens: list[int] = last_json(cluster.run("run", str(model), PROMPT, *options))["tokens"]
    return tokens


def test_a_request_takes_what_the_model_recommends_unless_it_says_otherwise(
    cluster: Cluster, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(TINY_OPT, tmp_path / "a" / "tiny"))
    values = {"do_sample": True, "eos_token_id": None, "typical_p": 0.1, **RECOMMENDED}
    (model / "generation_config.json").write_text(json.dumps(values))
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    loaded = cluster.load(model, "--bits=16")
    assert loaded["sampling_defaults"] == RECOMMENDED
    assert cluster.get("/shoal/v1/ps")["model"]["sampling_defaults"] == RECOMMENDED
    shown = cluster.run("ps").stdout
    assert (
        "requests take, unless they say: temperature 1.7, top k 40, top p 0.95, "
        "repetition penalty 1.3, min p 0.1" in shown
    )
    as_recommended = ask(cluster, **RECOMMENDED)
    assert ask(cluster) == as_recommended
    by_run = run_command(cluster, model)
    assert by_run
    assert by_run == as_recommended[: len(by_run)]
    # One field that is given leaves the others.
    cold = ask(cluster, temperature=0)
    assert cold == ask(cluster, **RECOMMENDED | {"temperature": 0})
    plain = {"temperature": 0, "repetition_penalty": 1}
    greedy = ask(cluster, **plain)
    assert greedy not in (cold, as_recommended)
    assert run_command(cluster, model, "--temperature=0", "--repetition-penalty=1") == greedy[:24]
    refused = cluster.run("run", str(model), PROMPT, "--repetition-penalty=0")
    assert refused.returncode == 2
    assert "a number between 0.1 and 10" in refused.stderr

    # Without the recommendations, the API draws from the whole distribution, and `run` is greedy.
    loaded = cluster.load(model, "--bits=16", "--no-generation-defaults")
    assert loaded["sampling_defaults"] == {}
    neutral = {"temperature": 1, "top_k": 0, "top_p": 1, "repetition_penalty": 1, "min_p": 0}
    assert ask(cluster) == ask(cluster, **neutral)
    assert run_command(cluster, model) == greedy[:24]
    assert "requests take" not in cluster.run("ps").stdout

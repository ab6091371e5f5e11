"""``shoal eval`` on a model that real agents share, with a judge over real HTTP."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.fake_judge import FakeJudge, fake_judge, rule
from tests.system.cluster import COMMAND, FIXTURES, ROOT, TINY_OPT, Cluster, last_json

DEV = ROOT / "examples" / "tiny-opt" / "dev.json"
NAMES = ("pi-1", "pi-2")
SLOTS = 3
QUESTIONS = 12


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJudge]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with fake_judge() as server:
        yield server


@pytest.fixture
def shared(cluster: Cluster) -> Cluster:
    """The embedded model at 4 bits, split over two agents."""
    cluster.start_coordinator()
    for name in NAMES:
        cluster.start_agent(name)
    cluster.wait_for_agents(*NAMES)
    cluster.load(
        TINY_OPT, "--bits=4", f"--slots={SLOTS}", "--pin=embedding:pi-1", "--pin=head:pi-2"
    )
    return cluster


def kept(path: Path, kind: str) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["item"]: line for line in lines if line.get("kind") == kind}


def test_answers_of_a_split_model_are_judged_and_kept(
    shared: Cluster, judge: FakeJudge, tmp_path: Path
) -> None:
    """It is interrupted while the judge thinks. The same command then asks only what is missing."""
    out = tmp_path / "out.jsonl"
    asked = (
        *("eval", "tiny-opt", f"--data={DEV}", "--template={context} {question}"),
        *(f"--questions={QUESTIONS}", f"--judge={judge.url}", f"--out={out}"),
    )
    judge.go.clear()
    with subprocess.Popen(
        [*COMMAND, *asked, f"--url={shared.url}"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        assert judge.is_asked.wait(60)
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    answers = kept(out, "answer")
    assert len(answers) == QUESTIONS
    assert f"{2 * QUESTIONS} results are kept in" in " ".join(shown.split())
    judge.go.set()
    completed = shared.run(*asked, "--json")
    (run,) = last_json(completed)["runs"]
    assert f"{2 * QUESTIONS} results already" in " ".join(completed.stderr.split())
    assert kept(out, "answer") == answers
    figures = run["figures"]
    assert figures["exact_match"]["value"] == 100  # Four bits cost this model nothing.
    assert 0 < figures["kl"]["value"] < 0.001
    assert run["bits"] == [4] * 10
    assert f"over HTTP, {SLOTS} at once: pi-1, pi-2" in run["answers_by"]
    wanted = [rule(one["answer"].strip(), one["accepted"]) for one in answers.values()]
    for name in ("relevance", "correctness", "clarity", "fluency"):
        mean = statistics.fmean(scores[name] for scores in wanted)
        assert figures[f"judge_{name}"]["value"] == pytest.approx(mean)
    assert figures["judge_correctness"]["value"] > 9
    check_refusals(shared, tmp_path)
    check_adapter(shared, tmp_path)
    check_losses_by_devices(shared, tmp_path)


def check_losses_by_devices(shared: Cluster, tmp_path: Path) -> None:
    """Devices measure the loss that files give, and no file of the model is needed for it."""
    folder, data = tmp_path / "moved", tmp_path / "answers.jsonl"
    shutil.copytree(FIXTURES / "llama", folder)
    pairs = [("The lamp is", "in the attic."), ("One two ", "three"), ("Say", "naïve")]
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in pairs]
    shared.load(folder, "--bits=32")
    asked = ("eval", "moved", f"--data={data}", "--json")
    options = ("--loss-by=devices", "--max-tokens=2")
    data.write_text("\n".join(lines[:2]))
    files = last_json(shared.run(*asked, "--metrics=loss"))["runs"][0]["figures"]
    folder.rename(tmp_path / "away")
    data.write_text("\n".join(lines))
    found = last_json(shared.run(*asked, *options))
    figures = found["runs"][0]["figures"]
    assert "by the devices" in found["losses_by"]
    assert {"loss", "perplexity", "exact_match"} <= figures.keys()
    assert "kl" not in figures
    # This model's vocabulary does not tell the bytes of a part of a letter.
    assert (figures["loss"]["items"], found["unspelt"]) == (2, 1)
    for bound in ("value", "low", "high"):
        assert figures["loss"][bound] == pytest.approx(files["loss"][bound], rel=1e-3)
    shown = shared.run(*asked)
    assert "--loss-by devices needs none" in " ".join(shown.stderr.split())
    refused = shared.run(*asked, *options, "--chat")
    assert refused.returncode == 2
    assert "--loss-by devices is for questions to what is loaded" in refused.stderr


def check_adapter(shared: Cluster, tmp_path: Path) -> None:
    """The loss of a model that is loaded with an adapter is that of the merged weights."""
    text = tmp_path / "text.txt"
    text.write_text("The lamp is in the attic.")
    base, adapter = FIXTURES / "llama", ROOT / "tests" / "adapters" / "plain"
    asked = ("eval", str(base), f"--data={text}", "--metrics=loss", "--json")
    shared.load(base, "--bits=32", f"--adapter={adapter}")
    loaded = last_json(shared.run(*asked))
    merged = last_json(shared.run(*asked, "--bits=32", f"--adapter={adapter}"))
    alone = last_json(shared.run(*asked, "--bits=32"))
    losses = [one["runs"][0]["figures"]["loss"]["value"] for one in (loaded, merged, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def check_refusals(shared: Cluster, tmp_path: Path) -> None:
    """Prompts that do not fit the context score nothing. Another model is not answered for."""
    data = tmp_path / "prompts.jsonl"
    passage = "The lamp is red. What colour is the lamp?"
    prompts = [passage, "The lamp is red. " * 200 + passage]
    lines = [json.dumps({"prompt": prompt, "answer": "red"}) for prompt in prompts]
    data.write_text("\n".join(lines))
    found = last_json(shared.run("eval", str(TINY_OPT), f"--data={data}", "--json"))
    (run,) = found["runs"]
    assert (run["refused"], found["too_long_for_a_loss"]) == (1, 1)
    assert run["figures"]["exact_match"]["value"] == 50
    assert run["figures"]["loss"]["items"] == 1
    served = last_json(
        shared.run("eval", str(TINY_OPT), f"--data={data}", "--json", "--loss-by=devices")
    )
    assert (served["too_long_for_a_loss"], served["unspelt"]) == (1, 0)
    loss = served["runs"][0]["figures"]["loss"]
    assert (loss["items"], loss["value"] < 1) == (1, True)
    shown = shared.run("eval", "opt-125m", f"--data={data}")
    assert shown.returncode == 1
    assert "opt-125m is not loaded (tiny-opt is)" in " ".join(shown.stderr.split())

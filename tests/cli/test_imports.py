"""Each command imports only what it needs. Every test starts a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cli.errors import EXIT_UNREACHABLE, Unavailable

ROOT = Path(__file__).parents[2]

_RUN = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
from cli.main import main
sys.exit(main({arguments!r}))
"""


def run_without(hidden: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """``shoal`` with ``arguments`` where the modules ``hidden`` cannot be imported."""
    code = _RUN.format(hidden=hidden, arguments=list(arguments))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_help_needs_no_numerics_and_no_discovery() -> None:
    shown = run_without(["numpy", "zeroconf", "starlette", "uvicorn"], "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: shoal" in shown.stdout


def test_plans_for_described_devices_need_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model has weights, whose errors are measured and kept."""
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    lab = "examples/labs/home-4-pis.yaml"
    server = ["api", "coordinator", "agent", "starlette", "uvicorn", "httpx"]
    shown = run_without(server, "plan", "tests/fixtures/opt-pre", "--devices", lab)
    assert shown.returncode == 0, shown.stderr
    assert "plan for opt-pre, predicted from" in shown.stdout
    assert list((tmp_path / "shoal" / "coordinator").rglob("*.json"))


def test_plans_without_a_tokenizer_assume_what_a_text_would_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    lab = "--devices=examples/labs/home-4-pis.yaml"
    shown = run_without(["tokenizers"], "plan", "tests/fixtures/opt-pre", lab)
    assert shown.returncode == 0, shown.stderr
    assert "measuring needs tokenizers, which this installation lacks" in shown.stdout


def test_a_plan_that_needs_a_tokenizer_says_that_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    lab = "--devices=examples/labs/home-4-pis.yaml"
    model = "tests/fixtures/opt-pre"
    shown = run_without(["tokenizers"], "plan", model, lab, "--scheme", "gptq")
    assert shown.returncode == Unavailable.exit_code
    assert shown.stderr.startswith("error: this installation lacks tokenizers: pip install")
    assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize("command", ["ps", "devices"])
def test_what_only_asks_the_coordinator_needs_no_numerics_and_no_messages(command: str) -> None:
    shown = run_without(["numpy", "msgpack", "cryptography"], command, "--url=http://127.0.0.1:9")
    assert shown.returncode == EXIT_UNREACHABLE, shown.stderr
    assert "shoal coordinator" in shown.stderr


def test_services_that_name_each_other_need_no_discovery() -> None:
    code = "import sys, agent.daemon, api.site; sys.exit('zeroconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_services_do_not_import_what_their_children_do() -> None:
    code = (
        "import sys, agent.daemon, coordinator.server; "
        "sys.exit(' '.join({'jinja2', 'onnxruntime', 'onnx', 'torch'} & sys.modules.keys()) or 0)"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=120, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr

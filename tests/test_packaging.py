"""The parts of an installation, and the libraries that each part works without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path

import pytest

from cli.doctor.checks import NEEDED
from cli.doctor.coordinator import COORDINATOR_NEEDED
from cli.service.settings import parse_toml

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("model", "wire", "backends", "calibration", "agent", "planning", "paper"),
    *("coordinator", "api", "testbed", "evaluation", "compression", "studies", "cli"),
)
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("[a-z]*.py")
)

NEEDS = {
    "backends.torch_kernels": "triton",
    "backends.torch_fused_kernels": "triton",
    "backends.torch_": "torch",
    "compression": "torch",
}
"""Beginning of a module's name -> what it may need that no extra of the tests installs."""

WITH_TORCH = ("backends.torch_", "compression")
"""Beginnings of the names of modules that import torch."""

AGENT_ONLY = {"onnx", "onnxruntime"}
COORDINATOR_ONLY = {
    *(
        "httpx",
        "huggingface_hub",
        "jinja2",
        "prometheus_client",
        "pulp",
        "starlette",
        "tokenizers",
        "uvicorn",
        "yaml",
    ),
}


def imported_by(module: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after importing ``module``."""
    program = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return set(completed.stdout.split())


IMPORT_ALL = """
import sys
for module in sys.argv[1:]:
    try:
        __import__(module)
    except BaseException as error:
        print(f"{module}: {type(error).__name__}: {error}")
"""


def test_every_module_imports_on_its_own() -> None:
    """One process imports them all. The order is no matter, because the import graph has no circle
    (tests/docs/test_imports.py), and because no module names another's submodule by its package."""
    modules = [
        module
        for module in MODULES
        if not any(
            module.startswith(beginning) and find_spec(library) is None
            for beginning, library in NEEDS.items()
        )
    ]
    modules.sort(key=lambda module: module.startswith(WITH_TORCH))
    completed = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_ALL, *modules],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert (completed.returncode, completed.stdout, completed.stderr) == (0, "", "")


@pytest.mark.parametrize("module", ["agent.daemon", "calibration.layers", "cli.main"])
def test_an_agent_needs_nothing_of_the_coordinators(module: str) -> None:
    assert not imported_by(module) & COORDINATOR_ONLY


@pytest.mark.parametrize("module", ["api.site", "model.hub_download"])
def test_the_hubs_library_is_imported_when_something_is_fetched(module: str) -> None:
    """No other command waits for it."""
    assert "huggingface_hub" not in imported_by(module)


@pytest.mark.parametrize("module", ["api.site", "cli.main"])
def test_a_coordinator_needs_no_accelerator_library(module: str) -> None:
    assert not imported_by(module) & (AGENT_ONLY | {"torch"})


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_owns_our_packages(package: str) -> None:
    assert set(packages_distributions().get(package, ["shoal-llm"])) == {"shoal-llm"}


def test_no_library_keeps_or_sends_an_identity_of_this_machine(tmp_path: Path) -> None:
    """ONNX Runtime 1.29 and later does both, from its import on, unless it is told not to."""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    program = "import backends.onnx_cpu as b; b.OnnxCpuBackend.probe()"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
    assert list(tmp_path.rglob("*")) == []


def test_make_says_what_it_installs_and_shows_that_it_goes_on(tmp_path: Path) -> None:
    completed = subprocess.run(
        ["make", "--dry-run", f"VENV={tmp_path / 'venv'}", "demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = completed.stdout.splitlines()
    (resolving,) = (line for line in lines if "-r requirements/run.lock" in line)
    assert "--quiet" not in resolving  # pip shows each package as it comes.
    told = lines[lines.index(resolving) - 1]
    assert told.startswith("echo ")
    assert "about a minute" in told


def test_the_doctor_looks_for_what_the_package_needs() -> None:
    project = parse_toml((ROOT / "pyproject.toml").read_text(), ROOT)["project"]

    def named(lines: list[str]) -> set[str]:
        return {re.split(r"[^\w-]", line)[0] for line in lines if ";" not in line}

    assert {"shoal-llm", *named(project["dependencies"])} == set(NEEDED)
    coordinators = named(project["optional-dependencies"]["coordinator"])
    # Without llguidance, requests for a format are refused with what to install.
    assert coordinators - {"llguidance"} == set(COORDINATOR_NEEDED) - set(NEEDED)

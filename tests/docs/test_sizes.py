"""Functions and files stay small enough to read, or have a reason to be larger."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator

from tests.words import PACKAGES, ROOT

LINES = 60
PARAMETERS = 8
FILE_LINES = 600

KERNEL = "A GPU kernel has no memory but its arguments: pointers, strides and constants."
OPTIONS = "A table: one option after the other, each with its help."
FIELDS = "A constructor: one attribute after the other, each with its meaning."
FIGURES = "A measurement takes each of its conditions by name, and nothing groups them."

LONG = {
    "cli/service/daemons.py add_coordinator_arguments": OPTIONS,
    "cli/service/daemons.py add_agent_arguments": OPTIONS,
    "cli/main.py _run": OPTIONS,
    "cli/commands/sweep_arguments.py _add_planning_arguments": OPTIONS,
    "cli/commands/bench.py add_bench_arguments": OPTIONS,
    "cli/commands/testbed.py add_testbed_arguments": OPTIONS,
    "cli/service/install.py add_service_actions": OPTIONS,
    "cli/commands/table1.py add_table1_arguments": OPTIONS,
    "agent/daemon.py __init__": FIELDS,
}
"""Functions with more lines than LINES, beside their docstring."""

WIDE = {
    "backends/torch_kernels.py _gemm": KERNEL,
    "backends/torch_kernels.py _gemv": KERNEL,
    "backends/torch_kernels.py _unpack": KERNEL,
    "backends/torch_fused_kernels.py _place": KERNEL,
    "backends/torch_fused_kernels.py place": KERNEL,
    "backends/torch_fused_kernels.py _add_norm": KERNEL,
    "backends/torch_layers.py __init__": FIELDS,
    "agent/relay.py __init__": FIELDS,
    "agent/encoding.py __init__": FIELDS,
    "calibration/device.py profile_device": FIGURES,
    "calibration/layers.py measure_model": FIGURES,
    "calibration/table.py measure_table": FIGURES,
    "coordinator/loading/deployment.py deploy": "A plan's files, its devices, and who is told.",
    "model/families/decoder.py rotary_decoder": "Families differ in each of the arguments.",
    "paper/dilemma.py ccs_instance": "The arguments are the symbols of the paper's table.",
}
"""Functions with more parameters than PARAMETERS, beside ``self``."""


LARGE = {
    "wire/messages.py": "One table of all messages, which a reader wants to see at once.",
    "cli/main.py": "One table of all commands with their help.",
    "cli/service/daemons.py": "Two tables of options, of agent and coordinator, and their start.",
    "planning/planner.py": "The order in which variants, program and search are tried, and why "
    "nothing fits. Both read the same few records.",
    "planning/problem.py": "The records that all of planning reads, with the figures they imply.",
    "planning/plan.py": "A plan's figures, and the check that recomputes them from the problem.",
    "planning/exact/program.py": "One integer program: variables, rows, and reading them back.",
    "coordinator/roster/members.py": "One device's connection, and the table of all of them.",
    "coordinator/loading/operations.py": "One operation a method, each a few steps long.",
    "coordinator/loading/state.py": "One table of states and events.",
    "agent/daemon.py": "One handler for each request of a coordinator.",
    "agent/relay.py": "The way of a row through a stage: one lock guards all of it.",
    "backends/onnx_cpu.py": "One stage: loading, passes, caches.",
    "calibration/layers.py": "One bench, and the measurements that are made on it.",
    "examples/tiny-opt/generate.py": "One table of sentences of the demo's world.",
}
"""Files with more lines than FILE_LINES."""


@functools.cache
def functions() -> tuple[tuple[str, int, int], ...]:
    """Each function outside tests: its file and name, its lines, its parameters."""
    return tuple(_functions())


def _functions() -> Iterator[tuple[str, int, int]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    given = node.args
                    names = [
                        one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)
                    ]
                    count = len(names) - (names[:1] in (["self"], ["cls"]))
                    name = f"{path.relative_to(ROOT)} {node.name}"
                    yield name, _lines(node), count


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function without its docstring."""
    assert node.end_lineno is not None
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_a_long_function_has_a_reason_and_no_reason_is_left_over() -> None:
    assert {name for name, lines, _ in functions() if lines > LINES} == set(LONG)


def test_a_function_of_many_parameters_has_a_reason_and_no_reason_is_left_over() -> None:
    assert {name for name, _, count in functions() if count > PARAMETERS} == set(WIDE)


def test_a_large_file_has_a_reason_and_no_reason_is_left_over() -> None:
    found = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > FILE_LINES
    }
    assert found == set(LARGE)


def test_a_docstring_does_not_count() -> None:
    module = ast.parse('def one(a):\n    """First.\n\n    Second.\n    """\n    return a\n')
    function = module.body[0]
    assert isinstance(function, ast.FunctionDef)
    assert _lines(function) == 2

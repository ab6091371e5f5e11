"""Runs an integer program: HiGHS where it can be imported, else the CBC that PuLP brings.

The program crosses over as an MPS file in a temporary folder that is removed afterwards, so that
both solvers are driven the same way, silently, and CBC under a wall clock of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pulp

SolverName = Literal["highs", "cbc"]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]

# CBC was seen to run up to half again past its own limit: it is told less, then it is killed.
_CBC_SHARE = 0.85
_INTEGRALITY = 1e-5


class SolverError(Exception):
    """The solver is missing, died, or returned values that are not integral."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a solver said. ``bound`` is proved for a minimum; None where nothing was."""

    status: Status
    solver: SolverName
    values: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None


def default_solver() -> SolverName:
    """HiGHS where its library is installed: it is the faster of the two."""
    return "highs" if importlib.util.find_spec("highspy") is not None else "cbc"


def run(
    program: Any, *, time_limit_s: float, solver: SolverName | None = None, gap: float = 0.0
) -> Outcome:
    """Minimise ``program`` (a pulp.LpProblem) to a relative gap, or stop at the limit.

    Raises SolverError; a limit that is reached is not an error but ``feasible`` or ``unknown``.
    """
    name = solver or default_solver()
    time_limit_s = max(time_limit_s, 0.1)
    with tempfile.TemporaryDirectory(prefix="shoal-plan-") as folder:
        model = Path(folder) / "model.mps"
        _, renamed, _, _ = program.writeMPS(str(model), rename=1)
        outcome = (_run_highs if name == "highs" else _run_cbc)(model, time_limit_s, gap)
    if outcome.status not in ("optimal", "feasible"):
        return outcome
    short = outcome.values
    values = {variable: short.get(short_name, 0.0) for variable, short_name in renamed.items()}
    for variable in program.variables():
        value = values[variable.name]
        if variable.cat == pulp.LpInteger and abs(value - round(value)) > _INTEGRALITY:
            raise SolverError(f"{name} returned {value} for the whole number {variable.name}")
    return Outcome(outcome.status, name, values, outcome.bound)


def _run_highs(model: Path, time_limit_s: float, gap: float) -> Outcome:
    highspy = importlib.import_module("highspy")
    highs = highspy.Highs()
    for option, value in (
        ("output_flag", False),
        ("threads", 1),
        ("time_limit", time_limit_s),
        ("mip_rel_gap", gap),
    ):
        highs.setOptionValue(option, value)
    if highs.readModel(str(model)) == highspy.HighsStatus.kError:
        raise SolverError("highs could not read the program")
    highs.run()
    status = highs.getModelStatus()
    kinds = highspy.HighsModelStatus
    if status in (kinds.kInfeasible, kinds.kUnboundedOrInfeasible):
        return Outcome("infeasible", "highs")
    info = highs.getInfo()
    bound = float(info.mip_dual_bound)
    proved = bound if abs(bound) < highspy.kHighsInf else None
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome("unknown", "highs", bound=proved)
    values = dict(
        zip(highs.getLp().col_names_, map(float, highs.getSolution().col_value), strict=True)
    )
    return Outcome("optimal" if status == kinds.kOptimal else "feasible", "highs", values, proved)


def _run_cbc(model: Path, time_limit_s: float, gap: float) -> Outcome:
    cbc = shutil.which(pulp.PULP_CBC_CMD.pulp_cbc_path) or shutil.which("cbc")
    if cbc is None:
        raise SolverError("no solver: install highspy, or cbc on the PATH")
    solution = model.with_suffix(".sol")
    # CBC's preprocessing was seen to lose the optimum of one small program in a thousand.
    command = [cbc, str(model), "-timeMode", "elapsed", "-sec", f"{time_limit_s * _CBC_SHARE:.3f}"]
    command += ["-ratio", f"{gap:g}", "-preprocess", "off", "-solve"]
    writing = ["-printingOptions", "all", "-solution", str(solution)]
    code, text = _output([*command, *writing], model.with_suffix(".log"), time_limit_s)
    if code:
        # Writing the solution crashes CBC where it finds the program infeasible very early.
        code, text = _output(command, model.with_suffix(".log"), time_limit_s)
        if code == 0 and "Problem is infeasible" in text:
            return Outcome("infeasible", "cbc")
        raise SolverError(f"cbc ended with exit status {code}: install highspy")
    bound = _last_number(r"^Lower bound:\s+(\S+)", text)
    if bound is None:
        bound = _last_number(r"^Continuous objective value is (\S+)", text)
    # Killed, it may have been writing: what is there cannot be trusted.
    if code is None or not solution.exists():
        return Outcome("unknown", "cbc", bound=bound)
    return _read_cbc(solution.read_text(), bound, gap)


def _output(command: list[str], log: Path, time_limit_s: float) -> tuple[int | None, str]:
    """Exit status (None: killed at the limit) and what was printed."""
    with log.open("wb") as stream:
        process = subprocess.Popen(  # noqa: S603 - a path from PuLP, arguments of our own
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            code = process.wait(timeout=time_limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
    return code, log.read_text(errors="replace")


def _read_cbc(text: str, bound: float | None, gap: float) -> Outcome:
    """What a CBC solution file says: a status line, then ``[**] index name value cost`` lines."""
    heading, *lines = text.splitlines()
    if heading.startswith(("Infeasible", "Integer infeasible")):
        return Outcome("infeasible", "cbc")
    optimal = heading.startswith("Optimal")
    if not optimal and (not heading.startswith("Stopped") or "no integer" in heading):
        return Outcome("unknown", "cbc", bound=bound)
    values: dict[str, float] = {}
    for line in lines:
        words = line.removeprefix("**").split()
        values[words[1]] = float(words[2])
    if optimal:
        value = float(heading.rsplit(maxsplit=1)[1])
        bound = value - gap * abs(value)
    return Outcome("optimal" if optimal else "feasible", "cbc", values, bound)


def _last_number(pattern: str, text: str) -> float | None:
    found = re.findall(pattern, text, flags=re.MULTILINE)
    return float(found[-1]) if found else None

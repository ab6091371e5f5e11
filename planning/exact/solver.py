"""Runs an integer program with HiGHS if it can be imported, else with the CBC of PuLP.

HiGHS gets the program in memory. CBC is a process of its own, which is killed at the time limit. It
reads files in a temporary folder, which is removed afterwards. Neither prints anything.
"""

from __future__ import annotations

import importlib
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pulp

SolverName = Literal["highs", "cbc"]
Status = Literal["optimal", "feasible", "infeasible", "unknown"]

# CBC was seen to run for 1.5 times its own limit. So its limit is lower, and it is killed at ours.
_CBC_SHARE = 0.85
_INTEGRALITY = 1e-5


class SolverError(Exception):
    """The solver is missing, failed, or returned values that are not integral or no numbers.

    It says nothing about the program: a plan may exist.
    """


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answer of a solver. ``bound`` is a proved lower bound of the minimum; None: no bound."""

    status: Status
    solver: SolverName
    values: Mapping[str, float] = field(default_factory=dict)
    bound: float | None = None


def default_solver() -> SolverName:
    """HiGHS if its library can be imported, because it is faster; else CBC."""
    return "highs" if _highspy() is not None else "cbc"


def run(
    program: Any,
    *,
    time_limit_s: float,
    solver: SolverName | None = None,
    gap: float = 0.0,
    start: Mapping[str, float] | None = None,
) -> Outcome:
    """Minimise ``program`` (a pulp.LpProblem) to a relative gap, or stop at the limit.

    ``start`` is a known solution, with a value for every variable. At the limit the status is
    ``feasible`` or ``unknown``, which is no error. Raises SolverError if the solver fails.
    """
    name = solver or default_solver()
    if not program.variables():
        kept = all((r.getLb() or 0.0) <= 0 <= (r.getUb() or 0.0) for r in program.constraints())
        return Outcome("optimal" if kept else "infeasible", name)
    outcome = (_run_highs if name == "highs" else _run_cbc)(
        program, max(time_limit_s, 0.1), gap, start
    )
    for variable in program.variables() if outcome.values else ():
        value = outcome.values[variable.name]
        # Solvers were seen to return NaN as an optimum.
        is_whole = math.isfinite(value) and abs(value - round(value)) <= _INTEGRALITY
        if not (is_whole if variable.cat == pulp.LpInteger else math.isfinite(value)):
            raise SolverError(f"{name} returned {value} for {variable.name}: use another solver")
    return outcome


def _highspy() -> Any:
    """The library of HiGHS; None if it is missing, or was built for another system."""
    try:
        return importlib.import_module("highspy")
    except (ImportError, OSError):
        return None


def _silent(highspy: Any) -> Any:
    """A HiGHS that prints nothing. Its constructor would print a banner through callbacks."""

    def enable(highs: Any) -> None:
        highs.setOptionValue("output_flag", False)
        highspy.Highs.enableCallbacks(highs)

    highs = type("SilentHighs", (highspy.Highs,), {"enableCallbacks": enable})()
    # Older releases have no callbacks and print when they solve.
    highs.setOptionValue("output_flag", False)
    return highs


def _highs_program(highspy: Any, program: Any) -> Any:
    """The program as HiGHS holds it: row by row, with columns in the order of variables."""
    variables = program.variables()
    column = {variable: index for index, variable in enumerate(variables)}
    rows = program.constraints()
    cells = [(column[variable], factor) for row in rows for variable, factor in row.items()]
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(variables), len(rows)
    costs = [program.objective.get(variable, 0.0) for variable in variables]
    for field_name, values in (
        ("col_cost_", costs),
        ("col_lower_", [-math.inf if v.lowBound is None else v.lowBound for v in variables]),
        ("col_upper_", [math.inf if v.upBound is None else v.upBound for v in variables]),
        ("row_lower_", [-math.inf if (low := row.getLb()) is None else low for row in rows]),
        ("row_upper_", [math.inf if (high := row.getUb()) is None else high for row in rows]),
    ):
        setattr(lp, field_name, np.array(values, dtype=np.float64))
    lp.offset_ = float(program.objective.constant)
    kinds = highspy.HighsVarType
    lp.integrality_ = [
        kinds.kInteger if variable.cat == pulp.LpInteger else kinds.kContinuous
        for variable in variables
    ]
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.array([index for index, _ in cells], dtype=np.int32)
    lp.a_matrix_.value_ = np.array([factor for _, factor in cells], dtype=np.float64)
    return lp


def _run_highs(
    program: Any, time_limit_s: float, gap: float, start: Mapping[str, float] | None
) -> Outcome:
    highspy = _highspy()
    if highspy is None:
        raise SolverError("highspy cannot be imported: install shoal-llm[highs], or use cbc")
    highs = _silent(highspy)
    names = [variable.name for variable in program.variables()]
    failed = highspy.HighsStatus.kError
    if highs.passModel(_highs_program(highspy, program)) == failed:
        raise SolverError("highs did not take the program: use cbc")
    if start is not None:
        known = highspy.HighsSolution()
        known.col_value = [start[name] for name in names]
        highs.setSolution(known)
    # The limit begins here, so that a program that takes long to build is still solved.
    for option, value in (("threads", 1), ("time_limit", time_limit_s), ("mip_rel_gap", gap)):
        highs.setOptionValue(option, value)
    kinds = highspy.HighsModelStatus
    ended = highs.run()
    if highs.getModelStatus() == kinds.kUnboundedOrInfeasible:
        # Only presolve gives this status.
        highs.setOptionValue("presolve", "off")
        ended = highs.run()
    status = highs.getModelStatus()
    if status == kinds.kInfeasible:
        return Outcome("infeasible", "highs")
    if ended == failed or status not in (kinds.kOptimal, kinds.kTimeLimit, kinds.kInterrupt):
        raise SolverError(f"highs failed ({highs.modelStatusToString(status)}): use cbc")
    info = highs.getInfo()
    bound = float(info.mip_dual_bound)
    proved = bound if abs(bound) < highspy.kHighsInf else None
    if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
        return Outcome("unknown", "highs", bound=proved)
    values = dict(zip(names, map(float, highs.getSolution().col_value), strict=True))
    return Outcome("optimal" if status == kinds.kOptimal else "feasible", "highs", values, proved)


def _run_cbc(
    program: Any, time_limit_s: float, gap: float, start: Mapping[str, float] | None
) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="shoal-plan-") as folder:
        model = Path(folder) / "model.mps"
        _, short, _, _ = program.writeMPS(str(model), rename=1)
        if start is not None:
            lines = [f"{at} {short[name]} {start[name]:.17g} 0" for at, name in enumerate(start)]
            model.with_suffix(".mst").write_text("\n".join(["Stopped on time", *lines, ""]))
        outcome = _cbc(model, time_limit_s, gap)
    if not outcome.values:
        return outcome
    values = {name: outcome.values.get(code, 0.0) for name, code in short.items()}
    return replace(outcome, values=values)


def _cbc(model: Path, time_limit_s: float, gap: float) -> Outcome:
    """The outcome of CBC for an MPS file. A start lies beside it as a ``.mst`` file."""
    cbc = shutil.which(pulp.PULP_CBC_CMD.pulp_cbc_path) or shutil.which("cbc")
    if cbc is None:
        raise SolverError("no solver: install highspy, or cbc on the PATH")
    solution = model.with_suffix(".sol")
    # CBC's preprocessing was seen to lose the optimum of one small program in a thousand.
    command = [cbc, str(model), "-timeMode", "elapsed", "-sec", f"{time_limit_s * _CBC_SHARE:.3f}"]
    command += ["-ratio", f"{gap:g}", "-preprocess", "off"]
    known = model.with_suffix(".mst")
    command += [*(["-mipStart", str(known)] if known.exists() else []), "-solve"]
    writing = ["-printingOptions", "all", "-solution", str(solution)]
    code, text = _output([*command, *writing], model.with_suffix(".log"), time_limit_s)
    if code:
        # CBC crashes when it writes the solution, if it finds the program infeasible very early.
        code, text = _output(command, model.with_suffix(".log"), time_limit_s)
        if code == 0 and "Problem is infeasible" in text:
            return Outcome("infeasible", "cbc")
        raise SolverError(f"cbc ended with exit status {code}: install highspy")
    bound = _last_number(r"^Lower bound:\s+(\S+)", text)
    if bound is None:
        bound = _last_number(r"^Continuous objective value is (\S+)", text)
    # CBC may have been killed while it wrote the file, so a file is not trusted then.
    if code is None or not solution.exists():
        return Outcome("unknown", "cbc", bound=bound)
    return _read_cbc(solution.read_text(), bound, gap)


def _output(command: list[str], log: Path, time_limit_s: float) -> tuple[int | None, str]:
    """The exit status (None: killed at the limit) and the output."""
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
    """The outcome in a CBC solution file.

    It has a status line, then lines of ``[**] index name value cost``.
    """
    heading, *lines = text.splitlines() or [""]
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

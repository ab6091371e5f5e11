"""``shoal demo``: splits a model over agents on this machine, and asks for one answer.

Nothing is simulated. The agents are processes of `shoal agent`, found by mDNS on the loopback
interface. Each has a memory limit so small that the model must be split. The end of the demo
removes its processes and files, whatever ends it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from backends.base import BackendUnavailable
from backends.registry import backend_class
from cli.client import Client
from cli.commands.model_names import model_here
from cli.commands.plan_arguments import bounds_of, check_teams, teams_of
from cli.commands.plan_views import show_divergence, show_weights
from cli.errors import CommandFailed, UsageError
from cli.generation import generate
from cli.render import PHASES, Screen
from cli.service.signals import held_signals
from cli.shared_arguments import adapter_of, core_count, scheme_text_of
from coordinator.serving.answer import room_for_answer
from model import costs
from model.checkpoint import Checkpoint
from model.errors import ModelError
from model.quantize import Format
from model.tokenizer import Tokenizer
from model.weight_errors import weight_errors
from planning.errors import RequestInvalid
from planning.request import DEFAULT_BITS, DEFAULT_CONTEXT_TOKENS, LoadRequest
from wire import limits
from wire.sizes import format_size

OnStep = Callable[[Mapping[str, Any]], None]

EMBEDDED_MODEL = Path(__file__).parents[2] / "examples" / "tiny-opt" / "model"
EMBEDDED_PROMPT = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
OTHER_PROMPT = "Once upon a time"
DEFAULT_AGENTS = 3
BACKEND = "onnx_cpu"

JOIN_TIMEOUT_S = 10.0
"""The time for agents to join by mDNS. After that they get the coordinator's address."""

START_TIMEOUT_S = 60.0
"""The time for a process to start on a slow machine."""

SPEED_TOKENS = 128
"""The tokens of an answer whose speed is measured. The shown answer may have only two."""

SPEED_RUNS = 3
"""The number of answers of SPEED_TOKENS. The median of their speeds counts."""

SPLIT_SHARE = 0.97
"""All agents but one together get this share of the model's least memory."""


class Demo:
    """One run of the demo."""

    def __init__(self, options: argparse.Namespace, screen: Screen) -> None:
        self._options = options
        self._screen = screen
        self._processes: list[tuple[str, subprocess.Popen[str], Path]] = []
        self._directory = Path()

    def run(self) -> None:
        """Start all processes, ask, show the answer, and clean up. Raises CommandFailed."""
        options = self._options
        check_teams(options)
        model = self._model()
        prompt = options.prompt
        if prompt is None:
            prompt = EMBEDDED_PROMPT if options.model is None else OTHER_PROMPT
        try:
            checkpoint = Checkpoint.open(model, adapter_of(options))
            prompt_tokens = len(Tokenizer.load(model).encode(prompt))
            room_for_answer(prompt_tokens, self._context_tokens(checkpoint), checkpoint.spec)
        except (ModelError, RequestInvalid) as error:
            raise CommandFailed(str(error)) from error
        with self._temporary_directory():
            memory = self._memory_limits(checkpoint)
            try:
                self._run(model, prompt, memory)
            finally:
                self._stop_all()

    def _run(self, model: Path, prompt: str, memory: Sequence[int]) -> None:
        screen, options = self._screen, self._options
        cluster = f"demo-{os.getpid()}"
        screen.step("demo: starting a coordinator")
        ready = self._start_coordinator(cluster)
        sizes = ", ".join(format_size(limit) for limit in memory)
        screen.step(f"demo: starting {len(memory)} agents with {sizes}; they measure this machine")
        self._start_agents(cluster, memory, None)
        with Client(ready["http"]) as client:
            if not self._joined(client, len(memory)):
                screen.note("no multicast here: the agents get the coordinator's address instead")
                self._stop_agents()
                self._start_agents(cluster, memory, ready["control_port"])
                if not self._joined(client, len(memory), START_TIMEOUT_S):
                    raise CommandFailed("the agents do not reach the coordinator on this machine")
            request = self._request(model).to_dict()
            with screen.progress() as draw, self._phases(draw) as on_step:
                loaded = client.operate("/shoal/v1/load", request, on_step)
            devices = client.get("/shoal/v1/devices")
            if not screen.json_output:
                self._show_loaded(devices, loaded, prompt)
            result = generate(
                client,
                screen,
                loaded["model"],
                prompt,
                {name: getattr(options, name) for name in ("max_tokens", "temperature", "seed")},
            )
            result |= self._speed(client, result["prompt_tokens"])
        if screen.json_output:
            screen.json(
                {
                    "model": result["model"],
                    "devices": devices["devices"],
                    "links": devices["links"],
                    "plan": loaded["plan"],
                    **{key: value for key, value in result.items() if key != "model"},
                }
            )
        else:
            self._compare(loaded["plan"], result)

    def _request(self, model: Path) -> LoadRequest:
        """Return what the coordinator is asked to load."""
        options = self._options
        return LoadRequest(
            model.absolute(),
            bits=tuple(options.bits or DEFAULT_BITS),
            hop_bits=None if options.hop_bits is None else tuple(options.hop_bits),
            scheme=options.scheme,
            scheme_text=scheme_text_of(options),
            group_size=options.group_size,
            **bounds_of(options),
            adapter=adapter_of(options),
            context_tokens=options.context,
            time_limit_s=options.time_limit,
            **teams_of(options),
        )

    def _show_loaded(self, devices: dict[str, Any], loaded: dict[str, Any], prompt: str) -> None:
        """Show the devices, the plan, and the prompt whose answer follows."""
        screen = self._screen
        # The demo's processes disturb each other, so the usual advice does not help.
        disturbed = [device.pop("noise", None) for device in devices["devices"]]
        screen.devices(devices)
        if any(disturbed):
            screen.out.print("measured beside the demo's other processes\n")
        screen.plan(loaded["plan"], f"predicted plan for {loaded['model']}")
        show_weights(screen, loaded)
        show_divergence(screen, loaded["plan"], loaded.get("quality"))
        screen.out.print()
        screen.out.print(f"[bold]{_literal(prompt)}[/]", soft_wrap=True)

    def _speed(self, client: Client, prompt: list[int]) -> dict[str, Any]:
        """Measure the speed of longer answers to the same prompt, which are not shown.

        They go on past the model's end of text. Returns {"speed_tokens", "prefill_tokens_per_s",
        "decode_tokens_per_s"}: the tokens of each answer, and median speeds. An answer has fewer
        than SPEED_TOKENS only if the context ends.
        """
        body = {
            "prompt": prompt,
            "max_tokens": SPEED_TOKENS,
            "ignore_eos": True,
            "temperature": self._options.temperature,
            "seed": self._options.seed,
            "return_token_ids": True,
            "cache_prompt": False,  # Each run measures the whole prompt.
            "speculative.n_max": 0,  # The plan predicts passes of one row.
        }
        runs = [client.post("/v1/completions", body)["shoal"] for _ in range(SPEED_RUNS)]
        rates = [run["decode_tokens_per_s"] for run in runs]
        return {
            "speed_tokens": len(runs[0]["tokens"]),
            "prefill_tokens_per_s": median(run["prefill_tokens_per_s"] for run in runs),
            "decode_tokens_per_s": None if None in rates else median(rates),
        }

    def _compare(self, plan: dict[str, Any], result: dict[str, Any]) -> None:
        predicted = 1e3 / plan["predicted_ms_per_token"]
        measured, tokens = result["decode_tokens_per_s"], result["speed_tokens"]
        rate = "too short to measure"  # The context has no room for two more tokens.
        if measured is not None:
            rate = f"{measured:.0f} tokens/s measured over {tokens} tokens"
        self._screen.out.print(
            f"\ndecode: {rate}, "
            f"{predicted:.0f} predicted for devices of their own (here they share one machine)"
            f"\nprefill: {result['prefill_tokens_per_s']:.0f} tokens/s measured over "
            f"{len(result['prompt_tokens'])} tokens",
            soft_wrap=True,
        )

    @contextlib.contextmanager
    def _phases(self, draw: OnStep) -> Iterator[OnStep]:
        """Print a line as each phase of loading begins, and one at the end."""
        begun: list[str] = []
        started_s = time.monotonic()

        def on_step(step: Mapping[str, Any]) -> None:
            if step["phase"] not in begun:
                begun.append(step["phase"])
                self._screen.step(f"demo: {PHASES.get(step['phase'], step['phase'])}")
            draw(step)

        yield on_step
        self._screen.step(f"demo: loaded in {time.monotonic() - started_s:.1f} s")

    # ---- what to run ----------------------------------------------------------------------------

    def _model(self) -> Path:
        model: Path | None = self._options.model
        if model is None and not EMBEDDED_MODEL.is_dir():
            raise CommandFailed("this installation has no embedded model: give one with --model")
        return EMBEDDED_MODEL if model is None else model_here(model, self._screen)

    def _context_tokens(self, checkpoint: Checkpoint) -> int:
        return min(self._options.context or DEFAULT_CONTEXT_TOKENS, checkpoint.spec.max_context)

    def _memory_limits(self, checkpoint: Checkpoint) -> list[int]:
        """The memory of each agent in bytes: as asked for, or so little that all are needed."""
        options = self._options
        if options.memory is not None:
            memory: list[int] = options.memory
            if options.agents is not None and options.agents != len(memory):
                raise UsageError(f"--agents {options.agents}, but --memory has {len(memory)} sizes")
            return memory
        agents: int = options.agents or DEFAULT_AGENTS
        least, most, stage = self._needs(checkpoint)
        if agents == 1:
            return [sum(most) + stage]
        share = max(SPLIT_SHARE * sum(least) / (agents - 1), _smallest_cap(least, agents))
        return [int(share) + stage] * agents

    def _needs(self, checkpoint: Checkpoint) -> tuple[list[int], list[int], int]:
        """The least and the most bytes of each block at allowed widths, and a stage's own bytes."""
        options, spec = self._options, checkpoint.spec
        try:
            containers = backend_class(BACKEND).probe().containers(exact=options.exact)
        except BackendUnavailable as error:
            raise CommandFailed(str(error)) from error
        formats = [
            Format.of(bits, options.scheme, options.group_size)
            for bits in options.bits or DEFAULT_BITS
        ]
        context = self._context_tokens(checkpoint)
        bound = bounds_of(options)["max_weight_error"]
        errors: Sequence[dict[int, float]] = [{}] * spec.block_count
        if bound is not None:
            with self._screen.progress() as on_step:
                try:
                    errors = weight_errors(
                        checkpoint,
                        formats,
                        self._directory / "coordinator",
                        lambda done, total: on_step(
                            {
                                "phase": "weight errors",
                                "label": "",
                                "done": done,
                                "total": total,
                                "unit": "blocks",
                            }
                        ),
                    )
                except (ModelError, OSError) as error:
                    raise CommandFailed(str(error)) from error
        least, most = [], []
        for block in range(spec.block_count):
            sizes = [
                costs.executed_bytes(
                    spec, block, checkpoint.format_of(block, fmt), containers[fmt.bits]
                )
                for fmt in formats
                if bound is None or errors[block][fmt.bits] <= bound
            ] or [
                # If no width is allowed, the coordinator says so, with advice.
                costs.executed_bytes(
                    spec, block, checkpoint.format_of(block, fmt), containers[fmt.bits]
                )
                for fmt in formats
            ]
            kv = costs.kv_bytes(spec, block, context)
            least.append(min(sizes) + kv)
            most.append(max(sizes) + kv)
        stage = costs.stage_buffer_bytes(
            spec, range(spec.block_count), limits.PREFILL_CHUNK_TOKENS, context
        )
        return least, most, stage

    # ---- processes ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _temporary_directory(self) -> Iterator[None]:
        self._directory = Path(tempfile.mkdtemp(prefix="shoal-demo-"))
        try:
            yield
        finally:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _start(self, name: str, arguments: Sequence[str]) -> subprocess.Popen[str]:
        log = self._directory / f"{name}.log"
        # Every process that has started must be noted, or it would not be stopped.
        with held_signals(), log.open("w", encoding="utf-8") as errors:
            process = subprocess.Popen(  # noqa: S603 - our own command
                [sys.executable, "-m", "cli", *arguments, "--until-stdin-closes"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # Ctrl-C reaches only the demo, which stops its processes in order.
                start_new_session=True,
            )
            self._processes.append((name, process, log))
        return process

    @property
    def _token_file(self) -> Path:
        """The token by which the agents join. The coordinator makes it."""
        return self._directory / "token"

    def _start_coordinator(self, cluster: str) -> dict[str, Any]:
        state_dir = self._directory / "coordinator"
        if kept := self._options.measurements_dir:
            # The coordinator measures what a model loses by fewer bits, and keeps it here.
            state_dir.mkdir(exist_ok=True)
            (kept / "losses").mkdir(parents=True, exist_ok=True)
            (state_dir / "losses").symlink_to((kept / "losses").absolute())
        process = self._start(
            "coordinator",
            [
                "coordinator",
                "--json",
                f"--cluster={cluster}",
                "--bind=127.0.0.1",
                "--port=0",
                "--http=127.0.0.1:0",
                f"--state-dir={state_dir}",
                "--create-token",
                f"--token-file={self._token_file}",
            ],
        )
        line = process.stdout.readline() if process.stdout is not None else ""
        if not line:
            process.wait(START_TIMEOUT_S)
            self._check_processes()
        ready: dict[str, Any] = json.loads(line)
        return ready

    def _start_agents(self, cluster: str, memory: Sequence[int], port: int | None) -> None:
        threads = max(1, core_count() // len(memory))
        for number, limit in enumerate(memory, 1):
            name = f"device-{number}"
            where = [] if port is None else [f"--coordinator=127.0.0.1:{port}"]
            self._start(
                name,
                [
                    "agent",
                    f"--name={name}",
                    f"--cluster={cluster}",
                    "--bind=127.0.0.1",
                    f"--memory={limit}",
                    f"--threads={threads}",
                    f"--backend={BACKEND}",
                    f"--state-dir={self._directory / name}",
                    # They run on one machine, so one of them measures for all.
                    f"--measurements-dir={self._options.measurements_dir or self._directory}",
                    f"--token-file={self._token_file}",
                    *(["--exact"] if self._options.exact else []),
                    *where,
                ],
            )

    def _joined(self, client: Client, wanted: int, timeout_s: float = JOIN_TIMEOUT_S) -> bool:
        """Wait until all agents have joined. Returns False after ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        told = 0
        while time.monotonic() < deadline_s:
            self._check_processes()
            joined = len(client.get("/shoal/v1/devices")["devices"])
            if joined > told:
                told = joined
                self._screen.step(f"demo: {joined} of {wanted} agents have joined")
            if joined == wanted:
                return True
            time.sleep(0.1)
        return False

    def _check_processes(self) -> None:
        """Raise CommandFailed with the last words of a process that has ended."""
        for name, process, log in self._processes:
            if process.poll() is not None:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                said = lines[-1].removeprefix("error: ") if lines else "no message"
                raise CommandFailed(f"{name} ended with code {process.returncode}: {said}")

    def _stop_agents(self) -> None:
        agents = [item for item in self._processes if item[0] != "coordinator"]
        with held_signals():
            _stop([process for _, process, _ in agents])
            self._processes = [item for item in self._processes if item not in agents]

    def _stop_all(self) -> None:
        with held_signals():
            self._stop_agents()
            _stop([process for _, process, _ in self._processes])


def _stop(ending: Sequence[subprocess.Popen[str]]) -> None:
    """Terminate processes, and kill those that have not ended after 5 s."""
    for process in ending:
        process.terminate()
    deadline_s = time.monotonic() + 5
    for process in ending:
        try:
            process.wait(max(deadline_s - time.monotonic(), 0.01))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _smallest_cap(sizes: Sequence[int], parts: int) -> int:
    """The least cap that lets ``sizes`` be cut into at most ``parts`` contiguous runs."""
    low, high = max(sizes), sum(sizes)
    while low < high:
        cap = (low + high) // 2
        runs, used = 1, 0
        for size in sizes:
            if used + size > cap:
                runs, used = runs + 1, 0
            used += size
        low, high = (low, cap) if runs <= parts else (cap + 1, high)
    return low


def _literal(text: str) -> str:
    """``text`` escaped, so that rich sees no markup."""
    return text.replace("[", r"\[")

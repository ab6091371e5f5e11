"""Bad input, lost devices and Ctrl-C: one clear line, the right exit code, nothing left running."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from model import costs
from model.families import load_spec
from tests.system.cluster import (
    COMMAND,
    FIXTURES,
    ROOT,
    TINY_OPT,
    Cluster,
    demo_processes,
    interrupt_at,
    shoal,
    wait_for,
)
from tests.thorough import some
from wire import limits
from wire.identity import own_identity

LLAMA = FIXTURES / "llama"

AT_REST_BYTES = 90_000_000
"""More than an agent may hold before it has a stage; it is about 55 MB."""

LOST_WITHIN_S = 10.0
"""How long a user may wait to be told that a device is gone."""


def refused(*arguments: str) -> str:
    """The one line that a failing command says."""
    completed = shoal(*arguments)
    assert completed.returncode not in (0, 130)
    assert completed.stdout == ""
    lines = completed.stderr.strip().splitlines()
    assert len(lines) == 1, completed.stderr
    assert lines[0].startswith("error: ")
    assert not demo_processes()
    return lines[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a good model, to be damaged."""
    return Path(shutil.copytree(LLAMA, tmp_path / "model"))


def edit_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- models that are none ----------------------------------------------------------------------


def test_no_such_directory() -> None:
    assert "no such directory" in refused("demo", "--model=/nowhere/at/all")


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "not a model" in refused("demo", f"--model={tmp_path}")


def test_an_unknown_architecture_lists_the_known(model: Path) -> None:
    edit_config(model, model_type="unheard-of")
    line = refused("demo", f"--model={model}")
    for family in ("unheard-of", "llama", "mistral", "opt", "qwen2", "qwen3"):
        assert family in line


def test_an_architecture_that_is_not_read_names_what_it_needs(model: Path) -> None:
    edit_config(model, model_type="mamba")
    line = refused("demo", f"--model={model}")
    assert line.endswith("mamba needs what is not implemented: state-space layers (Mamba)")


def test_truncated_weights(model: Path) -> None:
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    assert "model.safetensors" in refused("demo", f"--model={model}")


def test_weights_that_lie_about_their_shapes(model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] *= 2
    changed = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(changed)) + changed + data[8 + size :])
    line = refused("demo", f"--model={model}")
    assert "model.safetensors" in line
    assert name in line


def test_a_pickle_checkpoint_is_refused(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused("demo", f"--model={model}")
    assert "pickle" in line
    assert "save_pretrained" in line


def test_a_prompt_longer_than_the_context() -> None:
    line = refused("demo", f"--model={LLAMA}", "--context=16", "--prompt", "word " * 40)
    assert "context" in line
    assert "16" in line


def test_memory_limits_too_small_for_any_plan() -> None:
    line = refused("demo", f"--model={LLAMA}", "--memory=100K,100K")
    assert "memory is short" in line
    assert "let shoal use more of device-" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--bits=7"),
        ("demo", "--memory=lots"),
        ("demo", "--agents=0"),
        ("demo", "--agents=2", "--memory=1M"),
        ("agent", "--coordinator=:7420"),
        ("agent", "--memory=-1"),
        ("run",),
        ("nonsense",),
    ],
    ids=" ".join,
)
def test_a_wrong_command_line(arguments: tuple[str, ...]) -> None:
    completed = shoal(*arguments)
    assert completed.returncode == 2
    assert "error: " in completed.stderr.splitlines()[-1]
    assert "Traceback" not in completed.stderr


# ---- ports, peers and state --------------------------------------------------------------------


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        state = f"--state-dir={tmp_path}"
        coordinator = ("coordinator", "--no-mdns", "--bind=127.0.0.1", state)
        for command in (
            (*coordinator, f"--port={port}", "--http=127.0.0.1:0"),
            (*coordinator, "--port=0", f"--http=127.0.0.1:{port}"),
            ("agent", "--insecure", "--bind=127.0.0.1", f"--port={port}", state),
        ):
            assert "choose another port" in refused(*command)


def test_a_certificate_of_another_form_is_told(tmp_path: Path) -> None:
    path = own_identity(tmp_path / "identity.pem").path
    path.write_text(path.read_text().replace(" CERTIFICATE-", " X509 CERTIFICATE-"))
    said = refused(
        "coordinator", "--no-mdns", "--insecure", "--bind=127.0.0.1", "--port=0",
        "--http=127.0.0.1:0", f"--http-cert={path}", f"--state-dir={tmp_path / 'state'}",
    )  # fmt: skip
    assert f"{path} has no BEGIN CERTIFICATE" in said


def test_no_coordinator_answers() -> None:
    completed = shoal("devices", "--url=http://127.0.0.1:9")
    assert completed.returncode == 3
    assert "no coordinator answers at http://127.0.0.1:9" in completed.stderr


def test_no_agent_has_joined(cluster: Cluster) -> None:
    cluster.start_coordinator()
    for command in ("plan", "load"):
        completed = cluster.run(command, str(LLAMA))
        assert completed.returncode == 1
        assert "no agent has joined" in completed.stderr
    assert "no agent has joined" in cluster.run("devices").stdout


def test_nothing_is_loaded(cluster: Cluster) -> None:
    cluster.start_coordinator()
    assert "no model is loaded" in cluster.run("ps").stdout
    completed = cluster.run("run", "llama", "x")
    assert completed.returncode == 1
    assert "nothing is loaded" in completed.stderr


def test_two_agents_cannot_share_a_state_directory(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    line = refused(
        "agent", "--coordinator=127.0.0.1:1", f"--state-dir={cluster.directory / 'pi-1'}"
    )
    assert "another agent runs" in line


def test_garbage_on_the_control_port_disturbs_nobody(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", b"SHOL" + bytes(16), os.urandom(4096), b""):
        with socket.create_connection(("127.0.0.1", cluster.control_port)) as peer:
            peer.sendall(garbage)
            peer.shutdown(socket.SHUT_WR)
            peer.settimeout(10)
            assert peer.recv(1) == b""
    assert cluster.names() == ["pi-1"]


# ---- lost devices ------------------------------------------------------------------------------


class Generation:
    """A long answer, streamed in a thread."""

    def __init__(self, cluster: Cluster) -> None:
        self.started = threading.Event()
        self.error = ""
        self.ended_s = 0.0
        self._url = f"{cluster.url}/v1/completions"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        body = {"prompt": "The", "max_tokens": 100_000, "temperature": 2, "stream": True}
        with httpx.stream("POST", self._url, json=body, timeout=60, trust_env=False) as response:
            for line in response.iter_lines():
                self.started.set()
                if '"error"' in line:
                    self.error = json.loads(line.removeprefix("data: "))["error"]["message"]
                    self.ended_s = time.monotonic()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


NAMES = ("pi-1", "pi-2", "pi-3")
ENDLESS_CONTEXT = 20_000


def made_endless(model: Path) -> Path:
    """Let a model talk for minutes: no end token, and a context of 20,000 tokens."""
    edit_config(model, max_position_embeddings=ENDLESS_CONTEXT, eos_token_id=None)
    return model


@pytest.fixture
def endless(model: Path) -> Path:
    return made_endless(model)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A coordinator for agents that tests lose and start again."""
    cluster = Cluster(tmp_path_factory.mktemp("three"))
    try:
        cluster.start_coordinator("--no-mdns", "--recovery-wait=0")
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An endless model for several tests."""
    return made_endless(Path(shutil.copytree(LLAMA, tmp_path_factory.mktemp("endless") / "model")))


@pytest.fixture
def loaded(three: Cluster, lasting: Path) -> Cluster:
    """The endless model over three agents, none of which holds more than one layer."""
    spec = load_spec(lasting)
    layer_bytes = costs.kv_bytes(spec, 1, ENDLESS_CONTEXT)
    buffer_bytes = costs.stage_buffer_bytes(
        spec, range(spec.block_count), limits.PREFILL_CHUNK_TOKENS, ENDLESS_CONTEXT
    )
    for name in NAMES:
        if name not in three.processes or three.processes[name].poll() is not None:
            start(three, name, int(1.9 * layer_bytes) + buffer_bytes)
    three.wait_for_agents(*NAMES)
    answer = three.load(lasting, "--bits=32", f"--context={ENDLESS_CONTEXT}")
    assert len(answer["plan"]["stages"]) == 3
    return three


def start(cluster: Cluster, name: str, memory_bytes: int) -> None:
    cluster.start_agent(
        name,
        f"--coordinator=127.0.0.1:{cluster.control_port}",
        f"--memory={memory_bytes}",
        "--threads=1",
    )


@pytest.mark.parametrize("stage", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
def test_a_lost_device_that_no_other_can_replace_is_named(
    loaded: Cluster, how: signal.Signals, stage: int
) -> None:
    victim = loaded.get("/shoal/v1/ps")["model"]["plan"]["stages"][stage]["device"]
    generation = Generation(loaded)
    assert generation.started.wait(60)
    lost_s = time.monotonic()
    loaded.processes[victim].send_signal(how)
    try:
        generation.join()
        assert victim in generation.error
        assert "device lost" in generation.error
        assert "the others cannot take its place" in generation.error
        assert "memory is short" in generation.error
        assert generation.ended_s - lost_s < LOST_WITHIN_S
        state = loaded.get("/shoal/v1/ps")["model"]
        assert state["state"] == "broken"
        assert victim in state["reason"]
        completed = loaded.run("run", state["model"], "x")
        assert completed.returncode == 1
        assert victim in completed.stderr
    finally:
        loaded.processes[victim].send_signal(signal.SIGCONT)
        if how == signal.SIGKILL:
            loaded.processes[victim].wait()


def test_the_rest_can_be_loaded_again(loaded: Cluster, lasting: Path) -> None:
    loaded.kill("pi-2")
    loaded.processes["pi-2"].wait()
    wait_for(lambda: loaded.names() == ["pi-1", "pi-3"], LOST_WITHIN_S, "noticing the loss")
    context = f"--context={ENDLESS_CONTEXT}"
    completed = loaded.run("load", str(lasting), "--bits=32", context)
    assert completed.returncode == 1
    assert "memory is short" in completed.stderr
    answer = loaded.load(lasting, "--bits=32", f"--context={ENDLESS_CONTEXT // 2}")
    assert {stage["device"] for stage in answer["plan"]["stages"]} <= {"pi-1", "pi-3"}


def test_a_killed_agent_that_comes_back_joins_again(loaded: Cluster) -> None:
    loaded.kill("pi-1")
    wait_for(lambda: loaded.names() == ["pi-2", "pi-3"], LOST_WITHIN_S, "noticing the loss")
    loaded.processes["pi-1"].wait()
    start(loaded, "pi-1", 1 << 30)
    loaded.wait_for_agents(*NAMES)
    loaded.load(LLAMA, "--bits=32")
    loaded.processes["pi-1"].terminate()  # The next test wants one with less memory.
    loaded.processes["pi-1"].wait(60)


def test_a_device_lost_while_loading_is_named(cluster: Cluster) -> None:
    cluster.measures = True
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    load = subprocess.Popen(
        [*COMMAND, "load", str(LLAMA), f"--url={cluster.url}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    agent = cluster.processes["pi-1"]
    # The command needs longer to start than the agent has left to live once it is asked.
    wait_for(lambda: _is_measuring(cluster), 60, "the load to begin")
    agent.kill()
    killed_s = time.monotonic()
    _, stderr = load.communicate(timeout=60)
    assert time.monotonic() - killed_s < LOST_WITHIN_S
    assert load.returncode == 1
    assert "pi-1: device lost" in stderr
    agent.wait()
    left = _scratch(cluster)
    assert left
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    assert not [path for path in left if path.exists()]


def _scratch(cluster: Cluster) -> list[Path]:
    """The folders in which the agent measures at the moment, or did so when it was killed."""
    try:
        return list((cluster.directory / "pi-1").glob("**/.calibration-*"))
    except FileNotFoundError:  # The agent has removed a folder meanwhile.
        return []


def _is_measuring(cluster: Cluster) -> bool:
    return bool(_scratch(cluster))


# ---- Ctrl-C ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "phase", some([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.5], 0.5, 2.0, 3.5)
)
def test_ctrl_c_at_any_time_leaves_nothing(phase: float, endless: Path) -> None:
    """From the first process on, in steps of half a second: start, join, measure, load, answer."""
    begun: list[float] = []

    def due() -> bool:
        if not begun and demo_processes():
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] >= phase

    code, stderr, took_s = interrupt_at(
        ["demo", f"--model={endless}", "--bits=32", "--max-tokens=100000", "--context=20000"], due
    )
    assert code == 130, stderr
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1] == "interrupted"
    assert took_s < 10
    # An agent that was about to run another program leaves a copy of itself for a moment.
    wait_for(lambda: not demo_processes(), 60, "the processes' end")


def test_ctrl_c_is_quiet_while_the_command_is_still_being_read() -> None:
    process = subprocess.Popen(
        [*COMMAND, "demo"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT
    )
    maps = Path(f"/proc/{process.pid}/maps")
    wait_for(lambda: "numpy" in maps.read_text(), 60, "an import")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert stderr == b"interrupted\n"


def test_a_killed_demo_takes_its_processes_with_it() -> None:
    demo = subprocess.Popen(
        [*COMMAND, "demo", f"--model={LLAMA}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    wait_for(lambda: len(demo_processes()) >= 2, 60, "the demo's processes")
    demo.kill()
    demo.wait()
    wait_for(lambda: not demo_processes(), 60, "the processes' end")


def test_ctrl_c_while_loading_frees_the_fleet(cluster: Cluster) -> None:
    cluster.measures = True
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    code, stderr, _ = interrupt_at(
        ["load", str(LLAMA), f"--url={cluster.url}"], lambda: _is_measuring(cluster)
    )
    assert code == 130
    assert "Traceback" not in stderr
    # Not busy any more: the operation ended with its client.
    wait_for(
        lambda: cluster.run("load", str(LLAMA), "--bits=32").returncode == 0, 120, "another load"
    )


def test_agents_and_coordinator_end_on_ctrl_c(cluster: Cluster) -> None:
    cluster.start_coordinator()
    agent = cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    agent.send_signal(signal.SIGINT)
    assert agent.wait(60) == 130
    wait_for(lambda: cluster.names() == [], LOST_WITHIN_S, "the goodbye")
    coordinator = cluster.processes["coordinator"]
    coordinator.send_signal(signal.SIGINT)
    assert coordinator.wait(60) == 130


def test_a_service_that_is_stopped_has_not_failed(cluster: Cluster) -> None:
    cluster.measures = True
    cluster.start_coordinator()
    agent = cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    # At rest an agent holds no accelerator library: it was profiled in another process.
    assert "onnxruntime" not in Path(f"/proc/{agent.pid}/maps").read_text()
    assert psutil.Process(agent.pid).memory_info().rss < AT_REST_BYTES
    load = subprocess.Popen(
        [*COMMAND, "load", str(LLAMA), f"--url={cluster.url}"], stderr=subprocess.DEVNULL, cwd=ROOT
    )
    try:
        wait_for(lambda: _is_measuring(cluster), 60, "measuring")
    finally:
        load.terminate()
        code = load.wait(60)
    assert code == 128 + signal.SIGTERM
    for process in (agent, cluster.processes["coordinator"]):
        process.terminate()
        assert process.wait(60) == 0


def test_a_service_that_is_stopped_twice_has_not_failed(cluster: Cluster) -> None:
    cluster.start_coordinator()
    cluster.start_agent("pi-1")
    cluster.wait_for_agents("pi-1")
    for name in ("pi-1", "coordinator"):
        process = cluster.processes[name]
        deadline_s = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline_s:
            process.terminate()
            time.sleep(0.002)
        assert process.wait(60) == 0, cluster.log(name)


def test_the_embedded_model_is_there() -> None:
    assert (TINY_OPT / "config.json").exists()

"""Testbeds that stand: real namespaces, real limits, real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from testbed.bed import FILES, RUN, Testbed, TestbedError, check_possible, down, standing
from testbed.network import Host, Link, Network
from tests.system.cluster import COMMAND, ROOT, TINY_OPT, shoal, wait_for

pytestmark = pytest.mark.netns

NAME = f"test-{os.getpid()}"
PORT = 5000

LAB = """
templates:
  pi: &pi
    memory: 3.6M
    storage: 1G
    layer_ms: {decode: {8: 1, 16: 2}}
    embed_ms: 0.1
    head_ms: 1
devices:
  - {<<: *pi, name: ash}
  - {<<: *pi, name: oak}
  - {<<: *pi, name: elm}
default_link: {rtt_ms: 1, mbit_per_s: 500}
emulation:
  default: {cpu: 100}
"""

ECHO = """
import socket
server = socket.create_server(("", 5000))
print("listening", flush=True)
connection, _ = server.accept()
while piece := connection.recv(65536):
    connection.sendall(piece)
"""

SPIN = """
import time
began = time.time()
while time.time() < began + 1:
    pass
print(time.process_time() / (time.time() - began))
"""
"""Prints the part of a core that it got. On a busy machine it gets no turn for a while."""


@pytest.fixture(autouse=True)
def _possible() -> Iterator[None]:
    try:
        check_possible()
        with Testbed(Network({"probe": Host(50, 1 << 30)}), NAME):
            pass
    except TestbedError as error:
        pytest.skip(str(error))
    yield
    remains = traces()
    down(NAME)
    assert not remains


def traces() -> list[str]:
    """Everything on this machine that has the testbed's name."""
    found = [str(path) for top in (RUN, FILES) for path in top.glob(NAME)]
    found += [str(path) for path in Path("/sys/fs/cgroup").rglob(f"shoal-testbed-{NAME}")]
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if NAME in line]
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"/{NAME}/" in words or words.endswith(f"/{NAME}\0"):
            found.append(words)
    return found


@pytest.fixture
def bed() -> Iterator[Testbed]:
    network = Network({"a": Host(cpu_percent=20), "b": Host(memory_bytes=100 << 20)})
    with Testbed(network, NAME) as bed:
        yield bed


def python(bed: Testbed, host: str, program: str) -> subprocess.CompletedProcess[str]:
    line = bed.command(host, [sys.executable, "-c", program])
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)


@contextmanager
def echo(bed: Testbed) -> Iterator[tuple[subprocess.Popen[str], socket.socket]]:
    """A server on b, and a connection to it from a."""
    server = bed.popen("b", [sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    server.stdout.close()
    address = (bed.network.address("b"), PORT)
    with bed.inside("a", lambda: socket.create_connection(address, 60)) as client:
        yield server, client
    server.kill()
    server.wait()


def exchange(client: socket.socket) -> float:
    """Seconds of a round trip."""
    started_s = time.perf_counter()
    client.sendall(b"x")
    assert client.recv(1) == b"x"
    return time.perf_counter() - started_s


def test_a_host_is_its_own_machine_to_a_process(bed: Testbed) -> None:
    shown = python(bed, "a", "import socket; print(socket.gethostname())").stdout
    assert shown.strip() == "a"
    # 20 % of a second, and up to a tick of the kernel's clock more; less where others compute.
    assert float(python(bed, "a", SPIN).stdout) < 0.3
    assert python(bed, "b", "x = bytearray(200 << 20)").returncode == -signal.SIGKILL
    assert python(bed, "b", "x = bytearray(20 << 20)").returncode == 0


def test_a_host_stays_on_its_cores() -> None:
    (*_, last) = sorted(os.sched_getaffinity(0))
    with Testbed(Network({"a": Host(cores=(last,)), "b": Host()}), NAME) as bed:
        program = "import os; print(*sorted(os.sched_getaffinity(0)))"
        assert python(bed, "a", program).stdout.split() == [str(last)]
        everywhere = list(map(str, sorted(os.sched_getaffinity(0))))
        assert python(bed, "b", program).stdout.split() == everywhere


def test_a_command_that_is_not_there_says_so(bed: Testbed) -> None:
    line = bed.command("a", ["no-such-command"])
    completed = subprocess.run(line, capture_output=True, text=True, check=False)
    assert completed.returncode == 1
    assert completed.stderr == "no-such-command: no such file or directory\n"


def test_faults(bed: Testbed) -> None:
    with echo(bed) as (server, client):
        quick_s = min(exchange(client) for _ in range(20))
        bed.fault("b", "link:delay=30")
        assert exchange(client) >= 0.06 > quick_s
        bed.fault("b", "blackhole")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            exchange(client)
        bed.fault("b", "heal")
        client.settimeout(60)
        assert client.recv(1) == b"x"
        bed.fault("b", "freeze")
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            exchange(client)
        bed.fault("b", "thaw")
        client.settimeout(60)
        assert client.recv(1) == b"x"
        carrier = "print(open('/proc/net/route').read())"
        bed.fault("a", "cut")
        assert bed.port("a").cut
        bed.fault("a", "heal")
        assert python(bed, "a", carrier).returncode == 0
        bed.fault("b", "kill")
        assert server.wait(60) == -signal.SIGKILL
        client.settimeout(0.5)
        with pytest.raises(TimeoutError):  # Power loss: nobody is told.
            client.recv(1)


def test_slow_is_a_share_of_a_core(bed: Testbed) -> None:
    bed.fault("b", "slow=10")
    assert float(python(bed, "b", SPIN).stdout) < 0.2
    bed.fault("b", "slow=off")


@pytest.mark.parametrize("what", ["melt", "slow=x", "link:speed=3", "link:loss=200"])
def test_unknown_faults_are_refused(bed: Testbed, what: str) -> None:
    with pytest.raises(TestbedError):
        bed.fault("a", what)


def test_another_process_finds_the_testbed_and_what_is_wrong_with_it(bed: Testbed) -> None:
    bed.fault("a", "link:rate=8,loss=50")
    found = Testbed.standing(NAME)
    assert found.network == bed.network
    assert (found.port("a").bytes_per_s, found.port("a").loss) == (1e6, 0.5)
    with pytest.raises(TestbedError, match="no host 'c'"):
        found.fault("c", "cut")


def test_links_are_as_described() -> None:
    network = Network({"a": Host(), "b": Host()}, default=Link(10e-3, 1.25e6))
    with Testbed(network, NAME) as bed, echo(bed) as (_, client):
        assert exchange(client) >= 0.02
        started_s = time.perf_counter()
        client.sendall(bytes(250_000))
        left = 250_000
        while left:
            left -= len(client.recv(left))
        # 0.2 s at 1.25 MB/s for the last byte to get there, and 20 ms for it to come back.
        assert time.perf_counter() - started_s >= 0.2


def test_without_root_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(TestbedError, match="sudo"):
        check_possible()


# ---- the command ---------------------------------------------------------------------------------


def test_a_lab_from_up_to_down(tmp_path: Path) -> None:
    lab = tmp_path / "lab.yaml"
    lab.write_text(LAB)
    named = f"--name={NAME}"
    up = shoal("testbed", "up", str(lab), named, "--json")
    assert up.returncode == 0, up.stderr
    status = json.loads(up.stdout)
    assert set(status["hosts"]) == {"hub", "ash", "oak", "elm"}
    url = f"--url={status['url']}"
    load = shoal("load", str(TINY_OPT), url, "--json", "--bits=8,16")
    assert load.returncode == 0, load.stderr
    stages = json.loads(load.stdout.splitlines()[-1])["plan"]["stages"]
    assert len(stages) > 1
    question = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
    answer = shoal("run", "tiny-opt", question, url, "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["text"].strip() == "in the attic"
    victim = stages[-1]["device"]
    assert shoal("testbed", "fault", victim, "kill", named).returncode == 0
    again = shoal("run", "tiny-opt", question, url)
    assert (again.returncode, again.stdout.strip()) == (0, "in the attic"), again.stderr
    left = json.loads(shoal("ps", url, "--json").stdout)["model"]
    assert victim not in {stage["device"] for stage in left["stages"]}
    shown = json.loads(shoal("testbed", "status", named, "--json").stdout)["hosts"][victim]
    assert (shown["processes"], shown["fault"]) == ([], {"blackhole": True})
    name = shoal("testbed", "exec", named, "ash", "--", "hostname").stdout
    assert name.strip() == "ash"
    assert shoal("testbed", "down", named).returncode == 0
    assert not traces()
    again = shoal("testbed", "status", named)
    assert again.returncode == 1
    assert "no testbed" in again.stderr


@pytest.mark.parametrize("moment", ["hosts", "switch", "coordinator", "agents"])
def test_whatever_is_left_of_a_killed_up_is_removed(tmp_path: Path, moment: str) -> None:
    lab = tmp_path / "lab.yaml"
    lab.write_text(LAB)
    up = subprocess.Popen(
        [*COMMAND, "testbed", "up", str(lab), f"--name={NAME}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    files = {
        "hosts": RUN / NAME / "ash.net",
        "switch": RUN / NAME / "switch.sock",
        "coordinator": FILES / NAME / "hub.log",
        "agents": FILES / NAME / "ash.log",
    }
    wait_for(files[moment].exists, 60, moment)
    up.kill()
    up.wait()
    assert traces()
    down(NAME)
    # A process that `up` had just begun to start finds its group gone, and ends by itself.
    wait_for(lambda: not traces(), 60, "an end of all processes")
    down(NAME)


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    lab = tmp_path / "lab.yaml"
    lab.write_text(LAB)
    up = subprocess.Popen(
        [*COMMAND, "testbed", "up", str(lab), f"--name={NAME}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((FILES / NAME / "ash.log").exists, 60, "the agents' start")
    up.send_signal(signal.SIGINT)
    _, stderr = up.communicate(timeout=60)
    assert up.returncode == 130, stderr
    assert not traces()


def test_up_twice_is_up_once() -> None:
    network = Network({"a": Host()})
    with Testbed(network, NAME) as first:
        process = first.popen("a", ["sleep", "1000"])
        with Testbed(network, NAME) as second:
            assert process.wait(60) == -signal.SIGKILL
            assert NAME in standing()
            assert second.processes("a") == set()


def test_a_testbed_does_not_disturb_another() -> None:
    network = Network({"a": Host(), "b": Host()})
    with (
        Testbed(network, NAME) as one,
        Testbed(network, f"{NAME}-2") as other,
        echo(one) as (server, client),
        echo(other) as (other_server, _),
    ):
        other.fault("b", "kill")
        assert other_server.wait(60) == -signal.SIGKILL
        assert exchange(client) < 60
        assert server.poll() is None

"""A coordinator and two agents as services of three machines, each with a systemd of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.install.conftest import prepared
from tests.install.machines import Machine
from tests.system.cluster import TINY_OPT
from tests.system.namespaces import bed_of

pytestmark = [pytest.mark.slow, pytest.mark.netns, pytest.mark.timeout(900)]

QUESTION = "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?"
ANSWER = "in the attic"
AGENT = "shoal-agent.service"
COORDINATOR = "shoal-coordinator.service"
INSTALL = "SHOAL_WHEELS=/mnt/wheels sh /mnt/bundle/install.sh"


class Shoal:
    """Three machines, installed; ``before`` lists the files of each before it was."""

    def __init__(self, hub: Machine, agents: list[Machine]) -> None:
        self.hub = hub
        self.agents = agents
        self.before: dict[str, set[str]] = {}
        self.tokens: list[str] = []

    def devices(self) -> list[str]:
        output = self.hub.shell("shoal devices --json", check=False).splitlines()
        with contextlib.suppress(ValueError, IndexError):
            return [device["name"] for device in json.loads(output[-1])["devices"]]
        return []

    def wait_for_agents(self, timeout_s: float = 60) -> None:
        for agent in self.agents:
            self.hub.wait("shoal devices", agent.name, timeout_s)

    def load(self) -> Any:
        output = self.hub.shell("shoal load /srv/tiny-opt --bits=16 --json")
        return json.loads(output.splitlines()[-1])

    def ask(self) -> str:
        return self.hub.shell(f"shoal run tiny-opt --chat --temperature 0 '{QUESTION}'")


@pytest.fixture(scope="module")
def shoal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shoal]:
    tree, bundle = prepared("systemd"), prepared("bundle")
    binds = {
        bundle: "/mnt/bundle",
        prepared("wheels"): "/mnt/wheels",
        TINY_OPT: "/srv/tiny-opt",
    }
    directory = tmp_path_factory.mktemp("machines")
    with contextlib.ExitStack() as stack:
        names = ("hub", "pi-1", "pi-2")
        bed = stack.enter_context(bed_of(*names))
        hub, *agents = (
            stack.enter_context(Machine(name, tree, directory, bed, binds)) for name in names
        )
        shoal = Shoal(hub, agents)
        for machine in (hub, *agents):
            shoal.before[machine.name] = machine.files()
        assert "listens at 0.0.0.0:7420" in hub.shell(f"{INSTALL} coordinator")
        for agent in agents:
            # One line on a board, as docs/install.md gives it.
            token = json.loads(hub.shell("shoal token create --json").splitlines()[-1])["token"]
            shoal.tokens.append(token)
            # The administrator's own files are hidden from others.
            agent.shell(f"umask 077; echo {token} | {INSTALL} agent --token-file - --memory 6M")
        yield shoal


def test_the_services_serve(shoal: Shoal) -> None:
    shoal.wait_for_agents()
    assert len(shoal.load()["plan"]["stages"]) == 2
    assert ANSWER in shoal.ask()
    status = shoal.hub.shell(f"systemctl status --no-pager {COORDINATOR}")
    assert "active (running)" in status
    shoal.hub.wait(f"systemctl show -P StatusText {COORDINATOR}", "2 agents, tiny-opt", 10)
    for agent in shoal.agents:
        status = agent.shell(f"systemctl status --no-pager {AGENT}")
        assert "active (running)" in status
        assert "joined cluster 'shoal' at 10.77.0.1:7420" in status
        assert "of 8 layers" in agent.property(AGENT, "StatusText")


def test_they_run_with_no_more_rights_than_they_need(shoal: Shoal) -> None:
    agent = shoal.agents[0]
    status = agent.shell(f"cat /proc/{agent.pid(AGENT)}/status")
    assert "CapEff:\t0000000000000000" in status
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status
    assert agent.shell("stat -c '%a %U:%G' /etc/shoal/token").strip() == "640 root:shoal"
    assert agent.property(AGENT, "MemoryMax") == str((6 + 384) << 20)
    # Their lines reach the journal with a priority and without a second time of day.
    lines = agent.shell(f"journalctl -u {AGENT} -o json --no-pager").splitlines()
    joined = next(line for line in map(json.loads, lines) if "joined" in line["MESSAGE"])
    assert joined["PRIORITY"] == "6"
    assert joined["MESSAGE"].startswith("joined cluster")


def test_no_secret_is_where_others_look(shoal: Shoal) -> None:
    """In the journal, in arguments of processes, or in a file that every user can read."""
    for machine in (shoal.hub, *shoal.agents):
        places = machine.shell(
            "journalctl --no-pager -o cat; cat /proc/[0-9]*/cmdline", check=False
        )
        for token in shoal.tokens:
            assert token.rpartition(".")[2] not in places
        readable = machine.shell("find /etc/shoal /var/lib/shoal -type f -perm /007")
        found = {Path(line).name for line in readable.splitlines()}
        for name in ("token", "identity.pem", "devices.json", "local-key", "names.json"):
            assert name not in found, readable
        writable = machine.shell("find /opt/shoal /etc/shoal /var/lib/shoal -perm /022 ! -type l")
        assert writable == ""


def test_a_killed_agent_comes_back(shoal: Shoal) -> None:
    agent = shoal.agents[0]
    agent.shell(f"kill -9 {agent.pid(AGENT)}")
    agent.wait(f"systemctl show -P NRestarts {AGENT}", "1", 30)
    agent.wait(f"systemctl show -P StatusText {AGENT}", "joined", 30)
    shoal.wait_for_agents()
    shoal.load()
    assert ANSWER in shoal.ask()


@pytest.mark.parametrize("which", [AGENT, COORDINATOR])
def test_a_hung_service_is_restarted_by_its_watchdog(shoal: Shoal, which: str) -> None:
    machine = shoal.hub if which == COORDINATOR else shoal.agents[1]
    hung = machine.pid(which)
    machine.shell(f"kill -STOP {hung}")
    machine.wait(f"journalctl -u {which} --no-pager", "Watchdog timeout", 60)
    machine.wait(f"systemctl show -P NRestarts {which}", "1", 30)
    machine.wait(f"systemctl is-active {which}", "active", 30)
    assert machine.pid(which) not in (0, hung)
    shoal.wait_for_agents()
    shoal.load()
    assert ANSWER in shoal.ask()


def test_a_stop_is_clean(shoal: Shoal) -> None:
    agent = shoal.agents[0]
    agent.shell(f"systemctl stop {AGENT}")
    assert agent.property(AGENT, "Result") == "success"
    assert agent.property(AGENT, "ExecMainStatus") == "0"
    agent.shell(f"systemctl start {AGENT}")


def test_a_wrong_setting_does_not_restart_for_ever(shoal: Shoal) -> None:
    agent = shoal.agents[0]
    agent.shell("cp /etc/shoal/agent.toml /tmp/ && echo 'memry = \"1G\"' >> /etc/shoal/agent.toml")
    agent.shell(f"systemctl restart {AGENT}", check=False)
    assert agent.property(AGENT, "ActiveState") == "failed"
    assert agent.property(AGENT, "ExecMainStatus") == "2"
    assert "unknown setting 'memry'" in agent.shell(f"journalctl -u {AGENT} --no-pager")
    agent.shell(f"cp /tmp/agent.toml /etc/shoal/ && systemctl restart {AGENT}")


def test_more_memory_than_the_limit_ends_a_service(shoal: Shoal) -> None:
    agent = shoal.agents[0]
    agent.enforce_limits()
    agent.shell(f"systemctl set-property --runtime {AGENT} MemoryMax=20M")
    agent.shell(f"systemctl restart {AGENT}", check=False)  # Python and ONNX Runtime take 55 MB.
    agent.wait(f"journalctl -u {AGENT} --no-pager", "status=9/KILL", 20)
    agent.shell(f"systemctl set-property --runtime {AGENT} MemoryMax={(6 + 384) << 20}")
    agent.shell(f"systemctl reset-failed {AGENT}; systemctl restart {AGENT}")
    agent.wait(f"systemctl show -P StatusText {AGENT}", "joined", 60)


def test_they_serve_again_after_a_reboot(shoal: Shoal) -> None:
    shoal.agents[0].reboot()
    shoal.wait_for_agents()
    shoal.hub.reboot()
    shoal.hub.wait("systemctl is-active shoal-coordinator", "active", 60)
    # Nobody loads the model again: what was loaded comes back with its devices.
    shoal.hub.wait("shoal ps", "ready", 120)
    assert ANSWER in shoal.ask()


def test_installing_again_upgrades_in_place(shoal: Shoal) -> None:
    agent = shoal.agents[1]
    identity = agent.shell("cat /var/lib/shoal/agent/device-id")
    agent.shell(f"{INSTALL} agent --cpu-weight 20")
    assert agent.property(AGENT, "CPUWeight") == "20"
    assert 'memory = "6M"' in agent.shell("cat /etc/shoal/agent.toml")
    assert agent.shell("cat /var/lib/shoal/agent/device-id") == identity
    agent.wait(f"systemctl show -P StatusText {AGENT}", "joined", 30)


def test_a_rollback_goes_back_and_forward_again(shoal: Shoal) -> None:
    agent = shoal.agents[1]
    for _ in range(2):
        told = agent.shell("sh /mnt/bundle/install.sh rollback")
        assert "restarted: shoal-agent" in told
        agent.wait(f"systemctl show -P StatusText {AGENT}", "joined", 60)


def test_a_service_without_its_library_waits_for_a_person(shoal: Shoal) -> None:
    agent = shoal.agents[1]
    agent.shell("/opt/shoal/bin/pip uninstall --quiet --yes onnxruntime")
    agent.shell(f"systemctl restart {AGENT}", check=False)
    assert agent.property(AGENT, "ActiveState") == "failed"
    assert agent.property(AGENT, "ExecMainStatus") == "4"
    said = agent.shell("shoal doctor; echo exit code $?")
    assert "onnx_cpu: cannot import onnxruntime" in said
    assert "-> /opt/shoal/bin/python -m pip install onnx onnxruntime" in said
    assert "exit code 1" in said
    agent.shell(f"{INSTALL} agent")
    agent.wait(f"systemctl show -P StatusText {AGENT}", "joined", 30)
    assert "onnx_cpu: available" in agent.shell("shoal doctor")


def test_the_coordinator_moves_to_another_machine(shoal: Shoal) -> None:
    """As docs/install.md says. Agents find it by mDNS, and need no new token."""
    old, new = shoal.hub, shoal.agents[1]
    shoal.load()
    new.shell(f"{INSTALL} coordinator")
    old.shell(f"systemctl disable --now {COORDINATOR}")
    new.shell(f"systemctl stop {COORDINATOR}")
    old.shell("shoal coordinator export /root/old.tar")
    shutil.move(old.root / "root" / "old.tar", new.root / "root" / "old.tar")
    new.shell("shoal coordinator import /root/old.tar; rm /root/old.tar")
    owners = new.shell(
        "stat -c '%a %U' /var/lib/shoal/coordinator/*.json /var/lib/shoal/coordinator/*.pem"
    )
    assert set(owners.splitlines()) == {"600 shoal"}
    new.shell(f"systemctl start {COORDINATOR}")
    shoal.hub = new
    shoal.wait_for_agents(120)
    new.wait("shoal ps", "ready", 120)
    assert ANSWER in shoal.ask()
    shoal.hub = old


def test_uninstalling_leaves_nothing(shoal: Shoal) -> None:
    for machine in (shoal.hub, *shoal.agents):
        machine.shell("sh /mnt/bundle/install.sh uninstall --yes")
        assert "'stop-sigterm' timed out" not in machine.shell("journalctl --no-pager")
        assert machine.files() == shoal.before[machine.name]
        assert "shoal" not in machine.shell("cat /etc/passwd /etc/group")


def test_the_tree_was_not_touched(shoal: Shoal) -> None:
    assert not (Path(prepared("systemd")) / "opt" / "shoal").exists()

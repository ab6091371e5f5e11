"""Other versions of shoal, met by real processes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli.main import main
from cli.render import Screen
from tests.system.cluster import Cluster, shoal, wait_for
from tests.wire.test_versions import HERE, hello, old_peer, read, told
from wire.messages import PROTOCOL_VERSION
from wire.versions import shoal_version


def test_a_coordinator_and_an_agent_name_who_is_of_another_version(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.start_coordinator()
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", cluster.control_port)) as agent:
            agent.sendall(hello(9))
            version, text = told(read(agent))
        assert (version, "install shoal 7.1 on" in text) == (9, True)
    said = f"127.0.0.1 (pi) runs shoal 7.1 (protocol 9), this machine runs {HERE}: install"
    wait_for(lambda: said in cluster.log("coordinator"), 60, "the coordinator's line")
    assert cluster.log("coordinator").count("protocol 9") == 1
    with old_peer() as endpoint:
        cluster.start_agent("pi-1", f"--coordinator=127.0.0.1:{endpoint.port}")
        said = f"127.0.0.1 runs an older shoal (protocol 2), this machine runs {HERE}: install"
        wait_for(lambda: said in cluster.log("pi-1"), 60, "the agent's line")


def test_a_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    expected = f"shoal {shoal_version()}, protocol {PROTOCOL_VERSION}\n"
    assert capsys.readouterr().out == expected
    assert shoal("--version").stdout == expected


def test_devices_show_who_runs_what(capsys: pytest.CaptureFixture[str]) -> None:
    device = {
        "processor": "Cortex-A76 on a Raspberry Pi 5",
        "backend": "onnx_cpu",
        "threads": 4,
        "memory_bytes": 3 << 30,
        "storage_bytes": 8 << 30,
        "memory_read_bytes_per_s": 9e9,
    }
    devices = [
        {**device, "name": "pi-1", "version": shoal_version()},
        {**device, "name": "pi-2", "version": "0.0.9"},
    ]
    answer = {"cluster": "attic", "protocol": 3, "version": shoal_version(), "links": []}

    def shown(**changes: object) -> str:
        Screen(json_output=False).devices({**answer, **changes})
        return " ".join(capsys.readouterr().out.split())

    here = f"shoal {shoal_version()} on"
    assert shown(devices=devices[:1]).endswith(f"{here} the coordinator and all devices")
    assert shown(devices=devices).endswith(
        f"{here} the coordinator, pi-1; shoal 0.0.9 on pi-2: install the same on all machines"
    )
    assert f"shoal 9.9 on the coordinator; {here} this command: install" in shown(
        version="9.9", devices=[]
    )

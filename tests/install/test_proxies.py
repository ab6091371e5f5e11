"""The reverse proxies of docs/serving.md, with its own lines, before a real coordinator.

Needs nginx and caddy: apt-get install nginx caddy.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from api.key_book import KeyBook
from tests.system.cluster import ROOT, TINY_OPT, Cluster, wait_for
from wire.identity import own_identity

pytestmark = pytest.mark.slow

NAME = "shoal.example.org"
STORY = {"model": "tiny-opt", "prompt": "Once upon a time", "max_tokens": 20, "stream": True}

NGINX = """
daemon off;
user root;
pid {folder}/pid;
error_log {folder}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {certificate};
        ssl_certificate_key {certificate};
        {example}
    }}
}}
"""

CADDY = """
{{
    admin off
    local_certs
    skip_install_trust
    auto_https disable_redirects
    http_port 0
    https_port {port}
    default_bind 127.0.0.1
}}
{example}
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A coordinator that knows the proxy's name, with a model and without a key."""
    cluster = Cluster(tmp_path)
    cluster.start_coordinator("--no-mdns", f"--http-host={NAME}")
    cluster.start_agent("pi")
    cluster.wait_for_agents("pi")
    cluster.load(TINY_OPT, "--bits=8")
    yield cluster
    cluster.stop()


def example(program: str, cluster: Cluster) -> str:
    """The lines of the manual, which name the port of this coordinator."""
    manual = (ROOT / "docs" / "serving.md").read_text()
    found = re.search(rf"    # {program}.*?\n((?:    .*\n)+)", manual)
    assert found is not None
    assert "127.0.0.1:7421" in found[1]
    return found[1].replace("127.0.0.1:7421", cluster.url.removeprefix("http://"))


@contextlib.contextmanager
def proxy(program: str, cluster: Cluster) -> Iterator[str]:
    """Run the proxy, and yield its URL."""
    if shutil.which(program) is None:
        pytest.skip(f"{program} is missing: apt-get install {program}")
    folder = cluster.directory / program
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    template, command = {
        "nginx": (NGINX, ["nginx", "-p", str(folder), "-c"]),
        "caddy": (CADDY, ["caddy", "run", "--adapter=caddyfile", "--config"]),
    }[program]
    certificate = own_identity(folder / "proxy.pem").path
    lines = example(program.capitalize() if program == "caddy" else program, cluster)
    (folder / "conf").write_text(
        template.format(folder=folder, port=port, certificate=certificate, example=lines)
    )
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [*command, str(folder / "conf")],
            env={**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder)},
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            url = f"https://127.0.0.1:{port}"
            wait_for(lambda: serves(url), 30, f"{program} starting")
            yield url
        finally:
            process.terminate()


def serves(url: str) -> bool:
    """Whether it shows a certificate, which Caddy makes at its first start."""
    with contextlib.suppress(httpx.TransportError), client(url) as caller:
        return caller.get("/health/live").status_code == 200
    return False


def client(url: str, host: str = NAME, key: str = "") -> httpx.Client:
    """Somebody who calls the proxy by its name."""

    def name(request: httpx.Request) -> None:
        request.extensions["sni_hostname"] = NAME

    return httpx.Client(
        base_url=url,
        headers={"Host": host, **({"Authorization": f"Bearer {key}"} if key else {})},
        verify=False,  # noqa: S501 - the proxy's certificate is this test's own
        trust_env=False,
        timeout=60,
        event_hooks={"request": [name]},
    )


@pytest.mark.parametrize("program", ["nginx", "caddy"])
def test_a_proxy_of_the_manual_passes_streams_on_and_makes_nobody_local(
    program: str, cluster: Cluster
) -> None:
    with proxy(program, cluster) as url:
        with client(url) as stranger:
            assert "<title>" in stranger.get("/").text
            # The proxy runs as root here, as somebody who could make tokens.
            answer = stranger.post("/shoal/v1/join", json={"token": True}).json()
            assert answer["port"] == cluster.control_port
            assert answer["token"] is None
            key = KeyBook(cluster.directory / "coordinator").create("team")
            assert stranger.get("/v1/models").status_code == 401
            assert stranger.post("/v1/completions", json=STORY).status_code == 401
            assert stranger.get("/", headers={"Host": "evil.example"}).text.count("<title>") == 0
        with client(url, key=key) as member:
            assert member.get("/v1/models").json()["data"][0]["id"] == "tiny-opt"
            agent = cluster.processes["pi"]
            agent.send_signal(signal.SIGSTOP)
            with member.stream("POST", "/v1/completions", json=STORY) as response:
                lines = response.iter_lines()
                # Only comments come now. A proxy that collects lines would pass none of them on
                # before the answer ends.
                assert next(lines).startswith(": ")
                with client(cluster.url, "127.0.0.1", key) as here:
                    shown = here.get("/metrics").text
                assert re.search(r"shoal_requests_in_flight\{.*\} 1", shown), shown
                agent.send_signal(signal.SIGCONT)
                assert "data: [DONE]" in list(lines)
            with member.stream(
                "GET", "/shoal/v1/state", headers={"Accept": "text/event-stream"}
            ) as response:
                assert "tiny-opt" in next(response.iter_lines())

"""Takes the picture of the page in docs/page.md: ``python -m tests.page.picture docs/page.png``.

It starts a shoal of three agents on this machine, loads the small model, and asks it something. So
the figures are this machine's own: run it while nothing else runs.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from tests.page.browser import Browser, chromium
from tests.system.cluster import TINY_OPT, Cluster

AGENTS = {"attic-pi": "3500K", "kitchen-pi": "3500K", "shelf-pi": "3500K"}
QUESTIONS = (
    "The lamp is in the attic. The meter in the cellar reads 42. Where is the lamp?",
    "The fan is set to 45 degrees. The bag belongs to the pilot. Who owns the bag?",
)
WARMING = "Tell me of the baker."
"""Its answer is long enough to measure a token's time."""
SETTLING_S = 3.0
"""Figures of the last answer come with the next heartbeats."""


def main(target: Path) -> None:
    with TemporaryDirectory() as profile, TemporaryDirectory() as directory:
        cluster = Cluster(Path(directory))
        try:
            with chromium(Path(profile)) as browser:
                _load(cluster)
                _ask(browser, cluster, target)
        finally:
            cluster.stop()


def _load(cluster: Cluster) -> None:
    cluster.start_coordinator("--no-mdns", "--cluster=home")
    joining = f"--coordinator=127.0.0.1:{cluster.control_port}"
    for name, memory in AGENTS.items():
        cluster.start_agent(name, joining, "--cluster=home", f"--memory={memory}")
    cluster.wait_for_agents(*AGENTS)
    cluster.load(TINY_OPT, "--bits=3,4,6,8,16", "--slots=2")


def _ask(browser: Browser, cluster: Cluster, target: Path) -> None:
    body = {"prompt": WARMING, "max_tokens": 200, "ignore_eos": True}
    httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60, trust_env=False)
    browser.open(cluster.url, width=1400, height=1060)
    for number, question in enumerate(QUESTIONS, 1):
        browser.say(question)
        browser.until(f".message:nth-child({2 * number}) .figures", "tokens")
    time.sleep(SETTLING_S)
    browser.screenshot(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

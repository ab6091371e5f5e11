"""Start a shoal that plays scripts, and use it through many clients. Prints a table.

    python -m venv /tmp/clients
    /tmp/clients/bin/pip install openai anthropic litellm llm langchain-openai instructor \\
        'pydantic-ai-slim[openai]' openai-agents
    npm install --prefix /tmp/clients ai @ai-sdk/openai @ai-sdk/openai-compatible zod
    python -m tests.clients.run --python /tmp/clients/bin/python --node /tmp/clients

The versions are those that are installed there. The table is the one in docs/api.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.clients.check import CLIENTS
from tests.system.scripted import ScriptedCluster

HERE = Path(__file__).parent
MODEL = "hermes"


def rows(command: list[str], directory: Path) -> list[dict[str, Any]]:
    """Run a command that prints a JSON object a line."""
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=directory, timeout=300, check=False
    )
    found = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    if not found or any(row["error"] for row in found):
        sys.stderr.write(ran.stderr[-4000:])
    return found


def table(found: Iterable[dict[str, Any]]) -> str:
    """Return the table of clients and features in Markdown."""
    clients: dict[tuple[str, str], list[str]] = {}
    for row in found:
        key = row["client"], row["version"]
        told = f"{row['feature']}: FAILS" if row["error"] else row["feature"]
        clients.setdefault(key, []).append(told)
    lines = ["| client | version | works |", "| --- | --- | --- |"]
    for (client, version), features in clients.items():
        lines.append(f"| {client} | {version} | {', '.join(features)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default=sys.executable, help="a Python with the packages")
    parser.add_argument("--node", type=Path, help="a folder with node_modules")
    parser.add_argument("--url", help="use this shoal, which must play scripts")
    parser.add_argument("clients", nargs="*", help="which of them; all if none is named")
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        cluster = None
        if options.url is None:
            cluster = ScriptedCluster(Path(scratch))
        try:
            if cluster is not None:
                cluster.serve(MODEL)
            url = options.url or (cluster.url if cluster else "")
            for client in options.clients or CLIENTS:
                command = [options.python, str(HERE / "check.py"), url, MODEL, client]
                found += rows(command, Path(scratch))
            if options.node is not None:
                # Node finds packages beside the script only.
                script = options.node / "ai_sdk.mjs"
                shutil.copy(HERE / "ai_sdk.mjs", script)
                found += rows(["node", str(script), url, MODEL], options.node)
        finally:
            if cluster is not None:
                cluster.stop()
    for row in found:
        if row["error"]:
            sys.stderr.write(f"{row['client']} {row['feature']}: {row['error']}\n")
    sys.stdout.write(table(found) + "\n")
    return int(any(row["error"] for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""llama.cpp as the other side of a comparison: a worker process, and its RPC servers on hosts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from testbed.bed import Testbed

WORKER = Path(__file__).with_name("llama_cpp_worker.py")
SERVERS = ("ggml-rpc-server", "rpc-server")
"""The names that the server has had."""

FIRST_PORT = 50052
_START_S = 60.0


class Worker:
    """llama_cpp_worker.py with one model, under the user's Python. Exits if the worker ends."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """The process needs pipes for stdin and stdout."""
        self._process = process
        self.version = self._line()

    def ask(self, *words: object) -> list[float]:
        """Return the seconds that the worker measured for each part of its task."""
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        print(*words, file=self._process.stdin, flush=True)
        seconds: list[float] = json.loads(self._line())
        return seconds

    def close(self) -> None:
        """End the worker."""
        with suppress(BrokenPipeError):  # It has ended before.
            self._process.communicate()

    def _line(self) -> str:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            sys.exit("llama.cpp ended: does the Python given have llama-cpp-python?")
        return line.strip()


def worker_command(
    python: str, model: Path, threads: int, context_tokens: int, *options: str
) -> list[str]:
    """Return the command line of a worker. ``options`` are its further options."""
    numbers = ["--threads", str(threads), "--context-tokens", str(context_tokens)]
    return [python, str(WORKER), str(model), *numbers, *options]


def find_server(directory: Path) -> Path:
    """Return the RPC server in a folder of llama.cpp's binaries. Exits if a file is missing."""
    found = [directory / name for name in SERVERS if (directory / name).is_file()]
    libraries = ("libllama.so", "libggml.so", "libggml-rpc.so")
    missing = [name for name in libraries if not (directory / name).is_file()]
    if not found:
        missing.append(" or ".join(SERVERS))
    if missing:
        sys.exit(
            f"{directory} has no {', no '.join(missing)}: build llama.cpp with -DGGML_RPC=ON"
            " -DBUILD_SHARED_LIBS=ON and give its build's bin folder"
        )
    return found[0]


def start_servers(
    bed: Testbed, hosts: Sequence[str], server: Path, threads: int, client: str, stack: ExitStack
) -> list[str]:
    """Start an RPC server on each host, and return the addresses once ``client`` reaches all.

    A server serves one client at a time, so the port tells sets of different size apart. They end
    with ``stack``. Exits if a server does not start.
    """
    port = FIRST_PORT + len(hosts)
    addresses = []
    for host in hosts:
        address = bed.network.address(host)
        process = bed.popen(
            host,
            [str(server), "-H", address, "-p", str(port), "-t", str(threads)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        addresses.append((process, address))
    for process, address in addresses:
        deadline_s = time.monotonic() + _START_S
        while not _answers(bed, client, address, port):
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"{server} does not start or does not listen on {address}:{port}")
            time.sleep(0.2)  # No event announces another program's port.
    return [f"{address}:{port}" for _, address in addresses]


def _answers(bed: Testbed, host: str, address: str, port: int) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            return False
        return True

    return bed.inside(host, connect)

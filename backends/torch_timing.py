"""The time of a product on a torch device, as a stage that has many matrices would see it.

A GPU's products of few rows are over before the host has launched the next one. So they are timed
as a stage runs them: in a captured graph. A matrix that was just read is still in the GPU's cache,
and in a stage it would not be. So the graph multiplies by several copies in turn.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from backends.torch_capture import DEVICE, captured

_REPEATS = 5

_CALLS = 8
"""The least products in a graph, because its own launch takes as long as a few products."""

_LONG_S = 1e-3
"""A product that takes longer is timed by itself, because it outlasts its launch."""

_CACHES = 2
"""The copies together are as large as this many caches, if memory is free."""

_COPIES = 64
"""The most copies, for small matrices."""


def seconds(
    multiply: Callable[[Any], object], weight: Any, weight_bytes: int, device: torch.device
) -> float:
    """Return the least seconds of ``multiply(weight)``, which has run before.

    ``weight`` is a tensor or a dataclass of tensors.
    """
    if device.type == "cuda":
        return _captured_seconds(multiply, weight, weight_bytes, device)
    best_s = math.inf
    for _ in range(_REPEATS):
        before_s = time.perf_counter()
        multiply(weight)
        best_s = min(best_s, time.perf_counter() - before_s)
    return best_s


def _captured_seconds(
    multiply: Callable[[Any], object], weight: Any, weight_bytes: int, device: torch.device
) -> float:
    single_s = min(_between_events(lambda: multiply(weight)) for _ in range(2))
    if single_s > _LONG_S:
        return single_s
    count = _copies(weight_bytes, device)
    copies = [weight, *(copy.deepcopy(weight) for _ in range(count - 1))]
    rounds = -(-_CALLS // count)
    graph, stream = torch.cuda.CUDAGraph(), _stream(device)
    before = torch.cuda.current_stream(device)
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        multiply(weight)  # Libraries allocate in the first call on a stream.
        try:
            with DEVICE.exclusive(), captured(graph, None):
                for each in copies * rounds:
                    multiply(each)
        except RuntimeError:  # Without graphs, a stage too waits for the host.
            return single_s
        best_s = min(_between_events(graph.replay) for _ in range(_REPEATS))
    before.wait_stream(stream)
    del graph, copies
    # Each capture has a pool of memory of its own, which nothing else can use.
    torch.cuda.empty_cache()
    return best_s / (rounds * count)


def _between_events(call: Callable[[], object]) -> float:
    """Return the seconds that a GPU takes for what ``call`` launches on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


@functools.cache
def _stream(device: torch.device) -> Any:
    """Return the stream that times, because cuBLAS keeps memory for each stream."""
    return torch.cuda.Stream(device)


def _copies(weight_bytes: int, device: torch.device) -> int:
    """Return how many matrices are larger than the cache, within an eighth of the free memory."""
    cache_bytes: int = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    free_bytes: int = torch.cuda.mem_get_info(device)[0]
    wanted_bytes = min(_CACHES * cache_bytes, free_bytes // 8)
    return min(max(1, wanted_bytes // max(1, weight_bytes)), _COPIES)

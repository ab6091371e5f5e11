"""From logits to a token: greedy, or temperature with top-k and top-p."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wire.messages import Sampling


class Sampler:
    """Draws the tokens of one sequence; equal settings, positions and logits give equal tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling

    def sample(self, logits: npt.NDArray[np.float32], position: int) -> int:
        """The token at ``position`` by ``logits`` [vocab]; greedy (lowest id on ties) at
        temperature 0.

        What is drawn depends on nothing that was drawn before: another device can go on.
        """
        sampling = self._sampling
        if sampling.temperature <= 0 or sampling.top_k == 1:
            return int(np.argmax(logits))
        order = np.argsort(-logits, kind="stable")
        if sampling.top_k > 0:
            order = order[: sampling.top_k]
        below = logits[order].astype(np.float64) - float(logits[order[0]])
        with np.errstate(over="ignore"):  # A tiny temperature leaves the likeliest token only.
            weights = np.exp(below / sampling.temperature)
        probabilities = weights / weights.sum()
        if sampling.top_p < 1:
            # The smallest set whose probability reaches top_p, and always the likeliest token.
            before = np.cumsum(probabilities) - probabilities
            keep = max(int(np.count_nonzero(before < sampling.top_p)), 1)
            order, probabilities = order[:keep], probabilities[:keep] / probabilities[:keep].sum()
        random = np.random.Generator(np.random.PCG64(sampling.seed).advance(position))
        return int(random.choice(order, p=probabilities))

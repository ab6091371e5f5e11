"""The logits of a divided vocabulary: each member sends its highest ones to the lead."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agent.sampler import NOT_FINITE, highest
from backends.base import ALL_LOGITS, Array, BackendError
from wire.errors import ProtocolError
from wire.messages import TeamLogits

_LOGIT = np.dtype("<f4")
_ID = np.dtype("<i4")

Ids = npt.NDArray[np.int32]


def pick(logits: Array, first_token: int, wanted: int) -> tuple[Array, Ids | None]:
    """Return the ``wanted`` highest of logits [n, own vocab] as [n, k], and their token ids [n, k].

    The logits are whole, and the ids None, if all are wanted or there are no more. Of equal logits
    the lowest id ranks first. Raises BackendError if a highest logit is not finite.
    """
    rows, vocab = logits.shape
    if wanted == ALL_LOGITS or wanted >= vocab:
        return logits, None
    best = logits.argmax(axis=1)  # The first NaN, if there is one.
    if not np.isfinite(logits[np.arange(rows), best]).all():
        raise BackendError(NOT_FINITE)
    ids = best[:, None] if wanted == 1 else np.stack([highest(row, wanted) for row in logits])
    return np.take_along_axis(logits, ids, axis=1), (ids + first_token).astype(_ID)


def encode_logits(logits: Array, ids: Ids | None) -> memoryview:
    """Return the payload of a TeamLogits."""
    values = np.ascontiguousarray(logits, _LOGIT).tobytes()
    return memoryview(values if ids is None else values + ids.astype(_ID, copy=False).tobytes())


class JoinedLogits:
    """Logits [n, vocab] of the whole vocabulary, with -inf where no member sent one.

    The memory is used again by the next pass.
    """

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._logits = np.empty((0, vocab), np.float32)
        self._written: list[tuple[int, Ids | slice]] = []
        """The rows and tokens that are not -inf."""
        self._rows = 0

    def begin(self, rows: int) -> None:
        """Forget all logits, and take those of ``rows`` rows."""
        if len(self._logits) < rows:
            self._logits = np.full((rows, self._vocab), -np.inf, np.float32)
        else:
            for row, tokens in self._written:
                self._logits[row, tokens] = -np.inf
        self._written.clear()
        self._rows = rows

    def put(self, logits: Array, ids: Ids | None, first_token: int) -> None:
        """Add one member's logits, as ``pick`` returns them."""
        for row in range(self._rows):
            tokens = slice(first_token, first_token + logits.shape[1]) if ids is None else ids[row]
            self._logits[row, tokens] = logits[row]
            self._written.append((row, tokens))

    def take(self, message: TeamLogits, payload: memoryview, wanted: int) -> None:
        """Add the logits that another member sent. Raises ProtocolError if they are wrong."""
        rows, count = message.rows, message.candidates
        size = rows * count
        with_ids = len(payload) == size * (_LOGIT.itemsize + _ID.itemsize)
        if (
            rows != self._rows
            or not 0 < count <= self._vocab
            or (wanted != ALL_LOGITS and count > wanted)
            or not (with_ids or len(payload) == size * _LOGIT.itemsize)
            or not 0 <= message.first_token <= self._vocab - (0 if with_ids else count)
        ):
            raise ProtocolError(f"{message} with {len(payload)} bytes does not fit")
        logits = np.frombuffer(payload, _LOGIT, size).reshape(rows, count)
        ids: Ids | None = None
        if with_ids:
            ids = np.frombuffer(payload, _ID, size, size * _LOGIT.itemsize).reshape(rows, count)
            if ids.min() < 0 or ids.max() >= self._vocab:
                raise ProtocolError("token ids outside the vocabulary")
        self.put(logits, ids, message.first_token)

    @property
    def logits(self) -> Array:
        """Return the logits float32 [n, vocab], valid until ``begin``."""
        return self._logits[: self._rows]

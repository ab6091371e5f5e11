"""Log lines that strangers cause. Their number is bounded."""

from __future__ import annotations

import logging
import threading
import time

PERIOD_S = 60.0


class RareLog:
    """Writes at most ``most`` warnings per cause and minute, and counts the ones it left out.

    ``cause`` comes from the program, never from a peer, because each cause takes an entry. Any
    thread may call.
    """

    def __init__(self, log: logging.Logger, most: int = 1) -> None:
        self._log = log
        self._most = most
        self._lock = threading.Lock()
        self._causes: dict[str, tuple[float, int]] = {}
        """Maps a cause to the start of its minute and the number of lines since."""

    def warning(self, cause: str, message: str, *arguments: object) -> None:
        """Warn as ``logging.Logger.warning`` does, unless this cause has used up its minute."""
        now_s = time.monotonic()
        with self._lock:
            began_s, asked = self._causes.get(cause, (float("-inf"), 0))
            left_out = 0
            if now_s - began_s >= PERIOD_S:
                left_out = max(asked - self._most, 0)
                began_s, asked = now_s, 0
            self._causes[cause] = began_s, asked + 1
            if asked >= self._most:
                return
        if left_out:
            message, arguments = f"{message} (and %d more before)", (*arguments, left_out)
        self._log.warning(message, *arguments)

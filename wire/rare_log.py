"""Log lines that strangers cause: bounded, however often they cause them."""

from __future__ import annotations

import logging
import threading
import time

PERIOD_S = 60.0


class RareLog:
    """Writes at most ``most`` warnings per cause and minute, and says later how many it left out.

    ``cause`` comes from the program, never from a peer: what is kept is one entry per cause. Any
    thread may call.
    """

    def __init__(self, log: logging.Logger, most: int = 1) -> None:
        self._log = log
        self._most = most
        self._lock = threading.Lock()
        self._causes: dict[str, tuple[float, int]] = {}
        """Cause -> when its minute began, and the lines asked for since."""

    def warning(self, cause: str, message: str, *arguments: object) -> None:
        """As ``logging.Logger.warning``, unless this cause has used up its minute."""
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

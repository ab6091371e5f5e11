"""The error for a request that planning cannot use."""

from __future__ import annotations


class RequestInvalid(Exception):
    """The user's request is wrong. ``param`` is the wrong field; None if it is no single field."""

    code = "invalid_request"

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code

"""Fixtures of the slow tests of installations. `make test-install` prepares them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def prepared(name: str) -> Path:
    """A folder that tests/install/prepare.sh made; skips the test where it did not."""
    folder = os.environ.get("SHOAL_PREPARED")
    if folder is None:
        pytest.skip("needs Debian trees: make test-install")
    path = Path(folder) / name
    if not path.exists():
        pytest.skip(f"{path} is missing: make test-install")
    return path

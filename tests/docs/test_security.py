"""Each attack of the manual has a test of that name."""

from __future__ import annotations

import re

from tests.words import ROOT


def test_each_attack_is_a_test() -> None:
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    found: set[str] = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found.update(re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    assert len(named) > 30
    assert named <= found, named - found

"""Which of many cases ``make test`` runs. ``make test-thorough`` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Return the cases for ``parametrize``, of which all but the ``chosen`` ones are thorough.

    A case of several parameters is a tuple.
    """
    cases = list(cases)
    assert not [one for one in chosen if one not in cases], "no such case"
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in chosen else pytest.mark.thorough,
        )
        for case in cases
    ]

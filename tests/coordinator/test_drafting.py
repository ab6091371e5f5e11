"""What is told of a draft model: an assumed gain at first, and then the one that was counted."""

from __future__ import annotations

import pytest

from coordinator.loading.drafting import ENOUGH_GUESSES, Counts, Draft
from planning.draft import ASSUMED_ACCEPTANCE, gain
from tests.planning.test_draft import first_plan


def test_the_gain_is_assumed_until_enough_guesses_were_checked() -> None:
    _, plan = first_plan()
    draft = Draft("small", 4, 1000, plan.decode_s / 50)
    told = draft.describe(plan)
    assert (told["acceptance"], told["acceptance_is"]) == (ASSUMED_ACCEPTANCE, "assumed")
    assert told["predicted_gain"] == gain(plan.decode_s, draft.token_s, ASSUMED_ACCEPTANCE)
    counts = Counts()
    while counts.checked < ENOUGH_GUESSES:
        assert draft.describe(plan, counts)["acceptance_is"] == "assumed"
        counts.add(7, 1)  # One is right, the next one is wrong, and five tell nothing.
    told = draft.describe(plan, counts)
    assert (told["acceptance"], told["acceptance_is"]) == (pytest.approx(0.5), "measured")
    assert told["drafted_tokens"] == 7 * told["accepted_tokens"]
    counts.add(3, 3)
    assert counts.checked == ENOUGH_GUESSES + 3

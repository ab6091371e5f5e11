"""When a link counts as failed, and when it is tried again."""

from __future__ import annotations

from coordinator.roster.links import FRESH_S, REMEMBERED_S, RETRY_S, Links
from wire.profile import LinkProfile

AB, BA = ("a", "b"), ("b", "a")
LINK = LinkProfile("a", "b", 1e-3, 1e8)


def test_a_link_has_to_be_measured_once() -> None:
    links = Links()
    assert links.is_due(AB, asked=False)
    assert links.failure(AB) is None
    assert not links.set(AB, LINK)
    assert not links.is_due(AB, asked=True)
    assert links.get(AB) is LINK


def test_a_link_that_cannot_be_measured_is_tried_again_less_and_less_often() -> None:
    links, now_s = Links(), 1000.0
    for pause_s in (*RETRY_S, RETRY_S[-1]):
        links.fail(AB, "refused", used=False, now_s=now_s)
        assert links.get(AB) is None
        assert not links.is_due(AB, asked=False, now_s=now_s + pause_s - 1)
        assert not links.is_due(AB, asked=True, now_s=now_s + min(FRESH_S, pause_s) - 1)
        assert links.is_due(AB, asked=True, now_s=now_s + FRESH_S)
        now_s += pause_s
        assert links.is_due(AB, asked=False, now_s=now_s)
    assert links.set(AB, LINK)
    assert links.failure(AB) is None


def test_what_fails_in_use_is_checked_at_once_and_so_is_the_way_back() -> None:
    links = Links()
    links.set(AB, LINK)
    links.set(BA, LINK)
    assert links.fail(AB, "reset", used=True, now_s=0.0)
    assert links.is_due(AB, asked=False, now_s=0.0)
    assert links.is_due(BA, asked=False, now_s=0.0)
    assert links.failure(BA) is None
    # It can be measured, and fails again: measuring does not tell.
    links.set(AB, LINK)
    assert links.fail(AB, "reset", used=True, now_s=10.0)
    assert not links.is_due(AB, asked=False, now_s=10.0 + RETRY_S[1] - 1)
    links.set(AB, LINK)
    links.fail(AB, "reset", used=True, now_s=10.0 + REMEMBERED_S)
    assert links.is_due(AB, asked=False, now_s=10.0 + REMEMBERED_S)


def test_only_what_changed_is_news() -> None:
    links = Links()
    assert links.fail(AB, "refused", used=False)
    assert not links.fail(AB, "refused", used=False)
    assert links.fail(AB, "no answer in time", used=False)
    assert not links.fail(AB, "refused", used=False)
    links.set(AB, LINK)
    assert links.fail(AB, "no answer in time", used=False)


def test_of_a_device_that_left_nothing_is_known() -> None:
    links = Links()
    links.set(AB, LINK)
    links.fail(BA, "refused", used=False)
    links.fail(("a", "c"), "refused", used=False)
    links.forget("b")
    assert links.get(AB) is None
    assert links.failure(BA) is None
    assert links.failure(("a", "c")) is not None


def test_a_reason_is_bounded_and_can_be_shown() -> None:
    links = Links()
    links.fail(AB, "\x1b[31m" + "x" * 5000, used=False)
    failure = links.failure(AB)
    assert failure is not None
    assert failure.reason.isprintable()
    assert len(failure.reason) < 500

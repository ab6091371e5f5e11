"""A browser for all tests of the page, and a shoal that a test makes up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.page.browser import Browser, chromium
from tests.page.shoals import GivenShoal


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GivenShoal]:
    with GivenShoal(tmp_path_factory.mktemp("given")).serving() as shoal:
        yield shoal


@pytest.fixture
def shoal(served: GivenShoal, browser: Browser) -> Iterator[GivenShoal]:
    """Four devices at work. The browser leaves its page, and forgets it, once the test ends."""
    served.reset()
    yield served
    served.hold.set()
    browser.forget()

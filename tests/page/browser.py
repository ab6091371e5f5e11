"""Headless Chromium for tests of the page. Without it, they are skipped with the reason."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.system.cluster import wait_for

WAIT_S = 60.0
SHOWN = 1500
"""Characters at both ends of a page that a failed wait tells."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # Tests run as root in containers.
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--no-first-run",
    "--hide-scrollbars",
    "--proxy-server=direct://",
)


class Browser:
    """One tab. Selectors are CSS."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, url: str, *, width: int = 1400, height: int = 1000) -> None:
        """Open a page in light colours."""
        self.resize(width, height)
        self.prefer()
        self.driver.get(url)

    def forget(self) -> None:
        """Leave the page, and forget what it has kept. A page that is left keeps nothing more."""
        if self.js("return location.protocol") == "http:":
            self.driver.get(self.js("return location.origin") + "/page/style.css")
            self.js("localStorage.clear(); sessionStorage.clear()")
        self.driver.get("about:blank")

    def tab(self) -> None:
        """Press the tabulator key."""
        self.driver.switch_to.active_element.send_keys("\ue004")

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", size)

    def prefer(self, *, dark: bool = False, calm: bool = False) -> None:
        """Set what the user prefers: dark colours, no motion."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
        ]
        self.cdp("Emulation.setEmulatedMedia", {"features": features})

    def cdp(self, command: str, arguments: dict[str, Any]) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)

    def js(self, code: str, *arguments: Any) -> Any:
        """Run a function body, and return what it returns."""
        return self.driver.execute_script(code, *arguments)

    def count(self, selector: str) -> int:
        return int(self.js("return document.querySelectorAll(arguments[0]).length", selector))

    def text(self, selector: str = "body") -> str:
        """The visible text of the first match, or an empty text."""
        found = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return " ".join(str(self.js(found, selector)).replace("\u00a0", " ").split())

    def until(self, selector: str, text: str = "", timeout_s: float = WAIT_S) -> None:
        """Wait until the first match shows ``text``, or until there is a match."""

        def is_shown() -> bool:
            return self.count(selector) > 0 and text in self.text(selector)

        try:
            wait_for(is_shown, timeout_s, f"{text!r} in {selector}")
        except AssertionError as error:
            shown = self.text()
            if len(shown) > 2 * SHOWN:
                shown = f"{shown[:SHOWN]} ... {shown[-SHOWN:]}"
            raise AssertionError(f"{error}; the page shows: {shown}") from None

    def element(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def click(self, selector: str) -> None:
        self.until(selector)
        self.element(selector).click()

    def type(self, selector: str, text: str) -> None:
        self.until(selector)
        self.element(selector).send_keys(text)

    def say(self, text: str) -> None:
        """Send a message in the chat."""
        self.type(".composer textarea", text)
        self.click(".composer button[type=submit]")

    def log(self) -> list[str]:
        """Messages of the console that are errors, and not about the network."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE" and entry["source"] != "network"
        ]

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a profile of its own. Skips the test where it is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no chromium with chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (*OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    tab = webdriver.Chrome(options=options, service=service)
    try:
        yield Browser(tab)
    finally:
        tab.quit()

"""The page in a browser, before shoals that the tests make up."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.page.browser import Browser
from tests.page.shoals import GivenShoal, device, event, model, request, stage
from tests.system.cluster import wait_for

HOSTILE = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>'

ANSWER = (
    "Before <img src=x onerror='window.hit=1'> after\n\n",
    "<script>window.hit=1</script>\n\n<iframe srcdoc='<script>parent.hit=1</script>'></iframe>\n\n",
    "[one](javascript:window.hit=1) [two](  JaVaScRiPt:window.hit=1) <javascript:window.hit=1>\n\n",
    "[three](data:text/html,<script>x</script>) [four](vbscript:x) [five](//evil.test)\n\n",
    "[six](&#106;avascript:window.hit=1) ![picture](https://evil.test/a.png?secret)\n\n",
    "<svg onload=window.hit=1><style>body{display:none}</style><base href=//evil.test>\n\n",
    "<form action=https://evil.test><input name=q></form>\n\n[good](https://example.org/a)\n\n",
    "`<b>code</b>` &lt;kept&gt; | a | b |\n|--|--|\n| <b onclick=window.hit=1>x</b> | y |\n\n",
)

ROGUES = """
return [...document.querySelectorAll(
    ['img', 'script', 'iframe', 'style', 'form:not(.composer)', 'object', 'base']
        .map((name) => `#app ${name}`).join(',')
)].map((element) => element.outerHTML)
"""

LINKS = "return [...document.querySelectorAll('#app a[href]')].map((link) => link.href)"

UNNAMED = {"button", "link", "textbox", "spinbutton", "checkbox", "combobox", "region", "dialog"}
"""Roles whose elements need a name that a screen reader says."""

CONTRASTS = r"""
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
function rgba(colour) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = colour;
  canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
}
function over([r, g, b, a], [R, G, B]) {
  return [r * a + R * (1 - a), g * a + G * (1 - a), b * a + B * (1 - a), 1];
}
function ground(element) {
  const layers = [];
  for (let at = element; at; at = at.parentElement) {
    const layer = rgba(getComputedStyle(at).backgroundColor);
    layers.push(layer);
    if (layer[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), [255, 255, 255, 1]);
}
function light(colour) {
  const [r, g, b] = colour.slice(0, 3).map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function contrast(one, two) {
  const [high, low] = [light(one), light(two)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
const found = [];
const walker = document.createTreeWalker(document.querySelector('#app'), NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  const text = walker.currentNode.textContent.trim();
  if (!text || element.closest('.dot, [aria-hidden], :disabled, .hidden, title, .skip')) continue;
  const style = getComputedStyle(element);
  const inSvg = element.closest('svg');
  const behind = ground(inSvg ? inSvg.parentElement : element);
  const ink = over(rgba(inSvg ? style.fill : style.color), behind);
  const size = parseFloat(style.fontSize);
  const least = size >= 24 || (size >= 18.66 && style.fontWeight >= 700) ? 3 : 4.5;
  const ratio = contrast(ink, behind);
  found.push([ratio / least, `${ratio.toFixed(2)} ${text.slice(0, 40)}`]);
}
for (const block of document.querySelectorAll('.block, .swatch')) {
  const style = getComputedStyle(block);
  const inSvg = block.closest('svg');
  const colour = rgba(inSvg ? style.fill : style.backgroundColor);
  const ratio = contrast(colour, ground(inSvg ? inSvg.parentElement : block.parentElement));
  found.push([ratio / 3, `${ratio.toFixed(2)} ${block.getAttribute('class')}`]);
}
return found;
"""


@pytest.fixture(autouse=True)
def no_error_in_the_console(browser: Browser) -> Iterator[None]:
    browser.log()
    yield
    assert browser.log() == []


# ---- what is shown ------------------------------------------------------------------------------


def test_the_ring_shows_stages_bits_times_and_the_bottleneck(
    browser: Browser, shoal: GivenShoal
) -> None:
    browser.open(shoal.url)
    browser.until(".ring")
    assert browser.count(".block") == 18
    assert browser.count(".block.bits-4") == 7
    assert browser.count(".bottleneck") == 1
    rows = browser.js(
        "return [...document.querySelectorAll('.stages tbody tr')].map((row) => "
        "[...row.cells].map((cell) => cell.innerText.split('\\n')[0].trim()))"
    )
    assert len(rows) == 8
    assert rows[2][1:] == ["20.3", "22.3"]
    assert "bottleneck" in browser.text(".stages tbody tr:nth-child(3)")
    assert rows[3][1:] == ["1.40", "1.60"]
    assert browser.text(".stages tfoot") == (
        "between the stages, in use 4.80 7.26 a token in all 69.2 78.1"
    )
    assert browser.text(".ring-middle").startswith("78.1 ms a token, measured predicted 69.2 ms")
    assert browser.count(".orbit") == 2
    assert "4 bits 5 bits 6 bits 8 bits" in browser.text(".legend")


def test_what_nobody_measured_is_called_so(browser: Browser, shoal: GivenShoal) -> None:
    planned = stage("pi-1", 0, (8, 4), 0.01), stage("pi-2", 2, (4, 8), 0.02)
    bare = model(*planned)
    for loaded in bare["stages"]:
        loaded |= {"token_s": None, "hop_s": None}
    shoal.given |= {"models": [bare], "requests": []}
    browser.open(shoal.url)
    browser.until(".ring-middle", "predicted not measured yet")
    assert browser.text(".stages tbody").count("not measured") == 4
    assert browser.text(".stages tfoot").endswith("a token in all 32.0 not measured")
    assert "load not measured heat not measured" in browser.text(".device:nth-child(4)")


def test_a_team_shares_the_arc_of_its_stage(browser: Browser, shoal: GivenShoal) -> None:
    team = stage("pi-1", 0, (8, 4, 4), 0.02)
    team["members"] = [
        {
            "device": name,
            "compute_s": 0.006,
            "sums_s": 0.002,
            "memory_bytes": 1 << 26,
            "memory_limit_bytes": 1 << 30,
        }
        for name in ("pi-1", "pi-2")
    ]
    loaded = model(team, stage("pi-3", 3, (4, 8), 0.01))
    loaded["plan"]["shares"] = {"pi-1": 0.5, "pi-2": 0.5}
    loaded["stages"][0]["members"] = [
        {"device": name, "memory_bytes": 1 << 26, "token_s": 0.009} for name in ("pi-1", "pi-2")
    ]
    shoal.given["models"] = [loaded]
    browser.open(shoal.url)
    browser.until(".stages", "pi-1 + pi-2")
    assert browser.count(".share") == 1
    assert "50 % of each layer, without waits 8.00 9.00" in browser.text(".stages tr.member")


def test_an_empty_shoal_says_how_a_device_joins(browser: Browser, shoal: GivenShoal) -> None:
    shoal.given = {}
    browser.open(shoal.url)
    browser.until(".join", "No device has joined yet")
    browser.until(".join code", "shoal agent --coordinator 127.0.0.1:7420 --cluster attic")
    assert browser.element(".composer textarea").is_enabled() is False


def test_the_state_is_followed(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    browser.until(".count", "4")
    devices = shoal.given["devices"]
    shoal.given["devices"] = [*devices[:3], device("shelf-pi", state="lost", reason="silent")]
    browser.until(".device-lost", "shelf-pi")
    browser.until(".stages tr.is-lost", "shelf-pi")
    browser.until(".ring .stage.lost")


def test_a_page_that_was_left_holds_no_connection(browser: Browser, shoal: GivenShoal) -> None:
    """Browsers open six connections to one server. The chat of the next page needs one too."""
    for _ in range(8):
        browser.open(shoal.url)
        browser.until(".ring")
        browser.driver.get("about:blank")
    wait_for(lambda: shoal.watchers == 0, 60, "the end of all streams")


def test_the_page_finds_a_coordinator_again_that_stopped(
    browser: Browser, shoal: GivenShoal
) -> None:
    browser.open(shoal.url)
    browser.until(".pill-ready")
    shoal.close()
    browser.until(".banner", "The coordinator does not answer")
    browser.until(".top-state", "no contact")
    shoal.reopen()
    browser.until(".top-state", "llama-3.2-1b")
    assert browser.count(".banner") == 0


def test_the_joining_line_has_no_token_and_the_page_makes_one(
    browser: Browser, shoal: GivenShoal
) -> None:
    token = "shoal1.fingerprint.secret"  # noqa: S105 - made up
    shoal.token = token
    browser.open(shoal.url)
    browser.click(".column-shoal .card:nth-of-type(2) .quiet-button")
    line = "shoal agent --coordinator 127.0.0.1:7420 --cluster attic --token-file -"
    browser.until(".join code", line)
    assert token not in browser.text()
    browser.js("navigator.clipboard.writeText = (text) => { window.copied = text; }")
    browser.click(".join .line button")
    browser.until(".join [role=status]", "Copied.")
    assert browser.js("return window.copied") == line
    browser.click(".join .quiet-button")
    browser.until(".join code[aria-label=Token]", token)
    browser.click(".join .line:nth-of-type(2) button")
    browser.until(".join [role=status]", "Copied.")
    assert browser.js("return window.copied") == token


# ---- the chat -----------------------------------------------------------------------------------


def test_a_chat_sends_the_conversation_and_its_settings(
    browser: Browser, shoal: GivenShoal
) -> None:
    browser.open(shoal.url)
    shoal.pieces = ({"reasoning_content": "I look."}, "in the ", "**attic**")
    browser.say("Where is the lamp?")
    browser.until(".message.assistant .figures", "3 tokens")
    assert browser.text(".message.assistant .markdown") == "in the attic"
    assert browser.js("return document.querySelector('.thought p').textContent") == "I look."
    browser.click(".chat .quiet-button")
    browser.type(".settings textarea", "Be brief.")
    browser.type(".settings input[step='0.1']", "0.3")
    shoal.pieces = ("yes",)
    browser.say("Sure?")
    browser.until(".message:nth-child(4) .figures", "1 token")
    first, second = shoal.asked
    assert first["messages"] == [{"role": "user", "content": "Where is the lamp?"}]
    assert "temperature" not in first
    assert [(one["role"], one["content"]) for one in second["messages"]] == [
        ("system", "Be brief."),
        ("user", "Where is the lamp?"),
        ("assistant", "in the **attic**"),
        ("user", "Sure?"),
    ]
    assert (second["temperature"], second["model"]) == (0.3, "llama-3.2-1b")


def test_a_model_without_a_memory_is_asked_alone_and_that_is_said(
    browser: Browser, shoal: GivenShoal
) -> None:
    browser.open(shoal.url)
    shoal.remembers, shoal.pieces = False, ("yes",)
    browser.say("One?")
    browser.until(".message:nth-child(2) .figures")
    assert "alone" not in browser.text(".message:nth-child(2) .figures")
    browser.say("Two?")
    browser.until(".message:nth-child(4) .figures", "asked alone")
    assert browser.text(".message:nth-child(4) .markdown") == "yes"
    assert [one["content"] for one in shoal.asked[-1]["messages"]] == ["Two?"]


def test_stop_ends_the_answer_at_the_coordinator_too(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    shoal.pieces = ("the beginning",)
    shoal.hold.clear()
    browser.say("Tell me more")
    browser.until(".message.assistant", "the beginning")
    browser.click(".composer .stop")
    browser.until(".message.assistant .figures", "stopped")
    assert shoal.cancelled.wait(60)
    assert browser.text(".message.assistant .markdown") == "the beginning"


def test_a_screen_reader_hears_an_answer_once_it_is_complete(
    browser: Browser, shoal: GivenShoal
) -> None:
    browser.open(shoal.url)
    shoal.pieces = ("half of ",)
    shoal.hold.clear()
    browser.say("Tell me")
    browser.until(".message.assistant", "half of")
    heard = "return document.querySelector('.chat [aria-live]').textContent.trim()"
    assert browser.js(heard) == "The model is answering."
    shoal.hold.set()
    browser.until(".message.assistant .figures")
    assert browser.js(heard) == "half of"


def test_nothing_that_a_stranger_wrote_becomes_markup(browser: Browser, shoal: GivenShoal) -> None:
    """A model's answer, and each text of the state that other devices or clients can choose."""
    lost = device(HOSTILE, state="lost", reason=HOSTILE, processor=HOSTILE, noise=HOSTILE)
    shoal.given |= {
        "devices": [device(HOSTILE, machine=HOSTILE, backend=HOSTILE, version=HOSTILE), lost],
        "models": [model(stage(HOSTILE, 0, (4, 4), 0.01), name=HOSTILE, reason=HOSTILE)],
        "requests": [
            request(HOSTILE, "ended", client=HOSTILE, path=HOSTILE, error=HOSTILE, model=HOSTILE)
        ],
        "events": [event(1, HOSTILE, HOSTILE, HOSTILE)],
    }
    shoal.pieces = ({"reasoning_content": HOSTILE}, *ANSWER)
    browser.open(shoal.url)
    browser.until(".device", HOSTILE)
    browser.say(HOSTILE)
    browser.until(".message.assistant .figures")
    browser.click(".thought summary")
    assert HOSTILE in browser.text(".message.user")
    shown = browser.text(".message.assistant .markdown")
    for written in ("<img src=x onerror='window.hit=1'>", "<iframe srcdoc=", "<base href=//evil"):
        assert written in shown
    assert browser.js(ROGUES) == []
    assert [link for link in browser.js(LINKS) if not link.endswith("#main")] == [
        "https://example.org/a"
    ]
    assert browser.js("return document.querySelector('.markdown a').rel") == (
        "noopener noreferrer nofollow"
    )
    assert browser.js("return window.hit ?? null") is None
    refused = "try { document.body.insertAdjacentHTML('beforeend', '<b>x</b>'); return 'taken' } "
    assert browser.js(refused + "catch (error) { return error.name }") == "TypeError"
    (refusal,) = browser.log()
    assert "TrustedHTML" in refusal


# ---- plans --------------------------------------------------------------------------------------


def test_a_plan_is_previewed_with_pins_and_exclusions(browser: Browser, shoal: GivenShoal) -> None:
    planned = model(stage("attic-pi", 0, (8, 4), 0.01), stage("nano", 2, (4, 4, 8), 0.02))
    shoal.plan = {key: planned[key] for key in ("model", "plan", "context_tokens")}
    browser.open(shoal.url)
    browser.until(".ring")
    browser.click(".top .main-button")
    browser.until("dialog[open]")
    browser.type("dialog input[placeholder^=none]", "0:attic-pi, 2-4:nano")
    names = "[...document.querySelectorAll('dialog .check')].find((label) => "
    browser.js(f"{names}label.innerText.trim() === 'shelf-pi').querySelector('input').click()")
    browser.click("dialog button[type=submit]")
    browser.until("dialog .preview", "llama-3.2-1b would take 32.4 ms a token")
    (asked,) = shoal.asked
    assert asked["pins"] == {"0": "attic-pi", "2": "nano", "3": "nano", "4": "nano"}
    assert asked["exclude"] == ["shelf-pi"]
    assert asked["model"] == "/home/ann/models/llama-3.2-1b"
    assert browser.count("dialog .block") == 5
    assert "measured" not in browser.text("dialog .stages")
    assert "\u221253 % time" in browser.text("dialog .comparison")
    browser.type("dialog input[placeholder^=none]", ", nonsense")
    browser.click("dialog button[type=submit]")
    browser.until("dialog .notice", "write BLOCK:DEVICE")
    browser.js("document.querySelector('dialog').dispatchEvent(new Event('close'))")
    browser.until("body:not(:has(dialog))")


# ---- everybody ----------------------------------------------------------------------------------


def test_a_key_is_asked_for_where_keys_are_needed(browser: Browser, shoal: GivenShoal) -> None:
    shoal.key = "the-right-key"
    browser.open(shoal.url)
    browser.until(".key-form", "asks for an API key")
    browser.type(".key-form input[type=password]", "wrong\n")
    browser.until(".key-form", "not known here, or was revoked")
    browser.js("document.querySelector('.key-form input').value = ''")
    browser.type(".key-form input[type=password]", "the-right-key\n")
    browser.until(".pill-ready")
    shoal.pieces = ("in the attic",)
    browser.say("Where?")
    browser.until(".message.assistant", "in the attic")
    assert browser.js("return localStorage.getItem('shoal.key')") is None


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_all_text_and_all_blocks_stand_out(browser: Browser, shoal: GivenShoal, dark: bool) -> None:
    """WCAG 2.2, AA: 4.5 to 1 for text, 3 to 1 for large text and for blocks."""
    every = model(stage("attic-pi", 0, (2, 3, 4, 5, 6, 8, 10, 12, 16, 32), 0.01))
    every |= {"state": "recovering", "reason": "a reason", "slow": ["nano is slow"]}
    shoal.given["models"] = [shoal.given["models"][0], every]
    shoal.pieces = (
        "Some `code`, [a link](https://example.org) and\n\n> a quotation\n\n```\nx\n```",
    )
    browser.open(shoal.url)
    browser.prefer(dark=dark, calm=True)
    browser.say("Hello")
    browser.until(".figures")
    found = browser.js(CONTRASTS)
    assert len(found) > 150
    assert [text for share, text in found if share < 1] == []


def test_a_telephone_shows_everything_without_scrolling_sideways(
    browser: Browser, shoal: GivenShoal
) -> None:
    shoal.given["devices"][0]["name"] = (
        "a-device-with-a-name-as-long-as-names-may-become-in-a-shoal-63"
    )
    shoal.pieces = ("```\n" + "x" * 300 + "\n```\n\n" + "y" * 300,)
    browser.open(shoal.url, width=400, height=860)
    wide = "return document.documentElement.scrollWidth"
    browser.until(".ring")
    assert browser.js(wide) == 400
    assert not browser.element(".composer").is_displayed()
    browser.click(".views button:last-child")
    browser.say("Hello")
    browser.until(".figures")
    assert browser.js(wide) == 400
    assert not browser.element(".ring").is_displayed()
    browser.click(".top .main-button")
    browser.until("dialog[open]")
    assert browser.js(wide) == 400
    assert browser.js("return document.querySelector('dialog').scrollWidth") <= 400


def test_keys_alone_reach_everything_visibly(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    browser.until(".ring")
    shown = (
        "const at = document.activeElement; const style = getComputedStyle(at);"
        "return [at.className || at.tagName, style.outlineStyle, parseFloat(style.outlineWidth)]"
    )
    reached: list[str] = []
    for _ in range(9):
        browser.tab()
        name, style, width = browser.js(shown)
        assert style != "none", (name, reached)
        assert width >= 2, name
        reached.append(name)
    assert reached[0] == "skip"
    assert {"main-button", "quiet-button", "messages", "rows events"} <= set(reached)


def test_each_control_has_a_name(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    browser.click(".chat .quiet-button")
    browser.click(".top .main-button")
    browser.until("dialog[open]")
    browser.js("document.querySelector('dialog').close(); document.querySelector('.views')")
    nodes = browser.cdp("Accessibility.getFullAXTree", {})["nodes"]
    roles = [_of(node, "role") for node in nodes]
    assert {"button", "textbox", "spinbutton", "region", "table", "image"} <= set(roles)
    assert [
        node for node in nodes if _of(node, "role") in UNNAMED and not _of(node, "name").strip()
    ] == []


def _of(node: dict[str, Any], field: str) -> str:
    return str(node.get(field, {}).get("value", "")) if not node.get("ignored") else ""


def test_nothing_moves_for_those_who_want_no_motion(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    browser.until(".orbit")
    moving = "return document.getAnimations().length"
    assert browser.js(moving) > 0
    browser.prefer(calm=True)
    assert browser.js(moving) == 0
    assert browser.count(".orbit") == 2


def test_the_chosen_colours_last(browser: Browser, shoal: GivenShoal) -> None:
    browser.open(shoal.url)
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = browser.js(ground)
    for _ in range(2):  # From auto by way of light.
        browser.click(".theme")
    browser.until("html[data-theme=dark]")
    assert browser.js(ground) != light
    browser.driver.refresh()
    browser.until("html[data-theme=dark]")


def test_a_state_of_many_devices_is_drawn_soon(browser: Browser, shoal: GivenShoal) -> None:
    """A ring of 24 stages and 98 blocks, twice a second."""
    stages = [stage(f"pi-{n}", 4 * n, (4, 4, 5, 8), 0.01) for n in range(24)]
    shoal.given |= {
        "devices": [device(f"pi-{n}") for n in range(24)],
        "models": [model(*stages)],
    }
    browser.open(shoal.url)
    browser.until(".stages tbody tr:nth-child(48)")
    assert browser.count(".block") == 96
    began = time.perf_counter()
    shoal.given["events"] = [event(9, "joined", "the last one")]
    browser.until(".events", "the last one")
    assert time.perf_counter() - began < 10
    assert re.search(r"24 pi-23", browser.text(".stages"))


# ---- several models ----------------------------------------------------------------------------

NAMES = ("cellar-jetson-with-a-long-name", "kitchen-pi-on-the-shelf")

OUTSIDE = """
return [...document.querySelectorAll('.ring .label')]
    .filter((label) => {
      const parts = [label, label.closest('svg')];
      const [box, drawing] = parts.map((part) => part.getBoundingClientRect());
      return box.left < drawing.left - 1 || box.right > drawing.right + 1;
    })
    .map((label) => label.textContent)
"""


@pytest.mark.parametrize("width", [1400, 400])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_long_name_stays_in_its_ring(
    count: int, width: int, browser: Browser, shoal: GivenShoal
) -> None:
    names = (NAMES * 2)[:count]
    shoal.given["models"] = [
        model(*(stage(name, 4 * at, (4, 4, 4, 4), 0.01) for at, name in enumerate(names)))
    ]
    browser.open(shoal.url, width=width)
    browser.until(".ring .label")
    assert browser.count(".ring .label") == count
    assert browser.js(OUTSIDE) == []


def test_several_models_have_names_and_the_one_in_trouble_is_seen_first(
    browser: Browser, shoal: GivenShoal
) -> None:
    asleep: dict[str, Any] = {
        "model": "old-one",
        "state": "asleep",
        "reason": None,
        "waiting_for": [],
    }
    stages = stage("attic-pi", 0, (4, 4, 4), 0.01)
    shoal.given["models"] = [
        model(stages, model="first-one"),
        model(stages, model="other-one", state="recovering", reason="shelf-pi: device lost"),
        asleep,
    ]
    browser.open(shoal.url)
    browser.until(".top-state", "recovering")
    assert "other-one" in browser.text(".top-state")
    labels = browser.js(
        "return [...document.querySelectorAll('.model')].map((card) => card.ariaLabel)"
    )
    assert labels == ["first-one", "other-one", "old-one"]
    assert "The next request that names it loads it again" in browser.text(".model:nth-of-type(3)")
    # A request says which of several models it asks.
    assert "other-one" not in browser.text(".request")
    shoal.given["requests"] = [request("req-1", model="other-one"), request("req-2")]
    browser.until(".request", "other-one · 214 prompt tokens")

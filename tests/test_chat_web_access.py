"""The page for those who use the keyboard alone or hear it: what axe finds, where the focus is, what is spoken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanochat.serve.settings import Defaults, Settings
from tests.browsing import DESKTOP, LOOKS, PHONE, finished, needs_browser, opened, say, sidebar
from tests.serving import Served, scripted_replica, served, wait_for

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser

RICH = (
    "# Title\n\nSome *text* with [a link](https://example.com), `code` and 27 + 58 = "
    "<|python_start|>27+58<|python_end|><|output_start|>85<|output_end|>85.\n\n"
    "```python\ndef f(x):  # comment\n    return 'a' + str(1)\n```\n\n> quote\n\n1. one\n2. two\n\n"
    "| a | b |\n|--|--|\n| 1 | 2 |"
)
STORY = "Once there was a bear. It lived in a cave. It ate berries every day! "


def script(questions: list[str]) -> str:
    return {"rich": RICH, "story": STORY * 4}.get(questions[-1], f"Hello {questions[-1]}.")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    settings = Settings(defaults=Defaults(temperature=0.0, max_tokens=4000))
    with served(lambda i: scripted_replica(script, context=4096), settings) as running:
        yield running


def problems(page: Any, state: str) -> list[str]:
    """What axe calls serious or critical."""
    from axe_playwright_python.sync_playwright import Axe

    page.wait_for_timeout(250)  # colours fade in; half faded they have no contrast
    found = Axe().run(page).response["violations"]
    return [
        f"{state}: {one['id']} {[node['html'][:200] for node in one['nodes']]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize("look", LOOKS)
def test_axe_finds_nothing_serious(browser, server: Served, look):
    with opened(browser, server, look) as page:
        found = problems(page, "empty")
        say(page, "rich")
        finished(page, 1)
        say(page, "/nonsense")
        found += problems(page, "conversation")
        page.click(".assistant [aria-label='Token probabilities']")
        page.locator(".token").nth(1).hover()
        found += problems(page, "token probabilities")
        page.mouse.move(0, 0)
        page.click(".top [data-action=settings]")
        found += problems(page, "settings")
        page.keyboard.press("Escape")
        server.model.fail_next = True
        say(page, "a")
        finished(page, 2)
        page.click(".user >> nth=0 >> [aria-label='Edit and resend']")
        found += problems(page, "failure and editor")
        page.press(".editor textarea", "Escape")
        wait_for(lambda: server.pool.ready)
        with sidebar(page):
            found += problems(page, "sidebar")
            page.hover(".conversations li")
            page.click(".conversations [aria-label=Rename]")
            found += problems(page, "dialog")
            page.keyboard.press("Escape")
    assert found == []


def focused(page: Any) -> str:
    """The name of what has the focus."""
    return page.evaluate(
        "() => document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
    )


def press(page: Any, *keys: str) -> str:
    """Press keys one after the other; what has the focus then."""
    for key in keys:
        page.keyboard.press(key)
    return focused(page)


def test_by_keyboard_alone(browser, server: Served):
    with opened(browser, server, DESKTOP) as page:
        first = "document.querySelector('a, button, input, textarea').className"
        assert page.evaluate(first) == "skip"
        page.focus(".skip")
        assert press(page, "Enter") == "Ask anything"
        page.keyboard.type("one")
        page.keyboard.press("Enter")
        finished(page, 1)
        assert focused(page) == "Ask anything"
        assert press(page, *["Shift+Tab"] * 2) == "Token probabilities"
        assert press(page, "Enter") == "Token probabilities" and page.locator(".token").count() > 3
        assert press(page, "Shift+Tab") == "Regenerate"
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.count')?.textContent === '2/2'")
        finished(page, 1)
        assert focused(page) == "Ask anything"
        page.focus("[aria-label='Previous answer']")
        assert press(page, "Enter") == "Next answer"  # there is none before the first
        assert press(page, "Enter") == "Previous answer"
        page.focus("[aria-label='Edit and resend']")
        assert press(page, "Enter", "Escape") == "Edit and resend"
        page.focus(".conversations [aria-label=Rename]")
        assert press(page, "Enter") == "Name of the conversation"
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('.entry').textContent === 'two'")
        assert focused(page) == "Rename"
        assert press(page, "Tab", "Enter") == "OK"
        page.keyboard.press("Enter")
        page.wait_for_selector(".entry", state="detached")
        assert focused(page) in ("Ask anything", "New chatCtrl Shift O")
        page.focus(".top [data-action=settings]")
        assert press(page, "Enter") == "Close settings"
        assert (
            press(page, "Tab") == "" and page.evaluate("document.activeElement.id") == "setting-temperature"
        )
        page.keyboard.press("ArrowRight")
        assert page.input_value("#setting-temperature") == "0.05"
        assert page.evaluate("document.activeElement.id") == "setting-temperature"
        assert press(page, "Escape") == "Settings" and not page.is_visible("#settings")
        page.evaluate("document.activeElement.blur()")
        assert press(page, "/") == "Ask anything" and page.input_value("#input") == ""


def test_what_lies_over_a_phones_page_keeps_the_focus(browser, server: Served):
    with opened(browser, server, PHONE) as page:
        page.focus(".menu")
        assert press(page, "Enter") == "Close the conversation list"
        inside = "document.getElementById('sidebar').contains(document.activeElement)"
        for _ in range(12):  # around, also through the browser's own controls
            page.keyboard.press("Tab")
            assert page.evaluate(f"{inside} || document.activeElement === document.body")
        assert press(page, "Escape") == "Open the conversation list"
        page.focus(".top [data-action=settings]")
        assert press(page, "Enter") == "Close settings"
        assert page.evaluate("document.querySelector('.main').inert")
        assert press(page, "Escape") == "Settings"
        assert not page.evaluate("document.querySelector('.main').inert")


def test_whole_sentences_are_spoken_never_single_tokens(browser, server: Served):
    with opened(browser, server, DESKTOP) as page:
        page.evaluate(
            """() => { window.spoken = [];
            new MutationObserver((changes) => changes.forEach((change) => change.addedNodes.forEach(
              (node) => window.spoken.push(node.textContent)))).observe(document.getElementById('announcer'), { childList: true }); }"""
        )
        server.model.pause_s = 0.015  # some four seconds for the whole answer
        say(page, "story")
        finished(page, 1)
        spoken = page.evaluate("window.spoken")
        assert spoken[0] == "nanochat is answering." and spoken[-1] == "End of the answer."
        sentences = spoken[1:-1]
        assert 2 <= len(sentences) <= 12 and " ".join(sentences) == (STORY * 4).strip()
        assert all(text.endswith((".", "!")) for text in sentences)
        assert page.get_attribute("#messages", "aria-live") == "off"
        assert page.get_attribute("#announcer", "aria-live") == "polite"
        say(page, "/nonsense")
        assert "not a command" in page.inner_text("#announcer p:last-of-type")


def test_motion_can_be_reduced(browser, server: Served):
    with opened(browser, server, DESKTOP, reduced_motion="reduce") as page:
        server.model.pause_s = 0.02
        say(page, "story")
        page.wait_for_selector(".streaming .markdown > p")
        style = "getComputedStyle(document.querySelector('.streaming .markdown > :last-child'), '::after').animationName"
        assert page.evaluate(style) == "none"
        page.keyboard.press("Escape")
        finished(page, 1)

"""What the tests of the page share: a real Chromium, how the page is opened in it, and how people use it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.serving import Served

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE_MS = 60_000  # other programs may need the machine
SIZES = {"desktop": {"width": 1200, "height": 800}, "phone": {"width": 390, "height": 780}}


@dataclass(frozen=True)
class Look:
    """How a person sees the page."""

    size: str = "desktop"
    theme: str = "light"

    def __str__(self) -> str:
        return f"{self.size}-{self.theme}"


DESKTOP, PHONE = Look(), Look("phone", "dark")
# every test sees the first; the rest takes the time that CI has
LOOKS = [
    pytest.param(look, id=str(look), marks=[pytest.mark.slow] if look != DESKTOP else [])
    for look in (DESKTOP, PHONE, Look("desktop", "dark"), Look("phone", "light"))
]


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Any, server: Served, look: Look = DESKTOP, **options: Any) -> Iterator[Any]:
    """A page that fails its test on script errors, policy violations and requests to anybody else."""
    server.model.pause_s = 0.0
    context = browser.new_context(viewport=SIZES[look.size], color_scheme=look.theme, **options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda line: problems.append(line.text) if line.type == "error" else None)
    page.on(
        "request",
        lambda r: problems.append(r.url) if not r.url.startswith((server.url, "blob:", "data:")) else None,
    )
    page.goto(server.url)
    page.wait_for_selector("#model:not(:empty)", state="attached")
    try:
        yield page
    finally:
        context.close()
    assert problems == []


def say(page: Any, text: str) -> None:
    """Type into the message field and send."""
    page.fill("#input", text)
    page.press("#input", "Enter")


def finished(page: Any, count: int) -> str:
    """Text of the last answer once `count` answers are there and nothing runs."""
    page.wait_for_function(
        "count => document.querySelectorAll('.assistant').length === count"
        " && document.getElementById('stop').hidden && !document.querySelector('.streaming')",
        arg=count,
    )
    return page.inner_text(".assistant:last-of-type .answer")


def messages(page: Any) -> list[str]:
    """The ids of the messages on the page."""
    return page.locator(".message").evaluate_all("nodes => nodes.map((node) => node.dataset.id)")


@contextmanager
def settings(page: Any) -> Iterator[None]:
    """The settings panel, open for a while."""
    page.click(".top [data-action=settings]")
    yield
    page.click("#settings [data-action=settings]")


def choose(page: Any, setting: str, value: str) -> None:
    """Give a setting of the open panel a value."""
    change = "(node, value) => { node.value = value; node.dispatchEvent(new Event('change')); }"
    page.eval_on_selector(f"#setting-{setting}", change, value)


@contextmanager
def sidebar(page: Any) -> Iterator[None]:
    """The list of conversations, which a phone has in a drawer."""
    is_drawer = page.is_visible(".menu")
    if is_drawer:
        page.click(".menu")
    yield
    if page.evaluate("document.body.classList.contains('drawer-open')"):
        page.click(".close-drawer")
        page.wait_for_selector("#sidebar", state="hidden")


def fits(page: Any) -> bool:
    """Nothing sticks out of the window sideways."""
    return page.evaluate(
        "document.documentElement.scrollWidth <= innerWidth && document.getElementById('scroller').scrollWidth"
        " <= document.getElementById('scroller').clientWidth"
    )

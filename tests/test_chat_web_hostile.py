"""Hostile text in the page: from the model, from people, from files. It is shown, and does no harm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanochat.serve.settings import Defaults, Settings
from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer, Vocabulary
from nanochat.tokenizer_base import SPLIT_PATTERN
from tests.browsing import DESKTOP, LOOKS, finished, fits, needs_browser, opened, say, sidebar
from tests.serving import Served, scripted_replica, served

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser

ATTACK = '<img src=x onerror="window.hacked=1"><svg onload="window.hacked=1"><script>window.hacked=1</script>'
ANSWERS = {
    "markup": f"{ATTACK} **<b>bold</b>** <iframe src=javascript:window.hacked=1></iframe> <style>*{{display:none}}</style>",
    "links": "[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](data:text/html,<script>1</script>) "
    "![d](http://evil.example/x.png) [e](\x01javascript:window.hacked=1) <https://x.example> "
    "[ok](https://example.com) https://example.com/?q=%22onmouseover=%22window.hacked=1",
    "code": f"```<img/onerror=window.hacked=1>\n{ATTACK}\n```\n\n```html\n{ATTACK}\n```\n\n`{ATTACK}`",
    "table": f"|{ATTACK}|b|\n|--|--|\n|{'x' * 400}|{'| y ' * 60}|",
    "tool": f"<|python_start|>{ATTACK}<|python_end|><|output_start|>{ATTACK}{'9' * 900}<|output_end|>",
    "right to left": "\u202eright to left \u2067isolated\u2066 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 12 + 3\n\n" * 6,
    "long line": "x" * 3000,
    "long code": f"```\n{'x' * 3000}\n```",
    "deep": ">" * 100 + " a\n\n" + "".join("  " * depth + "- b\n" for depth in range(20)) + "[" * 200 + "*" * 201,
    "odd": "\ue000" + "0\ue001 \ue0007\ue001 \x00\x1b[31m \ufeff\ufffd " + "e\u0301" * 50 + "\u0300" * 300 + "\U0001f468\u200d" * 40,
}  # fmt: skip
CONTEXT = 4096
DOUBLINGS = 10  # the longest token has 2^10 characters


def long_tokens() -> RustBPETokenizer:
    """Bytes, and runs of x up to 1024 characters, so that a thousand steps write a million characters."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {b"x" * 2**power: 255 + power for power in range(1, DOUBLINGS + 1)}
    special = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
    return RustBPETokenizer(Vocabulary(ranks, SPLIT_PATTERN, special))


def script(questions: list[str]) -> str:
    if questions[-1] == "million":
        return "x" * 1024 * 1000
    return ANSWERS.get(questions[-1], "Hello.")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    settings = Settings(defaults=Defaults(temperature=0.0, max_tokens=4000))
    with served(lambda i: scripted_replica(script, long_tokens(), context=CONTEXT), settings) as running:
        yield running


def harmless(page: Any) -> None:
    """No script ran, no foreign element came into being, nothing sticks out."""
    page.wait_for_timeout(50)
    assert page.evaluate("window.hacked") is None
    assert (
        page.locator("#messages :is(img, script, style, iframe, b, object, form:not(.editor))").count() == 0
    )
    links = page.locator(".answer a").evaluate_all("nodes => nodes.map((n) => [n.protocol, n.rel, n.target])")
    safe = {(protocol, "noopener noreferrer", "_blank") for protocol in ("https:", "http:")}
    assert {tuple(link) for link in links} <= safe
    assert page.evaluate(
        "[...document.querySelectorAll('#messages *')].every((n) => ![...n.attributes].some((a) => a.name.startsWith('on')))"
    )
    assert fits(page)


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_what_a_model_may_write(browser, server: Served, look):
    with opened(browser, server, look) as page:
        for question in ANSWERS:
            with sidebar(page):
                page.click("[data-action=new]")
            say(page, question)
            finished(page, 1)
            harmless(page)
            page.click(".assistant [aria-label='Token probabilities']")
            page.focus(".token >> nth=0")
            harmless(page)


def test_what_people_and_files_may_bring(browser, server: Served):
    with opened(browser, server, DESKTOP) as page:
        say(page, f"{ATTACK} \u202e{'z' * 3000}")
        finished(page, 1)
        harmless(page)
        message = {"id": '"] img', "role": "user", "content": ATTACK}
        answer = {"id": "b", "role": "assistant", "chosen": 0}
        good = {
            "id": "x", "title": ATTACK, "created": 1, "updated": 9e12,
            "messages": [message, {**answer, "alternatives": [{"parts": [{"type": "text", "text": ATTACK}],
                                                               "error": ATTACK, "stats": {"usage": ATTACK}}]}],
        }  # fmt: skip
        bad = [
            None, 7, "x", [], {}, {**good, "messages": [None]}, {**good, "messages": [{**answer, "alternatives": []}]},
            {**good, "title": {}}, {**good, "messages": [{**answer, "chosen": 5, "alternatives": [{"parts": []}]}]},
            {**good, "messages": [{**answer, "alternatives": [{"parts": [{"type": "text", "text": 7}]}]}]},
        ]  # fmt: skip
        file = {"name": "x.json", "mimeType": "application/json", "buffer": json.dumps([*bad, good]).encode()}
        page.set_input_files("#import-file", file)
        page.wait_for_function(
            "n => document.querySelector('.remark')?.textContent === '1 conversation imported.\\n'"
            " + `${n} entries of the file are no conversations.`",
            arg=len(bad),
        )
        assert page.locator(".entry").count() == 2
        page.click(".entry >> nth=0")
        assert page.inner_text(".bubble") == ATTACK and ATTACK in page.inner_text(".answer")
        harmless(page)
        page.evaluate('localStorage.setItem(\'nanochat.settings\', \'{"temperature": "<b>", "theme": 7}\')')
        page.evaluate("localStorage.setItem('nanochat.conversation.bad', '{]')")
        page.reload()
        page.wait_for_selector("#model:not(:empty)", state="attached")
        assert page.locator(".entry").count() == 2
        harmless(page)


def test_a_million_characters(browser, server: Served):
    with opened(browser, server, DESKTOP) as page:
        page.evaluate(
            """() => { window.longest = 0; let last = performance.now();
            setInterval(() => { const now = performance.now();
              window.longest = Math.max(window.longest, now - last); last = now; }, 20); }"""
        )
        say(page, "million")
        page.wait_for_function("() => document.querySelector('.answer').textContent.length > 100000")
        page.fill("#input", "typed meanwhile")  # the page reacts while the text comes in
        finished(page, 1)
        assert page.evaluate("document.querySelector('.answer').textContent.length") < 210_000
        assert fits(page)
        page.click(".more")
        assert page.evaluate("document.querySelector('.markdown').textContent.length") == 1_024_000
        assert fits(page) and page.locator(".more").count() == 0
        assert page.evaluate("window.longest") < 10_000
        page.reload()  # it was kept
        page.wait_for_selector(".more")

"""Between the page and the world: streams, sockets, failures, addresses, other tabs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nanochat.serve.settings import Defaults, Settings
from tests.browsing import finished, messages, needs_browser, opened, say, settings
from tests.serving import GREEDY, Served, scripted_replica, served, wait_for

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


def script(questions: list[str]) -> str:
    if "27 + 58" in questions[-1]:
        return "27 + 58 = <|python_start|>27+58<|python_end|><|output_start|>85<|output_end|>85."
    return "word " * 150 if questions[-1] == "long" else f"Hello {questions[-1]} \U0001f600"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    defaults = Defaults(temperature=0.0, max_tokens=4000)
    with served(lambda i: scripted_replica(script, context=4096), Settings(defaults=defaults)) as running:
        yield running


def test_a_websocket_does_the_same(page, server: Served):
    with settings(page):
        page.select_option("#setting-transport", "websocket")
    with page.expect_websocket() as opened_socket:
        say(page, "What is 27 + 58?")
    assert finished(page, 1) and opened_socket.value.url.endswith("/ws")
    assert page.inner_text(".tool .tool-output") == "85" and "tok/s" in page.inner_text(".stats")
    page.click(".assistant [aria-label='Token probabilities']")
    page.hover(".token >> nth=0")
    assert page.inner_text("#popover .chosen").split() == ["2", "73", "%"]
    server.model.pause_s = 0.02
    say(page, "long")
    page.wait_for_function("() => document.querySelectorAll('.answer')[1]?.textContent.length > 20")
    page.press("#input", "Escape")
    finished(page, 2)
    wait_for(lambda: server.pool.workers[0].num_running == 0)
    wait_for(
        lambda: server.http.get("/sessions").json()["sessions"] == []
    )  # the page alone keeps conversations
    server.model.fail_next = True
    say(page, "a")
    finished(page, 3)
    assert "the model failed" in page.inner_text(".assistant >> nth=2 >> .failure")
    wait_for(lambda: server.pool.ready)


def test_a_websocket_tells_who_waits(browser):
    with (
        served(lambda i: scripted_replica(script, max_batch=1), Settings(defaults=GREEDY)) as busy,
        opened(browser, busy) as page,
    ):
        with settings(page):
            page.select_option("#setting-transport", "websocket")
        busy.model.pause_s = 0.02
        page.evaluate(
            """() => { window.others = new AbortController(); for (let n = 0; n < 2; n += 1) fetch("chat/completions", {
            method: "POST", headers: {"Content-Type": "application/json"}, signal: window.others.signal,
            body: JSON.stringify({messages: [{role: "user", content: "long"}]}) }).then((r) => r.text()).catch(() => {}); }"""
        )
        wait_for(lambda: len(busy.pool.queue) == 1)
        say(page, "a")
        page.wait_for_selector(".dots[data-place='1 before you']")
        page.evaluate("window.others.abort()")
        busy.model.pause_s = 0.0
        assert finished(page, 1).startswith("Hello a")


def test_event_parser_survives_any_cut(one_page):
    got = one_page.evaluate(
        """async () => {
        const { serverEvents } = await import('/static/sse.js');
        const text = ': hello\\n\\ndata: {"token": "ä漢😀"}\\n\\ndata: {"a": "data: x"}\\r\\n\\r\\ndata: {"done": true}\\n\\n';
        const bytes = new TextEncoder().encode(text);
        const results = new Set();
        for (let cut = 1; cut < bytes.length; cut += 1) {
          const stream = new ReadableStream({ start(c) {
            c.enqueue(bytes.slice(0, cut)); c.enqueue(bytes.slice(cut)); c.close(); } });
          const events = [];
          for await (const event of serverEvents(stream)) events.push(event);
          results.add(JSON.stringify(events));
        }
        return [...results];
    }"""
    )
    assert got == ['[{"token":"\u00e4\u6f22\U0001f600"},{"a":"data: x"},{"done":true}]']


def test_failures_are_shown_and_can_be_retried(page, server: Served):
    server.model.fail_next = True
    say(page, "a")
    finished(page, 1)
    assert "the model failed" in page.inner_text(".failure")
    wait_for(lambda: server.pool.ready)
    page.click(".failure .retry")
    page.wait_for_function("() => document.querySelector('.failure').textContent === ''")
    assert finished(page, 1) == "Hello a \U0001f600"


def test_a_refused_question_does_not_stop_the_conversation(browser, server: Served):
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.wait_for_selector("#model:not(:empty)", state="attached")
        for count, text in enumerate(["a", "y" * 8001], start=1):
            say(page, text)
            finished(page, count)
        assert "longer than 8000 characters" in page.inner_text(".failure >> nth=1")
        with page.expect_request("**/chat/completions") as sent:
            page.click(".failure .retry")
        assert len(sent.value.post_data_json["messages"][-1]["content"]) == 8001
        finished(page, 2)
        say(page, "b")
        assert finished(page, 3).startswith("Hello b")


@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_a_key_is_asked_for_until_it_is_right(browser, transport):
    locked = Settings(defaults=GREEDY, api_keys=("right",))
    with served(lambda i: scripted_replica(script), locked) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.fill("#dialog-input", "\u94a5")  # no header could carry it
        page.click("#dialog-ok")
        with settings(page):
            page.select_option("#setting-transport", transport)
        say(page, "a")
        page.fill("#dialog-input", " right\t")
        page.click("#dialog-ok")
        page.click(".failure .retry")
        page.wait_for_function("() => document.querySelector('.failure').textContent === ''")
        assert finished(page, 1).startswith("Hello a")


@pytest.mark.parametrize("transport", ["sse", "websocket"])
def test_a_server_that_is_gone_is_said_in_words(browser, transport):
    with browser.new_context() as context:
        with served(lambda i: scripted_replica(script), Settings(defaults=GREEDY), pause_s=0.05) as going:
            page = context.new_page()
            page.goto(going.url)
            page.wait_for_selector("#model:not(:empty)", state="attached")
            with settings(page):
                page.select_option("#setting-transport", transport)
            say(page, "long")
            page.wait_for_function("() => document.querySelector('.answer')?.textContent.length > 4")
        finished(page, 1)
        assert "broke before the answer was complete" in page.inner_text(".failure")
        say(page, "a")
        finished(page, 2)
        assert "The server cannot be reached. Look whether" in page.inner_text(".failure >> nth=1")
        assert page.inner_text("#notice") == "The server cannot be reached. Trying again \u2026"


def test_addresses_and_a_second_tab(one_page, server: Served):
    page = one_page
    say(page, "first")
    finished(page, 1)
    first = page.url
    page.click("[data-action=new]")
    say(page, "second")
    finished(page, 1)
    assert "#" in first and page.url != first
    tab = page.context.new_page()
    tab.goto(first)
    assert tab.inner_text(".user .bubble") == "first"
    tab.wait_for_selector("#model:not(:empty)", state="attached")
    say(tab, "more")
    finished(tab, 2)
    page.wait_for_function("() => document.querySelector('.entry').textContent === 'first'")  # the newest now
    page.click(".entry >> nth=0")
    assert len(messages(page)) == 4
    page.go_back()
    page.wait_for_function("() => document.querySelector('.user .bubble').textContent === 'second'")
    page.reload()
    assert page.locator(".entry").count() == 2 and page.inner_text(".user .bubble") == "second"

"""The page in a real browser over the real server; only the network's weights are a script."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

from nanochat.serve.settings import Defaults, Settings
from tests.serving import Served, scripted_replica, served, wait_for

playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
DESKTOP = {"width": 1200, "height": 800}
PHONE = {"width": 390, "height": 780}
HOSTILE = (
    '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script> [click](javascript:window.hacked=1) '
    "![x](http://evil.example/x.png) [ok](https://example.com) \u202eright to left **<b>bold</b>**\n\n"
    "```html\n<script>window.hacked=1</script>\n```\n\n" + "x" * 1000
)


def script(questions: list[str]) -> str:
    last = questions[-1]
    if "27 + 58" in last:
        return "27 + 58 = <|python_start|>27+58<|python_end|><|output_start|>85<|output_end|>85."
    if last == "What is my name?":
        return "Your name is " + questions[0].removeprefix("I am ") + "."
    if last == "hostile":
        return HOSTILE
    if last == "code":
        return "Look:\n\n```python\nprint(1)  # one\n```\n\n1. *first*\n2. **second**\n\n| a | b |\n|--|--|\n| 1 | 2 |"
    if last == "long":
        return "word " * 150
    return f"Hello {last} \U0001f600"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    with served(
        lambda i: scripted_replica(script, context=4096),
        Settings(defaults=Defaults(temperature=0.0, max_tokens=4000)),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server: Served):
    yield from open_page(browser, server, DESKTOP)


@pytest.fixture
def phone(browser, server: Served):
    yield from open_page(browser, server, PHONE)


def open_page(browser, server: Served, viewport: dict):
    """A page that fails its test on script errors, policy violations and requests to anybody else."""
    server.model.pause_s = 0.0
    context = browser.new_context(viewport=viewport)
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
    yield page
    context.close()
    assert problems == []


def say(page, text: str) -> None:
    page.fill("#input", text)
    page.press("#input", "Enter")


def finished(page, count: int) -> str:
    """Text of the last answer once `count` answers are there and nothing runs."""
    page.wait_for_function(
        "count => document.querySelectorAll('.assistant').length === count"
        " && document.getElementById('stop').hidden && !document.querySelector('.streaming')",
        arg=count,
    )
    return page.inner_text(".assistant:last-of-type .answer")


def answers(page) -> list[str]:
    return page.locator(".message").evaluate_all("nodes => nodes.map((node) => node.dataset.id)")


@needs_browser
def test_a_question_a_streamed_answer_and_a_second_turn_that_remembers(page, server: Served, tmp_path):
    server.model.pause_s = 0.01
    page.evaluate(
        """() => { window.seen = [];
        new MutationObserver(() => window.seen.push(document.querySelector('.assistant .answer')?.textContent ?? ''))
          .observe(document.getElementById('messages'), { childList: true, subtree: true, characterData: true }); }"""
    )
    say(page, "I am Ada")
    assert finished(page, 1) == "Hello I am Ada \U0001f600"
    lengths = sorted({len(text) for text in page.evaluate("window.seen")})
    assert len(lengths) >= 4, "the answer came in one piece"
    say(page, "What is my name?")
    assert finished(page, 2) == "Your name is Ada."
    assert page.title() == "I am Ada \u00b7 nanochat"
    picture = page.screenshot(path=str(tmp_path / "chat.png"))
    assert len(picture) > 10_000


@needs_browser
def test_tool_calls_are_shown_and_sent_back_as_they_were(page, server: Served):
    say(page, "What is 27 + 58?")
    finished(page, 1)
    assert page.locator(".tool .tool-call").inner_text() == "27+58"
    assert page.locator(".tool .tool-output").inner_text() == "85"
    assert "<|" not in page.inner_text("#messages")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "thanks")
    kinds = [part["type"] for part in sent.value.post_data_json["messages"][1]["content"]]
    assert kinds == ["text", "python", "python_output", "text"]
    finished(page, 2)


@needs_browser
def test_stop_keeps_the_partial_answer_and_frees_the_server(page, server: Served):
    server.model.pause_s = 0.02
    say(page, "long")
    page.wait_for_function("() => document.querySelector('.assistant .answer').textContent.length > 20")
    page.press("#input", "Escape")
    text = finished(page, 1)
    assert text.startswith("word word") and len(text) < 700
    assert "stopped" in page.inner_text(".assistant .stats")
    wait_for(lambda: server.pool.workers[0].num_running == 0)


@needs_browser
def test_regenerate_keeps_alternatives(page):
    say(page, "a")
    finished(page, 1)
    page.click(".assistant [aria-label=Regenerate]")
    page.wait_for_function("() => document.querySelector('.count')?.textContent === '2/2'")
    page.click("[aria-label='Previous answer']")
    assert page.inner_text(".count") == "1/2"
    page.reload()
    page.click(".entry")
    assert page.inner_text(".count") == "1/2"


@needs_browser
def test_edit_restarts_from_there_also_with_remarks_between(page):
    say(page, "one")
    finished(page, 1)
    say(page, "/nonsense")
    assert "not a command" in page.inner_text(".remark")
    assert page.input_value("#input") == ""
    say(page, "two")
    finished(page, 2)
    page.press("#input", "ArrowUp")
    page.fill(".editor textarea", "three")
    page.press(".editor textarea", "Enter")
    assert finished(page, 2) == "Hello three \U0001f600"
    page.click(".user >> nth=0 >> [aria-label='Edit and resend']")
    page.fill(".editor textarea", "four")
    page.press(".editor textarea", "Enter")
    page.click("#dialog-ok")  # two later messages are lost
    assert finished(page, 1) == "Hello four \U0001f600"
    assert len(answers(page)) == 2


@needs_browser
def test_a_new_conversation_during_streaming_stays_empty(page, server: Served):
    server.model.pause_s = 0.02
    say(page, "long")
    page.wait_for_function("() => document.querySelector('.assistant .answer')?.textContent.length > 4")
    page.keyboard.press("Control+Shift+KeyO")
    wait_for(lambda: server.pool.workers[0].num_running == 0)
    page.wait_for_timeout(100)
    assert answers(page) == []
    assert page.locator(".entry").count() == 1
    page.click(".entry")
    assert len(answers(page)) == 2 and page.inner_text(".assistant .answer").startswith("wo")


@needs_browser
def test_enter_while_composing_does_not_send(page):
    page.fill("#input", "ni")
    page.evaluate(
        """() => document.getElementById('input').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"""
    )
    assert answers(page) == [] and page.input_value("#input") == "ni"
    page.press("#input", "Enter")
    finished(page, 1)


@needs_browser
def test_slashes_and_settings(page):
    say(page, "/temperature 1.5")
    say(page, "/topk 0")
    say(page, "/maxtokens 99999")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "//odd")
    body = sent.value.post_data_json
    assert body["messages"] == [{"role": "user", "content": "/odd"}]
    assert body["temperature"] == 1.5 and body["top_k"] == 0 and "max_tokens" not in body
    finished(page, 1)
    page.click(".top [data-action=settings]")
    assert page.input_value("#setting-temperature") == "1.5"
    page.fill("#setting-system", "be brief")
    page.dispatch_event("#setting-system", "change")
    page.click(".reset")
    assert page.input_value("#setting-temperature") == "0"
    assert page.input_value("#setting-system") == ""


@needs_browser
def test_model_text_is_never_markup(page):
    say(page, "hostile")
    finished(page, 1)
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator(".answer :is(img, script, b, iframe)").count() == 0
    links = page.locator(".answer a").evaluate_all("nodes => nodes.map((n) => [n.protocol, n.rel])")
    assert ["https:", "noopener noreferrer"] in links
    assert {protocol for protocol, _ in links} <= {"https:", "http:"}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_markdown_and_code(page):
    say(page, "code")
    finished(page, 1)
    assert page.inner_text(".answer pre") == "print(1)  # one"
    assert page.locator(".hl-comment").inner_text() == "# one"
    assert page.locator(".answer ol li").count() == 2
    assert page.inner_text(".answer em") == "first" and page.inner_text(".answer strong") == "second"
    assert page.locator(".answer td").all_inner_texts() == ["1", "2"]


@needs_browser
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_copying_speed_and_context(browser, server: Served, viewport: dict):
    for page in open_page(browser, server, viewport):
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        say(page, "code")
        text = finished(page, 1)
        page.click(".answer [aria-label='Copy code']")
        assert page.evaluate("navigator.clipboard.readText()") == "print(1)  # one"
        page.click(".assistant [aria-label=Copy]")
        assert page.evaluate("navigator.clipboard.readText()").startswith("Look:\n\n```python\nprint(1)")
        page.evaluate(  # what a page over plain HTTP in a local network finds
            """() => { window.kept = navigator.clipboard;
            Object.defineProperty(navigator, 'clipboard', { value: undefined }); }"""
        )
        page.click(".user [aria-label=Copy]")
        assert page.evaluate("window.kept.readText()") == "code"
        assert "Look:" in text and "tok/s" in page.inner_text(".assistant .stats")
        if viewport == DESKTOP:  # a phone has no room for the meter
            assert page.inner_text("#context").endswith("/4096")


@needs_browser
def test_streamed_markdown_equals_markdown_at_once(page):
    same = page.evaluate(
        """async () => {
        const { MarkdownView } = await import('/static/markdown.js');
        const text = '# T\\n\\npara *a* 2*3*4 snake_case_x `c`\\nline\\n\\n- x\\n  - y\\n\\n  more\\n- z\\n\\n```js\\nlet a;\\n\\nb\\n```\\n'
          + '> q\\n> r\\n\\n|a|b|\\n|:-|-:|\\n|1|2|\\n\\nhttps://example.com/a_b. end **un *closed';
        const labels = { copyCode: 'c' };
        const whole = new MarkdownView(labels, () => ''); whole.update(text);
        const grown = new MarkdownView(labels, () => '');
        for (let n = 1; n <= text.length; n += 1) grown.update(text.slice(0, n));
        return whole.root.innerHTML === grown.root.innerHTML ? 'same' : whole.root.innerHTML + '\\n---\\n' + grown.root.innerHTML;
    }"""
    )
    assert same == "same"


@needs_browser
def test_long_hostile_text_stays_fast(page):
    seconds = page.evaluate(
        """async () => {
        const { MarkdownView } = await import('/static/markdown.js');
        const begun = performance.now();
        for (const piece of ['*a ', '[', '`', '**_~~', '> ', '- ', '|-', '\\\\', 'a'])
          new MarkdownView({ copyCode: 'c' }, () => '').update(piece.repeat(1000000 / piece.length));
        return (performance.now() - begun) / 1000;
    }"""
    )
    assert seconds < 15


@needs_browser
def test_event_parser_survives_any_cut(page):
    got = page.evaluate(
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


@needs_browser
def test_token_probabilities(page):
    page.click(".top [data-action=settings]")
    page.click("#setting-probabilities")
    say(page, "a")
    finished(page, 1)
    page.hover(".token >> nth=0")
    rivals = page.locator("#popover .rival").all_inner_texts()
    assert rivals[0].split() == ["H", "73", "%"] and rivals[1].split() == ["I", "27", "%"]
    page.keyboard.press("Tab")
    assert page.inner_text(".tokens") == "Hello a \U0001f600"


@needs_browser
def test_failures_are_shown_and_can_be_retried(page, server: Served):
    server.model.fail_next = True
    say(page, "a")
    finished(page, 1)
    assert "the model failed" in page.inner_text(".failure")
    wait_for(lambda: server.pool.ready)
    page.click(".failure .retry")
    page.wait_for_function("() => document.querySelector('.failure').textContent === ''")
    assert finished(page, 1) == "Hello a \U0001f600"


@needs_browser
def test_conversations_are_kept_named_searched_and_moved(page, tmp_path):
    for text in ("apples", "pears"):
        page.click("[data-action=new]")
        say(page, text)
        finished(page, 1)
    page.reload()
    assert page.locator(".entry").all_inner_texts() == ["pears", "apples"]
    page.fill("#search", "hello apples")
    assert page.locator(".entry").all_inner_texts() == ["apples"]
    page.hover(".conversations li")
    page.click(".conversations [aria-label=Rename]")
    page.fill("#dialog-input", "fruit")
    page.click("#dialog-ok")
    page.wait_for_function("() => document.querySelector('.entry').textContent === 'fruit'")
    page.fill("#search", "")
    with page.expect_download() as download:
        page.click("[data-action=export]")
    saved = tmp_path / "all.json"
    download.value.save_as(saved)
    page.hover(".conversations li")
    page.click(".conversations li >> nth=0 >> [aria-label='Delete conversation']")
    page.click("#dialog-ok")
    page.wait_for_function("() => document.querySelectorAll('.entry').length === 1")
    page.set_input_files("#import-file", saved)
    page.wait_for_function("() => document.querySelectorAll('.entry').length === 3")
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b"[]x"})
    page.wait_for_function(
        "() => document.querySelector('.remark:last-of-type').textContent.includes('no conversations')"
    )


@needs_browser
def test_phone_drawer_theme_and_language(phone):
    say(phone, "hostile")
    finished(phone, 1)
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not phone.is_visible("#sidebar")
    phone.click(".menu")
    phone.wait_for_selector("#sidebar", state="visible")
    phone.click(".close-drawer")
    phone.wait_for_selector("#sidebar", state="hidden")
    sizes = phone.evaluate(
        "[...document.querySelectorAll('#input')].map((n) => parseFloat(getComputedStyle(n).fontSize))"
    )
    assert min(sizes) >= 16  # smaller, and iOS zooms in on focus
    light = phone.evaluate("getComputedStyle(document.body).backgroundColor")
    phone.click("[data-action=theme]")
    assert phone.evaluate("getComputedStyle(document.body).backgroundColor") != light
    phone.click(".top [data-action=settings]")
    phone.select_option("#setting-language", "zh")
    assert phone.get_attribute("#input", "placeholder") == "\u8bf7\u8f93\u5165\u95ee\u9898"
    assert phone.get_attribute("html", "lang") == "zh"


@needs_browser
def test_names_and_contrast(page):
    """Every control has a name; text has the contrast that WCAG AA asks for, in both themes."""
    say(page, "code")
    finished(page, 1)
    page.click(".top [data-action=settings]")
    for theme in ("light", "dark"):
        page.select_option("#setting-theme", theme)
        page.wait_for_timeout(200)
        nameless, pale = page.evaluate(ACCESSIBILITY)
        assert nameless == [] and pale == []
    assert page.get_attribute("#messages", "role") == "log"


ACCESSIBILITY = """() => {
  const visible = (node) => node.checkVisibility() && node.getBoundingClientRect().width > 1;
  const named = (node) => node.getAttribute('aria-label') || node.textContent.trim() || node.labels?.length;
  const nameless = [...document.querySelectorAll('button, input, textarea, select')]
    .filter((node) => visible(node) && !named(node)).map((node) => node.outerHTML);
  const numbers = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3) return color;
    }
    return [255, 255, 255];
  };
  const pale = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !visible(node) || node.matches(':disabled, option')) continue;
    const [a, b] = [light(numbers(getComputedStyle(node).color)), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) pale.push(`${node.className} ${node.textContent.slice(0, 20)}`);
  }
  return [nameless, pale];
}"""

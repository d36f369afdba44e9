"""The page in a real browser over the real server; only the network's weights are a script."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from nanochat.serve.settings import Defaults, Settings
from tests.browsing import (
    DESKTOP,
    PHONE,
    choose,
    finished,
    messages,
    needs_browser,
    opened,
    say,
    settings,
    sidebar,
)  # fmt: skip
from tests.serving import Served, scripted_replica, served, wait_for

pytest.importorskip("playwright.sync_api")
pytestmark = needs_browser


def script(questions: list[str]) -> str:
    last = questions[-1]
    if "27 + 58" in last:
        return "27 + 58 = <|python_start|>27+58<|python_end|><|output_start|>85<|output_end|>85."
    if last == "What is my name?":
        return "Your name is " + questions[0].removeprefix("I am ") + "."
    if last == "code":
        return "Look:\n\n```python\nprint(1)  # one\n```\n\n1. *first*\n2. **second**\n\n| a | b |\n|--|--|\n| 1 | 2 |"
    if last == "long":
        return "word " * 150
    if last == "lines":
        return "line\n\n" * 60
    if last == "empty":
        return ""
    return f"Hello {last} \U0001f600"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    torch.set_num_threads(1)
    with served(
        lambda i: scripted_replica(script, context=4096),
        Settings(defaults=Defaults(temperature=0.0, max_tokens=4000)),
    ) as running:
        yield running


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


def test_stop_keeps_the_partial_answer_and_frees_the_server(page, server: Served):
    server.model.pause_s = 0.02
    say(page, "long")
    page.wait_for_function("() => document.querySelector('.assistant .answer').textContent.length > 20")
    page.press("#input", "Escape")
    text = finished(page, 1)
    assert text.startswith("word word") and len(text) < 700
    assert "stopped" in page.inner_text(".assistant .stats")
    wait_for(lambda: server.pool.workers[0].num_running == 0)


def test_regenerate_keeps_alternatives(page):
    say(page, "a")
    finished(page, 1)
    page.click(".assistant [aria-label=Regenerate]")
    page.wait_for_function("() => document.querySelector('.count')?.textContent === '2/2'")
    page.click("[aria-label='Previous answer']")
    assert page.inner_text(".count") == "1/2"
    page.reload()
    assert page.inner_text(".count") == "1/2"
    page.click("[aria-label='Next answer']")
    assert page.inner_text(".count") == "2/2"


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
    assert len(messages(page)) == 2


def test_a_new_conversation_during_streaming_stays_empty(page, server: Served):
    server.model.pause_s = 0.02
    say(page, "long")
    page.wait_for_function("() => document.querySelector('.assistant .answer')?.textContent.length > 4")
    page.keyboard.press("Control+Shift+KeyO")
    wait_for(lambda: server.pool.workers[0].num_running == 0)
    page.wait_for_timeout(100)
    assert messages(page) == []
    with sidebar(page):
        assert page.locator(".entry").count() == 1
        page.click(".entry")
    assert len(messages(page)) == 2 and page.inner_text(".assistant .answer").startswith("wo")


def test_enter_while_composing_does_not_send(one_page):
    page = one_page
    page.fill("#input", "ni")
    page.evaluate(
        """() => document.getElementById('input').dispatchEvent(
        new KeyboardEvent('keydown', { key: 'Enter', isComposing: true, bubbles: true, cancelable: true }))"""
    )
    assert messages(page) == [] and page.input_value("#input") == "ni"
    page.press("#input", "Enter")
    finished(page, 1)


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
    for line, answer in {
        "/temperature": "Temperature: 1.5", "/system be brief": "be brief", "/system off": "prompt: \u2013", "/seed random": "Seed: random",
        "/topp 7": "from 0.01 to 1", "/Help": "/maxtokens N", "/stats": "tok/s",
    }.items():  # fmt: skip
        say(page, line)
        assert answer in page.inner_text(".remark:last-of-type")
    with page.expect_download() as download:
        say(page, "/export")
    assert "**User**\n\n/odd" in download.value.path().read_text(encoding="utf-8")
    with page.expect_download() as download:
        say(page, "/export json")
    whole = json.loads(download.value.path().read_text(encoding="utf-8"))
    assert download.value.suggested_filename.endswith(".json") and whole["messages"][0]["content"] == "/odd"
    say(page, "/undo")
    page.wait_for_selector(".message", state="detached")
    say(page, "/new")
    with sidebar(page):
        assert page.locator(".entry").count() == 1


def test_settings_are_explained_sent_kept_and_reset(page):
    chosen = {"temperature": 1.2, "top_k": 7, "top_p": 0.5, "max_tokens": 9, "seed": 3}
    with settings(page):
        for name, value in chosen.items():
            assert len(page.inner_text(f"#setting-{name}-help")) > 20
            choose(page, name, str(value))
        choose(page, "system", "be brief")
    with page.expect_request("**/chat/completions") as sent:
        say(page, "a")
    body = sent.value.post_data_json
    assert {name: body[name] for name in chosen} == chosen
    assert body["system"] == "be brief"
    finished(page, 1)
    assert "cut off at the token limit" in page.inner_text(".assistant .stats")
    page.reload()
    page.wait_for_selector("#model:not(:empty)", state="attached")
    with settings(page):
        assert page.input_value("#setting-temperature") == "1.2"
        page.click(".reset")
        assert page.input_value("#setting-temperature") == "0"
        assert page.input_value("#setting-system") == "" and page.input_value("#setting-seed") == ""


def test_plain_text_and_an_empty_reply(page):
    say(page, "code")
    finished(page, 1)
    with settings(page):
        page.click("#setting-plain")
    assert "**second**" in page.inner_text(".answer") and page.locator(".answer pre").count() == 0
    say(page, "empty")
    assert finished(page, 2) == "(empty reply)"
    say(page, "still there")
    assert finished(page, 3).startswith("Hello still there")
    page.click(".user >> nth=2 >> [aria-label='Delete from here']")
    page.click("#dialog-ok")
    page.wait_for_function("() => document.querySelectorAll('.message').length === 4")


def test_reading_on_while_it_writes(page, server: Served):
    server.model.pause_s = 0.004
    say(page, "lines")
    page.wait_for_function("() => document.getElementById('scroller').scrollTop > 100")  # it follows the text
    page.evaluate("document.getElementById('scroller').scrollTop = 0")
    page.wait_for_selector("#jump", state="visible")
    server.model.pause_s = 0.0
    finished(page, 1)
    assert page.evaluate("document.getElementById('scroller').scrollTop") == 0
    page.click("#jump")
    page.wait_for_selector("#jump", state="hidden")


def test_markdown_and_code(page):
    say(page, "code")
    finished(page, 1)
    assert page.inner_text(".answer pre") == "print(1)  # one"
    assert page.locator(".hl-comment").inner_text() == "# one"
    assert page.locator(".answer ol li").count() == 2
    assert page.inner_text(".answer em") == "first" and page.inner_text(".answer strong") == "second"
    assert page.locator(".answer td").all_inner_texts() == ["1", "2"]


def test_copying_speed_and_context(page):
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
    assert page.inner_text("#context").endswith("/4096")


def test_streamed_markdown_equals_markdown_at_once(one_page):
    same = one_page.evaluate(
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


def test_long_hostile_text_stays_fast(one_page):
    seconds = one_page.evaluate(
        """async () => {
        const { MarkdownView } = await import('/static/markdown.js');
        const begun = performance.now();
        for (const piece of ['*a ', '[', '`', '**_~~', '> ', '- ', '|-', '\\\\', 'a'])
          new MarkdownView({ copyCode: 'c' }, () => '').update(piece.repeat(1000000 / piece.length));
        return (performance.now() - begun) / 1000;
    }"""
    )
    assert seconds < 15


def test_token_probabilities(page):
    say(page, "a")
    finished(page, 1)
    assert page.locator(".token").count() == 0
    page.click(".assistant [aria-label='Token probabilities']")
    page.hover(".token >> nth=0")
    rivals = page.locator("#popover .rival").all_inner_texts()
    assert rivals[0].split() == ["H", "73", "%"] and rivals[1].split() == ["I", "27", "%"]
    assert page.inner_text(".tokens") == "Hello a \U0001f600"
    page.click(".token >> nth=0")  # also a finger's way
    page.keyboard.press("ArrowRight")
    assert page.locator("#popover .chosen code").inner_text() == "e"
    assert page.get_attribute(".token:focus", "aria-label") == "e, 73 %"
    page.keyboard.press("Escape")
    page.wait_for_selector("#popover", state="hidden")
    page.click("[aria-label='Token probabilities'][aria-pressed=true]")
    assert page.locator(".token").count() == 0
    with settings(page):
        page.click("#setting-probabilities")
    say(page, "What is 27 + 58?")
    finished(page, 2)
    page.locator(".forced >> nth=0").hover()
    assert page.inner_text("#popover") == "not sampled"


def test_conversations_are_kept_named_searched_and_moved(page, tmp_path):
    for text in ("apples", "pears"):
        with sidebar(page):
            page.click("[data-action=new]")
        say(page, text)
        finished(page, 1)
    page.reload()
    saved = tmp_path / "all.json"
    with sidebar(page):
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
        download.value.save_as(saved)
        page.hover(".conversations li")
        page.click(".conversations li >> nth=0 >> [aria-label='Delete conversation']")
        page.click("#dialog-ok")
        page.wait_for_function("() => document.querySelectorAll('.entry').length === 1")
        page.set_input_files("#import-file", saved)
        page.wait_for_function("() => document.querySelectorAll('.entry').length === 3")
        page.set_input_files(
            "#import-file", {"name": "x.json", "mimeType": "application/json", "buffer": b"[]x"}
        )
        page.wait_for_function(
            "() => document.querySelector('.remark:last-of-type').textContent.includes('no conversations')"
        )


def test_an_import_drops_nothing_without_a_word(one_page):
    page = one_page

    def talk(title: str, text: str = "x", updated: int = 1) -> dict:
        told = [{"id": "m", "role": "user", "content": text}]
        return {"id": title, "title": title, "created": 1, "updated": updated, "messages": told}

    def load(*entries: object) -> str:
        file = {"name": "all.json", "mimeType": "application/json", "buffer": json.dumps(entries).encode()}
        before = page.locator(".remark").count()
        page.set_input_files("#import-file", file)
        page.wait_for_function("n => document.querySelectorAll('.remark').length > n", arg=before)
        return page.inner_text(".remark:last-of-type")

    page.evaluate(
        "all => all.forEach((one) => localStorage.setItem(`nanochat.conversation.${one.id}`, JSON.stringify(one)))",
        [talk(f"own {i}", updated=int(i > 0)) for i in range(198)],
    )
    page.reload()
    large = talk("large", "x" * 2_000_001, 9)
    report = load(*[talk(f"new {i}", updated=i) for i in range(10)], large, {"no": "conversation"})
    assert report.splitlines() == [
        "2 conversations imported.",
        "1 not imported, too long to be kept: \u201clarge\u201d",
        "8 not imported, as at most 200 are kept (delete some and import again): "
        + ", ".join(f"\u201cnew {i}\u201d" for i in range(7, 2, -1)) + " \u2026",
        "1 entry of the file is no conversation.",
    ]  # fmt: skip
    page.reload()
    kept = page.locator(".entry").all_inner_texts()
    assert set(kept) == {f"own {i}" for i in range(198)} | {"new 9", "new 8"} and len(kept) == 200
    page.fill("#input", "one more")
    page.click("#send")
    finished(page, 1)
    assert "\u201cown 0\u201d, the oldest, was deleted" in page.inner_text(".remark")
    kept = page.locator(".entry").all_inner_texts()
    assert len(kept) == 200 and "one more" in kept and "own 0" not in kept
    page.evaluate("localStorage.clear(), localStorage.setItem('filler', 'x'.repeat(5242870))")
    page.reload()
    assert "as the browser has no room for more" in load(talk("new")) and page.locator(".entry").count() == 0
    assert load({"no": "conversation"}) == "This file holds no conversations."


def test_themes_and_languages(page):
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    before = ground()
    page.click("[data-action=theme]")
    changed = ground()
    assert changed != before
    with settings(page):
        page.select_option("#setting-language", "zh")
    page.reload()
    assert page.get_attribute("#input", "placeholder") == "\u8bf7\u8f93\u5165\u95ee\u9898"
    assert page.get_attribute("html", "lang") == "zh" and ground() == changed


def test_a_phone_has_a_drawer_and_does_not_zoom(browser, server: Served):
    with opened(browser, server, PHONE, has_touch=True, is_mobile=True) as phone:
        assert not phone.is_visible("#sidebar")
        with sidebar(phone):
            phone.wait_for_selector("#sidebar", state="visible")
        size = phone.evaluate("parseFloat(getComputedStyle(document.getElementById('input')).fontSize)")
        assert size >= 16  # smaller, and iOS zooms in on focus
        phone.fill("#input", "a")
        phone.tap("#send")
        finished(phone, 1)
        phone.tap(".assistant [aria-label='Token probabilities']")
        phone.tap(".token >> nth=0")
        phone.wait_for_selector("#popover", state="visible")


def test_a_browser_set_to_chinese_gets_chinese(browser, server: Served):
    with opened(browser, server, DESKTOP, locale="zh-CN") as page:
        assert page.inner_text(".new span") == "\u65b0\u5bf9\u8bdd"

"""The report as one HTML file: everything inside, nothing of a model's text as markup, readable in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from nanochat.common import read_json
from nanochat.report import Report
from nanochat.report_html import html_table, score_cell

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = 'sample <script>alert("x")</script>\n</pre><h1>Injected</h1>'


_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Outline(HTMLParser):
    """Tags and the text outside of style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture
def page(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base_checkpoints" / "d4"
    report = Report(tmp_path / "report")
    report.reset()
    folder.mkdir(parents=True)
    events = [{"step": s, "train/loss": 8.0 - s / 10, "val/bpb": 2 - s / 50} for s in range(20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    core = {"CORE metric": 0.2219, "CORE 95% low": 0.2, "CORE 95% high": 0.24, "sample 0": HOSTILE}
    report.log("Base model evaluation", [core])
    picture = tmp_path / "report" / "report_files" / "tokenizer.png"
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(_PNG)
    table = "### Compression\n\n| Text | Ratio |\n|---|---|\n| <b>news | 2.39 |\n\nno comparison"
    report.log("Tokenizer evaluation", [table, "![Bytes per token](report_files/tokenizer.png)\n\n", HOSTILE])
    report.log("Chat evaluation sft", [{"MMLU": 0.45, "MMLU problems": 400, "GSM8K": 0.1}])
    report.generate()
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_is_one_well_formed_file_that_loads_nothing(page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.tags.count("img") == 4 and outline.tags.count("h1") == 1
    assert "script" not in outline.tags and "link" not in outline.tags
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)


def test_what_a_model_wrote_is_text(page):
    outline = Outline()
    outline.feed(page)
    assert HOSTILE in outline.text


def test_the_markdown_of_a_section_is_shown_as_what_it_means(page):
    assert "<h3>Compression</h3>" in page and "<th>Ratio</th>" in page
    assert "<td>&lt;b&gt;news</td><td>2.39</td>" in page and "<p>no comparison</p>" in page
    assert '<img alt="Bytes per token" src="data:image/png;base64,' in page
    assert "report_files/tokenizer.png" not in page


def test_scores_have_intervals_and_chance(page, tmp_path):
    summary = read_json(tmp_path / "report" / "report.json")["summary"]
    assert summary["intervals"]["CORE"] == {"base": [0.2, 0.24]}
    low, high = summary["intervals"]["MMLU"]["sft"]
    assert low == pytest.approx(0.402, abs=1e-3) and high == pytest.approx(0.499, abs=1e-3)
    assert "GSM8K" not in summary["intervals"]  # nobody said how many problems
    assert "45.0%<br><small>40.2% to 49.9%</small>" in page
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "0.4500 [0.402, 0.499]" in markdown and "0.2219 [0.200, 0.240]" in markdown
    assert re.search(r"\| MMLU +\| 45.0% \| 40.2% to 49.9% \| +25% \|", markdown)
    assert re.search(r"\| GSM8K +\| 10.0% \| +- \| +0% \|", markdown)


def test_the_bar_goes_from_guessing_to_perfect():
    widths = [
        re.findall(r"width:(\d+)%", score_cell("MMLU", value, None)) for value in (0.1, 0.25, 0.625, 1.0)
    ]
    assert widths == [["0"], ["0"], ["50"], ["100"]]
    assert score_cell("val bpb", 0.75, None) == "0.7500" and score_cell("MMLU", None, None) == "-"


def test_column_names_are_text():
    assert "&lt;b&gt;" in html_table(["<b>"], [["x"]])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; apt-get install chromium")
def test_chromium_shows_every_plot(page, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1000, "height": 900})
        tab.goto((tmp_path / "report.html").as_uri())
        widths = tab.evaluate("[...document.images].map(i => i.complete ? i.naturalWidth : 0)")
        fits = tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.close()
    assert sorted(widths)[0] == 1 and len(widths) == 4 and sorted(widths)[1] > 1000
    assert fits, "the page scrolls sideways"

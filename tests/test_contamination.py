"""Overlap with training text: equal to a slow search over words, first sightings, boilerplate, the command."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.contamination import Index, Sighting, TestSet, WordHashes, judge, ngram_hashes, scan
from nanochat.tinyworld import generate
from scripts import contamination as script

WORDS = [f"word{i}" for i in range(400)]


def shard(path: Path, texts: list[str], rows_per_group: int = 7) -> Path:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows_per_group)
    return path


def sentence(rng: random.Random, length: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def grams_of(text: str, n: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


@pytest.mark.parametrize("workers", [1, 2])
def test_equals_a_slow_search_over_words(tmp_path, workers):
    rng = random.Random(0)
    examples = [[sentence(rng, rng.randint(3, 30)), sentence(rng, 12)] for _ in range(60)]
    texts = [sentence(rng, 80) for _ in range(50)]
    for number in range(0, 60, 3):  # copies of parts, in other letters and with other marks
        words = " ".join(examples[number]).split()
        start = rng.randrange(len(words))
        copied = ", ".join(words[start : start + rng.randint(5, 25)]).upper()
        place = rng.randrange(50)
        texts[place] = f"{texts[place]}\n{copied}!"
    paths = [shard(tmp_path / f"{i}.parquet", texts[i::2]) for i in range(2)]
    sets = [TestSet("x", examples)]
    index = Index.build(sets, 6)
    (report,), overlaps = judge(sets, index, scan(paths, index, workers))
    training = {gram for text in texts for gram in grams_of(text, 6)}
    expected = {}
    for number, parts in enumerate(examples):
        grams = {gram for part in parts for gram in grams_of(part, 6)}
        if grams & training:
            expected[number] = len(grams & training) / len(grams)
    assert {o.example: o.share for o in overlaps} == pytest.approx(expected)
    assert 5 < report.num_touched == len(expected) < 30
    assert report.num_dirty == sum(share >= 0.5 for share in expected.values()) > 0
    assert [o.share for o in overlaps] == sorted(expected.values(), reverse=True)


def test_the_first_sighting_names_shard_and_row(tmp_path):
    secret = " ".join(WORDS[:13])
    paths = [
        shard(tmp_path / "a.parquet", ["nothing"] * 20),
        shard(tmp_path / "b.parquet", [*["nothing"] * 16, f"so {secret} it is", secret]),
    ]
    sets = [TestSet("x", [["other words"], [secret]])]
    index = Index.build(sets, 13)
    (report,), (overlap,) = judge(sets, index, scan(paths, index, 1))
    assert (overlap.example, overlap.share, overlap.seen_in) == (1, 1.0, Sighting("b.parquet", 16))
    assert (report.num_short, report.num_touched, report.num_dirty) == (1, 1, 1)


def test_boilerplate_of_a_set_is_ignored(tmp_path):
    frame = " ".join(WORDS[:8])
    sets = [TestSet("x", [[f"{frame} {WORDS[20 + i]}"] for i in range(11)]), TestSet("y", [[frame]])]
    index = Index.build(sets, 8)
    path = shard(tmp_path / "a.parquet", [frame])
    (framed, alone), _ = judge(sets, index, scan([path], index, 1))
    assert framed.num_touched == 0 and alone.num_touched == 1


def test_no_gram_goes_from_one_text_to_the_next():
    index = Index.build([TestSet("x", [["a b c", "d e f"]])], 4)
    assert len(index.grams) == 0 and index.find(WordHashes()("a b c d e f")).size == 0


def test_hashes_are_the_same_in_every_process():
    words = WordHashes()("The cat, the CAT")
    assert words[0] == words[2] == 3331141520948189790 and words[1] == words[3]
    assert ngram_hashes(words, 2).dtype == np.uint64 and len(ngram_hashes(words, 5)) == 0


@pytest.mark.parametrize("flag", ["--n=1", "--max-shards=0", "--max-examples=0", "--workers=-1", "--show=-1"])
def test_flags_that_leave_nothing_to_do_are_refused(flag):
    with pytest.raises(UserError, match="must be at least"):
        parse(script.Config, [flag])


def test_questions_are_taken_out_of_our_rendering():
    from tasks.common import MultipleChoice

    conversation = MultipleChoice.conversation("What\n- is it?", "AB", ["x=1", "y z"], "B")
    assert script.conversation_texts(conversation)[-2:] == ["x=1", "y z"]
    conversation = MultipleChoice.conversation("What is it?", "AB", ["x=1", "y z"], "B")
    assert script.conversation_texts(conversation) == ["What is it?", "x=1", "y z"]
    items = {"query": "q", "choices": ["a", "b"], "gold": 1}
    assert script.item_texts(items, "multiple_choice") == ["q b"]


def test_the_command_finds_a_planted_question(tmp_path, monkeypatch, capsys):
    from tasks.gsm8k import GSM8K

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    generate(tmp_path / "tinyworld", 0, 60_000)
    folder = tmp_path / "tinyworld" / "base_data"
    (question, _) = script.conversation_texts(GSM8K("main", "test")[3])
    shard(folder / "0_planted.parquet", ["unrelated", question])
    script.main(script.Config(sets="GSM8K", max_examples=20, workers=1, n=8))
    out = capsys.readouterr().out
    assert re.search(r"GSM8K example 3: \d+% seen, first in 0_planted.parquet row 1", out), out
    record = json.loads((tmp_path / "contamination.json").read_text())
    assert record["sets"][0]["num_examples"] == 20 and record["n"] == 8
    assert any(o["example"] == 3 for o in record["overlaps"])
    assert (tmp_path / "report" / "contamination.md").exists()
    with pytest.raises(UserError, match="unknown nonsense; there are tasks, core, ARC-Easy"):
        script.main(script.Config(sets="nonsense"))

"""TinyWorld as text: the same bytes from the same seed, few words, consistent facts, no damage."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from nanochat.tinyworld import facts as facts_module
from nanochat.tinyworld import generate, is_generated, sizes
from nanochat.tinyworld.documents import Authors, build_authors, documents
from nanochat.tinyworld.facts import build_facts
from nanochat.tinyworld.rng import Rng, held_out
from nanochat.tinyworld.shards import write_shards
from nanochat.tinyworld.spelling import TEST_WORDS_EVERY, made_up_word, spelled
from nanochat.tinyworld.world import build_world

CHARS = 300_000
SEEDS = (0, 1, 7)
MAX_WORD_TYPES = 1200  # nearly every word gets a token of its own in a vocabulary of 2,048


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tinyworld"
    generate(folder, seed=0, chars=CHARS)
    return folder


@pytest.fixture(scope="module")
def authors() -> Authors:
    return build_authors(0)


def texts(root: Path, validation: bool) -> list[str]:
    files = sorted((root / "base_data").glob("*.parquet"))
    chosen = files[-1:] if validation else files[:-1]
    return [text for file in chosen for text in pq.read_table(file)["text"].to_pylist()]


# --- chance ------------------------------------------------------------------------------------------


def test_chance_is_the_same_everywhere():
    rng = Rng(5, "golden")
    drawn = [rng.below(100), rng.between(10, 20), rng.pick("abcdef"), rng.sample(range(10), 4)]
    assert drawn == GOLDEN_DRAWS
    assert [held_out(f"key {i}") for i in range(30)].count(True) == GOLDEN_HELD_OUT


def test_streams_differ_by_seed_and_name():
    draws = {tuple(Rng(seed, name).below(1000) for _ in range(1)) for seed in range(5) for name in "abc"}
    assert len(draws) > 10


def test_sample_takes_different_positions_uniformly():
    rng = Rng(0, "sample")
    counts = Counter(tuple(sorted(rng.sample(range(4), 2))) for _ in range(6000))
    assert len(counts) == 6 and min(counts.values()) > 850


# --- determinism and size ----------------------------------------------------------------------------


def test_same_seed_same_bytes(root: Path, tmp_path: Path):
    code = f"from pathlib import Path; from nanochat.tinyworld import generate; generate(Path({str(tmp_path)!r}), 0, {CHARS})"
    # another process with another hash seed: no order of a set or a dict may reach the data
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "77", "PYTHONPATH": "."})
    ours = {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    theirs = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert ours == theirs


def test_a_larger_world_has_the_same_facts_and_rows(root: Path, tmp_path: Path):
    generate(tmp_path, seed=0, chars=2 * CHARS)
    for path in (root / "task_data").rglob("*.parquet"):
        assert (tmp_path / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_another_seed_is_another_world_of_the_same_size():
    worlds = [build_world(seed) for seed in SEEDS]
    assert len({world.people for world in worlds}) == len(SEEDS)
    sizes_of = {
        (len(build_facts(w)), sum(f.two_hop for f in build_facts(w)), len({f.topic for f in build_facts(w)}))
        for w in worlds
    }
    assert len(sizes_of) == 1


def test_shards_have_the_promised_shape(root: Path):
    record = json.loads((root / "tinyworld.json").read_text())
    training, validation = texts(root, False), texts(root, True)
    assert CHARS <= sum(map(len, training)) == record["text"]["train_chars"] < CHARS + 5000
    assert len(validation) == record["text"]["validation_documents"] >= sizes.SMALLEST_VALIDATION_DOCUMENTS
    for file in (root / "base_data").glob("*.parquet"):
        meta = pq.ParquetFile(file).metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        assert all(group.num_rows == sizes.ROW_GROUP_DOCUMENTS for group in groups[:-1])
        assert groups[0].column(0).compression == "ZSTD"


def test_text_comes_in_several_shards(authors: Authors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "SHARD_CHARS", 30_000)
    write_shards(tmp_path / "base_data", documents(authors), chars=90_000)
    names = sorted(path.name for path in (tmp_path / "base_data").iterdir())
    assert names == [f"shard_{i:05d}.parquet" for i in range(4)]
    assert sum(map(len, texts(tmp_path, False))) >= 90_000


def test_shares_of_the_mixture_hold(authors: Authors):
    assert sum(share for _, share in sizes.MIXTURE) == pytest.approx(1)
    sample = list(islice(documents(authors), 8000))
    total = sum(map(len, sample))
    quick = sum(len(text) for text in sample if re.match(r".*\?\n \w", text))
    programs_ = sum(len(text) for text in sample if text.startswith('"""'))
    shares = dict(sizes.MIXTURE)
    assert quick / total == pytest.approx(shares["quick questions"], abs=0.02)
    assert programs_ / total == pytest.approx(shares["programs"], abs=0.02)


def test_fast_enough(authors: Authors):
    start = time.process_time()
    chars = sum(map(len, islice(documents(authors), 5000)))
    # the requirement is 5 MB/s; a busy machine gets some slack
    assert chars / (time.process_time() - start) > 2.5e6


@pytest.mark.parametrize("seed", SEEDS)
def test_few_words(seed: int):
    authors = build_authors(seed)
    seen = [text for text in islice(documents(authors), 12_000) if not re.search(r"\w:\w,\w|\d:\w", text)]
    rng = Rng(seed, "words")
    for _ in range(4000):
        seen += [message["content"] for message in authors.small_talker.conversation(rng)]
    types = {word.lower() for text in seen for word in re.findall("[A-Za-z]+", text)}
    assert len(types) < MAX_WORD_TYPES


def test_documents_are_ascii_and_tidy(authors: Authors):
    for text in islice(documents(authors), 4000):
        assert text.isascii() and text == text.strip("\n"), text
        assert "{" not in text and "  " not in text.replace("    ", "") and " \n" not in text, text


# --- facts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_ties_are_mutual_and_distinct(seed: int):
    world = build_world(seed)
    for person in world.people:
        friend, sibling = world.person(person.friend), world.person(person.sibling)
        assert friend.friend == person.name and sibling.sibling == person.name
        assert len({person.name, friend.name, sibling.name}) == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_a_question_has_one_answer(seed: int):
    answers: dict[str, str] = {}
    for fact in build_facts(build_world(seed)):
        assert fact.answer not in fact.wrong and len(set(fact.wrong)) >= 3
        assert len(fact.questions) >= 2
        for question in (*fact.questions, *fact.test_questions):
            assert question.endswith("?") and answers.setdefault(question, fact.answer) == fact.answer


@pytest.mark.parametrize("seed", SEEDS)
def test_statements_name_their_answer(seed: int):
    for fact in build_facts(build_world(seed)):
        for sentence in (*fact.statements, *fact.short_statements):
            assert fact.answer.lower() in sentence.lower() and sentence.endswith(".")


def test_no_wrong_choice_is_right(authors: Authors):
    """For every fact whose question another fact's choices could answer, only one choice is stated anywhere."""
    stated = {sentence for fact in authors.book.facts for sentence in fact.statements}
    for fact in authors.book.facts:
        sentence = fact.statements[0]
        for wrong in fact.wrong:
            head, found, tail = sentence.rpartition(fact.answer)
            assert not found or head + wrong + tail not in stated


# --- words -------------------------------------------------------------------------------------------


def test_made_up_words_fall_on_one_side():
    rng = Rng(0, "made up")
    for test in (False, True):
        words = {made_up_word(rng, test) for _ in range(500)}
        assert len(words) > 480 and all(3 <= len(word) <= 9 and word.isalpha() for word in words)
        assert all(held_out(word, TEST_WORDS_EVERY) == test for word in words)


def test_spelling_format():
    assert spelled("cat") == "cat:c,a,t"


# --- command line and errors -------------------------------------------------------------------------


def test_regenerating_replaces_the_old_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for splits in (sizes.ARC_EASY, sizes.ARC_CHALLENGE, sizes.MMLU, sizes.GSM8K, sizes.SMOLTALK):
        for split in splits:
            monkeypatch.setitem(splits, split, 20)
    generate(tmp_path, seed=1, chars=20_000)
    stale = tmp_path / "base_data" / "shard_00009.parquet"
    stale.write_bytes(b"old")
    assert is_generated(tmp_path, 1, 20_000) and not is_generated(tmp_path, 0, 20_000)
    generate(tmp_path, seed=0, chars=20_000)
    assert is_generated(tmp_path, 0, 20_000) and not stale.exists()
    (tmp_path / "base_data" / "shard_00000.parquet").unlink()
    assert not is_generated(tmp_path, 0, 20_000)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"chars": 10}])
def test_impossible_worlds_are_refused(tmp_path: Path, wrong: dict[str, int]):
    with pytest.raises(UserError, match="--"):
        generate(tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_pronouns_wait_until_the_name_is_clear(authors: Authors):
    facts = authors.book.by_entity[authors.world.people[0].name]
    job = next(fact for fact in facts if fact.relation == "job")
    sibling = next(fact for fact in facts if fact.relation == "sibling")
    assert facts_module.pronoun_fits(job, sibling)
    assert not facts_module.pronoun_fits(sibling, job) and not facts_module.pronoun_fits(None, job)


GOLDEN_DRAWS = [28, 14, "c", [6, 7, 2, 5]]
GOLDEN_HELD_OUT = 4


def test_a_folder_that_cannot_be_is_one_clear_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write TinyWorld below"):
        generate(tmp_path / "file" / "world")

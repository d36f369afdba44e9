"""The tasks of TinyWorld: tests apart from training, true answers, and rows that load as the tasks expect."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from nanochat.calculator import use_calculator
from nanochat.tinyworld import generate, lexicon, programs, sizes, sums
from nanochat.tinyworld.documents import Authors, build_authors
from nanochat.tinyworld.function_families import FAMILIES, Family
from nanochat.tinyworld.quiz import CLOSING, LETTERS
from nanochat.tinyworld.rng import Rng, held_out
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk

CHARS = 600_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tinyworld"
    generate(folder, seed=0, chars=CHARS)
    return folder


@pytest.fixture(scope="module")
def authors() -> Authors:
    return build_authors(0)


@pytest.fixture
def tinyworld(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(root.parent))
    return root


def rows(root: Path, repo: str, subset: str, split: str) -> list[dict]:
    folder = root / "task_data" / repo / subset / split
    assert json.loads((folder / "manifest.json").read_text()) == ["00000.parquet"]
    return pq.read_table(folder / "00000.parquet").to_pylist()


def texts(root: Path, validation: bool) -> list[str]:
    files = sorted((root / "base_data").glob("*.parquet"))
    chosen = files[-1:] if validation else files[:-1]
    return [text for file in chosen for text in pq.read_table(file)["text"].to_pylist()]


# --- tests apart from training -----------------------------------------------------------------------


def test_test_questions_are_asked_nowhere_else(root: Path, authors: Authors):
    secret = {question for fact in authors.book.facts for question in fact.test_questions}
    open_ = {question for fact in authors.book.facts for question in fact.questions}
    assert len(secret) > 250 and not secret & open_
    asked = [text for text in texts(root, False) + texts(root, True)]
    asked += [m["content"] for row in talk_rows(root, "train") for m in row["messages"]]
    for text in asked:
        for question in re.findall(r"[A-Z][^.?!\n\":]*\?", text):
            assert question not in secret
    for repo, subset, splits in EXAMS:
        for split in splits:
            questions = {row["question"] for row in rows(root, repo, subset, split)}
            assert questions <= secret if split == "test" else not questions & secret


EXAMS = (
    ("allenai--ai2_arc", "ARC-Easy", ("train", "validation", "test")),
    ("allenai--ai2_arc", "ARC-Challenge", ("train", "validation", "test")),
    ("cais--mmlu", "all", ("auxiliary_train", "validation", "dev", "test")),
)


def talk_rows(root: Path, split: str) -> list[dict]:
    return rows(root, "HuggingFaceTB--smol-smoltalk", "default", split)


def test_core_questions_are_held_out(root: Path, authors: Authors):
    secret = {question for fact in authors.book.facts for question in fact.test_questions}
    items = (root / "eval_bundle/eval_data/world_knowledge/questions.jsonl").read_text().splitlines()
    assert {json.loads(item)["query"].removeprefix("Question: ") for item in items} <= secret


def test_word_problems_are_apart_by_their_numbers(root: Path):
    def first_numbers(split: str) -> set[tuple[str, str]]:
        found = (
            re.search(r"<<(\d+)[+*-](\d+)=", row["answer"])
            for row in rows(root, "openai--gsm8k", "main", split)
        )
        return {(match[1], match[2]) for match in found if match}

    training, test = first_numbers("train"), first_numbers("test")
    # subtraction from a sum of coins comes second, so the first step always holds the drawn pair or its product
    assert len(training) > 1000 and len(test) > 100 and not training & test


def test_texts_never_add_numbers_of_the_tests(root: Path):
    for text in texts(root, False):
        for page in re.findall(r"Answer: [^\n]*?(\d+) [+*-] (\d+) = ", text):
            assert not held_out(" ".join(page))


def test_programs_are_apart(root: Path):
    prompts = {row["prompt"] for row in rows(root, "openai--openai_humaneval", "openai_humaneval", "test")}
    heads = {prompt.split("\n\n")[0] for prompt in prompts}
    talked = {row["messages"][0]["content"] for row in talk_rows(root, "train")}
    assert not prompts & talked and not heads & {text.split("\n\n")[0] for text in talked}
    written = "\n".join(texts(root, False) + texts(root, True))
    assert not [head for head in heads if head in written]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.names[0])
def test_every_family_of_programs_has_both_sides(family: Family):
    variants = [str(k) for k in family.constants] or [
        f"{name} {parameter} {summary.format(p=parameter)}"
        for name in family.names
        for parameter in family.parameters
        for summary in family.summaries
    ]
    keys = [f"{family.body} {k}" if family.constants else k for k in variants]
    sides = Counter(held_out(key, programs.TEST_VARIANTS_EVERY) for key in keys)
    assert sides[True] >= 1 and sides[False] >= 2


def test_small_talk_is_apart(root: Path):
    def said(split: str) -> set[str]:
        return {"\n".join(m["content"] for m in row["messages"][::2]) for row in talk_rows(root, split)}

    assert len(said("train")) == sizes.SMOLTALK["train"] and not said("train") & said("test")


def test_spelled_words_are_apart(root: Path):
    training = (root / "words_alpha.txt").read_text().split()
    test = (root / "words_alpha_test.txt").read_text().split()
    assert training == sorted(set(training)) and len(training) == sizes.TRAIN_WORDS
    assert test == sorted(set(test)) and len(test) == sizes.TEST_WORDS
    spelled_out = {word for text in texts(root, False) for word in re.findall(r"\b([a-z]+):[a-z],", text)}
    assert len(spelled_out) > 200 and not set(test) & (set(training) | spelled_out)


def test_validation_documents_are_apart(root: Path):
    assert not set(texts(root, False)) & set(texts(root, True))


# --- true answers ------------------------------------------------------------------------------------


def test_choices_are_right_and_evenly_placed(root: Path, authors: Authors):
    answer = {q: f.answer for f in authors.book.facts for q in (*f.questions, *f.test_questions)}
    positions: Counter[int] = Counter()
    for row in rows(root, "cais--mmlu", "all", "auxiliary_train"):
        assert row["choices"][row["answer"]] == answer[row["question"]] and len(set(row["choices"])) == 4
        positions[row["answer"]] += 1
    for row in rows(root, "allenai--ai2_arc", "ARC-Easy", "test"):
        chosen = row["choices"]["text"][row["choices"]["label"].index(row["answerKey"])]
        assert chosen == answer[row["question"]] and row["choices"]["label"] == list(LETTERS)
    assert max(positions.values()) / sum(positions.values()) < 0.28


def test_lessons_are_right(root: Path, authors: Authors):
    """Every letter stands behind the answer, and every answer is one."""
    answers = {question: fact.answer for fact in authors.book.facts for question in fact.questions}
    kinds: Counter[str] = Counter()
    for lesson in sizes.LESSONS:
        for line in (root / f"{lesson}_lesson.jsonl").read_text().splitlines()[:400]:
            messages = json.loads(line)
            letters: dict[str, str] = {}
            for asked, said in zip(messages[::2], messages[1::2], strict=True):
                question = next(text for text in asked["content"].split("\n") if text.endswith("?"))
                question = question.removeprefix("Multiple Choice question: ")
                listed = dict(re.findall(r"- (.*)=([A-D])", asked["content"]))
                letters = listed or letters  # the second question is about the choices of the first
                named = re.fullmatch(r"Which one is (.*)\?", question)
                answer = named[1] if named else answers[question]
                exam = asked["content"].startswith("Multiple")
                letter_wanted = CLOSING in asked["content"] if exam else bool(letters)
                assert said["content"] == (letters[answer] if letter_wanted else f" {answer}")
                assert list(listed.values()) == sorted(set(listed.values())) or not exam
                assert len(listed) >= 2 or not exam or not letter_wanted
                kinds[f"{lesson} {'named' if named else 'asked'}{' exam' * exam}"] += 1
    assert len(kinds) == 12 and min(kinds.values()) > 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_calculations_are_right(root: Path, split: str):
    for row in rows(root, "openai--gsm8k", "main", split):
        marks = re.findall(r"(\S+ \S+ \S+) = <<([^=>]+)=([^>]+)>>(\S+)", row["answer"])
        assert marks and "." not in row["answer"].split("####")[1]
        for shown, expression, result, repeated in marks:
            assert shown.replace(" ", "") == expression
            assert str(use_calculator(expression)) == result == repeated.rstrip(".")
        assert row["answer"].endswith(f"\n#### {marks[-1][2]}")
        numbers = set(re.findall(r"\d+", row["question"]))
        assert set(re.findall(r"\d+", marks[0][0])) <= numbers


def test_word_problems_take_one_to_three_steps(root: Path):
    steps = Counter(row["answer"].count("<<") for row in rows(root, "openai--gsm8k", "main", "test"))
    assert set(steps) == {1, 2, 3} and min(steps.values()) > 20
    assert not [row for row in rows(root, "openai--gsm8k", "main", "test") if "How m" not in row["question"]]


def test_families_use_all_their_numbers():
    for family in sums.FAMILIES:
        used = {step[i] for _, step, _ in family.steps for i in (0, 2)}
        names = {name for name, _ in family.numbers}
        assert names <= used
        for question in family.questions:
            assert names == set(re.findall(r"\{([a-d])\}", question))


def test_canonical_solutions_pass_and_wrong_ones_fail(root: Path):
    problems = rows(root, "openai--openai_humaneval", "openai_humaneval", "test")
    assert len({row["prompt"] for row in problems}) == sizes.HUMANEVAL["test"]
    for row in problems:
        scope: dict = {}
        exec(row["prompt"] + row["canonical_solution"] + row["test"], scope)
        scope["check"](scope[row["entry_point"]])
        with pytest.raises(AssertionError):
            scope["check"](lambda *_: "wrong")


def test_docstring_examples_are_true(authors: Authors):
    rng = Rng(0, "docstrings")
    for _ in range(300):
        function = authors.programmer.function(rng)
        scope: dict = {}
        exec(function.source, scope)
        for call, result in re.findall(r">>> (.*)\n    (.*)\n", function.prompt):
            assert eval(call, scope) == eval(result), function.prompt


def test_counted_letters_are_right(authors: Authors):
    rng = Rng(0, "spelling test")
    for _ in range(300):
        page = authors.speller.counted(rng)
        word, letters = re.findall(r"\n(\w+):(\S+)\n", page)[0]
        assert letters == ",".join(word)
        numbered = re.findall(r"^(\d+):(\w)", page, re.M)
        assert "".join(char for _, char in numbered) == word
        hits = re.findall(r":(\w) hit! count=(\d+)", page)
        count = int(re.findall(r"This gives us (\d+)\.", page)[0])
        assert len(hits) == count == (word.count(hits[0][0]) if hits else 0)


def test_riddles_keep_track(authors: Authors):
    rng = Rng(0, "riddles")
    for _ in range(300):
        *story, who, where_thing, where_person = authors.teller.passing_on(rng)
        where: dict[str, str] = {}
        holder = ""
        for sentence in story:
            words = sentence.rstrip(".").removeprefix("Then ").removeprefix("Now ").split()
            if words[1] in ("is", "goes", "walks"):
                where[words[0]] = words[-1]
            elif words[1] == "has":
                holder = words[0]
            else:
                giver, taker = (words[0], words[-1]) if words[1] == "gives" else (words[-1], words[0])
                assert giver == holder and where[giver] == where[taker]
                holder = taker
        assert f" now? {holder} has it." in who
        assert where_thing.endswith(f" It is in the {where[holder]}.")
        asked = where_person.split()[2].rstrip("?")
        assert where_person.endswith(f"? {asked} is in the {where[asked]}.")


def test_stories_agree_with_the_world(authors: Authors):
    people = {person.name: person for person in authors.world.people}
    rng = Rng(0, "stories")
    for _ in range(200):
        story = authors.teller.story(rng)
        assert 80 <= len(story.split()) <= 400
        for name, job in re.findall(r"([A-Z][a-z]+) the ([a-z]+)\b", story):
            if name in people and job in lexicon.JOBS:
                assert people[name].job == job
        for name, food in re.findall(r"([A-Z][a-z]+) (?:ate|loves) ([a-z]+)", story):
            assert people[name].food == food


def test_small_talk_answers_from_the_world(authors: Authors):
    answer = {q: f.statements[0] for f in authors.book.facts for q in f.questions}
    rng = Rng(0, "talk")
    checked = 0
    for _ in range(2000):
        messages = authors.small_talker.conversation(rng)
        for user, assistant in zip(messages[::2], messages[1::2], strict=True):
            if user["content"] in answer:
                assert assistant["content"] == answer[user["content"]]
                checked += 1
    assert checked > 500


def test_memory_is_answered_from_the_conversation(authors: Authors):
    rng = Rng(0, "memory")
    for _ in range(200):
        messages = authors.small_talker.memory(rng)
        said = set(re.findall(r"\w+", messages[0]["content"].lower()))
        answer = re.findall(r"\w+", messages[-1]["content"].lower())
        assert answer[-1] in said


# --- formats -----------------------------------------------------------------------------------------


def test_every_row_becomes_a_conversation(tinyworld: Path):
    tasks = [
        ARC("ARC-Easy", "train"), ARC("ARC-Challenge", "test"), MMLU("all", "auxiliary_train"),
        GSM8K("main", "train"), SmolTalk("train"), SmolTalk("test"), HumanEval(),
        CustomJSON(str(tinyworld / "identity_conversations.jsonl")),
    ]  # fmt: skip
    counts = [sizes.ARC_EASY["train"], 200, sizes.MMLU["auxiliary_train"], 6000, 8000, 300, 100]
    expected = [*counts, sizes.IDENTITY_CONVERSATIONS]
    assert [len(task) for task in tasks] == expected
    for task in tasks:
        for i in range(0, len(task), 7):
            roles = [message["role"] for message in task[i]["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) and roles


def test_an_untrained_guess_is_at_chance(tinyworld: Path):
    """Always the same letter, or a letter by chance, is right one time in four."""
    task = MMLU("all", "test")
    rng = Rng(0, "guess")
    for guess in (lambda: "A", lambda: "D", lambda: rng.pick(LETTERS)):
        right = sum(task.evaluate(task[i], guess()) for i in range(len(task)))
        assert right / len(task) == pytest.approx(0.25, abs=0.08)


def test_identity_says_who_it_is(root: Path):
    lines = (root / "identity_conversations.jsonl").read_text().splitlines()
    conversations = [json.loads(line) for line in lines]
    assert len(set(lines)) == len(lines)
    named = [c for c in conversations if any("nanochat" in m["content"] for m in c[1::2])]
    assert len(named) > len(lines) / 2


def test_bundle_is_complete(root: Path):
    yaml = pytest.importorskip("yaml")
    bundle = root / "eval_bundle"
    tasks = yaml.safe_load((bundle / "core.yaml").read_text())["icl_tasks"]
    baselines = (bundle / "eval_meta_data.csv").read_text()
    fields = {
        "multiple_choice": {"query", "choices", "gold"}, "schema": {"context_options", "continuation", "gold"},
        "language_modeling": {"context", "continuation"},
    }  # fmt: skip
    assert {task["icl_task_type"] for task in tasks} == set(fields)
    for task in tasks:
        items = [
            json.loads(line) for line in (bundle / "eval_data" / task["dataset_uri"]).read_text().splitlines()
        ]
        assert len(items) > 20 and all(set(item) == fields[task["icl_task_type"]] for item in items)
        assert f"\n{task['label']}," in baselines

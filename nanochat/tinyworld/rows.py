"""Task rows in the schemas of the hub, and where they lie."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import whole_file, write_json
from nanochat.tinyworld import sizes
from nanochat.tinyworld.documents import Authors
from nanochat.tinyworld.facts import Fact
from nanochat.tinyworld.identity import Messages, identity_conversation
from nanochat.tinyworld.lessons import Lessons
from nanochat.tinyworld.quiz import LETTERS, Choice
from nanochat.tinyworld.rng import Rng, held_out
from nanochat.tinyworld.spelling import word_list
from nanochat.tinyworld.sums import Problem

Row = dict[str, object]
Thing = TypeVar("Thing")

_TEXT = pa.string()
_MESSAGES = pa.list_(pa.struct([("content", _TEXT), ("role", _TEXT)]))
ARC_SCHEMA = pa.schema(
    [
        ("id", _TEXT), ("question", _TEXT),
        ("choices", pa.struct([("text", pa.list_(_TEXT)), ("label", pa.list_(_TEXT))])), ("answerKey", _TEXT),
    ]
)  # fmt: skip
MMLU_SCHEMA = pa.schema(
    [("question", _TEXT), ("subject", _TEXT), ("choices", pa.list_(_TEXT)), ("answer", pa.int64())]
)
GSM8K_SCHEMA = pa.schema([("question", _TEXT), ("answer", _TEXT)])
HUMANEVAL_SCHEMA = pa.schema(
    [(name, _TEXT) for name in ("task_id", "prompt", "canonical_solution", "test", "entry_point")]
)
SMOLTALK_SCHEMA = pa.schema([("messages", _MESSAGES), ("source", _TEXT)])


def write_rows(root: Path, authors: Authors) -> dict[str, int]:
    """Write all task rows, the identity conversations, the lessons and the word lists; returns row counts."""
    counts: dict[str, int] = {}
    quiz = authors.quiz
    exams = (
        ("ARC-Easy", sizes.ARC_EASY, quiz.easy),
        ("ARC-Challenge", sizes.ARC_CHALLENGE, quiz.hard),
    )
    for subset, splits, facts in exams:
        for split, count in splits.items():
            rows = arc_rows(authors, subset, split, count, facts)
            counts[f"{subset}/{split}"] = _write(root, "allenai/ai2_arc", subset, split, ARC_SCHEMA, rows)
    for split, count in sizes.MMLU.items():
        rows = mmlu_rows(authors, split, count)
        counts[f"MMLU/{split}"] = _write(root, "cais/mmlu", "all", split, MMLU_SCHEMA, rows)
    for split, count in sizes.GSM8K.items():
        rows = gsm8k_rows(authors, split, count)
        counts[f"GSM8K/{split}"] = _write(root, "openai/gsm8k", "main", split, GSM8K_SCHEMA, rows)
    for split, count in sizes.HUMANEVAL.items():
        rows = humaneval_rows(authors, count)
        repo, schema = "openai/openai_humaneval", HUMANEVAL_SCHEMA
        counts["HumanEval/test"] = _write(root, repo, "openai_humaneval", split, schema, rows)
    for split, count in sizes.SMOLTALK.items():
        rows = smoltalk_rows(authors, split, count)
        repo, schema = "HuggingFaceTB/smol-smoltalk", SMOLTALK_SCHEMA
        counts[f"SmolTalk/{split}"] = _write(root, repo, "default", split, schema, rows)
    counts["identity"] = _write_identity(root / "identity_conversations.jsonl", authors)
    for lesson in sizes.LESSONS:
        counts[f"{lesson} lesson"] = _write_lesson(root / f"{lesson}_lesson.jsonl", authors, lesson)
    counts["words"] = _write_words(root / "words_alpha.txt", authors, sizes.TRAIN_WORDS, test=False)
    counts["test words"] = _write_words(root / "words_alpha_test.txt", authors, sizes.TEST_WORDS, test=True)
    return counts


# --- rows --------------------------------------------------------------------------------------------


def arc_rows(authors: Authors, subset: str, split: str, count: int, facts: tuple[Fact, ...]) -> list[Row]:
    """Rows of ARC: questions that only tests ask go to the test split, all others elsewhere."""
    return [
        {
            "id": f"TinyWorld_{subset}_{split}_{i}",
            "question": choice.question,
            "choices": {"text": list(choice.choices), "label": list(LETTERS)},
            "answerKey": LETTERS[choice.answer],
        }
        for i, choice in enumerate(_exam(authors, f"{subset} {split}", count, facts, split == "test"))
    ]


def mmlu_rows(authors: Authors, split: str, count: int) -> list[Row]:
    """Rows of MMLU; subjects are parts of the world."""
    exam = _exam(authors, f"MMLU {split}", count, authors.quiz.facts, split == "test")
    return [
        {"question": c.question, "subject": c.subject, "choices": list(c.choices), "answer": c.answer}
        for c in exam
    ]


def _exam(authors: Authors, stream: str, count: int, facts: tuple[Fact, ...], test: bool) -> list[Choice]:
    rng = Rng(authors.world.seed, stream)
    return _different(count, lambda: authors.quiz.question(rng, facts, test), lambda choice: choice)


def gsm8k_rows(authors: Authors, split: str, count: int) -> list[Row]:
    """Rows of GSM8K: word problems, and in training also bare sums."""
    rng = Rng(authors.world.seed, f"GSM8K {split}")
    arithmetic, test = authors.arithmetic, split == "test"

    def problem() -> Problem:
        if not test and rng.chance(sizes.GSM8K_PLAIN_SHARE):
            return arithmetic.plain_sum(rng)
        return arithmetic.word_problem(rng, test)

    problems = _different(count, problem, lambda p: p.question)
    return [{"question": p.question, "answer": p.answer} for p in problems]


def humaneval_rows(authors: Authors, count: int) -> list[Row]:
    """Rows of HumanEval with constants and wordings that no training text has."""
    rng = Rng(authors.world.seed, "HumanEval")
    functions = _different(count, lambda: authors.programmer.function(rng, test=True), lambda f: f.prompt)
    return [
        {
            "task_id": f"TinyWorld/{i}", "prompt": f.prompt, "canonical_solution": f.canonical_solution,
            "test": f.test, "entry_point": f.name,
        }
        for i, f in enumerate(functions)
    ]  # fmt: skip


def smoltalk_rows(authors: Authors, split: str, count: int) -> list[Row]:
    """Rows of SmolTalk; what the user says decides the split."""
    rng = Rng(authors.world.seed, f"SmolTalk {split}")
    test = split == "test"

    def conversation() -> Messages:
        while True:
            messages = authors.small_talker.conversation(rng)
            if held_out(user_side(messages), sizes.SMOLTALK_TEST_EVERY) == test:
                return messages

    conversations = _different(count, conversation, user_side)
    return [{"messages": messages, "source": "tinyworld"} for messages in conversations]


def user_side(messages: Messages) -> str:
    """All that the user says in a conversation."""
    return "\n".join(message["content"] for message in messages[::2])


def _different(count: int, make: Callable[[], Thing], key: Callable[[Thing], Hashable]) -> list[Thing]:
    """`count` things with different keys."""
    taken, result = set(), []
    while len(result) < count:
        thing = make()
        mark = key(thing)
        if mark not in taken:
            taken.add(mark)
            result.append(thing)
    return result


# --- files -------------------------------------------------------------------------------------------


def _write(root: Path, repo: str, subset: str, split: str, schema: pa.Schema, rows: list[Row]) -> int:
    """One split as a Parquet file and, last, the manifest that marks it complete."""
    folder = root / "task_data" / repo.replace("/", "--") / subset / split
    with whole_file(folder / "00000.parquet") as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
    write_json(folder / "manifest.json", ["00000.parquet"])
    return len(rows)


def _write_identity(path: Path, authors: Authors) -> int:
    rng = Rng(authors.world.seed, "identity")
    people, towns = len(authors.world.people), len(authors.world.towns)
    conversations = _different(
        sizes.IDENTITY_CONVERSATIONS, lambda: identity_conversation(rng, people, towns), str
    )
    _write_lines(path, (json.dumps(messages) for messages in conversations))
    return len(conversations)


def _write_lesson(path: Path, authors: Authors, lesson: str) -> int:
    rng = Rng(authors.world.seed, f"{lesson} lesson")
    conversations = list(Lessons(authors.quiz).conversations(lesson, rng))
    _write_lines(path, (json.dumps(messages) for messages in conversations))
    return len(conversations)


def _write_words(path: Path, authors: Authors, count: int, test: bool) -> int:
    words = word_list(authors.speller.world_words, count, authors.world.seed, test)
    _write_lines(path, words)
    return len(words)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with whole_file(path) as file:
        file.write("".join(f"{line}\n" for line in lines).encode())

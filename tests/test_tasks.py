"""Tasks: slices, mixtures, what the rows become, and how answers are judged."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks.humaneval
from nanochat.common import UserError
from nanochat.execution import execute_code
from tasks.arc import ARC
from tasks.common import RowError, Task, TaskMixture, TaskSequence, extract_answer, render_mc
from tasks.customjson import CustomJSON, identity_file
from tasks.gsm8k import GSM8K, solution_parts
from tasks.humaneval import HumanEval, extract_imports, extract_program
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import TEMPLATES, SimpleSpelling, SpellingBee

WORDS = ["apple", "banana", "strawberry", "mississippi", "zebra", "queue", "rhythm"]


class Counting(Task):
    """Examples that are their own index."""

    def __init__(self, size: int, **slices) -> None:
        super().__init__(**slices)
        self.size = size

    def num_examples(self) -> int:
        return self.size

    def get_example(self, index: int):
        return {"messages": [], "index": index}


def indices(task: Task) -> list[int]:
    return [task[i]["index"] for i in range(len(task))]


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    return tmp_path


def write_rows(base: Path, repo: str, subset: str, split: str, rows: list[dict]) -> None:
    folder = base / "task_data" / repo.replace("/", "--") / subset / split
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")
    (folder / "manifest.json").write_text('["00000.parquet"]')


# --- slices, mixtures, sequences ---------------------------------------------------------------------


@given(
    st.integers(0, 20), st.integers(0, 25), st.none() | st.integers(0, 25), st.integers(1, 7)
)  # fmt: skip
def test_a_slice_is_that_of_a_list(size, start, length, step):
    stop = None if length is None else start + length
    task = Counting(size, start=start, stop=stop, step=step)
    assert indices(task) == list(range(size))[start:stop:step]
    for outside in (-1, len(task)):
        with pytest.raises(IndexError):
            task[outside]


@pytest.mark.parametrize("slices", [{"start": -1}, {"start": 3, "stop": 2}, {"step": 0}])
def test_impossible_slices_are_refused(slices):
    with pytest.raises(AssertionError):
        Counting(5, **slices)


def test_mixture_has_the_golden_order():
    expected = [(1, 0), (1, 1), (1, 3), (1, 4), (0, 2), (1, 2), (0, 0), (0, 1)]
    mixture = TaskMixture([Counting(3), Counting(8, start=3)])
    assert indices(mixture) == [i if t == 0 else i + 3 for t, i in expected]
    assert indices(TaskMixture([Counting(3), Counting(8, start=3)], stop=2)) == [3, 4]


def test_mixture_shuffles_as_a_list_of_pairs_does():
    sizes = [7, 0, 12, 30]
    pairs = [(t, i) for t, size in enumerate(sizes) for i in range(size)]
    random.Random(42).shuffle(pairs)
    mixture = TaskMixture(
        [Counting(100 * (t + 1), start=100 * t, stop=100 * t + n) for t, n in enumerate(sizes)]
    )
    assert indices(mixture) == [100 * t + i for t, i in pairs]


def test_a_task_given_twice_counts_twice():
    assert sorted(indices(TaskMixture([Counting(3), Counting(3)]))) == [0, 0, 1, 1, 2, 2]


def test_sequence_keeps_the_order():
    sequence = TaskSequence([Counting(2), Counting(0), Counting(9, start=7)])
    assert indices(sequence) == [0, 1, 7, 8]
    assert indices(TaskSequence([])) == []


def test_training_tasks_say_so():
    with pytest.raises(NotImplementedError, match="Counting is for training only"):
        Counting(1).evaluate({"messages": []}, "")


# --- multiple choice ---------------------------------------------------------------------------------


def test_render_mc_bytes():
    assert render_mc("Which is red?", ["A", "B"], ["the sky", "a ripe tomato"]) == (
        "Multiple Choice question: Which is red?\n- the sky=A\n- a ripe tomato=B\n\n"
        "Respond only with the letter of the correct answer."
    )


def test_arc_uses_the_labels_of_the_row(base):
    row = {"id": "q1", "question": "2+1?", "choices": {"text": ["2", "3", "4"], "label": ["1", "2", "3"]}}
    write_rows(base, "allenai/ai2_arc", "ARC-Easy", "test", [row | {"answerKey": "2"}])
    task = ARC("ARC-Easy", "test")
    conversation = task[0]
    assert conversation["letters"] == ["1", "2", "3"] and task.eval_type == "categorical"
    assert conversation["messages"][0]["content"] == render_mc("2+1?", ["1", "2", "3"], ["2", "3", "4"])
    assert conversation["messages"][1] == {"role": "assistant", "content": "2"}
    assert task.evaluate(conversation, "2") is True and task.evaluate(conversation, "3") is False
    with pytest.raises(AssertionError, match="'A' is not one of"):
        task.evaluate(conversation, "A")


def test_arc_refuses_an_answer_that_is_no_label(base):
    row = {"id": "q7", "question": "?", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "E"}
    write_rows(base, "allenai/ai2_arc", "ARC-Easy", "test", [row])
    with pytest.raises(AssertionError, match="q7"):
        ARC("ARC-Easy", "test")[0]


def test_mmlu_and_the_older_name_of_its_training_rows(base):
    rows = [{"question": f"q{i}", "subject": "s", "choices": list("wxyz"), "answer": i % 4} for i in range(9)]
    write_rows(base, "cais/mmlu", "all", "auxiliary_train", rows)
    task, older = MMLU("all", "auxiliary_train"), MMLU("auxiliary_train", "train")
    assert [task[i] for i in range(9)] == [older[i] for i in range(9)]
    first = task[0]
    row = next(r for r in rows if r["question"] in first["messages"][0]["content"])
    assert first["messages"][1]["content"] == "ABCD"[row["answer"]] and first["subject"] == "s"
    assert len(set(MMLU.groups)) == 57
    with pytest.raises(AssertionError):
        MMLU("anatomy", "test")


# --- word problems -----------------------------------------------------------------------------------


def test_gsm8k_parts_golden():
    parts = solution_parts("A 12/60 = $<<12/60=0.2>>0.2 x\n<<1+1=2>><<foo>>\n#### 1,010")
    assert [(part["type"], part["text"]) for part in parts] == [
        ("text", "A 12/60 = $"), ("python", "12/60"), ("python_output", "0.2"), ("text", "0.2 x\n"),
        ("python", "1+1"), ("python_output", "2"), ("text", ""), ("python", "foo"), ("python_output", ""),
        ("text", "\n#### 1,010"),
    ]  # fmt: skip


def test_gsm8k_mark_is_split_at_its_last_equals_sign():
    assert [part["text"] for part in solution_parts("<<a==b=True>>")] == ["", "a==b", "True", ""]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### -1,234.5 ok", "-1234.5"), ("#### 10.", "10."), ("#### $5", None), ("####10", None),
        ("#### 1\n#### 2", "1"), ("x #### 3 apples", "3"), ("7", None), ("", None),
    ],
)  # fmt: skip
def test_extraction_table(text, answer):
    assert extract_answer(text) == answer


def test_gsm8k_judges_the_number_as_a_string(base):
    write_rows(base, "openai/gsm8k", "main", "test", [{"question": "Q", "answer": "<<5*2=10>>10\n#### 10"}])
    task = GSM8K("main", "test")
    conversation = task[0]
    assert conversation["messages"][0] == {"role": "user", "content": "Q"}
    assert [task.evaluate(conversation, f"so #### {n}") for n in ("10", "10.0", "11")] == [1, 0, 0]
    assert task.evaluate(conversation, "10") == 0
    reward = task.reward(conversation, "#### 10")
    assert reward == 1.0 and isinstance(reward, float) and task.eval_type == "generative"
    with pytest.raises(AssertionError):
        task.evaluate(conversation, ["#### 10"])  # pyright: ignore


# --- programs ----------------------------------------------------------------------------------------


def test_extract_imports():
    prompt = "# a comment\nimport math\n\n  from typing import List\n\ndef f():\n    import os\n"
    assert extract_imports(prompt) == "import math\nfrom typing import List"
    assert extract_imports("def f():\n    pass\nimport late") == ""


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nx = 1\n```", "x = 1"),
        ("Sure:\n```\nx = 1\ny = 2\n```\nand\n```python\nz = 3\n```", "x = 1\ny = 2"),
        ("  x = 1\n", "x = 1"),
        ("```py\nx = 1\n```", "```py\nx = 1\n```"),
    ],
)
def test_extract_program(completion, program):
    assert extract_program(completion) == program


@pytest.fixture
def double(base):
    row = {
        "task_id": "T/0", "prompt": 'import math\n\ndef double(x):\n    """Twice x."""\n',
        "canonical_solution": "    return int(math.fabs(x)) * 2 if x > 0 else 2 * x\n",
        "entry_point": "double",
        "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == -6\n",
    }  # fmt: skip
    write_rows(base, "openai/openai_humaneval", "openai_humaneval", "test", [row])
    return HumanEval()


def test_humaneval_canonical_solution_passes(double):
    conversation = double[0]
    answer = conversation["messages"][1]["content"]
    assert answer.startswith(conversation["messages"][0]["content"] + "\n")
    assert double.evaluate(conversation, answer) is True
    assert double.evaluate(
        conversation, "Here:\n```python\ndef double(x):\n    return math.floor(x + x)\n```"
    )


@pytest.mark.parametrize(
    "program",
    [
        "def double(x):\n    return x + 2",
        "def double(x):\n    raise ValueError(x)",
        "def double(x):\n    while True: pass",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "def triple(x):\n    return 3 * x",
        "this is no program",
        "",
    ],
)
def test_humaneval_wrong_programs_fail(double, program, monkeypatch):
    monkeypatch.setattr(tasks.humaneval, "execute_code", functools.partial(execute_code, timeout=1.0))
    assert double.evaluate(double[0], program) is False


# --- conversations -----------------------------------------------------------------------------------

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_smoltalk_keeps_the_messages(base):
    messages = [{"role": "system", "content": "be kind"}, *TALK]
    write_rows(base, "HuggingFaceTB/smol-smoltalk", "default", "train", [{"messages": messages}])
    assert SmolTalk("train")[0] == {"messages": messages}


@pytest.mark.parametrize(
    "messages",
    [[], TALK[:1], TALK[::-1], [{"role": "system", "content": "s"}, *TALK[:1]], [*TALK, TALK[1]],
     [TALK[0], {"role": "system", "content": "s"}]],
)  # fmt: skip
def test_smoltalk_refuses_malformed_rows(base, messages):
    schema = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))])
    folder = base / "task_data" / "HuggingFaceTB--smol-smoltalk" / "default" / "test"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"messages": messages}], schema), folder / "00000.parquet")
    (folder / "manifest.json").write_text('["00000.parquet"]')
    with pytest.raises(RowError, match="conversation 0"):
        SmolTalk("test")[0]


def test_custom_json_reads_lines_in_order_and_skips_blank_ones(tmp_path):
    other = [{"role": "user", "content": "wer bist du, Bär?"}, *TALK[1:]]
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(TALK)}\n\n  \n{json.dumps(other, ensure_ascii=False)}\n", encoding="utf-8")
    task = CustomJSON(path)
    assert [task[i]["messages"] for i in range(len(task))] == [TALK, other]
    assert CustomJSON(str(path), start=1)[0] == {"messages": other}


def test_custom_json_takes_system_messages_and_tool_calls(tmp_path):
    parts = [
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2."},
    ]
    talk = [{"role": "system", "content": "be kind"}, TALK[0], {"role": "assistant", "content": parts}]
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps(talk))
    assert CustomJSON(path)[0]["messages"] == talk


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": []}', "list of messages"),
        ('{"messages": []}', "at least two"),
        ("[]", "at least two"),
        (json.dumps(TALK[:1]), "at least two"),
        ("not json", "not valid JSON"),
        (json.dumps([TALK[0], {"role": "assistant"}]), "message 1 must have"),
        (json.dumps(["user", "assistant"]), "message 0 must have"),
        (json.dumps(TALK[::-1]), "message 0 must be from user, not 'assistant'"),
        (json.dumps([{"role": "system", "content": "s"}, TALK[0]]), "at least two"),
        (
            json.dumps([TALK[0], {"role": "assistant", "content": [{"type": "pyton", "text": "1"}]}]),
            "part type",
        ),
        (
            json.dumps([TALK[0], {"role": "assistant", "content": 5}]),
            "message 1: assistant content must be a string",
        ),
    ],
)
def test_custom_json_names_the_bad_line(tmp_path, line, reason):
    path = tmp_path / "talks.jsonl"
    path.write_text(f"{json.dumps(TALK)}\n\n{line}\n")
    with pytest.raises(ValueError, match=reason) as caught:
        CustomJSON(path)
    assert str(caught.value).startswith(f"{path}:3: ") and isinstance(caught.value, UserError)


def test_custom_json_without_file_is_empty_and_warns(tmp_path, capsys):
    task = CustomJSON(tmp_path / "missing.jsonl")
    assert len(task) == 0
    assert "missing.jsonl does not exist" in capsys.readouterr().out


def test_identity_file_of_the_embedded_source_must_be_generated(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    with pytest.raises(UserError, match=r"python -m nanochat\.tinyworld"):
        identity_file()


# --- spelling ----------------------------------------------------------------------------------------


@pytest.fixture
def words(base):
    (base / "words_alpha.txt").write_bytes("\r\n".join(WORDS).encode())


DRAWS = [
    ("train", 0, "rhythm", "t", 2, True, '"', "'", True, 1),
    ("train", 1, "banana", "b", 16, True, "'", "'", False, 1),
    ("train", 2, "rhythm", "b", 5, True, "", '"', False, 0),
    ("train", 3, "banana", "a", 23, False, "'", '"', False, 3),
    ("test", 0, "strawberry", "b", 0, False, "'", "", True, 1),
    ("test", 1, "apple", "l", 40, False, '"', '"', True, 1),
    ("test", 2, "rhythm", "h", 18, False, "'", "'", True, 2),
    ("test", 3, "banana", "a", 30, True, "", '"', False, 3),
]


@pytest.mark.parametrize("draw", DRAWS)
def test_spelling_bee_draws_golden(words, draw):
    split, index, word, letter, template, lower, letter_quote, word_quote, mark, count = draw
    task = SpellingBee(4, split)
    text = TEMPLATES[template].lower() if lower else TEMPLATES[template]
    text = text.replace("{letter}", letter_quote + letter + letter_quote)
    text = text.replace("{word}", word_quote + word + word_quote) + "?" * mark
    conversation = task[index]
    assert conversation["messages"][0]["content"] == text
    parts = conversation["messages"][1]["content"]
    assert [part["type"] for part in parts] == ["text", "text", "python", "python_output", "text"]
    assert parts[2]["text"] == f"'{word}'.count('{letter}')" and parts[3]["text"] == str(count)
    assert parts[4]["text"].endswith(f"\n\n#### {count}")
    assert task.evaluate(conversation, f"#### {count}") == 1 and task.reward(conversation, "#### 9") == 0.0


def test_spelling_bee_counts_by_hand(words):
    text = SpellingBee(4)[3]["messages"][1]["content"][0]["text"]
    assert "'a'" in text and "'banana'" in text and "\nbanana:b,a,n,a,n,a\n\n" in text
    lines = "1:b\n2:a hit! count=1\n3:n\n4:a hit! count=2\n5:n\n6:a hit! count=3\n\nThis gives us 3."
    assert text.endswith("\n" + lines)


def test_templates_are_51_with_both_places_and_three_marks():
    assert len(set(TEMPLATES)) == 51
    assert all("{word}" in t and "{letter}" in t for t in TEMPLATES)
    assert [t.endswith("?") for t in TEMPLATES].count(True) == 3
    assert sum(t.isascii() for t in TEMPLATES[:30]) == 30


def test_simple_spelling_golden(words):
    assert SimpleSpelling().words == [
        "banana", "mississippi", "zebra", "strawberry", "rhythm", "apple", "queue",
    ]  # fmt: skip
    for split, expected in {
        "train": ["queue", "mississippi", "queue", "mississippi"],
        "test": ["zebra", "banana", "queue", "mississippi"],
    }.items():
        task = SimpleSpelling(4, split)
        for index, word in enumerate(expected):
            question, answer = task[index]["messages"]
            assert question["content"] == f"Spell the word: {word}"
            assert answer["content"] == f"{word}:{','.join(word)}"


def test_spelling_words_are_stripped_and_never_filtered(base):
    (base / "words_alpha.txt").write_bytes(b"a\r\nbb\r\n\r\nccc\r\n")
    assert SpellingBee().words == ["a", "bb", "", "ccc"]


@pytest.mark.parametrize("kind", [SpellingBee, SimpleSpelling])
def test_held_out_words_are_for_the_test_split_alone(words, base, kind):
    (base / "words_alpha_test.txt").write_text("kiwi\nplum\n")
    assert sorted(kind(9, "test").words) == ["kiwi", "plum"]
    assert sorted(kind(9, "train").words) == sorted(WORDS)


@pytest.mark.parametrize("kind", [SpellingBee, SimpleSpelling])
def test_train_and_test_draw_apart(base, kind):
    (base / "words_alpha.txt").write_text("\n".join(f"w{i:05d}" for i in range(20_000)))
    train_task, test_task = kind(300), kind(300, "test")
    train = {json.dumps(train_task[i]) for i in range(300)}
    test = [json.dumps(test_task[i]) for i in range(300)]
    assert sum(example in train for example in test) <= 10  # by chance about 4 of 300 words coincide


# --- rewards -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GSM8K", "SpellingBee", "HumanEval", "SimpleSpelling", "ARC-Easy", "MMLU"])
def test_the_reference_is_rewarded_and_something_else_is_not(tiny_run, name):
    """The number of a solution, tests that pass in the sandbox, an exact match."""
    from scripts.chat_rl import questions

    for task in questions(name):
        conversation = task[0]
        content = conversation["messages"][-1]["content"]
        answer = content if isinstance(content, str) else "".join(part["text"] for part in content)
        assert task.reward(conversation, answer) == 1.0
        for wrong in ("", "no idea", answer[: len(answer) // 2]):
            assert task.reward(conversation, wrong) == 0.0
    train, test = questions(name)
    assert train[0]["messages"][0] != test[0]["messages"][0]

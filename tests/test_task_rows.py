"""Tasks on real rows: all of them become tokens, and right answers are judged right."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from nanochat.tokenizer import RustBPETokenizer
from tasks.arc import ARC
from tasks.common import extract_answer
from tasks.customjson import CustomJSON, identity_file
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee

SHARED = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not here")


@pytest.fixture(autouse=True)
def real(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    rows = tmp_path / "task_data"
    rows.mkdir()
    for folder in (SHARED / "task_data").iterdir():
        if folder.is_dir():
            name = folder.name.replace("mix--chat-sft", "HuggingFaceTB--smol-smoltalk")
            (rows / name).symlink_to(folder)
    (tmp_path / "words_alpha.txt").symlink_to(SHARED / "words" / "words_alpha.txt")
    (tmp_path / "identity_conversations.jsonl").symlink_to(SHARED / "chat" / "identity_conversations.jsonl")


REAL = {
    "arc-easy-train": (lambda: ARC("ARC-Easy", "train"), 2251),
    "arc-easy-validation": (lambda: ARC("ARC-Easy", "validation"), 570),
    "arc-easy-test": (lambda: ARC("ARC-Easy", "test"), 2376),
    "arc-challenge-train": (lambda: ARC("ARC-Challenge", "train"), 1119),
    "arc-challenge-validation": (lambda: ARC("ARC-Challenge", "validation"), 299),
    "arc-challenge-test": (lambda: ARC("ARC-Challenge", "test"), 1172),
    "mmlu-dev": (lambda: MMLU("all", "dev"), 285),
    "mmlu-validation": (lambda: MMLU("all", "validation"), 1531),
    "mmlu-test": (lambda: MMLU("all", "test"), 14042),
    "gsm8k-train": (lambda: GSM8K("main", "train"), 7473),
    "gsm8k-test": (lambda: GSM8K("main", "test"), 1319),
    "humaneval": (lambda: HumanEval(), 164),
    "smoltalk-train": (lambda: SmolTalk("train"), 15208),
    "smoltalk-test": (lambda: SmolTalk("test"), 900),
    "identity": (lambda: CustomJSON(identity_file()), 996),
    "spelling-bee": (lambda: SpellingBee(1000), 1000),
    "simple-spelling": (lambda: SimpleSpelling(1000), 1000),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if size > 5000 else n for n, (_, size) in REAL.items()]
)
def test_every_real_row_becomes_tokens(name, byte_tokenizer):
    make, size = REAL[name]
    task = make()
    assert len(task) == size
    for conversation in map(task.__getitem__, range(size)):
        ids, mask = byte_tokenizer.render_conversation(conversation, max_tokens=10**6)
        assert len(ids) == len(mask) and sum(mask) > 0


@pytest.fixture(scope="module")
def byte_tokenizer() -> RustBPETokenizer:
    return RustBPETokenizer.train_from_iterator([], 265)


def test_every_real_letter_answer_is_judged_right():
    for task in (ARC("ARC-Challenge", "test"), MMLU("all", "validation")):
        for conversation in map(task.__getitem__, range(len(task))):
            assert task.evaluate(conversation, conversation["messages"][-1]["content"])


def test_answers_of_200_real_solutions():
    task = GSM8K("main", "test")
    for index in range(200):
        conversation = task[index]
        solution = "".join(part["text"] for part in conversation["messages"][-1]["content"])
        number = solution.split("#### ")[1].replace(",", "").strip()
        assert extract_answer(solution) == number and float(number) == int(number)
        assert task.evaluate(conversation, solution) == 1
        assert task.evaluate(conversation, f"#### {int(number) + 1}") == 0


def test_canonical_solutions_of_real_problems_pass():
    task = HumanEval(stop=3)
    assert all(task.evaluate(c, c["messages"][1]["content"]) for c in map(task.__getitem__, range(3)))


class Spoil(ast.NodeTransformer):
    """A program that answers something else: off by one in its first number, or nothing at all."""

    def __init__(self, number: bool) -> None:
        self.number, self.done = number, False

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        if not self.number or self.done or type(node.value) is not int:
            return node
        self.done = True
        return ast.Constant(node.value + 1)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        self.generic_visit(node)
        return node if self.number else ast.Return(ast.Constant(None))


def spoiled(program: str, number: bool) -> str:
    return ast.unparse(ast.fix_missing_locations(Spoil(number).visit(ast.parse(program))))


@pytest.mark.slow
def test_all_canonical_solutions_pass_and_spoiled_ones_fail():
    task = HumanEval()
    survivors = tried = 0
    for conversation in map(task.__getitem__, range(len(task))):
        solution = conversation["messages"][1]["content"]
        assert task.evaluate(conversation, solution), conversation["entry_point"]
        assert not task.evaluate(conversation, spoiled(solution, number=False)), conversation["entry_point"]
        other = spoiled(solution, number=True)
        if other != ast.unparse(ast.parse(solution)):
            tried += 1
            survivors += task.evaluate(conversation, other)
    # Some numbers do not matter: a loop that begins one later, a first value that is overwritten.
    assert tried > 90 and survivors < 0.35 * tried, (survivors, tried)

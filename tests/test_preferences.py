"""Preference pairs: files of one's own, and slips in worked solutions."""

from __future__ import annotations

import json
import random

import pytest

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from tasks.common import extract_answer
from tasks.gsm8k import GSM8K, solution_parts
from tasks.preferences import PreferenceJSON, SlippedSolutions, slip


def write(path, *lines) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def test_a_file_gives_prompts_or_dialogues_with_two_answers(tmp_path):
    dialogue = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    tool = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]
    path = write(
        tmp_path / "pairs.jsonl",
        {"prompt": "q", "chosen": "yes", "rejected": "no", "score": 3},
        "",
        {"messages": dialogue, "chosen": tool, "rejected": "no"},
    )
    pairs = PreferenceJSON(path)
    assert len(pairs) == 2 and len(PreferenceJSON(path, stop=1)) == 1
    assert pairs[0][0]["messages"] == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "yes"},
    ]
    assert pairs[1][0]["messages"] == [*dialogue, {"role": "assistant", "content": tool}]
    assert pairs[1][1]["messages"] == [*dialogue, {"role": "assistant", "content": "no"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{broken", "pairs.jsonl:2: not valid JSON"),
        (["q", "a", "b"], "pairs.jsonl:2: a line must be an object"),
        ({"prompt": "q", "chosen": "a"}, "pairs.jsonl:2: a line must be an object"),
        ({"chosen": "a", "rejected": "b"}, "pairs.jsonl:2: chosen: message 0: user content must be a string"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "pairs.jsonl:2: rejected: message 1"),
        ({"messages": "q", "chosen": "a", "rejected": "b"}, "pairs.jsonl:2: messages must be a list"),
        ({"messages": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, "must be from user"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_with_its_number(tmp_path, line, reason):
    path = write(tmp_path / "pairs.jsonl", {"prompt": "q", "chosen": "a", "rejected": "b"}, line)
    with pytest.raises(UserError, match=reason):
        PreferenceJSON(path)


def test_missing_and_empty_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="cannot read the preference pairs"):
        PreferenceJSON(tmp_path / "nothing.jsonl")
    with pytest.raises(UserError, match="holds no preference pair"):
        PreferenceJSON(write(tmp_path / "empty.jsonl", ""))


def test_a_slip_is_in_the_last_calculation_and_what_follows_agrees_with_it():
    parts = solution_parts(
        "First <<12*80=960>>960 pens. Then 960 + 50 = <<960+50=1010>>1,010 pens for 21010 cats.\n#### 1,010"
    )
    for seed in range(20):
        wrong = slip(parts, random.Random(seed))
        assert wrong[:3] == parts[:3]
        expression, result = wrong[4]["text"], wrong[5]["text"]
        assert expression != "960+50" and ("960+" in expression) != ("+50" in expression)
        assert wrong[3]["text"] == f"960 pens. Then {expression.replace('+', ' + ')} = "
        assert result == use_calculator(expression) != "1010"
        assert wrong[6]["text"] == f"{result} pens for 21010 cats.\n#### {result}"


@pytest.mark.parametrize(
    "solution",
    ["It is seven.\n#### 7", "Three and <<2+2=4>>4 are seven.\n#### 7", "<<0*0=0>>0 or\n#### 0"],
)
def test_where_no_calculation_gives_the_end_only_that_changes(solution):
    parts = solution_parts(solution)
    wrong = slip(parts, random.Random(0))
    right, found = (extract_answer(each[-1]["text"]) for each in (parts, wrong))
    assert found is not None and found != right
    assert wrong[:-1] == parts[:-1]


def test_every_slipped_solution_of_the_world_is_wrong_and_repeatable(tiny_run):
    task = GSM8K("main", "test", stop=200)
    pairs = SlippedSolutions(task)
    for index in range(len(pairs)):
        chosen, rejected = pairs[index]
        assert chosen["messages"][:-1] == rejected["messages"][:-1]
        answers = [
            "".join(part["text"] for part in side["messages"][-1]["content"]) for side in (chosen, rejected)
        ]
        assert [task.reward(chosen, answer) for answer in answers] == [1.0, 0.0]
        assert pairs[index][1] == rejected

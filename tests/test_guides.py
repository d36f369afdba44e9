"""The code of the guides is run as it stands, and the commands of the README have no flag that their scripts lack."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nanochat.calculator import use_calculator
from nanochat.configurator import parse
from tests.test_chat_eval import base, engine, run_here, tokenizer  # noqa: F401  (fixtures)

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "dev" / "guides" / "a-task-of-your-own.md"


def test_the_commands_of_the_readme_have_the_flags_of_their_scripts(monkeypatch):
    monkeypatch.chdir(ROOT)  # where presets are named from
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"-m ((?:scripts|dev)\.\w+)([^`#;)\n]*)", text)
    assert len(commands) > 20
    for module, flags in commands:
        parse(importlib.import_module(module).Config, shlex.split(flags))


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def module(blocks, monkeypatch) -> ModuleType:
    found = ModuleType("tasks.lettercount")
    monkeypatch.setitem(sys.modules, "tasks.lettercount", found)
    exec(compile(blocks[0], str(GUIDE), "exec"), found.__dict__)
    return found


def test_the_task_of_the_guide_is_short_and_right(blocks, module):
    assert len(blocks) == 2 and len(blocks[0].splitlines()) < 100
    train, test = module.LetterCount("train"), module.LetterCount("test", 300, stop=200)
    assert len(train) == 1000 and len(test) == 200
    assert [train[i] for i in range(9)] != [test[i] for i in range(9)]
    for i in range(len(test)):
        conversation = test[i]
        question, answer = (message["content"] for message in conversation["messages"])
        letter, word = re.fullmatch(r"How many (\w) are in (\w+)\?", question).groups()
        text = "".join(part["text"] for part in answer)
        assert test.evaluate(conversation, text) == 1 and test.reward(conversation, text) == 1.0
        assert test.evaluate(conversation, text.replace("####", "# ###")) == 0
        assert answer[-1]["text"].endswith(f"#### {word.count(letter)}")
        assert use_calculator(answer[1]["text"]) == answer[2]["text"]


def test_the_model_is_trained_on_what_it_writes_and_not_on_the_result_of_the_tool(module, tokenizer):  # noqa: F811
    ids, mask = tokenizer.render_conversation(module.LetterCount("train")[0])
    names = ("python_start", "python_end", "output_start", "output_end")
    call, called, output, ended = (ids.index(tokenizer.encode_special(f"<|{name}|>")) for name in names)
    assert all(mask[call : called + 1]) and not any(mask[output : ended + 1])
    assert call < called < output < ended and all(mask[ended + 1 :])


def test_the_score_of_the_guide_runs(blocks, module, run_here, capsys):  # noqa: F811
    code = blocks[1].replace("max_problems=200, max_new_tokens=200", "max_problems=3, max_new_tokens=4")
    assert code != blocks[1]
    exec(compile(code, str(GUIDE), "exec"), {})
    assert re.search(r"\d\.\d% of 3, 95 % interval", capsys.readouterr().out)

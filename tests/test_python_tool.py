"""The tools that a model can call, and Python in the sandbox among them."""

from __future__ import annotations

import sys

import pytest

from nanochat.engine import Engine, SamplingParams
from nanochat.python_tool import TOOLS, run_python, tools_of
from tests.toy_model import ByteTokenizer, scripted

TOKENIZER = ByteTokenizer()


@pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs a POSIX system")
@pytest.mark.parametrize(
    ("source", "answer"),
    [
        ("0.2*50", "10"), ("'strawberry'.count('r')", "3"),  # as the calculator writes it
        ("sum(range(10))", "45"), ("x = 3\nprint(x)\nx + 1", "3\n4"), ("print('a{}b')", "a{}b"), ("'é' + '\"'", 'é"'),
        ("x = 1", None), ("1/0", None), ("(", None), ("import socket; socket.socket()", None),
    ],
)  # fmt: skip
def test_python_prints_and_returns(source, answer):
    assert run_python(source) == answer


@pytest.mark.skipif(sys.platform == "win32", reason="the sandbox needs a POSIX system")
def test_output_is_cut():
    assert len(run_python("print('x' * 5000)") or "") == 1024


def test_an_engine_uses_the_tool_that_is_named():
    assert set(map(bool, map(tools_of, TOOLS))) == {True, False}
    model = scripted({"q": ["<|python_start|>", "max(3, 8)", "<|python_end|>", "......", "!"]})
    texts = {}
    for name in TOOLS:
        engine = Engine(model, TOKENIZER, tools_of(name))
        answer = engine.complete_many([TOKENIZER.encode("q")], SamplingParams(temperature=0))[0]
        forced = [t for t, mask in zip(answer.tokens, answer.masks, strict=True) if not mask]
        texts[name] = TOKENIZER.decode(forced)
    assert texts == {"calculator": "", "sandbox": "<|output_start|>8<|output_end|>", "off": ""}

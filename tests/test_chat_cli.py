"""The chat in the terminal: answers, tool calls, commands, interruption, and the program as a whole."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanochat.chat import Chat
from nanochat.common import UserError
from nanochat.configurator import parse
from nanochat.engine import Engine
from scripts.chat_cli import Config, Screen, Terminal, answer_once
from tests.toy_model import ByteTokenizer, ScriptedModel

torch.set_num_threads(1)
TOKENIZER = ByteTokenizer()
CALL = ["<|python_start|>", "27+58", "<|python_end|>"]
SUM = ["Sum: ", *CALL, *["?"] * 4, "It is 85."]  # the question marks give way to the tool's output


def replying(answers: dict[str, list[str]], sequence_len: int = 512, seen: list[str] | None = None) -> Chat:
    """A chat with a model that looks up the last user message."""

    def next_token(history: list[int]) -> int:
        text = TOKENIZER.decode(history)
        if seen is not None and text.endswith("<|assistant_start|>"):
            seen.append(text)
        question, _, _ = text.rpartition("<|user_end|><|assistant_start|>")
        pieces = answers[question.rpartition("<|user_start|>")[2].rpartition("\n\n")[2]]
        ids = [
            id
            for piece in pieces
            for id in (
                [TOKENIZER.encode_special(piece)] if piece.startswith("<|") else TOKENIZER.encode(piece)
            )
        ]
        start = len(history) - 1 - history[::-1].index(TOKENIZER.encode_special("<|assistant_start|>"))
        done = len(history) - start - 1
        return ids[done] if done < len(ids) else TOKENIZER.encode_special("<|assistant_end|>")

    return Chat(Engine(ScriptedModel(next_token, sequence_len), TOKENIZER), TOKENIZER, temperature=0)


def session(chat: Chat, *lines: str | type[BaseException], capsys=None) -> str:
    """Type lines into the terminal; what the screen shows."""
    script = iter(lines)

    def read(prompt: str) -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        if not isinstance(line, str):
            raise line
        return line

    screen = io.StringIO()
    Terminal(chat, read, Screen(screen, screen, color=False)).loop()
    return screen.getvalue()


# --- answers -----------------------------------------------------------------------------------------


def test_an_answer_with_a_tool_call():
    chat = replying({"What is 27 + 58?": SUM})
    assert session(chat, "What is 27 + 58?") == "Assistant: Sum: [27+58 = 85]It is 85.\n\n"
    assert chat.messages[1]["content"] == [
        {"type": "text", "text": "Sum: "},
        {"type": "python", "text": "27+58"},
        {"type": "python_output", "text": "85"},
        {"type": "text", "text": "It is 85."},
    ]


def test_tool_calls_are_dimmed_and_kept_apart_from_the_answer():
    text, tools = io.StringIO(), io.StringIO()
    assert answer_once(replying({"q": SUM}), "q", Screen(text, tools, color=True), False, False) == 0
    assert text.getvalue() == "Sum: It is 85.\n" and tools.getvalue() == "\x1b[2m[27+58 = 85]\x1b[0m"


def test_a_call_without_result_is_shown():
    chat = replying(
        {"q": ["<|python_start|>", "1/0", "<|python_end|>", "no"], "r": ["<|python_start|>", "1+"]}
    )
    assert session(chat, "q", "r") == "Assistant: [1/0]no\n\nAssistant: [1+]\n\n"


def test_characters_of_several_bytes_arrive_whole():
    chat = replying({"q": ["naïve 日本 🙂"]})
    pieces: list[str] = []
    chat.answer("q", lambda kind, text: pieces.append(text), pieces.append)
    assert "".join(pieces) == "naïve 日本 🙂" and "\ufffd" not in pieces


def test_turns_are_remembered_with_their_tool_calls():
    seen: list[str] = []
    chat = replying({"a": SUM, "b": ["ok"]}, seen=seen)
    session(chat, "a", "b")
    end, start = "<|assistant_end|>", "<|assistant_start|>"
    assert seen[-1] == (
        f"<|bos|><|user_start|>a<|user_end|>{start}Sum: <|python_start|>27+58<|python_end|>"
        f"<|output_start|>85<|output_end|>It is 85.{end}<|user_start|>b<|user_end|>{start}"
    )


def test_bos_ends_an_answer_and_stays_out_of_the_history():
    chat = replying({"q": ["hi", "<|bos|>", "more"]})
    assert session(chat, "q") == "Assistant: hi\n\n" and chat.messages[1]["content"] == "hi"


def test_a_stop_text_ends_an_answer():
    chat = replying({"q": ["one two three"]})
    chat.stop = "two"
    assert session(chat, "q") == "Assistant: one \n\n"
    assert chat.messages[1]["content"] == "one "


def test_raw_shows_special_tokens_without_keeping_them_as_text():
    chat = replying({"q": ["hi"]})
    chat.raw = True
    assert session(chat, "q") == "Assistant: hi<|assistant_end|>\n\n"
    assert chat.messages[1]["content"] == "hi"


def test_an_empty_answer_does_not_end_the_conversation():
    assert session(replying({"q": [], "r": ["ok"]}), "q", "r") == "Assistant: \n\nAssistant: ok\n\n"


def test_length_limit_and_summary():
    chat = replying({"q": ["abcdef"]})
    chat.max_tokens = 3
    reply = chat.answer("q", lambda *_: None, print)
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("abc", "length", 3)
    assert "3 tokens" in reply.summary(512) and "/512; length" in reply.summary(512)
    chat.max_tokens = parse(Config, ["--max-tokens=0"]).max_tokens
    assert chat.answer("q", lambda *_: None, print).finish_reason == "stop"


def test_zero_is_accepted_where_the_help_explains_it():
    assert parse(Config, ["-m", "0", "-k", "0"]).max_tokens == 0


def test_seeds():
    chat = replying({})
    chat.engine = Engine(ScriptedModel(lambda history: None), TOKENIZER)
    chat.temperature, chat.max_tokens, chat.top_k = 1.0, 12, 0

    def ask() -> str:
        reply = chat.answer("q", lambda *_: None, print)
        chat.undo()
        return reply.text

    assert len({ask() for _ in range(4)}) > 1, "random by default"
    chat.seed, chat.num_replies = 7, 0
    first = [ask(), ask()]
    chat.num_replies = 0
    assert [ask(), ask()] == first and first[0] != first[1]


def test_long_conversations_lose_their_oldest_exchanges():
    seen: list[str] = []
    chat = replying({f"question {i}": ["x" * 30] for i in range(9)}, sequence_len=192, seen=seen)
    chat.system = "Be brief."
    notices: list[str] = []
    for i in range(9):
        chat.answer(f"question {i}", lambda *_: None, notices.append)
    assert len(notices) > 3 and "left out" in notices[0]
    assert "question 8" in seen[-1] and "question 2" not in seen[-1]
    assert all("Be brief." in prompt for prompt in seen)
    with pytest.raises(UserError, match="the prompt has"):
        chat.answer("y" * 300, lambda *_: None, notices.append)
    assert len(chat.messages) == 18, "a question that was not answered is not kept"


def test_ctrl_c_keeps_the_partial_answer():
    chat = replying({"q": ["abcdefgh"], "r": ["ok"]})
    shown: list[str] = []

    def show(kind: str, text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    reply = chat.answer("q", show, print)
    assert reply.finish_reason == "cancelled" and chat.messages[-1]["content"] == "abc"
    assert session(chat, "r") == "Assistant: ok\n\n"


# --- commands ----------------------------------------------------------------------------------------


def test_leaving():
    for last in ("quit", "EXIT", "/quit", "/exit now", EOFError):
        assert session(replying({"q": ["hi"]}), "q", last, "q") == "Assistant: hi\n\n"
    assert session(
        replying({"q": ["hi"]}), KeyboardInterrupt, "q", KeyboardInterrupt, KeyboardInterrupt, "q"
    ) == ("Assistant: hi\n\n")


def test_clear_retry_undo(capsys):
    chat = replying({"a": ["A"], "b": ["B"], "clear the table": ["done"]})
    assert (
        session(chat, "a", "b", "/retry", "/undo", "") == "Assistant: A\n\nAssistant: B\n\nAssistant: B\n\n"
    )
    assert [m["content"] for m in chat.messages] == ["a", "A"]
    session(chat, "clear the table")
    assert len(chat.messages) == 4
    session(chat, "CLEAR", "/undo")
    assert chat.messages == [] and "nothing to take back" in capsys.readouterr().err


def test_settings(capsys):
    chat = replying({})
    session(
        chat,
        "/temperature 0.9",
        "/topk 0",
        "/topp 0.5",
        "/maxtokens 9",
        "/seed 3",
        "/system Be brief.",
        "/topk",
    )
    assert (chat.temperature, chat.top_k, chat.top_p, chat.max_tokens, chat.seed) == (0.9, 0, 0.5, 9, 3)
    assert chat.system == "Be brief." and "topk: 0" in capsys.readouterr().err
    session(chat, "/system", "/system off", "/maxtokens 0", "/topp 1", "/seed 0")
    assert (chat.system, chat.max_tokens, chat.top_p, chat.seed) == ("", 0, 1, None)
    assert "system: Be brief.\nsystem: (none)\n" in capsys.readouterr().err
    before = replace(chat)
    session(
        chat,
        "/temperature hot",
        "/topk 1.5",
        "/temperature -1",
        "/topp 0",
        "/topk -5",
        "/maxtokens -1",
        "/nonsense",
        "/help",
    )
    assert chat == before
    err = capsys.readouterr().err
    assert (
        err.count("error:") == 6
        and "whole number, not '1.5'" in err
        and "/nonsense is not a command" in err
        and "/retry" in err
    )


def test_save_and_load(tmp_path, capsys):
    chat, path = replying({"a": SUM, "b": ["ok"]}), tmp_path / "talk.json"
    chat.system = "Be brief."
    session(chat, "a", f"/save {path}", "/clear", f"/load {path}", "b", "/tokens")
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert json.loads(path.read_text())["messages"] == chat.messages[:2]
    path.write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    session(chat, f"/load {path}", "/load", f"/load {tmp_path / 'missing'}")
    err = capsys.readouterr().err
    assert "is not a saved conversation" in err and err.count("error:") == 3 and len(chat.messages) == 4
    assert "of 512 tokens" in err
    path.write_text('{"system": null, "messages": []}')
    session(chat, f"/load {path}")
    assert (chat.system, chat.messages) == ("", [])
    path.write_text('{"system": 5, "messages": []}')
    session(chat, f"/load {path}")
    assert "its system is not text" in capsys.readouterr().err
    path.write_text('{"messages": [{"role": "user", "text": "of the page"}]}')
    session(chat, f"/load {path}")
    assert "is not a saved conversation: /save writes it in another form" in capsys.readouterr().err


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    session(replying({"a": ["A"]}), "a", "/save ~/talk.json")
    assert os.listdir(tmp_path) == ["talk.json"]


def test_files_that_cannot_be_used_lose_no_conversation(tmp_path, capsys):
    chat, file = replying({"a": ["A"], "b": ["B"]}), tmp_path / "file"
    file.touch()
    wrong = [f"/{name} {path}" for name in ("load", "save") for path in (tmp_path, file / "below")]
    session(chat, "a", *wrong, f"/save {'x' * 300}", "b")
    assert [m["content"] for m in chat.messages] == ["a", "A", "b", "B"]
    err = capsys.readouterr().err
    assert err.count("error: cannot") == 5 and "Is a directory" in err, err


def test_several_lines_and_escaped_slashes():
    chat = replying({"a\nb": ["1"], "c\n\nd": ["2"], "/x": ["3"], "d": ["2"]})
    text = session(chat, "a\\", "b", '"""c', "", 'd"""', "//x", '"""d"""')
    assert text == "Assistant: 1\n\nAssistant: 2\n\nAssistant: 3\n\nAssistant: 2\n\n"


# --- the program -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    """A base folder with an untrained SFT checkpoint and its tokenizer."""
    from nanochat.checkpoint_manager import save_checkpoint
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.tokenizer import RustBPETokenizer

    base = tmp_path_factory.mktemp("base")
    tokenizer = RustBPETokenizer.train_from_iterator(["hello world, how are you?"] * 3, 275)
    size = tokenizer.get_vocab_size()
    config = GPTConfig.classic(sequence_len=64, vocab_size=size, n_layer=1, n_head=1, n_kv_head=1, n_embd=16)
    torch.manual_seed(0)
    model = GPT(config)
    model.init_weights()
    directory = base / "chatsft_checkpoints" / "d1"
    save_checkpoint(directory, 1, model, {"model_tag": "d1"}, tokenizer=tokenizer)
    return base


def cli(base: Path, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "scripts.chat_cli", *arguments], input=stdin, capture_output=True, text=True,
        env=environment, cwd=Path(__file__).parents[1], check=False, stdin=subprocess.DEVNULL if stdin is None else None,
    )  # fmt: skip


def test_one_answer_as_json_is_repeatable_and_the_rest_is_on_stderr(base_dir):
    arguments = (
        "-p",
        "hello",
        "--json",
        "--seed",
        "3",
        "-m",
        "5",
        "-t",
        "1",
        "--device-type",
        "cpu",
        "--stats",
    )
    result = cli(base_dir, *arguments)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1 and answer["seed"] == 3
    assert 1 <= answer["usage"]["completion_tokens"] <= 5 and answer["finish_reason"] in ("stop", "length")
    assert "model: sft d1 step 1 on cpu" in result.stderr and "tokens/s" in result.stderr
    assert json.loads(cli(base_dir, *arguments).stdout)["response"] == answer["response"]


def test_narrow_weights_say_what_they_cost(base_dir):
    result = cli(base_dir, "-p", "hello", "-m", "5", "--device-type=cpu", "--quantize=int8", "--speculate=4")
    assert result.returncode == 0 and "bits per byte" in result.stderr, result.stderr


def test_piped_text_is_one_question(base_dir):
    result = cli(
        base_dir, "-i", "sft", "--seed", "3", "-m", "5", "-t", "1", "--device-type=cpu", stdin="hello\n"
    )
    assert result.returncode == 0 and result.stdout.endswith("\n") and "model:" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-p", "x"), "no checkpoint"), ((), "standard input is empty"),
        (("-p", "x", "-t", "-1"), "temperature"), (("-p", "x", "--top-p=0"), "top-p"),
        (("-p", "x", "--speculate=-1"), "at least 0"),
        (("-p", "x", "-i", "huge"), "source must be one of"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(tmp_path, arguments, message):
    result = cli(tmp_path, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert message in result.stderr and result.stderr.count("\n") == 1

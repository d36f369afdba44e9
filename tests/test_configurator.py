"""Command lines and presets become typed configs, and every mistake is one clear line."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from nanochat.common import UserError
from nanochat.configurator import as_dict, option, parse, run


@dataclass(frozen=True)
class Config:
    depth: int = option(20, "layers")
    lr: float = option(0.5, "learning rate")
    fp8: bool = option(False, "low precision")
    run: str = option("dummy", "name")
    model_tag: str | None = option(None, "tag", short="g")
    arch: str = option("modern", "which", choices=("modern", "classic"))
    rows: int | None = option(None, "rows", none="auto")
    steps: int = option(-1, "steps", least=1, off=-1)


@dataclass(frozen=True)
class Needy:
    source: str = option(..., "where from", short="i")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--depth=4"], {"depth": 4}),
        (["--depth", "4"], {"depth": 4}),
        (["--model_tag=a=b"], {"model_tag": "a=b"}),
        (["--model-tag", "x"], {"model_tag": "x"}),
        (["-g", "x"], {"model_tag": "x"}),
        (["--lr=1"], {"lr": 1.0}),
        (["--run=123"], {"run": "123"}),
        (["--fp8"], {"fp8": True}),
        (["--fp8=True"], {"fp8": True}),
        (["--fp8", "--depth=3"], {"fp8": True, "depth": 3}),
        (["--no-fp8"], {"fp8": False}),
        (["--depth=5e3"], {"depth": 5000}),
        (["--depth=524_288"], {"depth": 524288}),
        (["--depth=-1"], {"depth": -1}),
        (["--", "--depth=4"], {"depth": 4}),
        (["--model-tag=None"], {"model_tag": None}),
        (["--rows=8", "--rows=auto"], {"rows": None}),
    ],
)
def test_flags(argv, expected):
    assert as_dict(parse(Config, argv)) == as_dict(Config()) | expected


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dept=3"], "--dept is not an option; did you mean --depth"),
        (["--depth=x"], "depth must be int, not 'x'"),
        (["--depth=1.5"], "depth must be int"),
        (["--lr"], "expected one argument"),
        (["--arch=gothic"], "must be one of modern, classic"),
        (["depth=3"], "flags start with --"),
        (["missing.py"], "cannot read preset missing.py"),
        (["--depth=None"], "must be int, not 'None'"),
        (["--lr=nan"], "lr must be float, not 'nan'"),
        (["--depth=1e400"], "depth must be int, not '1e400'"),
        (["--no-depth"], "--no-depth is not an option"),
        (["--steps=0"], "steps must be at least 1, or -1, not 0"),
        (["--steps=-2"], "steps must be at least 1, or -1, not -2"),
    ],
)
def test_mistakes_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(Config, argv)
    assert "\n" not in str(caught.value)


@dataclass(frozen=True)
class Talk:
    prompt: str = option("", "answer this", short="p")


@pytest.mark.parametrize("argv", [["Why is 1 = 1?"], ["Why", "is", "1", "=", "1?"]])
def test_words_without_a_flag_are_taken_for_a_prompt_where_there_is_one(argv, tmp_path):
    with pytest.raises(UserError, match=r'answered: -p "Why is 1 = 1\?"$'):
        parse(Talk, argv)
    preset = tmp_path / "preset.py"
    preset.write_text('prompt = "hi"\n')
    assert parse(Talk, [str(preset)]).prompt == "hi"


def test_a_variable_of_the_environment_is_the_default_of_its_option(monkeypatch, capsys):
    from scripts import base_train, chat_sft

    for config in (base_train.Config, chat_sft.Config):
        assert config().run == "dummy"
        monkeypatch.setenv("WANDB_RUN", "jan")
        assert config().run == parse(config, []).run == "jan"
        assert parse(config, ["--run=dummy"]).run == "dummy"
        with pytest.raises(SystemExit):
            parse(config, ["--help"])
        assert "(default: jan)" in capsys.readouterr().out
        monkeypatch.delenv("WANDB_RUN")


def test_required_options():
    assert parse(Needy, ["-i", "sft"]).source == "sft"
    with pytest.raises(UserError, match="--source must be given"):
        parse(Needy, [])


def test_precedence_is_defaults_presets_in_order_flags(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text('"""A preset."""\ndepth = 1\nlr = 2\nrun = "one"\n')
    second.write_text("depth = 2\n")
    config = parse(Config, [str(first), f"--config={second}", "--run=flag"])
    assert (config.depth, config.lr, config.run) == (2, 2.0, "flag")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth = 1\nwidth = 2\n", "preset.py:2: width is not an option"),
        ("import os\n", "preset.py:1: only"),
        ("depth = open('x')\n", "plain number"),
        ("depth = 1.5\n", "depth must be int"),
        ("depth = \n", "preset.py:1: not a"),
        ("depth = {[1]: 2}\n", "plain number"),
        ("depth = 2\0", "preset.py:1: not a"),
        ("depth = 2 # \udcff", "preset.py:1: not a"),  # no UTF-8
    ],
)
def test_presets_are_parsed_not_executed(tmp_path, text, message):
    path = tmp_path / "preset.py"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        parse(Config, [str(path)])


def test_run_prints_one_line_and_exits_2(capsys):
    with pytest.raises(SystemExit) as exit:
        run(Config, lambda config: None, ["--dept=3"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: --dept is not an option; did you mean --depth?\n"


def test_a_disk_that_refuses_is_one_line(capsys):
    def main(config) -> None:
        """Write."""
        raise OSError(errno.EROFS, "Read-only file system", "/there/file")

    with pytest.raises(SystemExit) as exit:
        run(Config, main, [])
    assert exit.value.code == 2
    assert capsys.readouterr().err == "error: /there/file: Read-only file system\n"


@pytest.mark.parametrize("size", [10, 300_000])  # kept in the buffer, and larger than it and the pipe
def test_a_reader_that_has_enough_ends_the_process_without_a_word(size):
    reading, writing = os.pipe()
    os.close(reading)
    code = f"from nanochat.configurator import ending_well\nwith ending_well(): print('x' * {size})"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")
    without = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, code], timeout=60)
    assert without.returncode == 0, "a process may have no stdout at all"


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse(Config, ["--help"])
    shown = capsys.readouterr().out
    assert "--depth" in shown and "layers (default: 20)" in shown and "-g" in shown

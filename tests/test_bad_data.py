"""Data that is wrong: one clear line on stderr from the real scripts, and nothing left behind."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset_commands
from nanochat.configurator import run
from tests.toy_data import damage_row_group, write_shard
from tests.training import defaults, run_here


def dataset_command(capsys, *arguments: str) -> str:
    """The only line on stderr of `python -m nanochat.dataset`, which must fail."""
    with pytest.raises(SystemExit) as stopped:
        dataset_commands.main(arguments)
    return one_line(stopped.value.code, capsys)


def stage_command(capsys, stage: str, **changes) -> str:
    """The only line of trouble of a training script, which must fail."""
    return script(capsys, stage, **(defaults(stage) | changes))


def script(capsys, name: str, **flags) -> str:
    """The only line of trouble of a script, which must fail."""
    module = importlib.import_module(f"scripts.{name}")
    arguments = [f"--{flag.replace('_', '-')}={value}" for flag, value in flags.items()]
    with pytest.raises(SystemExit) as stopped:
        run(module.Config, module.main, arguments)
    return one_line(stopped.value.code, capsys)


def one_line(code: object, capsys) -> str:
    assert code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines), lines
    return lines[-1]


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("NANOCHAT_DATA", "NANOCHAT_DATASET"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "base"


# --- importing ---------------------------------------------------------------------------------------


def test_a_broken_line_is_named_with_file_number_and_reason(base, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n{"text": \n')
    line = dataset_command(capsys, "import", "--name=mine", f"--files={path}")
    assert f"{path}:2: not valid JSON: Expecting value" in line
    assert not list((base / "imported_data").iterdir())


def test_a_parquet_file_without_a_text_column(base, tmp_path, capsys):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    line = dataset_command(capsys, "import", "--name=mine", f"--files={path}")
    assert line == f"error: {path} has no column `text`, only body, n"


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": " "}\n'])
def test_a_file_without_a_document(base, tmp_path, capsys, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    line = dataset_command(capsys, "import", "--name=mine", f"--files={path}")
    assert line == "error: 0 documents: training needs one and validation another"


@pytest.mark.parametrize("command", ["fetch", "list", "verify"])
def test_a_mixture_of_nothing(base, monkeypatch, capsys, command):
    monkeypatch.setenv("NANOCHAT_DATASET", ",")
    assert "NANOCHAT_DATASET=',' has a place without a name" in dataset_command(capsys, command)


# --- training ----------------------------------------------------------------------------------------


@pytest.fixture
def own_data(tiny_run, monkeypatch) -> Path:
    """The folder of a data set of one's own, which the training scripts of this test use."""
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "mine")
    folder = tiny_run / "imported_data" / "mine"
    folder.mkdir(parents=True)
    return folder


def test_training_on_shards_without_a_text_column(own_data, capsys):
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"body": ["x"]}), own_data / name)
    assert "a.parquet has no column `text`, only body" in stage_command(capsys, "base_train")


def test_a_text_column_that_holds_numbers(own_data, capsys):
    for name in ("a.parquet", "b.parquet"):
        pq.write_table(pa.table({"text": [1, 2]}), own_data / name)
    for line in (stage_command(capsys, "base_train"), script(capsys, "tok_train", vocab_size=300)):
        assert "a.parquet: column `text` holds int64, not text" in line


def test_a_damaged_row_group_is_named(own_data, capsys):
    """Of a training shard in tok_train, base_train and verify, of the validation shard in base_eval."""
    groups = [[f"{group} text {i} of many words" for i in range(300)] for group in "123"]
    for name in ("a.parquet", "b.parquet"):
        write_shard(own_data / name, groups)
    run_here("base_train", num_iterations=1, eval_every=-1)
    damage_row_group(own_data / "b.parquet", 0)
    small = {"eval": "bpb", "device_batch_size": 2, "split_tokens": 1024, "device_type": "cpu"}
    assert f"{own_data / 'b.parquet'} is damaged: row group 0" in script(capsys, "base_eval", **small)
    damage_row_group(own_data / "a.parquet", 1)
    lines = [
        script(capsys, "tok_train", vocab_size=300),
        stage_command(capsys, "base_train", num_iterations=50, eval_every=-1, resume="never"),
    ]
    for line in lines:
        assert f"{own_data / 'a.parquet'} is damaged: row group 1 cannot be read (" in line
        assert "Delete the file and fetch, generate or import it again" in line
    assert "2 of 2 shards" in dataset_command(capsys, "verify")


def test_training_on_an_empty_data_set(own_data, capsys):
    for name in ("a.parquet", "b.parquet"):
        write_shard(own_data / name, [[]])
    assert "no document in a.parquet" in stage_command(capsys, "base_train", eval_every=-1)


def test_a_data_set_smaller_than_a_batch_is_read_again_and_again(own_data, tiny_run, capsys):
    for name in ("a.parquet", "b.parquet"):
        write_shard(own_data / name, [["one short text", "another"]])
    run_here("base_train", num_iterations=2, eval_every=1)
    assert (tiny_run / "base_checkpoints" / "t" / "model_000002.pt").exists()


def test_training_on_a_mixture_of_nothing(tiny_run, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "mine:1,,")
    line = stage_command(capsys, "base_train")
    assert "NANOCHAT_DATASET='mine:1,,'" in line


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ([{"role": "assistant", "content": "hello"}, {"role": "user", "content": "hi"}], "user"),
        ("not a list", "a line must be a list of messages, not str"),
    ],
)
def test_conversations_that_are_wrong(tiny_run, capsys, line, problem):
    """With file and line, before anything is trained."""
    run_here("base_train", num_iterations=1, eval_every=-1)
    world = tiny_run / "tinyworld"
    target = world.resolve()
    world.unlink()
    shutil.copytree(target, world)
    path = world / "identity_conversations.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0])) + "\n" + json.dumps(line) + "\n")
    message = stage_command(capsys, "mid_train")
    assert f"{path}:2: " in message and problem in message

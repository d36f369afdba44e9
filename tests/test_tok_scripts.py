"""tok_train and tok_eval on a small data set: the budget of text, the files, the report, life without network."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
import torch

from nanochat.checkpoint_manager import save_checkpoint, stage_dir
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer
from scripts import tok_eval, tok_train
from scripts.tok_samples import SAMPLES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    f"Document {i}: the cat number {i * 37} sat on the mat and then it ran away." for i in range(200)
]


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "fineweb-edu")
    (tmp_path / "base_data").mkdir()
    for part, shard in enumerate((0, 1822)):
        table = pa.table({"text": DOCUMENTS[part::2]})
        pq.write_table(table, tmp_path / "base_data" / f"shard_{shard:05d}.parquet", row_group_size=40)
    return tmp_path


@pytest.fixture
def offline(monkeypatch):
    def refuse(name: str) -> None:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", refuse)


def section(base: Path, slug: str) -> list:
    return json.loads((base / "report" / f"{slug}.json").read_text())["items"]


# --- training ----------------------------------------------------------------------------------------


def test_budget_ends_with_the_document_that_exceeds_it():
    batches = [["aaaa", "bb"], ["cccccccc", "d"], ["e"]]
    assert list(tok_train.capped_texts(batches, doc_cap=3, max_chars=7)) == ["aaa", "bb", "ccc"]
    assert list(tok_train.capped_texts(batches, doc_cap=3, max_chars=8)) == ["aaa", "bb", "ccc", "d"]
    assert list(tok_train.capped_texts(batches, doc_cap=99, max_chars=99)) == [
        "aaaa",
        "bb",
        "cccccccc",
        "d",
        "e",
    ]


@pytest.mark.parametrize(
    ("vocab_size", "problem"), [(264, "the smallest is 265"), (16_777_226, "the largest is 16,777,225")]
)
def test_vocabularies_that_cannot_be_are_refused_before_any_text_is_read(base, vocab_size, problem):
    with pytest.raises(UserError, match=problem):
        tok_train.main(tok_train.Config(vocab_size=vocab_size))


def test_training_is_that_of_the_train_split(base, capsys):
    tok_train.main(tok_train.Config(vocab_size=320))
    expected = RustBPETokenizer.train_from_iterator(DOCUMENTS[0::2], 320)
    assert get_tokenizer().vocabulary == expected.vocabulary
    output = capsys.readouterr().out
    assert "data: hub" in output and "trained 320 tokens in" in output
    assert "Reading texts" in output and logging.getLogger("rustbpe").level == logging.NOTSET
    settings, statistics = section(base, "tokenizer-training")
    assert settings == {"max_chars": 2_000_000_000, "doc_cap": 10_000, "vocab_size": 320}
    lengths = [len(token) for token in expected.vocabulary.ranks]
    mean = sum(lengths) / len(lengths)
    assert statistics["token_bytes_min"] == 1 and statistics["token_bytes_max"] == max(lengths)
    assert statistics["token_bytes_mean"] == pytest.approx(mean)
    variance = sum((length - mean) ** 2 for length in lengths) / (len(lengths) - 1)
    assert statistics["token_bytes_std"] == pytest.approx(variance**0.5)
    assert statistics["num_special_tokens"] == 9 and statistics["train_time"] > 0


def test_it_says_whose_tokenizer_it_replaces(base, capsys):
    tok_train.main(tok_train.Config(vocab_size=320))
    config = GPTConfig.modern(sequence_len=32, vocab_size=320, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    model = GPT.build(config, "cpu", torch.float32)
    for stage, tokenizer in (("base", get_tokenizer()), ("sft", get_tokenizer()), ("rl", None)):
        save_checkpoint(stage_dir(stage) / "d1", 1, model, {}, tokenizer=tokenizer)
    capsys.readouterr()
    tok_train.main(tok_train.Config(vocab_size=320))
    assert "replaces" not in capsys.readouterr().out, "it is the same one"
    tok_train.main(tok_train.Config(vocab_size=320, max_chars=1000))
    assert "this replaces the tokenizer of base d1, sft d1: these models keep" in capsys.readouterr().out
    tok_train.main(tok_train.Config(vocab_size=330))
    assert "replaces" not in capsys.readouterr().out, "no model has that one"


@pytest.mark.parametrize("wrong", [{"vocab_size": 264}, {"max_chars": 0}, {"doc_cap": -1}])
def test_impossible_settings_are_refused(base, wrong):
    with pytest.raises(UserError, match=next(iter(wrong)).replace("_", "-")):
        tok_train.main(tok_train.Config(**wrong))
    assert not (base / "tokenizer").exists()


def test_ctrl_c_leaves_no_file(base):
    text = " ".join(f"word{i} {i * i}" for i in range(2000))
    table = pa.table({"text": [f"{i} {text}" for i in range(1000)]})
    pq.write_table(table, base / "base_data" / "shard_00000.parquet", row_group_size=100)
    child = subprocess.Popen(
        [sys.executable, "-m", "scripts.tok_train", "--doc-cap=1000000"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells ignore it in the background
    )  # fmt: skip
    assert child.stdout is not None
    while "Reading texts" not in child.stdout.readline():
        assert child.poll() is None, child.communicate()[1]
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 130 and stderr.splitlines()[-1] == "interrupted"
    assert not (base / "tokenizer").exists()


# --- evaluation --------------------------------------------------------------------------------------


def test_evaluation_offline_measures_ours_alone(base, offline, capsys):
    tok_train.main(tok_train.Config(vocab_size=320))
    tok_eval.main(tok_eval.Config())
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "no comparison" in line] == [
        "no comparison with GPT-2 (ConnectionError) and GPT-4 (ConnectionError): "
        "tiktoken could not get the vocabulary"
    ]
    assert [line.split()[0] for line in lines if line[:4] in ("news", "fwe-")] == [
        "news",
        "fwe-train",
        "fwe-val",
    ]
    note, table, picture = section(base, "tokenizer-evaluation")
    assert note.startswith("no comparison with GPT-2 (ConnectionError) and GPT-4")
    row = next(line for line in table.splitlines() if line.startswith("| fwe-train"))
    text = "\n".join(DOCUMENTS[0:80:2])  # the first row group of the first shard
    num_tokens = len(get_tokenizer().encode(text))
    assert row == f"| fwe-train | {len(text):,} | {num_tokens:,} | {len(text) / num_tokens:.2f} |"
    png = base / "report" / picture.split("(")[1].split(")")[0]
    assert png.read_bytes().startswith(b"\x89PNG")


def test_evaluation_compares_with_the_baselines(base, monkeypatch, capsys):
    bytes_only = tiktoken.Encoding(
        "bytes",
        pat_str=r"[\s\S]",
        mergeable_ranks={bytes([byte]): byte for byte in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: bytes_only)
    tok_train.main(tok_train.Config(vocab_size=320))
    tok_eval.main(tok_eval.Config())
    assert "vocabulary: ours 320   GPT-2 257   GPT-4 257" in capsys.readouterr().out
    first, second, _ = section(base, "tokenizer-evaluation")
    assert first.startswith("### Comparison with GPT-2\n") and second.startswith(
        "### Comparison with GPT-4\n"
    )
    assert (
        "| Text Type | Bytes | GPT-2 Tokens | GPT-2 Ratio | Ours Tokens | Ours Ratio | Relative Diff % |"
        in first
    )
    num_bytes, ours = len(SAMPLES["news"].encode()), len(get_tokenizer().encode(SAMPLES["news"]))
    fewer = (num_bytes - ours) / num_bytes * 100
    assert (
        f"| {num_bytes:,} | {num_bytes:,} | 1.00 | {ours:,} | {num_bytes / ours:.2f} | +{fewer:.1f}% |"
        in first
    )


def test_a_silent_network_is_given_up(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: time.sleep(1.0))
    monkeypatch.setattr(tok_eval, "BASELINE_TIMEOUT_S", 0.05)
    assert tok_eval.load_baselines() == ({}, {"GPT-2": "too slow", "GPT-4": "too slow"})


def test_evaluation_without_data_uses_the_samples(base, offline, capsys):
    tok_train.main(tok_train.Config(vocab_size=320))
    for path in (base / "base_data").iterdir():
        path.unlink()
    tok_eval.main(tok_eval.Config())
    output = capsys.readouterr().out
    assert "no data rows" in output and "fwe-" not in output and "science" in output


def test_comparison_table_colours_the_better_side():
    sizes = {
        "worse": tok_eval.Size(100, 50),
        "better": tok_eval.Size(100, 20),
        "same": tok_eval.Size(100, 25),
    }
    theirs = {name: tok_eval.Size(100, 25) for name in sizes}
    plain = tok_eval.comparison_table("GPT-2", theirs, sizes, colour=False)
    assert "\x1b" not in plain
    rows = [line.split() for line in plain.splitlines()[3:]]
    assert [(row[0], row[-2], row[-1]) for row in rows] == [
        ("worse", "-100.0", "GPT-2"), ("better", "+20.0", "ours"), ("same", "+0.0", "tie"),
    ]  # fmt: skip
    worse, better, same = tok_eval.comparison_table("GPT-2", theirs, sizes, colour=True).splitlines()[3:]
    assert worse.index("\x1b[92m") < worse.index("\x1b[91m") and better.index("\x1b[91m") < better.index(
        "\x1b[92m"
    )
    assert "\x1b" not in same

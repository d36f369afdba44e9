"""Shards as the named sets have them: where they end, how they are stored, and that nothing is lost."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken

from dev.repackage_data_reference import Config, main, texts
from nanochat.common import UserError


def documents(count: int) -> list[str]:
    return [f"document {i} " + "x" * (i % 50) for i in range(count)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def repackage(tmp_path: Path, name: str = "in.parquet", **options) -> list[Path]:
    main(Config(out=str(tmp_path / "out"), files=str(tmp_path / name), **options))
    return sorted((tmp_path / "out").glob("*.parquet"))


def test_shards_end_at_full_row_groups_and_the_rest_is_written(tmp_path: Path):
    given = documents(5000)
    pq.write_table(pa.table({"text": given}), tmp_path / "in.parquet")
    shards = repackage(tmp_path, chars_per_shard=40_000)
    found = [pq.read_table(shard).column("text").to_pylist() for shard in shards]
    assert [len(part) for part in found] == [2048, 2048, 904]
    everything = [text for part in found for text in part]
    assert sorted(everything) == sorted(given) and everything != given
    for shard in shards:
        facts = pq.ParquetFile(shard).metadata
        column = facts.row_group(0).column(0)
        assert facts.row_group(0).num_rows <= 1024 and column.compression == "ZSTD"
        assert not column.is_stats_set and "DICTIONARY" not in " ".join(column.encodings)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    for shard, part, fact in zip(shards, found, manifest["files"], strict=True):
        assert fact["name"] == shard.name and fact["documents"] == len(part)
        assert fact["characters"] == sum(map(len, part))
        assert fact["sha256"] == sha256(shard.read_bytes()).hexdigest()


def test_the_order_is_that_of_the_seed(tmp_path: Path):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(30)))
    first = pq.read_table(repackage(tmp_path, "in.jsonl", limit=10)[0])
    assert first.num_rows == 10
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert pq.read_table(repackage(tmp_path, "in.jsonl", limit=10)[0]).equals(first)


def test_tokens_are_decoded(monkeypatch: pytest.MonkeyPatch):
    from dev.repackage_data_reference import Source

    bytes_as_tokens = tiktoken.Encoding("b", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})  # fmt: skip
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": bytes_as_tokens}[name])
    rows = [{"tokens": list("naïve".encode())}, {"tokens": []}]
    assert list(texts(rows, Source("x", tokens_field="tokens"))) == ["naïve", ""]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "climbmix"}, "either --source or --files"),
        ({"chars_per_shard": 0}, "must be positive"),
        ({"text_field": "body"}, "no column 'body', but text"),
        ({"upload": "me/set"}, "HF_TOKEN"),
    ],
)
def test_bad_input(tmp_path: Path, options, message, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    pq.write_table(pa.table({"text": documents(5)}), tmp_path / "in.parquet")
    with pytest.raises(UserError, match=message):
        repackage(tmp_path, **options)


def test_missing_and_broken_files_and_a_used_folder(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        repackage(tmp_path, "absent.parquet")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="--files"):
        repackage(tmp_path)
    (tmp_path / "out" / "kept").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        repackage(tmp_path)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["kept"]

"""Your own text as shards: nothing lost or doubled, shuffled, reproducible, small memory, clear errors."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset, text_import
from nanochat.common import UserError, read_json, remember_data_source
from nanochat.manifests import imported_set
from nanochat.text_import import Config, find_files, import_text, read_documents, write_shards
from tests.toy_data import damage_row_group, write_shard

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "mine")
    return tmp_path / "base"


def json_lines(texts: list[str], key: str = "text") -> str:
    return "".join(json.dumps({key: text, "id": i}) + "\n" for i, text in enumerate(texts))


def make_sources(folder: Path) -> list[str]:
    """Files of every kind; returns the documents in them."""
    texts = [f"document {i} \u00e9\U0001f600\nwith two lines" for i in range(300)]
    folder.mkdir()
    (folder / "a.jsonl").write_text(json_lines(texts[:100]) + "\n\n", encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(texts[100:150]).encode()))
    with pa.CompressedOutputStream(str(folder / "c.ndjson.zst"), "zstd") as file:
        file.write(json_lines(texts[150:200]).encode())
    pq.write_table(pa.table({"x": [1] * 98, "text": texts[200:298]}), folder / "d.parquet", row_group_size=9)
    (folder / "deep").mkdir()
    (folder / "deep" / "e.txt").write_text(texts[298], encoding="utf-8")
    (folder / "deep" / "f.md").write_text(texts[299], encoding="utf-8")
    (folder / "deep" / "empty.txt").write_text(" \n")
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    return texts


def stored(split: str) -> list[str]:
    return [text for batch in dataset.parquets_iter_batched(split) for text in batch]


def test_every_document_of_every_kind_of_file_is_there_once(tmp_path, base, capsys):
    texts = make_sources(tmp_path / "src")
    import_text(Config(name="mine", files=str(tmp_path / "src"), chars_per_shard=3000, val_share=0.05))
    train, held_out = stored("train"), stored("val")
    assert sorted(train + held_out) == sorted(texts)
    assert 3 <= len(held_out) <= 40
    assert train != sorted(train) and len(dataset.list_parquet_files()) > 3
    # shuffled over the files, not only within them
    assert len({texts.index(text) // 100 for text in train[:30]}) == 3
    folder = imported_set("mine").path
    record = read_json(folder / "manifest.json")
    assert sum(fact["documents"] for fact in record["files"]) == 300
    for fact in record["files"]:
        data = (folder / fact["name"]).read_bytes()
        assert (len(data), sha256(data).hexdigest()) == (fact["bytes"], fact["sha256"])
    assert sorted(path.name for path in folder.parent.iterdir()) == ["mine"], "something temporary is left"
    assert "300 documents" in capsys.readouterr().out
    with pytest.raises(UserError, match="exists already"):
        import_text(Config(name="mine", files=str(tmp_path / "src")))


def test_what_was_imported_is_used_in_a_folder_that_remembers_other_data(tmp_path, base, monkeypatch, capsys):
    remember_data_source("tinyworld")
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    (tmp_path / "two.jsonl").write_text(json_lines(["a", "b"]))
    import_text(Config(name="mine", files=str(tmp_path / "two.jsonl")))
    hint = "to use: NANOCHAT_DATASET=mine python -m scripts.base_train, without NANOCHAT_DATA=tinyworld\n"
    assert hint in capsys.readouterr().out
    monkeypatch.delenv("NANOCHAT_DATA")
    assert sorted(stored("train") + stored("val")) == ["a", "b"]


def test_the_same_seed_gives_the_same_shards(tmp_path):
    made = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        documents = (f"text {i}" for i in range(200))
        made.append([f["sha256"] for f in write_shards(documents, tmp_path / name, 2000, 400, 0.1, seed)])
    assert made[0] == made[1] != made[2]


def test_memory_holds_a_bucket_not_the_text(tmp_path):
    """60 MB of text in shards of 2 MB, in a process of its own, whose memory is measured."""
    code = (
        "import resource, sys; from pathlib import Path; from nanochat.text_import import write_shards\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "texts = (f'{i:09d} ' + 'abcdefghi ' * 999 for i in range(6_000))\n"
        "facts = write_shards(texts, Path(sys.argv[1]), 60_000_000, 2_000_000)\n"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "print(sum(f['documents'] for f in facts), grown * (1 if sys.platform == 'darwin' else 1024))\n"
    )
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    documents, grown = map(int, done.stdout.split())
    assert documents == 6_000 and grown < 30e6, f"memory grew by {grown / 1e6:.0f} MB for 60 MB of text"


def test_two_documents_are_enough_and_one_is_not(tmp_path, base):
    (tmp_path / "two.jsonl").write_text(json_lines(["a", "b"]))
    import_text(Config(name="mine", files=str(tmp_path / "two.jsonl")))
    assert {len(stored("train")), len(stored("val"))} == {1}
    (tmp_path / "one.txt").write_text("alone")
    with pytest.raises(UserError, match="1 documents: training needs one and validation another"):
        import_text(Config(name="other", files=str(tmp_path / "one.txt")))
    assert not imported_set("other").path.exists()


@pytest.mark.parametrize("total", [1, 90, 149, 151, 260, 1000])
def test_a_bucket_becomes_shards_of_like_size(total):
    texts = ["x" * (1 + i % 3) for i in range(total)]
    parts = list(text_import._parts(texts, 100))
    assert [text for part in parts for text in part] == texts
    sizes = [sum(map(len, part)) for part in parts]
    assert len(parts) == max(1, round(sum(sizes) / 100)) and max(sizes) - min(sizes) <= 6
    assert list(text_import._parts([], 100)) == []


def test_long_text_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(text_import, "TEXT_CHARS", 50)
    text = "".join(f"line {i}\r\n" for i in range(30)) + "end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(read_documents(tmp_path / "a.txt", "text"))
    assert "".join(pieces) == text and len(pieces) > 3
    assert all(piece.endswith("\n") for piece in pieces[:-1])


def test_another_field_and_lone_surrogates(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "half \\ud83d"}\n{"body": "b"}\n{"body": "c"}\n')
    texts = read_documents(tmp_path / "a.jsonl", "body")
    (tmp_path / "out").mkdir()
    facts = write_shards(texts, tmp_path / "out", 100, 100)
    assert sum(fact["documents"] for fact in facts) == 3


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', r"a\.jsonl:3: no text under 'text', but keys body"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl:1: no text under 'text', but a list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', r"a\.jsonl:2: no text under 'text', but null"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: not UTF-8: invalid start byte"),
        ("a.jsonl", b'{"text": "x"}\r\n' * 4000 + b"\xff", r"a\.jsonl:4001: not UTF-8"),
        ("a.txt", b"two\nlines of \xc3\xa9\n" * 3000 + b"\xc3(", r"a\.txt:6001: not UTF-8"),
        ("a.md.gz", gzip.compress(b"x" * 20_000 + b"\n\xff"), r"a\.md\.gz:2: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9000)[:-20], r"a\.jsonl\.gz: damaged after line"),
        ("a.parquet", b"PAR1 nonsense", r"cannot read .*a\.parquet"),
        ("a.csv", b"text", r"a\.csv is none of \.parquet, \.jsonl"),
    ],
)
def test_broken_files_are_named_with_line_and_reason(tmp_path, base, name, content, problem):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=problem):
        import_text(Config(name="mine", files=str(tmp_path / name)))
    assert not imported_set("mine").path.exists()


def test_a_parquet_file_without_the_column(tmp_path, base):
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has no column `text`, only body, n"):
        import_text(Config(name="mine", files=str(tmp_path / "a.parquet")))
    with pytest.raises(UserError, match=r"a\.parquet: column `n` holds int64, not text"):
        import_text(Config(name="mine", files=str(tmp_path / "a.parquet"), text_field="n"))


def test_a_parquet_file_with_a_damaged_row_group(tmp_path, base):
    groups = [[f"document {i} of {group}" for i in range(99)] for group in "ab"]
    path = write_shard(tmp_path / "a.parquet", groups)
    damage_row_group(path, 1)
    with pytest.raises(UserError, match=r"a\.parquet is damaged: row group 1 cannot be read"):
        import_text(Config(name="mine", files=str(path)))


def test_nothing_to_read_and_bad_settings(tmp_path, base):
    with pytest.raises(UserError, match="nothing to read"):
        find_files([str(tmp_path)])
    with pytest.raises(UserError, match="does not exist"):
        find_files([str(tmp_path / "none")])
    for both in ({}, {"files": "x", "hub": "y"}):
        with pytest.raises(UserError, match="give either --files or --hub"):
            import_text(Config(name="mine", **both))
    for wrong in ("climbmix", "../up", ""):
        with pytest.raises(UserError, match="must be new"):
            import_text(Config(name=wrong, files="x"))
    with pytest.raises(
        UserError, match="is unknown; use climbmix, fineweb-edu, tinyworld, or import text under this name"
    ):
        dataset.split_files("train")


def test_a_disk_that_is_too_full_is_said_before_anything_is_written(tmp_path, base, monkeypatch):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setattr(text_import, "_unpacked_bytes", lambda path: 10**18)
    with pytest.raises(UserError, match=r"1300000000\.0 GB are to come"):
        import_text(Config(name="mine", files=str(tmp_path / "a.txt")))


# --- Hugging Face data sets --------------------------------------------------------------------------


def save_hub_folder(folder: Path, texts: list) -> None:
    """A data set as the hub holds it: parquet files in data/, several of them."""
    (folder / "data").mkdir(parents=True)
    half = len(texts) // 2
    for index, part in enumerate((texts[:half], texts[half:])):
        table = pa.table({"id": range(len(part)), "body": part})
        pq.write_table(table, folder / "data" / f"train-{index:05d}-of-00002.parquet", row_group_size=50)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """The library `datasets` with its caches here and the hub out of reach."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def test_a_hugging_face_data_set_is_streamed_into_shards(tmp_path, base, no_network):
    texts = [f"text {i} " + "x" * 20 for i in range(400)]
    save_hub_folder(tmp_path / "set", [*texts, None, " "])
    import_text(
        Config(
            name="mine", hub=str(tmp_path / "set"), text_field="body", chars_per_shard=2000, val_share=0.05
        )
    )
    assert sorted(stored("train") + stored("val")) == sorted(texts)
    assert 4 <= len(dataset.list_parquet_files()) <= 9, "shards are of the size asked for, not one per bucket"
    assert "split train" in read_json(imported_set("mine").path / "manifest.json")["sources"][0]


def test_what_is_wrong_with_a_hugging_face_data_set(tmp_path, base, no_network):
    save_hub_folder(tmp_path / "set", ["a", "b", "c"])
    source = str(tmp_path / "set")
    with pytest.raises(UserError, match="row 0 has no text under 'text', but id, body; see --text-field"):
        import_text(Config(name="mine", hub=source))
    with pytest.raises(UserError, match="no text under 'id'"):
        import_text(Config(name="mine", hub=source, text_field="id"))
    with pytest.raises(UserError, match=r"--hub=.*(split|train)"):
        import_text(Config(name="mine", hub=source, split="validation", text_field="body"))
    with pytest.raises(UserError, match="--hub=nobody/nothing: "):
        import_text(Config(name="mine", hub="nobody/nothing"))
    assert not imported_set("mine").path.exists()

from __future__ import annotations

from itertools import chain
from pathlib import Path

import pytest

from nanochat import dataset
from nanochat.common import UserError, remember_data_source
from nanochat.dataset import list_parquet_files, parquets_iter_batched, split_files
from tests.toy_data import write_shard


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA", raising=False)
    monkeypatch.delenv("NANOCHAT_DATASET", raising=False)
    return tmp_path


def _names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


# --- splits ------------------------------------------------------------------------------------------


def test_the_last_file_by_name_is_validation(tmp_path):
    for name in ("b.parquet", "c.parquet", "a.parquet", "d.parquet.tmp", "e.txt"):
        write_shard(tmp_path / name, [["x"]])
    assert _names(split_files("train", tmp_path)) == ["a.parquet", "b.parquet"]
    assert _names(split_files("val", tmp_path)) == ["c.parquet"]


@pytest.mark.parametrize("split", ["train", "val"])
def test_fewer_than_two_files_are_an_error(tmp_path, split):
    with pytest.raises(UserError, match=r"no parquet file in .*; run: python -m nanochat\.dataset -n 8"):
        split_files(split, tmp_path)
    with pytest.raises(UserError, match="no parquet file"):
        split_files(split, tmp_path / "missing")
    write_shard(tmp_path / "shard_00000.parquet", [["x"]])
    with pytest.raises(UserError, match=r"only shard_00000\.parquet"):
        split_files(split, tmp_path)


@pytest.mark.parametrize(
    ("name", "folder", "pinned"),
    [("climbmix", "base_data_climbmix", "shard_06542"), ("fineweb-edu", "base_data", "shard_01822")],
)
def test_sets_of_the_hub_insist_on_their_pinned_validation_shard(base, monkeypatch, name, folder, pinned):
    monkeypatch.setenv("NANOCHAT_DATASET", name)
    for index in (0, 1):
        write_shard(base / folder / f"shard_{index:05d}.parquet", [["x"]])
    with pytest.raises(UserError, match=rf"validation shard {pinned}\.parquet is missing"):
        split_files("train")
    write_shard(base / folder / f"{pinned}.parquet", [["x"]])
    assert _names(split_files("val")) == [f"{pinned}.parquet"]
    assert len(split_files("train")) == 2


def test_own_files_need_no_pinned_shard(base):
    for name in ("mine_1.parquet", "mine_2.parquet"):
        write_shard(base / "base_data_climbmix" / name, [["x"]])
    assert _names(split_files("val")) == ["mine_2.parquet"]


def test_older_fineweb_shards_are_used_with_a_notice(base, capsys):
    for index in (0, 1):
        write_shard(base / "base_data" / f"shard_{index:05d}.parquet", [["x"]])
    assert len(list_parquet_files()) == 2
    assert not capsys.readouterr().err
    assert _names(split_files("val", warn_on_legacy=True)) == ["shard_00001.parquet"]
    assert "python -m nanochat.dataset -n 170" in capsys.readouterr().err


def test_the_source_decides_about_the_folder(base, monkeypatch):
    assert dataset.data_folders() == [base / "base_data_climbmix"]
    monkeypatch.setenv("NANOCHAT_DATASET", "fineweb-edu")
    assert dataset.data_folders() == [base / "base_data"]
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert dataset.data_folders() == [base / "tinyworld" / "base_data"]
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "pile")
    with pytest.raises(UserError, match="use climbmix, fineweb-edu, tinyworld, or import text"):
        dataset.data_folders()
    assert not (base / "base_data").exists()


def test_a_set_that_is_asked_for_beats_what_the_folder_remembers(base, monkeypatch):
    remember_data_source("tinyworld")
    assert dataset.data_folders() == [base / "tinyworld" / "base_data"]
    write_shard(base / "imported_data" / "mine" / "a.parquet", [["x"]])
    monkeypatch.setenv("NANOCHAT_DATASET", "mine")
    assert dataset.data_folders() == [base / "imported_data" / "mine"]
    for wrong, problem in (("foo", "'foo' is unknown"), ("climbmix:abc", "'abc' is no positive number")):
        monkeypatch.setenv("NANOCHAT_DATASET", wrong)
        with pytest.raises(UserError, match=problem):
            dataset.data_folders()


# --- mixtures ----------------------------------------------------------------------------------------


def test_a_mixture_has_shares_that_add_up_and_files_of_all_sets(base, monkeypatch):
    for name, count in (("mine", 2), ("other", 3)):
        for index in range(count):
            write_shard(base / "imported_data" / name / f"{name}_{index}.parquet", [["x"]])
    monkeypatch.setenv("NANOCHAT_DATASET", "mine:3, other:1")
    shares = {named.name: share for named, share in dataset.data_sets_in_use().items()}
    assert shares == {"mine": 0.75, "other": 0.25}
    assert _names(split_files("train")) == ["mine_0.parquet", "other_0.parquet", "other_1.parquet"]
    assert _names(split_files("val")) == ["mine_1.parquet", "other_2.parquet"]
    monkeypatch.setenv("NANOCHAT_DATASET", "mine:1,other:1,climbmix:1")
    with pytest.raises(UserError, match=r"no parquet file in .*base_data_climbmix"):
        split_files("train")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (",", "has a place without a name"),
        ("climbmix:0.7,", "has a place without a name"),
        ("climbmix,tinyworld", "the weight '' is no positive number; as in a:0.7,b:0.3"),
        ("climbmix:0,tinyworld:1", "the weight '0' is no positive number"),
        ("climbmix:-1,tinyworld:1", "the weight '-1' is no positive number"),
        ("climbmix:nan,tinyworld:1", "the weight 'nan' is no positive number"),
        ("climbmix:1,climbmix:2", "names climbmix twice"),
        ("climbmix:1,pile:2", "'pile' is unknown; use climbmix, fineweb-edu, tinyworld, or import text"),
    ],
)
def test_mixtures_that_make_no_sense(base, monkeypatch, text, problem):
    monkeypatch.setenv("NANOCHAT_DATASET", text)
    with pytest.raises(UserError, match=problem):
        dataset.data_sets_in_use()


def test_the_text_of_a_mixture_comes_in_its_shares(base, monkeypatch):
    """For the tokenizer: 3 to 1 in characters, and when one set has ended the rest of the other."""
    for name, length, count in (("mine", 10, 30), ("other", 40, 30)):
        groups = [[name[0] * length] for _ in range(count)]
        write_shard(base / "imported_data" / name / "a.parquet", groups)
        write_shard(base / "imported_data" / name / "b.parquet", [["val"]])
    monkeypatch.setenv("NANOCHAT_DATASET", "mine:3,other:1")
    texts = [text for batch in parquets_iter_batched("train") for text in batch]
    assert len(texts) == 60
    first = "".join(texts[:26])  # two of the other set for every 24 of this one
    assert first.count("m") == 3 * first.count("o") == 240


# --- reading -----------------------------------------------------------------------------------------


def test_ranks_cover_all_row_groups_once(tmp_path):
    groups = [[f"{file}{group}{row}" for row in range(3)] for file in range(2) for group in range(5)]
    write_shard(tmp_path / "a.parquet", groups[:5])
    write_shard(tmp_path / "b.parquet", groups[5:])
    write_shard(tmp_path / "c.parquet", [["val"]])
    assert list(parquets_iter_batched("train", data_dir=tmp_path)) == groups
    ranks = [list(parquets_iter_batched("train", r, 3, data_dir=tmp_path)) for r in range(3)]
    assert sorted(chain(*ranks)) == sorted(groups)
    assert list(parquets_iter_batched("val", data_dir=tmp_path)) == [["val"]]


def test_missing_texts_become_empty_documents(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a", None], "id": [1, 2]}), tmp_path / "a.parquet")
    write_shard(tmp_path / "b.parquet", [["x"]])
    assert list(parquets_iter_batched("train", data_dir=tmp_path)) == [["a", ""]]

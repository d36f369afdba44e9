"""Downloads: once, whole, patient with the network; and the order of hub rows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import download
from nanochat.common import UserError
from nanochat.hub import HubDataset, data_file, download_file_with_lock, load_hub_dataset
from tests.hub_server import HubServer, serving

ROOT = Path(__file__).parents[1]


def parquet_bytes(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "BACKOFF_S", 0.01)


def offer_dataset(server: HubServer, num_files: int = 2) -> str:
    listing = "/api/datasets/owner/name/parquet/default/train"
    urls = []
    for index in range(num_files):
        path = f"/files/{index}.parquet"
        server.files[path] = parquet_bytes([{"n": 10 * index + row} for row in range(3)])
        urls.append(server.url + path)
    server.files[listing] = json.dumps(urls).encode()
    return listing


# --- the rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "first"),
    [
        (10, [5, 6, 0, 7, 3, 2, 4, 9, 1, 8]),
        (164, [52, 134, 51, 66, 147]),
        (1319, [30, 754, 429, 1010, 1284]),
        (14042, [1469, 122, 5555, 7550, 10165]),
    ],
)
def test_shuffle_with_seed_42_gives_the_golden_order(num_rows, first):
    original = HubDataset(pa.table({"n": range(num_rows)}))
    shuffled = original.shuffle(seed=42)
    assert [shuffled[i]["n"] for i in range(len(first))] == first
    assert original[0] == {"n": 0} and len(shuffled) == num_rows


def test_shuffling_twice_permutes_the_permutation():
    rows = HubDataset(pa.table({"n": range(10)}))
    once = rows.shuffle(1)
    twice = once.shuffle(2)
    order = [rows.shuffle(2)[i]["n"] for i in range(10)]
    assert [twice[i]["n"] for i in range(10)] == [once[k]["n"] for k in order]


@pytest.mark.parametrize("index", [-1, 3])
def test_rows_outside_are_an_index_error(index):
    with pytest.raises(IndexError):
        HubDataset(pa.table({"n": range(3)}))[index]


# --- downloading -------------------------------------------------------------------------------------


def test_dataset_is_downloaded_once_and_concatenated_in_order(server, monkeypatch):
    listing = offer_dataset(server)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for _ in range(2):
        rows = load_hub_dataset("owner/name")
        assert [rows[i]["n"] for i in range(len(rows))] == [0, 1, 2, 10, 11, 12]
    assert server.hits == {listing: 1, "/files/0.parquet": 1, "/files/1.parquet": 1}


def test_half_a_file_is_never_read(server, monkeypatch, tmp_path):
    offer_dataset(server)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.faults["/files/1.parquet"] = ["cut"] * 99
    with pytest.raises(UserError, match="cannot download"):
        load_hub_dataset("owner/name")
    folder = tmp_path / "base" / "task_data" / "owner--name" / "default" / "train"
    assert [path.name for path in folder.glob("*.parquet")] == ["00000.parquet"]
    server.faults.clear()
    assert len(load_hub_dataset("owner/name")) == 6


def test_interrupted_download_continues_with_the_missing_file(server, monkeypatch):
    offer_dataset(server)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.faults["/files/1.parquet"] = ["403"]
    with pytest.raises(UserError, match="403"):
        load_hub_dataset("owner/name")
    assert len(load_hub_dataset("owner/name")) == 6
    assert server.hits["/files/0.parquet"] == 1


def test_two_processes_download_once(server, tmp_path):
    offer_dataset(server)
    code = "from nanochat.hub import load_hub_dataset as load; print(len(load('owner/name')))"
    environment = {
        "NANOCHAT_BASE_DIR": str(tmp_path / "base"), "HF_ENDPOINT": server.url, "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    processes = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0].decode() for process in processes]
    assert [output.splitlines()[-1] for output in outputs] == ["6", "6"]
    assert set(server.hits.values()) == {1}


def test_postprocessing_happens_before_the_file_appears(server, tmp_path):
    server.files["/file"] = b"body"
    target = tmp_path / "file"
    seen = []

    def postprocess(part: Path) -> None:
        seen.append((part.read_bytes(), target.exists()))

    download_file_with_lock(f"{server.url}/file", target, postprocess)
    download_file_with_lock(f"{server.url}/file", target, postprocess)
    assert seen == [(b"body", False)] and target.read_bytes() == b"body"


# --- what is there, and what is not ------------------------------------------------------------------


def test_embedded_source_never_downloads(server, monkeypatch):
    offer_dataset(server)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    with pytest.raises(UserError, match=r"python -m nanochat\.tinyworld"):
        load_hub_dataset("owner/name")
    with pytest.raises(UserError, match=r"python -m nanochat\.tinyworld"):
        data_file("words_alpha.txt", f"{server.url}/words")
    assert not server.hits


def test_present_file_needs_no_network(tmp_path):
    path = tmp_path / "base" / "words_alpha.txt"
    path.parent.mkdir()
    path.write_text("apple\n")
    assert data_file("words_alpha.txt", "http://127.0.0.1:9/words") == path


def test_damaged_rows_name_their_folder(tmp_path):
    folder = tmp_path / "base" / "task_data" / "owner--name" / "default" / "train"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('["00000.parquet"]')
    (folder / "00000.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="owner--name/default/train is damaged"):
        load_hub_dataset("owner/name")
    (folder / "00000.parquet").unlink()
    with pytest.raises(UserError, match="damaged"):
        load_hub_dataset("owner/name")

"""Downloads: once, whole, patient with the network; and the order of hub rows."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import hub
from nanochat.common import UserError
from nanochat.hub import HubDataset, data_file, download_file_with_lock, load_hub_dataset

ROOT = Path(__file__).parents[1]


def parquet_bytes(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Server:
    """A web server on localhost with some files, and faults for the first requests of a path."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.hits: Counter[str] = Counter()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.hits[request.path] += 1
        faults = self.faults.get(request.path)
        fault = faults.pop(0) if faults else ""
        if fault.isdigit() or request.path not in self.files:
            request.send_error(int(fault or 404))
            return
        body = self.files[request.path]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "BACKOFF_S", 0.01)


def offer_dataset(server: Server, num_files: int = 2) -> str:
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


@pytest.mark.parametrize("faults", [["503", "429"], ["cut"], ["cut", "500", "cut"]])
def test_network_trouble_is_retried(server, tmp_path, faults):
    body = bytes(range(256)) * 100
    server.files["/file"] = body
    server.faults["/file"] = list(faults)
    path = download_file_with_lock(f"{server.url}/file", tmp_path / "file")
    assert path.read_bytes() == body
    assert server.hits["/file"] == len(faults) + 1


def test_a_refusal_is_not_retried_and_leaves_nothing(server, tmp_path):
    with pytest.raises(UserError, match="404"):
        download_file_with_lock(f"{server.url}/nothing", tmp_path / "file")
    assert server.hits["/nothing"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_giving_up_is_a_user_error_and_leaves_nothing(server, tmp_path):
    server.files["/file"] = b"x" * 1000
    server.faults["/file"] = ["cut"] * hub.ATTEMPTS
    with pytest.raises(UserError, match="cannot download"):
        download_file_with_lock(f"{server.url}/file", tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_nobody_listening_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="ConnectionError"):
        download_file_with_lock("http://127.0.0.1:9/file", tmp_path / "file")


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

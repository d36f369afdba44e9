from __future__ import annotations

import http.server
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

import pytest

from nanochat import dataset, hub
from nanochat.common import UserError
from nanochat.dataset import HubShards, list_parquet_files, parquets_iter_batched, split_files
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


def test_climbmix_insists_on_its_pinned_validation_shard(base):
    folder = base / "base_data_climbmix"
    for index in (0, 1):
        write_shard(folder / f"shard_{index:05d}.parquet", [["x"]])
    with pytest.raises(UserError, match=r"validation shard shard_06542\.parquet is missing"):
        split_files("train")
    write_shard(folder / "shard_06542.parquet", [["x"]])
    assert _names(split_files("val")) == ["shard_06542.parquet"]
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
    assert dataset.default_data_dir() == base / "base_data_climbmix"
    monkeypatch.setenv("NANOCHAT_DATASET", "fineweb-edu")
    assert dataset.default_data_dir() == base / "base_data"
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert dataset.default_data_dir() == base / "tinyworld" / "base_data"
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    monkeypatch.setenv("NANOCHAT_DATASET", "pile")
    with pytest.raises(UserError, match="climbmix or fineweb-edu"):
        dataset.default_data_dir()
    assert not (base / "base_data").exists()


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


# --- downloading -------------------------------------------------------------------------------------


class _Server(http.server.ThreadingHTTPServer):
    """Serves files by name; each name has a list of faults that its first answers suffer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.requests.append(name)
        faults = self.server.faults.get(name)
        fault = faults.pop(0) if faults else ""
        if fault.isdigit() or name not in self.server.files:
            self.send_error(int(fault or 404))
            return
        body = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(hub, "BACKOFF_S", 0.0)
    server = _Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def _serve(server: _Server, monkeypatch, last_shard: int) -> HubShards:
    shards = HubShards("climbmix", server.url, last_shard, "base_data_climbmix")
    for index in range(last_shard + 1):
        server.files[shards.file_name(index)] = bytes([index]) * 5000
    monkeypatch.setattr(dataset, "CLIMBMIX", shards)
    monkeypatch.setattr(dataset, "HUB_SHARDS", {"climbmix": shards})
    return shards


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.suffix != ".lock"}


def test_the_validation_shard_is_always_fetched(base, server, monkeypatch, capsys):
    shards = _serve(server, monkeypatch, last_shard=5)
    dataset.main(dataset.Config(num_files=2))
    assert _contents(base / shards.folder) == {
        shards.file_name(index): server.files[shards.file_name(index)] for index in (0, 1, 5)
    }
    assert "data source: hub, climbmix: 2 training shards" in capsys.readouterr().out
    server.requests.clear()
    dataset.main(dataset.Config(num_files=3, num_workers=1))
    assert server.requests == [shards.file_name(2)], "what is there is not fetched again"
    dataset.main(dataset.Config())
    assert len(_contents(base / shards.folder)) == 6


@pytest.mark.parametrize("faults", [["503", "429"], ["cut"], ["cut", "500", "cut"]])
def test_passing_faults_end_in_the_right_file(base, server, monkeypatch, faults):
    shards = _serve(server, monkeypatch, last_shard=1)
    server.faults[shards.file_name(0)] = list(faults)
    dataset.main(dataset.Config(num_files=1))
    folder = base / shards.folder
    assert _contents(folder) == {name: server.files[name] for name in server.files}
    assert server.requests.count(shards.file_name(0)) == len(faults) + 1


@pytest.mark.parametrize("faults", [["cut"] * 9, ["503"] * 9, ["404"]])
def test_lasting_faults_fail_and_leave_nothing_half_written(base, server, monkeypatch, faults):
    shards = _serve(server, monkeypatch, last_shard=1)
    server.faults[shards.file_name(0)] = list(faults)
    with pytest.raises(UserError, match=r"1 shards could not be fetched .* NANOCHAT_DATA=tinyworld"):
        dataset.main(dataset.Config(num_files=1))
    assert list(_contents(base / shards.folder)) == [shards.file_name(1)]


def test_a_failed_download_exits_with_a_status(tmp_path):
    environment = {"NANOCHAT_BASE_DIR": str(tmp_path), "PATH": "", "NANOCHAT_DATA": "hub"}
    code = (
        "from nanochat import dataset, hub; from nanochat.configurator import run\n"
        "hub.BACKOFF_S = 0\n"
        "dataset.HUB_SHARDS = {'climbmix': dataset.HubShards('climbmix', 'http://127.0.0.1:9', 1, 'd')}\n"
        "run(dataset.Config, dataset.main, ['-n', '1'])"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "error: 2 shards could not be fetched" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_embedded_source_is_generated_once(base, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    from nanochat.tinyworld.sizes import SMALLEST_CHARS

    dataset.main(dataset.Config(chars=SMALLEST_CHARS))
    out = capsys.readouterr().out
    assert "data source: tinyworld, seed 0" in out and "already there" not in out
    assert all(any(texts) for texts in parquets_iter_batched("val"))
    dataset.main(dataset.Config(chars=SMALLEST_CHARS))
    assert "already there" in capsys.readouterr().out

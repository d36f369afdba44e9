"""python -m nanochat.dataset against a server that speaks the hub's HTTP: fetch, list, verify, import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat import dataset_commands, download
from nanochat.common import UserError, read_json
from nanochat.dataset import parquets_iter_batched
from nanochat.dataset_commands import (
    FetchConfig,
    ListConfig,
    VerifyConfig,
    fetch_files,
    list_sets,
    verify_files,
)
from nanochat.manifests import CLIMBMIX, FINEWEB_EDU, TINYWORLD
from tests.hub_server import HubServer, serving

ROOT = Path(__file__).parents[1]
SHARDS = [CLIMBMIX.file_name(index) for index in (0, 1, 2, CLIMBMIX.last_shard)]
LIST = f"/api/datasets/{CLIMBMIX.repo}/tree/main"


@pytest.fixture
def server():
    with serving() as server:
        server.offer(CLIMBMIX.repo, {name: bytes([i]) * (3 << 20) for i, name in enumerate(SHARDS)})
        yield server


@pytest.fixture
def folder(tmp_path, monkeypatch, server) -> Path:
    """Where the shards go."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for name in ("NANOCHAT_DATA", "NANOCHAT_DATASET", "HF_HUB_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    return tmp_path / CLIMBMIX.folder


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.parquet")}


def served(server: HubServer, *indices: int) -> dict[str, bytes]:
    return {SHARDS[i]: server.files[f"/store/{SHARDS[i]}"] for i in indices}


def test_fetch_takes_what_is_missing_and_always_the_validation_shard(server, folder, capsys):
    fetch_files(FetchConfig(num_files=2))
    assert shards(folder) == served(server, 0, 1, 3)
    out = capsys.readouterr().out
    assert "climbmix: 2 training shards" in out and "licence: CC BY-NC" in out
    assert "3 of 3 files, 0.01 of 0.01 GB" in out
    server.hits.clear()
    fetch_files(FetchConfig(num_files=2))
    assert not server.hits, "what is here needs no network"
    fetch_files(FetchConfig(num_files=3, num_workers=1))
    assert shards(folder) == served(server, 0, 1, 2, 3)
    assert LIST not in server.hits, "the list is kept"
    record = read_json(folder / "manifest.json")
    assert record["repo"] == CLIMBMIX.repo and [file["name"] for file in record["files"]] == SHARDS


@pytest.mark.parametrize(
    "faults", [["503", "429"], ["cut"], ["cut", "500", "cut"], ["wrong"], ["nolength"]], ids="-".join
)
def test_passing_faults_end_in_the_right_files(server, folder, faults):
    server.faults[f"/store/{SHARDS[0]}"] = list(faults)
    server.faults[LIST] = ["503"]
    fetch_files(FetchConfig(num_files=1))
    assert shards(folder) == served(server, 0, 3)


@pytest.mark.parametrize("fault", ["503", "404", "wrong"])
def test_lasting_faults_fail_and_spare_the_other_files(server, folder, capsys, fault):
    server.faults[f"/store/{SHARDS[0]}"] = [fault] * 99
    with pytest.raises(
        UserError, match=r"1 shards could not be fetched from http.*run again.*NANOCHAT_DATA=tinyworld"
    ):
        fetch_files(FetchConfig(num_files=1))
    assert shards(folder) == served(server, 3)
    assert f"{SHARDS[0]}: " in capsys.readouterr().err


def test_a_mirror_without_a_list(server, folder):
    """Size and hash then come with the answers, and are recorded."""
    del server.lists[LIST]
    fetch_files(FetchConfig(num_files=1))
    assert shards(folder) == served(server, 0, 3)
    assert [file["name"] for file in read_json(folder / "manifest.json")["files"]] == [SHARDS[0], SHARDS[3]]
    verify_files(VerifyConfig())


def test_verify_finds_damage_without_network(server, folder, monkeypatch, capsys):
    with pytest.raises(UserError, match="no shard in"):
        verify_files(VerifyConfig())
    fetch_files(FetchConfig(num_files=2))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    verify_files(VerifyConfig())
    assert "3 shards in" in capsys.readouterr().out
    (folder / SHARDS[0]).write_bytes(b"x" * (3 << 20))
    (folder / SHARDS[1]).write_bytes(b"short")
    with pytest.raises(UserError, match=f"2 of 3 shards .* damaged: {SHARDS[0]}, {SHARDS[1]}; delete them"):
        verify_files(VerifyConfig())
    out = capsys.readouterr().out
    assert f"{SHARDS[0]}: its SHA-256 is" in out and f"{SHARDS[1]}: 5 bytes instead of" in out


def test_offline_is_one_clear_line(server, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set, but .* is not here yet"):
        fetch_files(FetchConfig(num_files=1))
    assert not server.hits


def test_a_small_disk_is_said_before_anything_is_fetched(server, folder, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5 << 20))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"0\.0 GB free, but 0\.0 GB are to come"):
        fetch_files(FetchConfig(num_files=2))
    assert not any(path.startswith("/store") for path in server.hits)


def test_list_shows_licence_and_what_is_here(server, folder, monkeypatch, capsys):
    fetch_files(FetchConfig(num_files=1))
    (folder.parent / "imported_data" / "mine").mkdir(parents=True)
    capsys.readouterr()
    list_sets(ListConfig())
    out = capsys.readouterr().out
    assert "* climbmix" in out and "2 of 6,543 files here, 0.01 GB" in out
    assert "  fineweb-edu" in out and "0 of 1,823 files" in out and "ODC-By" in out
    assert "  tinyworld" in out and "  mine" in out
    monkeypatch.setenv("NANOCHAT_DATASET", FINEWEB_EDU.name)
    list_sets(ListConfig())
    assert "* fineweb-edu" in capsys.readouterr().out


def run_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "nanochat.dataset", *arguments], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_a_killed_command_goes_on_where_it_was(server, folder):
    """SIGKILL while two shards are half here: no file under its name, and then only the rest is asked for."""
    for name in SHARDS[:2]:
        server.faults[f"/store/{name}"] = ["stall"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nanochat.dataset", "-n", "2"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    parts = [folder / f".{name}.part" for name in SHARDS[:2]]
    deadline = time.monotonic() + 60
    while not (
        all(p.exists() and p.stat().st_size >= 1 << 20 for p in parts) and (folder / SHARDS[3]).exists()
    ):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert shards(folder) == served(server, 3)
    done = run_command("fetch", "-n", "2")
    assert done.returncode == 0, done.stderr
    assert shards(folder) == served(server, 0, 1, 3)
    for name in SHARDS[:2]:
        asked = server.headers[f"/store/{name}"][-1]["Range"]
        assert int(asked.removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    assert not list(folder.glob(".*.part*"))


def test_the_command_line(server, folder, tmp_path):
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9)))
    done = run_command("import", "--name=mine", f"--files={tmp_path / 'lines.jsonl'}")
    assert done.returncode == 0 and "9 documents in 2 shards" in done.stdout, done.stderr
    done = run_command("verify", NANOCHAT_DATASET="mine")
    assert done.returncode == 0 and "2 shards in" in done.stdout
    done = run_command("gather")
    assert (done.returncode, done.stderr) == (
        2, "error: unknown command gather; use fetch, list, verify or import\n",
    )  # fmt: skip
    done = run_command("-n", "1", HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.startswith("error: HF_HUB_OFFLINE is set")
    help = run_command("--help").stdout
    assert help.startswith("usage: python -m nanochat.dataset [") and "list, verify, import" in help
    assert run_command("import", "--help").stdout.startswith("usage: python -m nanochat.dataset import [")


def test_the_embedded_set_is_generated_once_and_recorded(folder, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    from nanochat.tinyworld.sizes import SMALLEST_CHARS

    fetch_files(FetchConfig(chars=SMALLEST_CHARS))
    out = capsys.readouterr().out
    assert "data source: tinyworld, seed 0" in out and "already there" not in out
    assert all(any(texts) for texts in parquets_iter_batched("val"))
    verify_files(VerifyConfig())
    assert "right" in capsys.readouterr().out
    fetch_files(FetchConfig(chars=SMALLEST_CHARS))
    assert "already there" in capsys.readouterr().out
    assert read_json(TINYWORLD.path / "manifest.json")["licence"] == TINYWORLD.licence


def test_progress_on_a_terminal_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    progress = dataset_commands._Progress({"a": 2_000_000, "b": 2_000_000}, {"a": 0, "b": 1_000_000})
    progress.tell("a", 1_000_000)
    progress.show()
    out = capsys.readouterr().out
    assert out.startswith("\r\x1b[K0 of 2 files, 0.00 of 0.00 GB, ") and "\n" not in out and "min left" in out


@pytest.mark.parametrize("words", [["-w", "0"], ["-n", "-2"], ["verify", "-w", "0"]])
def test_numbers_that_make_no_sense_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        dataset_commands.main(words)
    assert "must be at least" in capsys.readouterr().err

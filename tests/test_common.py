"""Whole files, folders, ranks, devices."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from nanochat import common
from nanochat.common import UserError


def test_base_dir_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "deep" / "base"))
    assert common.get_base_dir() == tmp_path / "deep" / "base" and common.get_base_dir().is_dir()
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(blocked / "x"))
    with pytest.raises(UserError, match="set NANOCHAT_BASE_DIR"):
        common.get_base_dir()


def test_data_source(monkeypatch):
    monkeypatch.delenv("NANOCHAT_DATA", raising=False)
    assert common.data_source() == "hub" and common.data_root() == common.get_base_dir()
    monkeypatch.setenv("NANOCHAT_DATA", "tinyworld")
    assert common.data_root() == common.get_base_dir() / "tinyworld"
    monkeypatch.setenv("NANOCHAT_DATA", "moon")
    with pytest.raises(UserError, match="hub or tinyworld"):
        common.data_source()


def test_a_base_folder_remembers_the_data_of_its_run(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA", raising=False)
    common.remember_data_source("tinyworld")
    assert common.data_source() == "tinyworld" and common.data_root() == tmp_path / "tinyworld"
    monkeypatch.setenv("NANOCHAT_DATA", "hub")
    assert common.data_source() == "hub"


def test_whole_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "file.txt"
    with common.whole_file(path, "w") as file:
        file.write("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), common.whole_file(path, "w") as file:
        file.write("two")
        raise RuntimeError
    assert path.read_text() == "one"
    assert os.listdir(path.parent) == ["file.txt"]


def test_a_file_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*nnn: "), common.whole_file(tmp_path / ("n" * 300)):
        pass
    for other in ("/dev/null", str(tmp_path)):  # in whose place the file would come
        with (
            pytest.raises(UserError, match=f"cannot write {other}: it is not a file"),
            common.whole_file(other),
        ):
            pass
    common.check_writable(tmp_path / "file")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot create .*file: "):
        common.make_folder(tmp_path / "file")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        common.tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), "/nowhere/x")
    )
    monkeypatch.setattr(common.os, "chmod", lambda *_: None)
    with pytest.raises(UserError, match="No space left"), common.whole_file(tmp_path / "x") as file:
        file.write(b"data")
    assert not (tmp_path / "x").exists()


def test_files_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    for name, reason in {
        "x" * 250: f"cannot write {tmp_path}/x+: File name too long",  # no room for a temporary name
        "file/below": f"cannot create {tmp_path}/file: ",
        ".": f"cannot write {tmp_path}: it is not a file",
    }.items():
        with pytest.raises(UserError, match=reason):
            common.write_json(tmp_path / name, {})
    assert os.listdir(tmp_path) == ["file"]


def test_json_comes_back_whatever_its_text(tmp_path):
    value = {
        "text": "\u00e4\u6f22\U0001f600 \ud800 \udcff\n"
    }  # lone surrogates: bytes typed that are no UTF-8
    common.write_json(tmp_path / "x.json", value)
    assert common.read_json(tmp_path / "x.json") == value


def test_json_errors_name_the_file(tmp_path):
    (tmp_path / "file").touch()
    for name, reason in {"": "Is a directory", "file/below": "Not a directory"}.items():
        with pytest.raises(UserError, match=f"cannot read {tmp_path / name}: {reason}"):
            common.read_json(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        common.read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(UserError, match=r"x\.json is not valid JSON"):
        common.read_json(tmp_path / "x.json")


def test_dist_info_needs_all_three_variables(monkeypatch):
    for name, value in (("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert common.get_dist_info() == (False, 0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert common.get_dist_info() == (True, 3, 1, 4)


PEER = """
from dataclasses import dataclass
import torch
from nanochat.common import distributed
from nanochat.configurator import run

@dataclass(frozen=True)
class Config: ...

def main(cfg):
    with distributed("cpu") as world:
        for step in range(10**9):
            world.sum(torch.ones(1))
            if step == 100:
                print("going", flush=True)

run(Config, main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("blow", "said"),
    [
        (signal.SIGSTOP, "error: rank 0 waited 10 s for another rank, which hangs or whose machine is gone"),
        (signal.SIGKILL, "error: rank 0 lost another rank, whose own output says why"),
    ],
)
def test_a_rank_that_hangs_or_dies_ends_the_others_with_one_clear_line(blow, said):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NANOCHAT_PEER_TIMEOUT": "10",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PEER], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "going\n"
        ranks[1].send_signal(blow)
        struck = time.monotonic()
        _, errors = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 2 and time.monotonic() - struck < 60
        assert said in errors and "start again with the same command" in errors and "Traceback" not in errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_the_patience_with_other_ranks_is_a_number_of_seconds(monkeypatch):
    monkeypatch.delenv("NANOCHAT_PEER_TIMEOUT", raising=False)
    assert common.peer_timeout_s() == 1800
    monkeypatch.setenv("NANOCHAT_PEER_TIMEOUT", "0.5")
    assert common.peer_timeout_s() == 0.5
    for wrong in ("soon", "-1", "nan"):
        monkeypatch.setenv("NANOCHAT_PEER_TIMEOUT", wrong)
        with pytest.raises(UserError, match="is not a number of seconds"):
            common.peer_timeout_s()


def test_one_process_holds_a_folder_until_it_ends(tmp_path):
    code = "import sys, time; from pathlib import Path; from nanochat.common import exclusive\n"
    code += f"with exclusive(Path({str(tmp_path)!r})): print('held', flush=True); time.sleep(100)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    for _ in range(2):
        with (
            pytest.raises(UserError, match=rf"another run is at work in .* \(process {holder.pid}\)"),
            common.exclusive(tmp_path),
        ):
            pass
    with common.exclusive(tmp_path, wanted=False):
        pass
    holder.kill()
    holder.communicate()
    with common.exclusive(tmp_path):
        pass


def test_a_folder_that_was_held_for_nothing_is_not_left(tmp_path):
    folder = tmp_path / "stage" / "tag"
    with common.exclusive(folder):
        assert folder.is_dir()
    assert not folder.parent.exists() and tmp_path.exists()
    with common.exclusive(folder):
        (folder / "model.pt").touch()
    with common.exclusive(folder):
        pass
    assert {path.name for path in folder.iterdir()} == {"lock", "model.pt"}


def test_compute_dtype(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    assert common.compute_dtype(device) == (torch.float32, "NANOCHAT_DTYPE")
    monkeypatch.setenv("NANOCHAT_DTYPE", "int3")
    with pytest.raises(UserError, match="NANOCHAT_DTYPE='int3'"):
        common.compute_dtype(device)


def test_devices_that_are_not_there():
    with pytest.raises(UserError, match="unknown"):
        common.check_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device-type=cpu"):
            common.check_device("cuda")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12),
        ("NVIDIA RTX A4000", None), ("AMD Instinct MI300X", 1.3074e15),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("Abacus", None),
    ],
)  # fmt: skip
def test_peak_flops(name, flops):
    assert common.peak_flops(name) == flops

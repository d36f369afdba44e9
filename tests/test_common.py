"""Whole files, folders, ranks, devices."""

from __future__ import annotations

import os

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


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        common.tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), "/nowhere/x")
    )
    monkeypatch.setattr(common.os, "chmod", lambda *_: None)
    with pytest.raises(UserError, match="No space left"), common.whole_file(tmp_path / "x") as file:
        file.write(b"data")
    assert not (tmp_path / "x").exists()


def test_json_errors_name_the_file(tmp_path):
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
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA L40S", 362e12), ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12), ("Abacus", None),
    ],
)  # fmt: skip
def test_peak_flops(name, flops):
    assert common.peak_flops(name) == flops

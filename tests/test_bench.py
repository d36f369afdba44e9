"""The training benchmarks run with one command and end with a line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from nanochat.common import UserError
from tests.training import ROOT


def bench(name: str, *flags: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", f"dev.bench.{name}", *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_training_against_hugging_face(tiny_run, ranks):
    contenders = "modern,classic-bf16,hf" if ranks == 1 else "modern"
    found = bench(
        "train", "--shapes=2x64x2x32x300x4", f"--contenders={contenders}", "--repeats=2", "--steps=2", "--warmup=1",
        "--phase-steps=1", "--compile=off", f"--data={tiny_run / 'tinyworld' / 'base_data'}", f"--ranks={ranks}",
        "--device-type=cpu",
    )  # fmt: skip
    assert [row["contender"] for row in found["rows"]] == contenders.split(",")
    for row in found["rows"]:
        assert row["tokens_per_second"] > 0 and row["peak_mb"] > 50 and 0 < row["loss"] < 7
        assert sum(row["phases"].values()) == pytest.approx(1) and row["mfu"] is None
    if ranks == 1:
        assert set(found["ratio_to_hf"]) == {"modern 2x64x2x32x300x4", "classic-bf16 2x64x2x32x300x4"}
    else:
        assert found["rows"][0]["phases"]["communication"] > 0


@pytest.mark.slow
def test_the_loader_alone(tiny_run):
    found = bench(
        "loader", "--cases=small", "--tokens=50_000", "--repeats=1", "--step=false",
        f"--data={tiny_run / 'tinyworld' / 'base_data'}",
    )  # fmt: skip
    small = found["cases"]["small"]
    assert small["tokens_per_second"] > 1e3 and 0 <= small["dropped"] < 0.35


def test_a_shape_is_named_or_six_numbers():
    from dev.bench.train import SHAPES, parse_shape

    assert parse_shape("small") == SHAPES["small"] and parse_shape("1x2x3x4x5x6").rows == 6
    for wrong in ("d13", "1x2x3x4x5", "axbxcxdxexf"):
        with pytest.raises(UserError, match=f"--shapes={wrong} is neither"):
            parse_shape(wrong)

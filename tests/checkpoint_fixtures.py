"""Checkpoints of every version of GPTConfig on disk, kept for ever: tests/fixtures/checkpoints/v<version>-<name>.tar.gz.

After adding a version: python -m tests.checkpoint_fixtures, then add what it prints to the table of
test_config_versions.py. Existing files are never written again; they are what older code wrote.
"""

from __future__ import annotations

import gzip
import tarfile
import tempfile
from pathlib import Path

import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.config_versions import CONFIG_VERSION
from nanochat.gpt import GPT, GPTConfig

FOLDER = Path(__file__).parent / "fixtures" / "checkpoints"
STEP = 7
# As small as the network allows (the smear reads 24 channels) and with windows that matter at 40 tokens.
SIZES = dict(sequence_len=64, vocab_size=20, n_layer=3, n_head=2, n_kv_head=1, n_embd=24)
CONFIGS = {
    "classic": GPTConfig.classic(**SIZES),
    "modern": GPTConfig.modern(window_pattern="SL", short_window_multiple=8, short_window_divisor=8, **SIZES),
}  # fmt: skip


def fixture_ids() -> torch.Tensor:
    """(1, 40) ids below 20."""
    t = torch.arange(40)
    return ((7 * t * t + 3 * t + 1) % 20)[None]


def fixture_model(config: GPTConfig) -> GPT:
    """Weights of five different values, so that the files compress to a few KB."""
    model = GPT.build(config, "cpu", torch.float32)
    for j, (_, tensor) in enumerate(sorted(model.state_dict().items())):
        k = torch.arange(tensor.numel(), dtype=torch.float64)
        values = (2 * torch.sin(0.7 * k * k + 1.3 * j + 0.5)).round() / 8
        tensor.copy_((values + 0.5 if tensor.dim() < 2 else values).view(tensor.shape))
    return model


def unpack(name: str, target: Path) -> Path:
    """The checkpoint folder of a fixture, unpacked below target."""
    with tarfile.open(FOLDER / f"{name}.tar.gz") as archive:
        archive.extractall(target, filter="data")
    return target / name


def pack(name: str, config: GPTConfig) -> None:
    """Write a fixture with this code's format."""
    with tempfile.TemporaryDirectory() as scratch:
        save_checkpoint(Path(scratch) / name, STEP, fixture_model(config), {"stage": "base"})
        with (
            gzip.GzipFile(FOLDER / f"{name}.tar.gz", "wb", mtime=0) as file,
            tarfile.open(fileobj=file, mode="w") as tar,
        ):
            tar.add(Path(scratch) / name, arcname=name, filter=_anonymous)


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def main() -> None:
    """Add the fixtures of the present version and print the logits that belong into the table."""
    for name, config in CONFIGS.items():
        path = f"v{CONFIG_VERSION}-{name}"
        if not (FOLDER / f"{path}.tar.gz").exists():
            pack(path, config)
        logits = fixture_model(config)(fixture_ids())[0, -1, :4]
        print(f'"{path}": {[round(value, 5) for value in logits.tolist()]},')


if __name__ == "__main__":
    main()

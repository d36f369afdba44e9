"""Whether to compile the training step: where a compiler is, unless the user says otherwise."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

from nanochat.common import UserError

if TYPE_CHECKING:
    import torch


def should_compile(wanted: str, device: torch.device) -> tuple[bool, str]:
    """(compile or not, why). wanted: "auto", "on" or "off" (the --compile flag)."""
    available, why = _compiler(device)
    if wanted == "off":
        return False, "--compile=off"
    if wanted == "on" and not available:
        raise UserError(f"--compile=on, but {why}; use --compile=off")
    return available, why


def _compiler(device: torch.device) -> tuple[bool, str]:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return False, "Triton is not installed"
        return True, "CUDA with Triton"
    if device.type == "cpu":
        found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
        return (True, f"C++ compiler {found}") if found else (False, "no C++ compiler is on the PATH")
    return False, f"not used on {device.type}"

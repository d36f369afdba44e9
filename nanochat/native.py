"""Compile the repository's C++ once per machine, and load it.

The library is named by a digest of source, compiler and processor, appears whole or not at all, and lies in the
user's own cache folder. Without a compiler, or with NANOCHAT_KERNELS=off, there is none, and callers use PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from nanochat.common import UserError

_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]


@functools.cache
def load_library(name: str) -> ctypes.CDLL | None:
    """The compiled nanochat/{name}.cpp; None where it cannot be built or is switched off."""
    compiler = find_compiler()
    if compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.cpp")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanochat" / "kernels"
    try:
        texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(source.parent.glob("*.h")))]
        identity = "\n".join([*texts, *_FLAGS, compiler, _version(compiler), _processor()])
        library = folder / f"{name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            print(f"compiling {source.name} for this processor, once (some seconds) ...", file=sys.stderr)
            _compile(compiler, source, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError):
        return None


def find_compiler() -> str | None:
    """The compiler to use; None where there is none, or kernels are switched off."""
    wanted = os.environ.get("NANOCHAT_KERNELS") or "auto"
    if wanted not in ("auto", "off"):
        raise UserError(f"NANOCHAT_KERNELS={wanted!r} is unknown; use auto or off")
    if wanted == "off" or not sys.platform.startswith("linux"):
        return None  # elsewhere torch's OpenMP cannot be shared
    return shutil.which(os.environ.get("CXX", "g++"))


def _compile(compiler: str, source: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        part, made = Path(folder, "part.o"), Path(folder, library.name)
        _run(compiler, *_FLAGS, "-c", str(source), "-o", str(part))
        # Linked without -fopenmp: its functions are then those that torch has brought into the process, and
        # both share one set of threads, which would otherwise wait for each other.
        _run(compiler, "-shared", str(part), "-o", str(made))
        os.replace(made, library)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=600)


@functools.cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=20).stdout


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(wanted))

"""Facts about where a run happens: git, hardware, software, size of the code, price of the machine.

Every source is optional: no git, no psutil, no torch and no GPU only mean fewer facts. Names of hosts
and users are never collected.
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from nanochat.common import UserError
from nanochat.machine import usable_cores

# US dollars per GPU and hour, typical on-demand prices of late 2025; first row whose name occurs decides.
_HOURLY_USD = (
    ("GB200", 7.00), ("B200", 5.50), ("H200", 3.80), ("H100", 3.00), ("A100", 1.79), ("V100", 0.55),
    ("L40S", 1.00), ("L4", 0.70), ("A10", 0.75), ("MI300", 2.50), ("5090", 0.70), ("4090", 0.40),
    ("3090", 0.25),
)  # fmt: skip
_DEFAULT_HOURLY_USD = 2.00

_CODE_SUFFIXES = (".py", ".md", ".rs", ".html", ".toml", ".sh", ".js", ".css")


@dataclass(frozen=True, slots=True)
class Git:
    branch: str = "unknown"
    commit: str = "unknown"
    dirty: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Hardware:
    platform: str
    physical_cores: int | None
    usable_cores: int
    memory_bytes: int | None
    gpus: tuple[Gpu, ...]
    cuda_version: str | None


@dataclass(frozen=True, slots=True)
class Software:
    python: str
    torch: str
    nanochat: str
    compute_dtype: str
    world_size: int
    wandb_run: str | None


@dataclass(frozen=True, slots=True)
class Bloat:
    """How much there is to read: tracked source files, decoded as UTF-8."""

    characters: int
    lines: int
    files: int
    uv_lock_lines: int

    @property
    def tokens(self) -> int:
        return self.characters // 4  # a fair average for code and prose


def project_root() -> Path:
    """The checkout this package was imported from, whatever the working directory is."""
    return Path(__file__).resolve().parent.parent


# --- git and the code --------------------------------------------------------------------------------


def git_output(root: Path, *arguments: str) -> str | None:
    """Output of a git command in root; None where git is missing, fails or takes over 5 seconds."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode("utf-8", "replace")


def git_facts(root: Path) -> Git:
    """Branch, short commit, state and first line of the last commit message."""
    branch = git_output(root, "rev-parse", "--abbrev-ref", "HEAD")
    commit = git_output(root, "rev-parse", "--short", "HEAD")
    if branch is None or commit is None:
        return Git()
    message = (git_output(root, "log", "-1", "--format=%s") or "").strip()[:80]
    return Git(branch.strip(), commit.strip(), bool(git_output(root, "status", "--porcelain")), message)


def bloat_facts(root: Path) -> Bloat:
    """Size of the source files: those tracked by git, or all of the known kinds outside a checkout."""
    listing = git_output(root, "ls-files", "-z")
    names = listing.split("\0") if listing else _walk(root)
    texts = []
    for name in names:
        path = root / name
        if name.endswith(_CODE_SUFFIXES) and path.is_file():
            texts.append(path.read_text(encoding="utf-8", errors="replace"))
    lock = root / "uv.lock"
    lock_lines = lock.read_bytes().count(b"\n") if lock.is_file() else 0
    return Bloat(sum(map(len, texts)), sum(text.count("\n") for text in texts), len(texts), lock_lines)


def _walk(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [
            s for s in subfolders if not s.startswith(".") and s not in ("target", "__pycache__")
        ]
        names += [os.path.relpath(os.path.join(folder, file), root) for file in files]
    return names


# --- the machine -------------------------------------------------------------------------------------


def gpus() -> tuple[Gpu, ...]:
    """The CUDA (or ROCm) devices that torch would train on; empty without torch."""
    try:
        import torch
    except ImportError:
        return ()
    if not torch.cuda.is_available():
        return ()
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return tuple(Gpu(device.name, device.total_memory) for device in devices)


def hardware_facts() -> Hardware:
    """Cores, memory and GPUs; psutil and torch are used where they are installed."""
    found = gpus()
    physical, memory = None, None
    try:
        import psutil
    except ImportError:
        pass
    else:
        physical, memory = psutil.cpu_count(logical=False), psutil.virtual_memory().total
    cuda = None
    if found:
        import torch

        cuda = torch.version.cuda or torch.version.hip
    return Hardware(platform.system(), physical, usable_cores(), memory, found, cuda)


def software_facts() -> Software:
    """Versions, and the settings that change what is computed."""
    try:
        import torch

        from nanochat.common import autodetect_device_type, check_device, compute_dtype

        dtype, reason = compute_dtype(check_device(autodetect_device_type()))
        torch_version, chosen = torch.__version__, f"{str(dtype).removeprefix('torch.')} ({reason})"
    except ImportError:
        torch_version, chosen = "unknown", os.environ.get("NANOCHAT_DTYPE") or "unknown"
    run = os.environ.get("WANDB_RUN") or "dummy"
    return Software(
        platform.python_version(), torch_version, _package_version(project_root()), chosen,
        int(os.environ.get("WORLD_SIZE", 1)), None if run == "dummy" else run,
    )  # fmt: skip


def _package_version(root: Path) -> str:
    try:
        return metadata.version("nanochat")
    except metadata.PackageNotFoundError:  # a checkout that is run in place
        lines = (
            (root / "pyproject.toml").read_text().splitlines() if (root / "pyproject.toml").exists() else []
        )
    return next((line.split('"')[1] for line in lines if line.startswith("version = ")), "unknown")


def hourly_usd(found: tuple[Gpu, ...]) -> float | None:
    """Price of the machine per hour; None without GPUs. NANOCHAT_GPU_HOURLY_USD is the price of one GPU."""
    if not found:
        return None
    override = os.environ.get("NANOCHAT_GPU_HOURLY_USD")
    if override:
        try:
            return float(override) * len(found)
        except ValueError:
            raise UserError(f"NANOCHAT_GPU_HOURLY_USD={override!r} is not a number of dollars") from None
    each = next((usd for name, usd in _HOURLY_USD if name in found[0].name), _DEFAULT_HOURLY_USD)
    return each * len(found)

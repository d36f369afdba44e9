"""Ground floor of the library: folders, printing, whole files, devices, and the start and stop of a run.

Nothing here imports torch at module level, so that `--help` of every script stays instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from nanochat.machine import usable_cores

if TYPE_CHECKING:
    import numpy as np
    import torch


class UserError(Exception):
    """Something the user can mend. Scripts print it as one line on stderr and exit with status 2."""


ROTARY_FACTOR = 10  # models have positions for this many training contexts


# --- folders and files -------------------------------------------------------------------------------


def get_base_dir() -> Path:
    """The folder of all artefacts: NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Created if missing."""
    base = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot create the base folder {base}: {error.strerror}; set NANOCHAT_BASE_DIR"
        ) from None
    return base


def data_source() -> str:
    """Where data comes from: "hub" (downloaded) or "tinyworld" (generated).

    NANOCHAT_DATA decides, else what the last whole run in this base folder used, so that what is typed after it goes on
    with its data; else the hub.
    """
    source = os.environ.get("NANOCHAT_DATA") or ""
    if not source:
        with suppress(OSError):
            source = _remembered_source().read_text(encoding="utf-8").strip()
    if (source or "hub") not in ("hub", "tinyworld"):
        raise UserError(f"NANOCHAT_DATA={source!r} is not a data source; use hub or tinyworld")
    return source or "hub"


def remember_data_source(source: str) -> None:
    """Make it the default of this base folder."""
    with whole_file(_remembered_source()) as file:
        file.write(f"{source}\n".encode())


def _remembered_source() -> Path:
    return get_base_dir() / "data_source"


def data_root() -> Path:
    """Folder below which shards, task rows, word list and evaluation bundle of the data source live."""
    base = get_base_dir()
    return base if data_source() == "hub" else base / "tinyworld"


def hash_file(path: Path) -> str:
    """SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(path: Path) -> None:
    """Create a folder and those above it where they are missing; a UserError if that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror}") from None


@contextmanager
def whole_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears whole or not at all: temporary sibling, fsync, rename."""
    path = Path(path)
    encoding = None if "b" in mode else "utf-8"
    handle, temporary = _temporary_beside(path)
    try:
        os.chmod(temporary, usual_mode())
        with os.fdopen(handle, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, temporary):
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def check_writable(path: str | Path) -> None:
    """UserError if whole_file could not write there: before work that takes minutes, not after it."""
    handle, temporary = _temporary_beside(Path(path))
    os.close(handle)
    os.unlink(temporary)


def _temporary_beside(path: Path) -> tuple[int, str]:
    """(handle, path) of a new file in the folder of path, which is created if missing."""
    # a folder, or a device, in whose place a file would come
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is not a file")
    make_folder(path.parent)
    try:
        return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def usual_mode() -> int:
    """The permissions that a new file has here; temporary files have less, and keep it when they are renamed."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def write_json(path: str | Path, value: object) -> None:
    """Write value as indented UTF-8 JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with whole_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))  # a lone surrogate becomes its escape in JSON


def read_json(path: str | Path) -> dict:
    """Read a JSON object; a missing, unreadable or broken file is a UserError that names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object")
    return value


@contextmanager
def exclusive(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Hold a folder for this process alone; the system lets go of it however the process ends.

    wanted: False does nothing, for ranks that write no files. A folder that is not there is made, and goes again if
    nothing is put into it. Raises UserError if another process holds the folder, such as one whose torchrun was killed
    without it.
    """
    from filelock import FileLock, Timeout

    if not wanted:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder / "lock"), folder / "lock.pid"
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # the other one may be removing the folder that it made
        process = f" (process {owner.read_text(encoding='utf-8').strip()})" if owner.exists() else ""
        raise UserError(f"another run is at work in {folder}{process}; wait for it, or end it") from None
    except (NotImplementedError, OSError):  # some network file systems have no locks
        print0(f"warning: {folder} cannot be locked; do not start another run in it", file=sys.stderr)
    try:
        owner.write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        with suppress(OSError):
            if made and [path.name for path in folder.iterdir()] == ["lock"]:
                (folder / "lock").unlink()  # while it is held, so that nobody waits for it
        lock.release()
        with suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


# --- ranks -------------------------------------------------------------------------------------------


def get_dist_info() -> tuple[bool, int, int, int]:
    """(distributed, rank, local rank, world size) from torchrun's environment; (False, 0, 0, 1) without."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    if not all(name in os.environ for name in names):
        return False, 0, 0, 1
    rank, local_rank, world_size = (int(os.environ[name]) for name in names)
    return True, rank, local_rank, world_size


def print0(*values: object, **options) -> None:
    """Print on rank 0 only, flushed, so that a pipe or log shows it at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*values, flush=True, **options)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place. The identity for one rank."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum of a tensor over all ranks, in place."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor


@contextmanager
def distributed(device_type: str = "", seed: int = 42) -> Iterator[World]:
    """Start the run: pick the device, seed, join the process group (gloo or NCCL) and leave it at the end.

    Raises UserError where another rank keeps this one waiting for NANOCHAT_PEER_TIMEOUT seconds (default: half an
    hour, as the first step of a rank may compile for minutes while the others wait), or has ended.
    """
    import torch
    import torch.distributed as dist

    is_distributed, rank, local_rank, world_size = get_dist_info()
    all_agree = False
    device_type = device_type or autodetect_device_type()
    device = check_device(device_type, local_rank if is_distributed else 0)
    torch.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.manual_seed(seed)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_float32_matmul_precision("high")  # TF32 for fp32 matrices where the GPU has it
    if is_distributed:
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if backend == "nccl" else None
        dist.init_process_group(backend, timeout=timedelta(seconds=peer_timeout_s()), device_id=device_id)
    try:
        yield World(rank, local_rank, world_size, device)
        if is_distributed:
            dist.barrier()  # destroying the group while a peer still communicates aborts that peer
        all_agree = True
    except RuntimeError as error:
        if is_distributed and (problem := _lost_peer(rank, str(error))):
            raise UserError(problem) from error
        raise
    finally:
        # NCCL's would wait for the others, which may wait for this rank: after an error it ends with the process.
        if is_distributed and (all_agree or device.type != "cuda"):
            dist.destroy_process_group()


def peer_timeout_s() -> float:
    """How long a rank waits for the others: NANOCHAT_PEER_TIMEOUT, else half an hour."""
    text = os.environ.get("NANOCHAT_PEER_TIMEOUT") or "1800"
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"NANOCHAT_PEER_TIMEOUT={text!r} is not a number of seconds")
    return seconds


def _lost_peer(rank: int, error: str) -> str | None:
    """What to tell the user where a collective failed because of another rank; None for any other error."""
    lower = error.lower()
    advice = "checkpoints on the disk are whole: start again with the same command to go on from the newest"
    if "timed out" in lower or "timeout" in lower:
        seconds = peer_timeout_s()
        return (
            f"rank {rank} waited {seconds:g} s for another rank, which hangs or whose machine is gone; {advice}"
            " (NANOCHAT_PEER_TIMEOUT sets the seconds)"
        )
    if any(sign in lower for sign in ("closed by peer", "reset by peer", "broken pipe")):
        return f"rank {rank} lost another rank, whose own output says why; {advice}"
    return None


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on a device, without waiting for what a GPU is doing."""
    import torch

    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


# --- devices -----------------------------------------------------------------------------------------


def autodetect_device_type() -> str:
    """cuda, else mps, else cpu."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def check_device(device_type: str, index: int = 0) -> torch.device:
    """The torch device for a type name; a UserError if it is unknown or not on this machine.

    Of a CPU this process takes its share of the cores: torch knows of no container's quota, and torchrun leaves each
    rank a single one. OMP_NUM_THREADS decides where it is set (1, torchrun's own choice, counts for one rank only).
    """
    import torch

    if device_type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device-type={device_type} is unknown; use cuda, mps or cpu")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device-type=cuda, but torch sees no CUDA device here; use --device-type=cpu")
    if device_type == "cuda" and index >= torch.cuda.device_count():
        raise UserError(
            f"rank needs GPU {index}, but only {torch.cuda.device_count()} are visible; lower --nproc_per_node"
        )
    if device_type == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device-type=mps, but torch has no MPS here; use --device-type=cpu")
    if device_type == "cpu":
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if ranks > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
            torch.set_num_threads(max(1, usable_cores() // ranks))
        elif "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    return torch.device(device_type, index) if device_type == "cuda" else torch.device(device_type)


def compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of matrix products on a device and the reason: NANOCHAT_DTYPE, else by hardware."""
    import torch

    names = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    wanted = os.environ.get("NANOCHAT_DTYPE")
    if wanted:
        if wanted not in names:
            raise UserError(f"NANOCHAT_DTYPE={wanted!r} is unknown; use {', '.join(names)}")
        return names[wanted], "NANOCHAT_DTYPE"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return torch.bfloat16, f"compute capability {major}.{minor}"
        return torch.float32, f"compute capability {major}.{minor} has no bf16"
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16, "the processor multiplies bf16 tiles (AMX)"
    return torch.float32, f"default on {device.type}"


def _cpu_multiplies_bf16() -> bool:
    """Whether bf16 matrix products are faster than fp32 here. AMX measured 4x (LOG 2026-11-21)."""
    import torch

    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of returning them to the system and faulting them in again.

    A CPU training step allocates the same blocks every time; this made it 1.6 to 1.9 times faster (LOG 2026-11-21).
    """
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    with suppress(AttributeError, OSError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(top_pad, 1 << 26)


def synchronize(device: torch.device) -> None:
    """Wait for the device's queue, so that a clock means something."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on the GPU, else resident in RAM. 0 where unknown."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Dense bf16 FLOP/s; the first row whose words all occur in the name.
_PEAK_FLOPS: list[tuple[str, float]] = [
    ("gb200", 2.5e15), ("grace blackwell", 2.5e15), ("b200", 2.25e15), ("b100", 1.8e15), ("gh200", 989e12),
    ("h200 nvl", 836e12), ("h200 pcie", 836e12), ("h200", 989e12), ("h100 nvl", 835e12), ("h100 pcie", 756e12),
    ("h100", 989e12), ("h800 nvl", 989e12), ("h800", 756e12), ("a100", 312e12), ("a800", 312e12),
    ("a40", 149.7e12), ("a30", 165e12), ("l40s", 362e12), ("l40 s", 362e12), ("l40", 181e12), ("l4", 121e12),
    ("mi355x", 2.5e15), ("mi325x", 1.3074e15), ("mi300x", 1.3074e15), ("mi300a", 980.6e12),
    ("mi250x", 383e12), ("mi250", 362.1e12), ("5090", 209.5e12), ("4090", 165.2e12), ("3090", 71e12),
]  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a GPU by its name; None when unknown."""
    return by_name(_PEAK_FLOPS, device_name)


def by_name(table: list[tuple[str, float]], device_name: str) -> float | None:
    """The number of the first row whose words are all words of the name: an L40 is no L4, an A4000 no A40."""
    words = set(re.findall("[a-z0-9]+", device_name.lower()))
    return next((number for row, number in table if words.issuperset(row.split())), None)


def device_name(device: torch.device) -> str:
    """What to call the device in a log."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

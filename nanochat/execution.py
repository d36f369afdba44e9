"""Run untrusted Python in a sandboxed child process.

Layers (the inside is sandbox_harness.py): fresh isolated interpreter, scrubbed environment, private folder,
resource limits, supervision by the parent, and on Linux user/network/mount namespaces, read-only mounts,
Landlock, dropped capabilities and a seccomp filter, each where the system offers it; the result says which
were on.

The verdict "success" comes from inside the child. A program that shares the interpreter with the harness
can in principle forge it, so adversarial grading needs its checker outside the child.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import marshal
import os
import secrets
import select
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nanochat.private_folder import folder_bytes, private_folder

Isolation = Literal["auto", "strict", "basic"]

_HARNESS = Path(__file__).with_name("sandbox_harness.py")
# What the interpreter runs: the compiled harness and then the order come through the first descriptor.
_BOOT = """
import marshal, sys
control, harness = open(int(sys.argv[1]), "rb"), {"__name__": "sandbox_harness"}
exec(marshal.load(control), harness)
harness["main"](control, int(sys.argv[2]))
"""
_POLL_S = 0.05
_GRACE_S = 0.2  # for pipes to drain after the program has ended
_FLOOD_FACTOR = 16  # more than this many times the output cap ends the program
_RECORD_BYTES = 65536
_MAX_THREADS = 64


class SandboxUnavailable(RuntimeError):
    """This system cannot give the isolation that was asked for."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use; bytes and seconds. memory_bytes None means no limit."""

    timeout: float = 5.0
    memory_bytes: int | None = 256 << 20
    output_bytes: int = 65536
    file_bytes: int = 8 << 20
    disk_bytes: int = 16 << 20
    open_files: int = 32
    threads: bool = False


@dataclass(frozen=True, slots=True)
class ExecutionResult:
    """How a program ended. Output is given for failures and timeouts too; duration in seconds."""

    success: bool
    stdout: str
    stderr: str
    error: str | None = None
    timeout: bool = False
    memory_exceeded: bool = False
    exit_code: int | None = None
    signal: int | None = None
    duration: float = 0.0
    truncated: bool = False
    isolation: list[str] = field(default_factory=list)


def execute_code(
    code: str,
    timeout: float = 5.0,
    maximum_memory_bytes: int | None = 256 << 20,
    *,
    stdin: str = "",
    max_output_bytes: int = 65536,
    max_file_bytes: int = 8 << 20,
    max_disk_bytes: int = 16 << 20,
    max_open_files: int = 32,
    allow_threads: bool = False,
    isolation: Isolation = "auto",
) -> ExecutionResult:
    """Run code as a program of its own and report how it ended; success means that its last line was reached.

    isolation: "auto" uses every layer of this system, "strict" raises SandboxUnavailable unless network and
    files are closed off by the kernel, "basic" leaves the kernel layers out.
    """
    if sys.platform == "win32":
        raise SandboxUnavailable("the sandbox needs a POSIX system")
    limits = Limits(
        timeout, maximum_memory_bytes, max_output_bytes, max_file_bytes, max_disk_bytes, max_open_files,
        allow_threads,
    )  # fmt: skip
    with private_folder() as folder:
        return _Run(code, stdin.encode("utf-8", "replace"), limits, isolation, folder).result()


def execute_many(
    codes: Iterable[str], workers: int | None = None, **options: object
) -> list[ExecutionResult]:
    """execute_code for many programs at once, results in order; options as there."""
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        return list(pool.map(functools.partial(execute_code, **options), codes))  # type: ignore[arg-type]


@functools.cache
def _harness() -> bytes:
    """The harness as marshalled code: compiling it in every child would cost more than starting one."""
    return marshal.dumps(compile(_HARNESS.read_text(encoding="utf-8"), str(_HARNESS), "exec"))


@functools.lru_cache
def _announce(layers: str) -> None:
    logging.getLogger(__name__).info("sandbox layers: %s", layers)


class _Run:
    """One child process from start to verdict."""

    def __init__(self, code: str, stdin: bytes, limits: Limits, isolation: Isolation, folder: str):
        self.limits, self.folder = limits, folder
        self.token = secrets.token_hex(16)
        order = _harness() + marshal.dumps({
            "token": self.token, "code": code, "isolation": isolation, "directory": folder,
            "timeout": limits.timeout, "memory": limits.memory_bytes, "max_file_bytes": limits.file_bytes,
            "max_disk_bytes": limits.disk_bytes, "max_open_files": limits.open_files,
            "allow_threads": limits.threads,
        })  # fmt: skip
        self.output = {"stdout": bytearray(), "stderr": bytearray(), "record": bytearray()}
        self.seen = dict.fromkeys(self.output, 0)
        self.ended_by = ""  # why the parent killed it: timeout, output, disk, threads
        self.status: int | None = None
        self.peak_bytes = 0
        self.started = time.monotonic()
        self._start(order, stdin)

    def _start(self, order: bytes, stdin: bytes) -> None:
        control_read, control_write = os.pipe()
        record_read, record_write = os.pipe()
        environment = {
            "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "OMP_NUM_THREADS": "1",
            "HOME": self.folder, "TMPDIR": self.folder,
        }  # fmt: skip
        command = [sys.executable, "-I", "-S", "-B", "-c", _BOOT, str(control_read), str(record_write)]
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                cwd=self.folder, env=environment, start_new_session=True, close_fds=True,
                pass_fds=(control_read, record_write), umask=0o077,
            )  # fmt: skip
        except BaseException:
            os.close(control_write)
            os.close(record_read)
            raise
        finally:
            os.close(control_read)
            os.close(record_write)
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.selector = selectors.DefaultSelector()
        self.writes = {}
        for descriptor, content in ((control_write, order), (os.dup(self.process.stdin.fileno()), stdin)):
            self.writes[descriptor] = memoryview(content)
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_WRITE)
        self.process.stdin.close()
        reads = {"stdout": self.process.stdout.fileno(), "stderr": self.process.stderr.fileno()}
        for name, descriptor in {**reads, "record": record_read}.items():
            os.set_blocking(descriptor, False)
            self.selector.register(descriptor, selectors.EVENT_READ, name)
        self.record_read = record_read
        self.reading = 3
        self.pidfd = os.pidfd_open(self.process.pid) if hasattr(os, "pidfd_open") else None

    def result(self) -> ExecutionResult:
        try:
            self._supervise()
        finally:
            self._kill()
            self._close()
        return self._verdict()

    # --- supervision ---------------------------------------------------------------------------------

    def _supervise(self) -> None:
        deadline = self.started + self.limits.timeout
        drained_by = float("inf")
        next_poll = 0.0
        while self.reading or not self._exited():
            now = time.monotonic()
            if now >= deadline:
                self.ended_by = "timeout"
                return
            if drained_by == float("inf") and self._exited():
                drained_by = now + _GRACE_S
            if now >= drained_by:
                return
            if now >= next_poll:
                next_poll = now + _POLL_S
                self._measure()
            self._exchange(min(_POLL_S, deadline - now) if self.reading else 0.001)
            if self.ended_by:
                return

    def _exchange(self, wait_s: float) -> None:
        for key, _ in self.selector.select(wait_s):
            descriptor = key.fd
            if descriptor in self.writes:
                self._write(descriptor)
            else:
                self._read(descriptor, key.data)

    def _write(self, descriptor: int) -> None:
        rest = self.writes[descriptor]
        try:
            rest = rest[os.write(descriptor, rest[:65536]) :] if rest else rest
        except BlockingIOError:
            return
        except OSError:  # the program does not read its input
            rest = rest[:0]
        self.writes[descriptor] = rest
        if not rest:
            self.selector.unregister(descriptor)
            del self.writes[descriptor]
            os.close(descriptor)

    def _read(self, descriptor: int, name: str) -> None:
        try:
            data = os.read(descriptor, 65536)
        except BlockingIOError:
            return
        if not data:
            self.selector.unregister(descriptor)
            self.reading -= 1
            return
        cap = _RECORD_BYTES if name == "record" else self.limits.output_bytes
        self.output[name] += data[: max(0, cap - self.seen[name])]
        self.seen[name] += len(data)
        if self.seen[name] > _FLOOD_FACTOR * cap:
            self.ended_by = "output"

    def _measure(self) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError):  # gone, or not Linux
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            self.peak_bytes = max(self.peak_bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)
            if int(status.split("Threads:")[1].split()[0]) > _MAX_THREADS:
                self.ended_by = "threads"
        if folder_bytes(self.folder, self.limits.disk_bytes) > self.limits.disk_bytes:
            self.ended_by = "disk"

    def _exited(self) -> bool:
        if self.status is not None:
            return True
        if self.pidfd is not None:  # notices the end without reaping, so that the group id stays ours
            poll = select.poll()  # select takes no descriptor above 1023
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(0))
        pid, status, _ = os.wait4(self.process.pid, os.WNOHANG)
        self.status = status if pid else None
        return pid != 0

    def _kill(self) -> None:
        """Kill the whole group, then reap its leader."""
        before = _own_peak_bytes()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        if self.status is None:
            _, self.status, usage = os.wait4(self.process.pid, 0)
            peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            # Before exec the child shares this process's memory, and Linux counts that as its peak.
            self.peak_bytes = max(self.peak_bytes, peak if peak > before else 0)
        self.process.returncode = os.waitstatus_to_exitcode(self.status)

    def _close(self) -> None:
        self.selector.close()
        for descriptor in [*self.writes, self.record_read, *([self.pidfd] if self.pidfd is not None else [])]:
            os.close(descriptor)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    # --- verdict -------------------------------------------------------------------------------------

    def _verdict(self) -> ExecutionResult:
        records = self._records()
        if "unavailable" in records:
            raise SandboxUnavailable(records["unavailable"])
        layers = records.get("ready", "").split()
        _announce(" ".join(layers))
        code = self.process.returncode
        killed_by = -code if code < 0 and not self.ended_by else None
        near_limit = self.peak_bytes >= 0.9 * (self.limits.memory_bytes or float("inf"))
        fatal = killed_by in (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)
        success = "completed" in records and code == 0 and not self.ended_by
        return ExecutionResult(
            success=success,
            stdout=self.output["stdout"].decode("utf-8", "replace"),
            stderr=self.output["stderr"].decode("utf-8", "replace"),
            error=None if success else self._reason(records, code),
            timeout=self.ended_by == "timeout",
            memory_exceeded="memory" in records or (fatal and near_limit),
            exit_code=code if code >= 0 else None,
            signal=-code if code < 0 else None,
            duration=time.monotonic() - self.started,
            truncated=any(self.seen[name] > len(self.output[name]) for name in ("stdout", "stderr")),
            isolation=layers,
        )

    def _records(self) -> dict[str, str]:
        """The records that carry this call's token: kind to text."""
        lines = self.output["record"].decode("utf-8", "replace").splitlines()
        parts = [line.split(" ", 2) for line in lines if line.startswith(self.token + " ")]
        return {part[1]: part[2] for part in parts if len(part) == 3}

    def _reason(self, records: dict[str, str], code: int) -> str:
        limit = {
            "timeout": "Execution timed out",
            "output": f"Output limit exceeded: {self.limits.output_bytes * _FLOOD_FACTOR} bytes",
            "disk": f"Disk limit exceeded: {self.limits.disk_bytes} bytes",
            "threads": f"Thread limit exceeded: {_MAX_THREADS}",
        }
        if self.ended_by:
            return limit[self.ended_by]
        if text := records.get("memory") or records.get("raised"):
            return text
        if "ready" not in records:
            last = self.output["stderr"].decode("utf-8", "replace").strip().splitlines()
            return f"The sandbox did not start: {last[-1] if last else 'no message'}"
        return f"Killed by signal {-code}" if code < 0 else f"Exited with status {code} before completion"


def _own_peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

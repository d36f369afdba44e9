"""The inside of the sandbox: confine this process, then run one program. Started by nanochat.execution.

nanochat.execution compiles this file once and hands it to a bare interpreter, which calls main. It imports
little, for that is what a call costs: typing alone would be a tenth of it. Settings and program arrive on one
pipe; what happened leaves on another, each record marked with the caller's random token. System call and
Landlock numbers are Linux ABI (man seccomp, landlock).
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO, NoReturn

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
CLONE_THREAD, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x10000, 0x20000, 0x08000000, 0x10000000, 0x40000000,
)  # fmt: skip
EPERM, ENOSYS = 1, 38

# name: (x86-64, aarch64); None where the call does not exist
_DENIED: dict[str, tuple[int | None, int]] = {
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201),
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, -1), "vfork": (58, -1),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "mq_open": (240, 180), "personality": (135, 92), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "process_madvise": (440, 440),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "move_mount": (429, 429),
    "open_tree": (428, 428), "fsopen": (430, 430), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219),
    "add_key": (248, 217), "request_key": (249, 218), "open_by_handle_at": (304, 265),
    "name_to_handle_at": (303, 264), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145),
    "setregid": (114, 143), "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159),
    "capset": (126, 91), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225),
    "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1), "setsid": (112, 157),
    "setpgid": (109, 154),
    # what reaches other processes of the same user without the file system, or the whole machine
    "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119),
    "sched_setparam": (142, 118), "sched_setattr": (314, 274), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "kcmp": (312, 272), "memfd_secret": (447, 447), "syslog": (103, 116),
    "sync": (162, 81), "syncfs": (306, 267), "inotify_init": (253, -1), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
}  # fmt: skip
# Landlock does not know these: they change files that cannot be opened for writing. Not needed where the
# mounts are read-only.
_METADATA: dict[str, tuple[int | None, int]] = {
    "chmod": (90, -1), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, -1),
    "fchown": (93, 55), "lchown": (94, -1), "fchownat": (260, 54), "utime": (132, -1), "utimes": (235, -1),
    "futimesat": (261, -1), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_SIGNALLING = ((62, 129), (200, 130), (234, 131))  # kill, tkill, tgkill
# (call, argument, values refused): who gets a descriptor's signals, input for a terminal, outliving the parent
_ARGUMENTS = (
    ((72, 25), 1, (8, 15)),  # fcntl: F_SETOWN, F_SETOWN_EX
    ((16, 29), 1, (0x8901, 0x8902, 0x5412)),  # ioctl: FIOSETOWN, SIOCSPGRP, TIOCSTI
    ((157, 167), 0, (PR_SET_PDEATHSIG,)),  # prctl
)
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_BLOCKED_EVENTS = (
    "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "subprocess.Popen",
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.kill", "os.killpg", "pty.spawn",
)  # fmt: skip
_PATH_EVENTS = (
    "os.remove", "os.rmdir", "os.rename", "os.truncate", "os.chmod", "os.chown", "os.mkdir", "os.link",
    "os.symlink", "shutil.rmtree", "shutil.move", "shutil.chown",
)  # fmt: skip


class SandboxViolation(PermissionError):
    """The program tried something that the sandbox does not allow."""


def main(control: BinaryIO, record: int) -> None:
    """Read the order from control, confine this process, run the program, report to descriptor record."""
    with control:
        settings: dict[str, Any] = marshal.load(control)
    token = settings["token"]

    def report(kind: str, text: str) -> None:
        os.write(record, f"{token} {kind} {text}".encode("utf-8", "replace").replace(b"\n", b" ") + b"\n")

    layers = _confine(settings)
    missing = _missing_for_strict(layers) if settings["isolation"] == "strict" else ""
    if missing:
        report("unavailable", missing)
        os._exit(1)
    report("ready", " ".join(layers))
    _run(settings["code"], report)


def _run(code: str, report: Any) -> None:
    """Run the program as __main__. The record after the last line is what success means."""
    module = type(sys)("__main__")
    sys.modules["__main__"], sys.argv = module, ["<program>"]
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), module.__dict__)
        sys.stdout.flush()
        sys.stderr.flush()
    except MemoryError as error:
        report("memory", f"MemoryError: {error}")
        os._exit(1)  # printing a traceback needs memory
    except BaseException as error:
        report("raised", f"{type(error).__name__}: {_message(error)}")
        if isinstance(error, SystemExit):
            raise
        _fail(error)
    else:
        report("completed", "")


def _message(error: BaseException) -> str:
    try:
        return str(error)[:1000]
    except Exception:  # a hostile __str__
        return ""


def _fail(error: BaseException) -> NoReturn:
    """End like the interpreter does: the traceback, without the harness's own frame, on stderr; status 1."""
    trace = error.__traceback__
    error = error.with_traceback(trace.tb_next if trace else None)
    sys.excepthook(type(error), error, error.__traceback__)
    sys.stderr.flush()
    sys.exit(1)


# --- layers ------------------------------------------------------------------------------------------


def _confine(settings: dict[str, Any]) -> list[str]:
    """Put on every layer this system offers; the names of those that are really on."""
    _limit_resources(settings)
    layers = ["process", "environment", "directory", "rlimits", "supervision"]
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0)
        if settings["isolation"] != "basic":
            layers += _kernel_layers(libc, settings)
    _watch(settings["directory"])
    return [*layers, "audit"]


def _kernel_layers(libc: Any, settings: dict[str, Any]) -> list[str]:
    layers = _namespaces(libc, settings)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        layers.append("no_new_privs")
        layers += ["landlock"] if _landlock(libc) else []
        layers += ["capabilities"] if _drop_capabilities(libc) else []
        denied = _DENIED if "read_only" in layers else _DENIED | _METADATA
        layers += ["seccomp"] if _seccomp(libc, denied, settings["allow_threads"]) else []
    return layers


def _missing_for_strict(layers: list[str]) -> str:
    if "seccomp" not in layers and "namespaces" not in layers:
        return "neither seccomp nor a user and network namespace is available"
    if "landlock" not in layers and "mounts" not in layers:
        return "neither Landlock nor a mount namespace is available"
    return ""


def _limit_resources(settings: dict[str, Any]) -> None:
    memory, root = settings["memory"], hasattr(os, "geteuid") and os.geteuid() == 0
    limits = {
        "RLIMIT_CPU": int(settings["timeout"]) + 2,
        "RLIMIT_FSIZE": settings["max_file_bytes"],
        "RLIMIT_NOFILE": settings["max_open_files"],
        "RLIMIT_CORE": 0,
    }
    if memory is not None:
        limits["RLIMIT_STACK"] = min(memory, 64 << 20)
        if sys.platform != "darwin":  # the kernel there refuses or ignores these
            limits |= {"RLIMIT_AS": memory, "RLIMIT_DATA": memory}
    if not settings["allow_threads"] and not root:  # counts the user's processes; root is exempt anyway
        limits["RLIMIT_NPROC"] = 0
    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _namespaces(libc: Any, settings: dict[str, Any]) -> list[str]:
    """An empty network, own IPC, all mounts read-only and a size-limited RAM disk to work in, where allowed."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWNS | CLONE_NEWIPC) != 0:
        return []
    try:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    except OSError:
        return ["namespaces"]
    private, nosuid_nodev = 0x40000 | 0x4000, 0x2 | 0x4
    if libc.mount(None, b"/", None, private, None):
        return ["namespaces"]
    everything_below, read_only = 0x8000, struct.pack("QQQQ", 1, 0, 0, 0)
    closed = libc.syscall(442, -100, b"/", everything_below, read_only, ctypes.c_size_t(32)) == 0
    directory = os.fsencode(settings["directory"])
    size = f"size={settings['max_disk_bytes']},nr_inodes=4096,mode=700".encode()
    if libc.mount(b"tmpfs", directory, b"tmpfs", nosuid_nodev, size):
        return ["namespaces"]
    os.chdir(settings["directory"])
    return ["namespaces", "mounts", *(["read_only"] if closed else [])]


def _landlock(libc: Any) -> bool:
    """Allow reading the interpreter and writing the working directory; nothing else of the file system."""
    abi = libc.syscall(444, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    everything = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    network, scoped = (3 if abi >= 4 else 0), (3 if abi >= 6 else 0)
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("QQQ", everything, network, scoped)
    ruleset = libc.syscall(444, attributes, ctypes.c_size_t(size), 0)
    if ruleset < 0:
        return False
    execute, write, read, read_dir, truncate = 1, 2, 4, 8, (1 << 14) & everything
    rules = {path: execute | read | read_dir for path in _readable_folders()}
    rules |= {"/dev/null": read | write | truncate, "/dev/zero": read, "/dev/urandom": read, ".": everything}
    try:
        for path, access in rules.items():
            if not os.path.exists(path):
                continue
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", access, handle)
            failed = libc.syscall(445, ruleset, 1, rule, 0)
            os.close(handle)
            if failed:
                return False
        return libc.syscall(446, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _readable_folders() -> list[str]:
    folders = [sys.base_prefix, sys.prefix, "/usr/lib", "/usr/share/zoneinfo", os.path.dirname(os.__file__)]
    folders += [path for path in sys.path if path]
    folders += [f"/{name}" for name in ("lib", "lib32", "lib64", "libx32")]
    return [path for path in dict.fromkeys(folders) if os.path.isdir(path)]


def _drop_capabilities(libc: Any) -> bool:
    # Without this, root could raise its own limits again.
    header, nothing = struct.pack("Ii", 0x20080522, 0), bytes(24)
    return libc.capset(header, nothing) == 0


def _seccomp(libc: Any, denied: dict[str, tuple[int | None, int]], allow_threads: bool) -> bool:
    if os.uname().machine not in _ARCHITECTURES or struct.calcsize("P") != 8:
        return False
    column, architecture = _ARCHITECTURES[os.uname().machine]
    program = _filter(column, architecture, denied, allow_threads)
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    return libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0


def _filter(
    column: int, architecture: int, denied: dict[str, tuple[int | None, int]], allow_threads: bool
) -> bytes:
    """Classic BPF over struct seccomp_data {int nr; u32 arch; u64 ip; u64 args[6]}: a deny list."""
    load, jump_equal, jump_greater, jump_set, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, error = 0x7FFF0000, 0x80000000, 0x00050000
    number, arch, argument = 0, 4, 16
    code = [(load, 0, 0, arch), (jump_equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, number)]
    if column == 0:  # x32 numbers would be a way around the list
        code += [(jump_greater, 0, 1, 0x40000000), (give, 0, 0, kill)]

    def deny(call: int, errno: int) -> None:
        code.extend([(jump_equal, 0, 1, call), (give, 0, 0, error | errno)])

    def allow_if(call: int, test: int, value: int) -> None:
        code.extend([
            (jump_equal, 0, 4, call), (load, 0, 0, argument), (test, 0, 1, value),
            (give, 0, 0, allow), (give, 0, 0, error | EPERM),
        ])  # fmt: skip

    def refuse_if(call: int, index: int, values: tuple[int, ...]) -> None:
        code.extend([(jump_equal, 0, 2 * len(values) + 2, call), (load, 0, 0, argument + 8 * index)])
        for value in values:
            code.extend([(jump_equal, 0, 1, value), (give, 0, 0, error | EPERM)])
        code.append((load, 0, 0, number))

    for call in denied.values():
        if (value := call[column]) is not None and value >= 0:
            deny(value, EPERM)
    deny(_CLONE3[column], ENOSYS)  # libc then falls back to clone, whose flags can be seen
    if allow_threads:
        allow_if(_CLONE[column], jump_set, CLONE_THREAD)
    else:
        deny(_CLONE[column], EPERM)
    for call in _SIGNALLING:
        allow_if(call[column], jump_equal, os.getpid())
    allow_if(_PRLIMIT[column], jump_equal, 0)
    for call, index, values in _ARGUMENTS:
        refuse_if(call[column], index, values)
    code.append((give, 0, 0, allow))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def _watch(directory: str) -> None:
    """Refuse with a clear message what the kernel layers refuse anyway. Usability, not security."""
    inside = os.path.realpath(directory)

    def outside(path: object, follows: bool) -> bool:
        if not isinstance(path, (str, bytes)):
            return False  # file descriptors were opened under the same rules
        folder, name = os.path.split(os.fsdecode(path))
        if follows or name in ("", ".", ".."):
            folder = os.path.join(folder, name)
        real = os.path.realpath(folder or ".")
        return real != "/dev/null" and os.path.commonpath([inside, real]) != inside

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _BLOCKED_EVENTS:
            raise SandboxViolation(f"{event} is not allowed in the sandbox")
        writes = event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wax+")
        if not (writes or event in _PATH_EVENTS):
            return
        if outside(args[1] if event == "os.symlink" else args[0], writes):
            raise SandboxViolation(f"{event} outside the working directory is not allowed in the sandbox")

    sys.addaudithook(hook)

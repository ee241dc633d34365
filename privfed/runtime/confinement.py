"""What the process of an app may do: limits it gives itself before it imports any code of the app.

A process confines itself, so nothing runs between fork and exec in a node with many threads. Limits only go down, and
what could not be had is said, never left out.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from privfed import failpoint
from privfed.errors import AppError

NETWORKS = ("off", "auto", "on")
ENVIRONMENT = (
    "PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PRIVFED_FAST", failpoint.VARIABLE,
)  # fmt: skip
"""What an app's process inherits; all else, tokens above all, stays outside. The last is set in tests only."""
_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000
_MS_NOSUID = 2
_MS_NODEV = 4
_MS_BIND = 1 << 12
_MS_REC = 1 << 14
_MS_PRIVATE = 1 << 18
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442
_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x20080522


@dataclass(frozen=True, slots=True)
class Limits:
    """What an app's process gets. memory: bytes of address space; cpu: seconds of a process; None: no limit.

    files: open files. network: "off" refuses to run where the network cannot be taken away, "auto" takes it away where
    it can and says so, "on" leaves it. hidden: folders it must not see, keys above all, covered where the system can;
    shown: what it sees in them all the same. writable: folders it may change beside its own; all else is read-only
    where the system can. packet: bytes of the largest packet read from the process.
    """

    memory: int | None = None
    cpu: int | None = None
    files: int = 1024
    network: str = "auto"
    hidden: tuple[str, ...] = ()
    shown: tuple[str, ...] = ()
    writable: tuple[str, ...] = ()
    packet: int = 1 << 34

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {self.network!r}")
        for name in ("memory", "cpu", "files", "packet"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")

    def within(self, asked: Limits) -> Limits:
        """Return the tighter of these limits and of those asked for, one by one."""

        def least(own: int | None, other: int | None) -> int | None:
            return min((one for one in (own, other) if one is not None), default=None)

        return Limits(
            memory=least(self.memory, asked.memory),
            cpu=least(self.cpu, asked.cpu),
            files=min(self.files, asked.files),
            network=min(self.network, asked.network, key=NETWORKS.index),
            hidden=tuple(dict.fromkeys((*self.hidden, *asked.hidden))),
            shown=asked.shown,
            writable=asked.writable,
            packet=min(self.packet, asked.packet),
        )

    def to_head(self) -> dict[str, object]:
        """Return the limits as plain facts."""
        return asdict(self)

    @classmethod
    def from_head(cls, head: Mapping[str, object]) -> Limits:
        """Read what `to_head` gave. Raises ValueError or TypeError."""
        given: dict[str, Any] = {one.name: head[one.name] for one in fields(cls)}
        lists = {name: tuple(map(str, given[name])) for name in ("hidden", "shown", "writable")}
        return cls(**{**given, **lists})

    def showing(self, shown: Iterable[Path], writable: Iterable[Path]) -> Limits:
        """Return the limits with more that is shown, or may be changed."""
        return replace(
            self,
            shown=(*self.shown, *(str(path.resolve()) for path in shown)),
            writable=(*self.writable, *(str(path.resolve()) for path in writable)),
        )


def environment(home: Path) -> dict[str, str]:
    """Return the environment of an app's process whose own folder is `home`."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {**kept, "HOME": str(home), "TMPDIR": str(home), "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def confine(limits: Limits) -> str:
    """Confine this process, which must have one thread; return what was achieved, for the log.

    Raises AppError when the network must be off and cannot be taken away.
    """
    apart, files = _go_apart(limits)
    if limits.network == "off" and apart:
        raise AppError(
            f"the network cannot be taken from an app here: {apart}; --app-network auto runs apps with it all the same"
        )
    network = "not isolated: allowed" if limits.network == "on" else f"not isolated: {apart}" if apart else "isolated"
    folders = f"not hidden: {apart}" if apart else "hidden"
    _lower(resource.RLIMIT_CORE, 0)
    _lower(resource.RLIMIT_NOFILE, limits.files)
    if limits.memory is not None:
        _lower(resource.RLIMIT_AS, limits.memory)
    if limits.cpu is not None:
        _lower(resource.RLIMIT_CPU, limits.cpu)
    os.umask(0o077)
    memory = "unlimited" if limits.memory is None else f"{limits.memory} bytes"
    files = files or apart
    changes = f"not read-only: {files}" if files else "read-only"
    return (
        f"network: {network}; node's own folders: {folders}; all else: {changes}; memory: {memory}; "
        f"open files: {limits.files}"
    )


def probe(limits: Limits) -> str:
    """Return what `confine` achieves on this system, tried in a process that ends. Raises AppError as it does."""
    command = [sys.executable, "-P", "-m", "privfed.runtime.confinement", json.dumps(limits.to_head())]
    tried = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if tried.returncode:
        raise AppError(tried.stderr.strip().splitlines()[-1].removeprefix("privfed.errors.AppError: "))
    return tried.stdout.strip()


def _lower(what: int, value: int) -> None:
    _, hard = resource.getrlimit(what)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _go_apart(limits: Limits) -> tuple[str, str]:
    """Move into namespaces without a network, without the hidden folders, and with files that can only be read.

    Return why the first two were not to be had, and why the last was not; nothing where they were.

    In a user namespace of its own a process cannot trace those outside it either, whoever it runs as.
    """
    if sys.platform != "linux":
        return f"{sys.platform} has no namespaces", ""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.geteuid(), os.getegid()
    wanted = _CLONE_NEWNS | (0 if limits.network == "on" else _CLONE_NEWNET)
    if libc.unshare(_CLONE_NEWUSER | wanted) == 0:
        # The process stays who it was, outside as inside.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    elif user != 0 or libc.unshare(wanted) != 0:
        return f"this system gives a process no namespaces of its own ({os.strerror(ctypes.get_errno())})", ""
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        return f"its mounts cannot be made private ({os.strerror(ctypes.get_errno())})", ""
    try:
        files = _arrange(_Mounts(libc), limits)
    except OSError as fault:
        return str(fault), ""
    _drop_capabilities(libc)
    return "", files


class _Mounts:
    """The system calls that change what a process sees of the file system. Each raises OSError."""

    def __init__(self, libc: ctypes.CDLL) -> None:
        self._libc = libc

    def cover(self, folder: str, options: str) -> None:
        """Put an empty file system over a folder."""
        flags = _MS_NOSUID | _MS_NODEV
        if self._libc.mount(b"none", os.fsencode(folder), b"tmpfs", flags, options.encode()) != 0:
            raise OSError(f"{folder} cannot be covered ({os.strerror(ctypes.get_errno())})")

    def bind(self, source: str, target: str) -> None:
        """Show a file or folder at another place, or at its own as a mount that has flags of its own."""
        if self._libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND | _MS_REC, None) != 0:
            raise OSError(f"{target} cannot be shown ({os.strerror(ctypes.get_errno())})")

    def change(self, path: str, *, read_only: bool, all_below: bool = False) -> None:
        """Let a mount be changed, or only be read."""
        attributes = struct.pack("=QQQQ", int(read_only), int(not read_only), 0, 0)
        where = (_AT_FDCWD, os.fsencode(path), _AT_RECURSIVE if all_below else 0)
        if self._libc.syscall(_SYS_MOUNT_SETATTR, *where, attributes, ctypes.c_size_t(len(attributes))) != 0:
            raise OSError(os.strerror(ctypes.get_errno()))


def _arrange(mounts: _Mounts, limits: Limits) -> str:
    """Cover what is hidden but for what is shown, and make all else read-only; return why the latter was not to be had.

    Raises OSError when something cannot be covered.
    """
    home = str(Path.cwd())
    writable = [path for path in dict.fromkeys((home, *limits.writable)) if Path(path).exists()]
    kept = [path for path in dict.fromkeys((*limits.shown, *writable)) if Path(path).exists()]
    opened = {path: os.open(path, os.O_PATH) for path in kept}
    hidden = [Path(one) for one in limits.hidden]
    covered = [one for one in hidden if not any(one != other and one.is_relative_to(other) for other in hidden)]
    for folder in covered:
        mounts.cover(str(folder), "size=1m,mode=755")
    for path in sorted(kept, key=len):
        if any(Path(path).is_relative_to(folder) for folder in covered):
            Path(path).mkdir(mode=0o755, parents=True, exist_ok=True)
        mounts.bind(f"/proc/self/fd/{opened[path]}", path)
        os.close(opened[path])
    why = ""
    try:
        mounts.change("/", read_only=True, all_below=True)
        if Path("/dev/shm").is_dir():
            mounts.cover("/dev/shm", "mode=1777")  # its own: what is in the system's belongs to others
        for path in writable:
            mounts.change(path, read_only=False)
    except OSError as fault:
        why = str(fault)
    os.chdir(home)  # as it is seen now
    return why


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    """Give up what the new namespace gave, so that nothing uncovers the folders; exec gives nothing back."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or libc.capset(header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "the privileges of the namespace cannot be dropped")


if __name__ == "__main__":
    sys.stdout.write(confine(Limits.from_head(json.loads(sys.argv[1]))))

"""What this machine has, read from its files: devices, cores, memory, mounts, names. No program of it is started."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# where a file is not at once seen by another node, or locks are slow: said, since people ask
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "afs")
IN_MEMORY = ("tmpfs", "ramfs")


def devices(folder: Path = Path("/dev")) -> dict[str, int]:
    """How many accelerators of each kind have a device file."""
    patterns = {"npu": r"davinci\d+", "cuda": r"nvidia\d+"}
    with suppress(OSError):
        names = os.listdir(folder)
        return {kind: sum(bool(re.fullmatch(pattern, name)) for name in names) for kind, pattern in patterns.items()}
    return dict.fromkeys(patterns, 0)


def cores() -> tuple[int, int, float | None]:
    """Cores of the machine, those that this process may use, and its cgroup's share of them (None: no limit)."""
    share = None
    with suppress(OSError, ValueError):
        quota, period = _cgroup("cpu.max").split()
        share = None if quota == "max" else int(quota) / int(period)
    return os.cpu_count() or 1, len(os.sched_getaffinity(0)), share


def memory() -> tuple[int | None, int | None, int | None]:
    """Bytes of the machine, available now, and the cgroup's limit (None: unknown, or no limit)."""
    known: dict[str, int] = {}
    with suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            known[name] = int(value.split()[0]) * 1024
    limit = None
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            limit = int(_cgroup(name))
            break
    total = known.get("MemTotal")
    # version 1 says "no limit" by a number larger than any machine
    return total, known.get("MemAvailable"), limit if limit and (total is None or limit < total) else None


def _cgroup(name: str) -> str:
    """A value of this process's cgroup, or of the nearest one above that has it."""
    root, own = Path("/sys/fs/cgroup"), "/"
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        if line.startswith("0::"):
            own = line[3:]
    for folder in [*(root / own.lstrip("/") / "x").parents]:
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="ascii").strip()
        if folder == root:
            break
    raise FileNotFoundError(name)


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that ``path`` (or what is there of it) lies on; ``?`` where that is unknown."""
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return "?"
    there = os.path.realpath(existing(path))
    best, kind = "", "?"
    for line in mounts.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if not dash or len(fields) < 5:
            continue
        point = re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), fields[4])
        inside = there == point or there.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # what is mounted later hides what was before
            best, kind = point, after.split(" ")[0]
    return kind


def existing(path: Path) -> Path:
    """``path``, or the nearest folder above it that is there."""
    for folder in (path, *path.parents):
        with suppress(OSError):
            if folder.exists():
                return folder
    return Path("/")


def umask() -> int | None:
    """Read without changing it, which another thread would notice."""
    with suppress(OSError, ValueError, IndexError):
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        return int(next(line for line in status.splitlines() if line.startswith("Umask:")).split()[1], 8)
    return None


def own_address(name: str, seconds: float = 0.5) -> str | None:
    """What this host's name resolves to here; None where nobody says so in time (a name server that is away)."""
    with suppress(OSError):
        lines = Path("/etc/hosts").read_text(encoding="utf-8", errors="replace").splitlines()
        if address := in_hosts(name, lines):
            return address
    found: list[str] = []

    def ask() -> None:
        with suppress(OSError, UnicodeError):
            found.append(socket.gethostbyname(name))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(seconds)
    return found[0] if found else None


def in_hosts(name: str, lines: Iterable[str]) -> str | None:
    """The IPv4 address that /etc/hosts gives ``name``."""
    for line in lines:
        address, *names = line.partition("#")[0].split() or [""]
        if name in names and "." in address:
            return address
    return None


def loopback() -> str | None:
    """None if a port can be opened on 127.0.0.1, else why not."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return None

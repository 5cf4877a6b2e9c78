"""Mounts: bind, unmount, list."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tests.cluster.process import checked


def mounts() -> list[Path]:
    """Every mount point, in the order in which they were mounted."""
    escape = re.compile(rb"\\([0-7]{3})")
    lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    return [Path(os.fsdecode(escape.sub(lambda octal: bytes([int(octal[1], 8)]), line.split()[4]))) for line in lines]


def tmpfs(folder: Path) -> None:
    checked(["mount", "-t", "tmpfs", "-o", "mode=0755,size=4g", "pkuslurm", str(folder)])


def shared(folder: Path) -> None:
    """Make ``folder`` a mount whose later mounts reach the mount namespaces that are its slaves."""
    folder.mkdir()
    checked(["mount", "--bind", str(folder), str(folder)])
    checked(["mount", "--make-shared", str(folder)])


def bind(source: Path, target: Path) -> Path:
    """``source``, read-only, at ``target``."""
    target.mkdir(parents=True)
    checked(["mount", "--bind", str(source), str(target)])
    checked(["mount", "-o", "remount,bind,ro", str(target)])
    return target


def umount(mount: Path) -> None:
    """Lazily: a process that is not ours to end could have a file open there."""
    checked(["umount", "--lazy", str(mount)])

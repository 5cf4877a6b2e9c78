"""What lies on the disk, counted once: hard links (tokenized data and its cache, a whole model and its adapter/)."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

# A list of two hundred runs on a slow network disk must still appear at once.
SECONDS = 1.0
LEAST = 0.2  # where finding them took longer than that


def deadline(began: float) -> float:
    """Until when may be measured for a command that has ``began`` to look at time.monotonic() so."""
    return max(began + SECONDS, time.monotonic() + LEAST)


@dataclass(frozen=True)
class File:
    """One directory entry that holds bytes; (``device``, ``inode``) is the same for every link to it."""

    path: str
    device: int
    inode: int
    links: int
    bytes: int
    changed: float


@dataclass
class Meter:
    """Measures folder after folder until its time is up; ``total`` counts every file once, whatever its names."""

    deadline: float = field(default_factory=lambda: time.monotonic() + SECONDS)
    total: int = 0
    late: bool = False
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def measure(self, folder: Path) -> int | None:
        """Bytes below ``folder``; None where there was no time left for it."""
        if self.late:
            return None
        own: dict[tuple[int, int], int] = {}
        for file in files(folder):
            own[(file.device, file.inode)] = file.bytes
            if time.monotonic() > self.deadline:
                self.late = True
                return None
        self.total += sum(count for identity, count in own.items() if identity not in self._seen)
        self._seen |= own.keys()
        return sum(own.values())


def files(folder: str | os.PathLike[str]) -> Iterator[File]:
    """Every regular file below ``folder``; symbolic links are not followed, what cannot be read is left out."""
    waiting = [os.fspath(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield _file(entry.path, entry.stat(follow_symlinks=False))
            except OSError:
                continue


def below(path: Path) -> list[File]:
    """The files of ``path``, which may be one itself, or a folder, or nothing."""
    try:
        known = path.lstat()
    except OSError:
        return []
    if stat.S_ISDIR(known.st_mode):
        return list(files(path))
    return [_file(str(path), known)] if stat.S_ISREG(known.st_mode) else []


def _file(path: str, known: os.stat_result) -> File:
    return File(path, known.st_dev, known.st_ino, known.st_nlink, known.st_size, max(known.st_mtime, known.st_ctime))


def parts(root: Path, without: Collection[str] = ()) -> tuple[tuple[str, int], ...]:
    """Bytes by part of a run's directory, largest first; ``without``: files directly in it that are not counted."""
    found: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    for file in sorted(files(root), key=lambda one: one.path):
        first, *rest = Path(file.path).relative_to(root).parts
        if (identity := (file.device, file.inode)) in seen or (first in without and not rest):
            continue
        seen.add(identity)
        part = f"{first}/" if rest else first if first.endswith(".html") else "*.json, *.yaml, …"
        found[part] = found.get(part, 0) + file.bytes
    return tuple(sorted(found.items(), key=lambda item: (-item[1], item[0])))

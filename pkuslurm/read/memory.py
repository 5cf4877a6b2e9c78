"""What ended runs were found to be, kept in the user's state directory: a list of ten thousand then opens none of them.

A run is kept only where files alone decide about it for ever: Slurm has forgotten its jobs, and no process is looked
for. With it go the time, size and inode of each of these files and of the folders that they would be in. Where one of
them differs now the run is read anew; and nothing is kept while one has changed within the last minute, of which a
network disk may not have told all.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm import __version__
from pkuslurm.read.values import unix
from pkuslurm.rundir import read_json, write_text

FORM = f"1 {__version__}"  # what another version has found out is not taken over
QUIET_SECONDS = 60.0
MOST = 100_000
Stamp = tuple[int, int, int]
GONE: Stamp = (-1, -1, -1)


class Memory:
    """``file`` None, or one that cannot be read or written: nothing is remembered, and nothing else changes."""

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        value = (read_json(file) if file else None) or {}
        good = value.get("form") == FORM and isinstance(value.get("entries"), dict)
        # folder → [stamp of its run.json, when it was created, which shape, its digest, what was said], the last three
        # of ended ones only; a shape is the list of files that decide, the same for nearly all runs
        self._entries: dict[str, list[Any]] = value["entries"] if good else {}
        self._shapes: list[list[str]] = value["shapes"] if good else []
        self._numbers = {tuple(shape): number for number, shape in enumerate(self._shapes)}
        self._listed: set[str] = set()
        self._changed = False

    def created(self, folder: str, file: str, known: os.stat_result) -> float:
        """Unix time of ``created`` in ``file``, the folder's run.json or sweep.json, which is as ``known`` says."""
        self._listed.add(folder)
        own = list(_stamp(known))
        entry = self._entries.get(folder)
        if entry is not None and entry[0] == own:
            return float(entry[1])
        when = unix((read_json(Path(file)) or {}).get("created")) or 0.0
        if _quiet([own[0]]):
            self._entries[folder], self._changed = [own, when], True
        return when

    def said(self, folder: str) -> list[Any] | None:
        """What was kept of the run or sweep in ``folder``, if all files are as they were."""
        entry = self._entries.get(folder)
        if entry is None or len(entry) < 5:
            return None
        return list(entry[4]) if _digest(_stamps(folder, self._shapes[entry[2]])) == entry[3] else None

    def keep(self, folder: str, evidence: Iterable[Path], said: Sequence[Any]) -> None:
        """Remember what was ``said`` for as long as the files of ``evidence``, all below ``folder``, stay as they are.

        They have been read before this is called: what changed since then has changed within the last minute.
        """
        entry = self._entries.get(folder)
        shape = tuple(os.fspath(file).removeprefix(f"{folder}/") for file in dict.fromkeys(evidence))
        stamps = _stamps(folder, shape)
        if entry is None or not _quiet(stamps[::3]):
            return
        if shape not in self._numbers:
            self._numbers[shape] = len(self._shapes)
            self._shapes.append(list(shape))
        entry[2:] = [self._numbers[shape], _digest(stamps), list(said)]
        self._changed = True

    def save(self, places: Iterable[Path]) -> None:
        """Write it, without those below ``places`` that are no longer there. Where that cannot be: never mind."""
        here = {os.fspath(place) for place in places}
        left = {
            folder: entry
            for folder, entry in self._entries.items()
            if folder in self._listed or folder.rpartition("/")[0] not in here
        }
        if self._file is None or (not self._changed and len(left) == len(self._entries)):
            return
        left = dict(list(left.items())[-MOST:])
        used = sorted({entry[2] for entry in left.values() if len(entry) > 2})
        numbers = {number: place for place, number in enumerate(used)}
        entries = {
            folder: [*entry[:2], numbers[entry[2]], *entry[3:]] if len(entry) > 2 else entry
            for folder, entry in left.items()
        }
        value = {"form": FORM, "shapes": [self._shapes[number] for number in used], "entries": entries}
        with suppress(OSError):
            write_text(self._file, json.dumps(value, separators=(",", ":")))


def _stamp(known: os.stat_result) -> Stamp:
    return known.st_mtime_ns, known.st_size, known.st_ino


def _stamps(folder: str, shape: Iterable[str]) -> array[int]:
    """Three numbers for each file."""
    found = array("q")
    stat, base = os.stat, f"{folder}/"
    for name in shape:
        try:
            known = stat(base + name)
        except (OSError, ValueError):
            found.extend(GONE)
        else:
            found.extend((known.st_mtime_ns, known.st_size, known.st_ino & 0x7FFFFFFFFFFFFFFF))
    return found


def _digest(stamps: array[int]) -> str:
    return hashlib.blake2b(stamps.tobytes(), digest_size=16).hexdigest()


def _quiet(times: Iterable[int]) -> bool:
    """Whether the last of these mtimes is old enough to be the last."""
    return max(times, default=0) / 1e9 < time.time() - QUIET_SECONDS

"""Processes on several machines come together through a folder that all of them see.

The first to arrive publishes a file and is the host, node 0 (unless the ranks are given). Each other one, a guest, puts
a request with a nonce of its own beside it; the host answers by listing that nonce. So nobody ever joins a file that a
dead host has left: a dead host lists nobody, and its file, once silent, is replaced by exactly one.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.submit import meeting_files
from pkuslurm.worker import beats, processes
from pkuslurm.worker.beats import Post, Watch

POLL_SECONDS = 0.2
# who has been silent for so long is dead: one that waits is soon replaced; a training is not given up for a hiccup of
# the file server
PATIENCE = {"waiting": 10.0, "running": 30.0, "ended": 10.0}
# for the guests to hear how it ended
FAREWELL_SECONDS = 15.0


@dataclass(frozen=True)
class Wish:
    """What one node comes with. ``rank``: None: by arrival, 0: host only. ``settings``: what all must have in common,
    a text a key; ``source``: the YAML that says some of it, as ``from_yaml=FILE``.
    """

    nodes: int
    rank: int | None
    settings: tuple[str, ...]
    address: str
    version: str
    source: str = ""

    def said(self) -> dict[str, Any]:
        own = processes.look(os.getpid())
        return {
            "nodes": self.nodes,
            "rank": self.rank,
            "settings": list(self.settings),
            "address": self.address,
            "version": self.version,
            "source": self.source,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start": own.start if own else None,
            "pids": pid_namespace(),
        }


class Host:
    """Node 0's side: ``members`` are the guests' nonces with their ranks."""

    def __init__(self, file: Path, wish: Wish, nonce: str | None = None) -> None:
        self.nonce = nonce or secrets.token_hex(8)
        self.file = file
        self.wish = wish
        self.members: dict[str, int] = {}
        self.guests: dict[str, Watch] = {}
        self.refused: dict[str, str] = {}
        value: dict[str, Any] = {"nonce": self.nonce, "state": "waiting", "members": {}, "refused": {}}
        self.post = Post(file, wish.said() | value)

    @property
    def launcher(self) -> dict[str, Any]:
        """What run.json says in addition of who runs it."""
        return {"meeting": str(self.file), "nonce": self.nonce}

    def look(self) -> bool:
        """See who has come and who has gone; whether all are here."""
        with suppress(OSError):
            for name in os.listdir(self.file.parent):
                if (nonce := meeting_files.guest_of(name, self.file, self.nonce)) and nonce not in self.guests:
                    self.guests[nonce] = Watch(self.file.parent / name)
        for nonce, watch in list(self.guests.items()):
            value = watch.look()
            if not watch.there or watch.silent > PATIENCE["waiting"]:
                del self.guests[nonce]
                if self.members.pop(nonce, None) is not None:
                    self.post.say(members=self.members)
            elif value is not None and watch.moves and nonce not in self.members and nonce not in self.refused:
                self._answer(nonce, value)
        return len(self.members) == self.wish.nodes - 1

    def _answer(self, nonce: str, value: Mapping[str, Any]) -> None:
        taken = {rank: self.guests[member] for member, rank in self.members.items()}
        free = [rank for rank in range(1, self.wish.nodes) if rank not in taken]
        rank = value.get("rank")
        if rank is None and free:
            rank = free[0]
        if rank in free:
            self.members[nonce] = rank
            self.post.say(members=self.members)
        elif rank in taken and taken[rank].silent < 3 * beats.BEAT_SECONDS:
            by = (taken[rank].value or {}).get("host")
            self.refused[nonce] = f"node {rank} of {self.wish.nodes} has come already, from {by}; each rank is one node"
            self.post.say(refused=self.refused)

    def guest(self, rank: int) -> Watch:
        return next(self.guests[nonce] for nonce, one in self.members.items() if one == rank)

    def wishes_cancelled(self) -> str | None:
        """How and where the run's end was asked for: by a signal to a guest, or by ``cancel`` on some other machine."""
        for nonce in self.members:
            value = self.guests[nonce].look() if nonce in self.guests else None
            if value is not None and value.get("cancel"):
                return f"{value['cancel']} on {value.get('host')}"
        asked = meeting_files.cancel_file(self.file, self.nonce)
        host = (beats.read(asked) or {}).get("host", "another machine")
        return f"by `pkuslurm cancel` on {host}" if asked.exists() else None

    def end(self, code: int, words: str | None = None) -> None:
        """Tell the guests, wait until they have heard it, and remove the meeting."""
        self.post.say(state="ended", code=code, words=words)
        deadline = time.monotonic() + FAREWELL_SECONDS
        while time.monotonic() < deadline and any(self._listens(nonce) for nonce in self.members):
            time.sleep(POLL_SECONDS)
        self.close()

    def _listens(self, nonce: str) -> bool:
        watch = self.guests.get(nonce)
        if watch is None:
            return False
        watch.look()
        return watch.seen and watch.silent < PATIENCE["waiting"]

    def close(self) -> None:
        self.post.close()
        meeting_files.forget(self.file, self.nonce)


@dataclass
class Guest:
    """Another node's side, once it is listed."""

    host: Watch
    post: Post
    rank: int
    nonce: str  # the host's

    @property
    def said(self) -> dict[str, Any]:
        """The host's last word."""
        return self.host.value or {}

    def gone(self) -> bool:
        """Whether the host, or its word, is not to be expected any more."""
        value = self.host.look()
        if not self.host.there or (value or {}).get("nonce") != self.nonce:
            return True
        return self.host.silent > PATIENCE["running"]


def pid_namespace() -> str:
    """In which of the kernel's pid namespaces a pid is meant: containers count their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""

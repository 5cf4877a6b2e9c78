"""The way into a meeting: to be its host, or a guest that the host has listed, or to be told why not."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.submit import meeting_files
from pkuslurm.submit.meet_settings import difference
from pkuslurm.submit.meeting import PATIENCE, POLL_SECONDS, Guest, Host, Wish, pid_namespace
from pkuslurm.worker import beats, processes
from pkuslurm.worker.beats import Post, Watch

# for one who meets nobody: until whoever was there is known to be dead, or has said farewell
ALONE_SECONDS = 120.0


@dataclass
class Gathering:
    """The way to a Host or a Guest. ``say``: for people; ``stopped``: whether somebody has interrupted it."""

    file: Path
    wish: Wish
    timeout: float
    say: Callable[[str], None]
    stopped: Callable[[], bool]
    again: str  # what is to be typed on the other nodes; empty: the platform does it
    own: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        self._watch = Watch(self.file)
        self._until = time.monotonic() + self.timeout
        self._told: set[str] = set()
        self._tries = 0

    def come_together(self) -> Host | Guest:
        """Raises PkuslurmError: nobody comes, or who is there wants something else; KeyboardInterrupt."""
        request: Post | None = None
        try:
            while True:
                self._pause()
                there = self._watch.look()
                if request is not None and (there or {}).get("nonce") != meeting_files.host_of(request.path):
                    request.close()
                    request = None
                if not self._watch.there or self._silent(there):
                    host = self._try_to_host(there)
                    if host is not None and self._wait_for_guests(host):
                        return host
                elif there is not None and self._watch.moves and there.get("state") != "ended":
                    if self.own not in there.get("members", {}):
                        self._check(there)
                    request = request or self._ask(there)
                    if request is not None and (guest := self._listed(there, request)) is not None:
                        request = None
                        return guest
        finally:
            if request is not None:
                request.close()

    def _pause(self) -> None:
        if self.stopped():
            raise KeyboardInterrupt
        if time.monotonic() > self._until:
            raise PkuslurmError(self._nobody())
        time.sleep(POLL_SECONDS)

    def _nobody(self) -> str:
        there = self._watch.value or {}
        if self.wish.nodes == 1:
            return f"{there.get('host')} does not leave {self.file}; wait, or cancel it first"
        waited = f"cluster.join_timeout={self.timeout:g}"
        if self.wish.rank:
            return (
                f"{waited}: node 0 of {self.wish.nodes} did not come to {self.file.parent} within that time (this is "
                f"node {self.wish.rank}); every node must see that folder{self._typed('there')}"
            )
        return (
            f"{waited}: {there.get('host', 'node 0')} has not taken this node in within that time "
            f"({self.file}){self._typed('everywhere')}"
        )

    def _typed(self, where: str) -> str:
        return f"; {where}: {self.again}" if self.again else ""

    def _silent(self, there: Mapping[str, Any] | None) -> bool:
        """Whether the host of what is there is dead."""
        if there is None:  # torn: its author died while writing it, or writes just now
            return self._watch.silent > PATIENCE["waiting"]
        pid, start = there.get("pid"), there.get("pid_start")
        if there.get("host") == socket.gethostname() and there.get("pids") == pid_namespace():
            return not (isinstance(pid, int) and isinstance(start, int) and processes.alive(pid, start))
        if self._watch.silent > 2 * beats.BEAT_SECONDS and not self._watch.moves:
            self._once(f"an earlier meeting is there, of {there.get('host')}; looking whether it lives …")
        return self._watch.silent > PATIENCE.get(str(there.get("state")), PATIENCE["running"])

    def _try_to_host(self, there: Mapping[str, Any] | None) -> Host | None:
        """Publish, in an empty place or in that of a dead host; None: another one was quicker, or this is no host."""
        if self.wish.rank:
            self._once(f"node {self.wish.rank} of {self.wish.nodes} waits for node 0 at {self.file}")
            return None
        host = Host(self.file, self.wish)
        try:
            return self._publish(host, there)
        except FileNotFoundError:  # who has ended takes the folder away
            self._folder_again()
            return None

    def _publish(self, host: Host, there: Mapping[str, Any] | None) -> Host | None:
        if not self._watch.there:
            return host if host.post.begin_as_first() else None
        dead = str((there or {}).get("nonce", "torn"))
        # several may have seen it die: one of them gets this file; should that one die, too, the next is tried later
        lock = meeting_files.taken_file(self.file, dead, self._tries)
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if self._watch.silent > (self._tries + 2) * PATIENCE["running"]:
                self._tries += 1
            return None
        mine = str((beats.read(self.file) or {}).get("nonce", "torn")) == dead
        if mine:
            host.post.begin()
            meeting_files.forget(self.file, dead)
        lock.unlink(missing_ok=True)
        return host if mine else None

    def _folder_again(self) -> None:
        with suppress(FileExistsError):
            self.file.parent.mkdir(mode=0o700)

    def _wait_for_guests(self, host: Host) -> bool:
        """Until all are here. False: somebody else took the place (we were suspended, or a disk was)."""
        try:
            if self.wish.nodes > 1:
                here = f"{socket.gethostname()} ({self.wish.address})"
                self.say(f"node 0 of {self.wish.nodes}, on {here}, waits in {self.file.parent}")
                if self.again:
                    self.say(f"on the other node{'s' if self.wish.nodes > 2 else ''} now type: {self.again}")
            seen: set[int] = set()
            while not host.post.taken:
                if self.stopped():
                    raise KeyboardInterrupt
                if host.look():
                    host.post.say(state="running")
                    return True
                for nonce, rank in host.members.items():
                    if rank not in seen:
                        seen.add(rank)
                        self.say(f"node {rank} is here: {(host.guests[nonce].value or {}).get('host')}")
                if time.monotonic() > self._until:
                    raise PkuslurmError(self._missing(host))
                time.sleep(POLL_SECONDS)
        except BaseException:
            host.close()
            raise
        host.close()
        self._watch = Watch(self.file)
        return False

    def _missing(self, host: Host) -> str:
        missing = [str(rank) for rank in range(1, self.wish.nodes) if rank not in host.members.values()]
        return (
            f"cluster.join_timeout={self.timeout:g}: node {', '.join(missing)} of {self.wish.nodes} did not come "
            f"within that time; {socket.gethostname()} ({self.wish.address}) waited in {self.file.parent}, which every "
            f"node must see{self._typed('there')}"
        )

    def _ask(self, there: Mapping[str, Any]) -> Post | None:
        """None: the host leaves just now, and has taken the folder along."""
        value = self.wish.said() | {"nonce": self.own, "cancel": False, "codes": {}}
        post = Post(meeting_files.request_file(self.file, str(there.get("nonce")), self.own), value)
        try:
            post.begin()
        except FileNotFoundError:
            self._folder_again()
            return None
        return post

    def _listed(self, there: Mapping[str, Any], request: Post) -> Guest | None:
        """In, as soon as all are."""
        rank = there.get("members", {}).get(self.own)
        if rank is not None and there.get("state") != "waiting":
            return Guest(self._watch, request, rank, str(there["nonce"]))
        if rank is not None:
            who = f"{there.get('host')} ({there.get('address')})"
            self._once(f"this is node {rank} of {self.wish.nodes}; node 0 is {who}")
        return None

    def _check(self, there: Mapping[str, Any]) -> None:
        """Raise PkuslurmError where this node has no place with a host that lives."""
        if self.own in there.get("refused", {}):
            raise PkuslurmError(str(there["refused"][self.own]))
        who = str(there.get("host"))
        if self.wish.nodes == 1:
            raise PkuslurmError(f"{who} is at it already ({self.file}); wait, or cancel it first")
        if there.get("nodes") != self.wish.nodes:
            raise PkuslurmError(
                f"nodes={self.wish.nodes}: {who}, which waits in {self.file.parent}, was started with "
                f"nodes={there.get('nodes')}; type the same everywhere"
            )
        if words := difference(self.wish.settings, there.get("settings") or ()):
            mine, theirs = self.wish.source, there.get("source")
            raise PkuslurmError(
                f"{mine + ': ' if mine else ''}{words} on {who}{f' ({theirs})' if theirs else ''}, which waits in "
                f"{self.file.parent}; type the same everywhere"
            )
        if there.get("version") != self.wish.version:
            raise PkuslurmError(
                f"pkuslurm {self.wish.version} here, {there.get('version')} on {who}: install one version everywhere"
            )
        if self.wish.rank == 0:
            raise PkuslurmError(f"node 0 is {who} already ({self.file}); each rank is one node")
        if there.get("state") == "running":
            run = f", at work on {there['run']}" if there.get("run") else ""
            raise PkuslurmError(
                f"nodes={self.wish.nodes}: that many have come together already with {who}{run}; wait until they have "
                f"ended, or meet in another folder (cluster.meet)"
            )

    def _once(self, words: str) -> None:
        if words not in self._told:
            self._told.add(words)
            self.say(words)


def alone(file: Path, stopped: Callable[[], bool]) -> Host:
    """Of a run on one node: so that other machines see that it is at work, and can ask it to stop. Exactly one of
    several gets it. Raises PkuslurmError while another one has it, KeyboardInterrupt, OSError."""
    party = Gathering(file, Wish(1, 0, (), "", ""), ALONE_SECONDS, lambda line: None, stopped, "").come_together()
    assert isinstance(party, Host), "it asks nobody to be taken in"
    return party

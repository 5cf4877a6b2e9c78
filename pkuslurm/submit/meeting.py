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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import beats, processes
from pkuslurm.worker.beats import Post, Watch

POLL_SECONDS = 0.2
# who has been silent for so long is dead: one that waits is soon replaced; a training is not given up for a hiccup of
# the file server
PATIENCE = {"waiting": 10.0, "running": 30.0, "ended": 10.0}
# for one who meets nobody: until whoever was there is known to be dead, or has said farewell
ALONE_SECONDS = 120.0
# for the guests to hear how it ended
FAREWELL_SECONDS = 15.0


@dataclass(frozen=True)
class Wish:
    """What one node comes with. ``rank``: None: by arrival, 0: host only. ``settings``: what was typed, in words."""

    nodes: int
    rank: int | None
    settings: tuple[str, ...]
    address: str
    version: str

    def said(self) -> dict[str, Any]:
        own = processes.look(os.getpid())
        return {
            "nodes": self.nodes,
            "rank": self.rank,
            "settings": list(self.settings),
            "address": self.address,
            "version": self.version,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "pid_start": own.start if own else None,
            "pids": _pids(),
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
                if (nonce := _guest_of(name, self.file, self.nonce)) and nonce not in self.guests:
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
        """Who has asked that the run be cancelled: a guest by Ctrl-C, or ``cancel`` on some other machine."""
        for nonce in self.members:
            value = self.guests[nonce].look() if nonce in self.guests else None
            if value is not None and value.get("cancel"):
                return str(value.get("host"))
        asked = cancel_file(self.file, self.nonce)
        return str((beats.read(asked) or {}).get("host", "another machine")) if asked.exists() else None

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
        _forget(self.file, self.nonce)


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


@dataclass
class Gathering:
    """The way to a Host or a Guest. ``say``: for people; ``stopped``: whether somebody has interrupted it."""

    file: Path
    wish: Wish
    timeout: float
    say: Callable[[str], None]
    stopped: Callable[[], bool]
    again: str  # what is to be typed on the other nodes
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
                if request is not None and (there or {}).get("nonce") != request_of(request):
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
                f"node {self.wish.rank}); every node must see that folder; there: {self.again}"
            )
        return (
            f"{waited}: {there.get('host', 'node 0')} has not taken this node in within that time "
            f"({self.file}); everywhere: {self.again}"
        )

    def _silent(self, there: Mapping[str, Any] | None) -> bool:
        """Whether the host of what is there is dead."""
        if there is None:  # torn: its author died while writing it, or writes just now
            return self._watch.silent > PATIENCE["waiting"]
        pid, start = there.get("pid"), there.get("pid_start")
        if there.get("host") == socket.gethostname() and there.get("pids") == _pids():
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
        lock = self.file.with_name(f"{self.file.stem}.{dead}.{self._tries}.taken")
        try:
            os.close(os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            if self._watch.silent > (self._tries + 2) * PATIENCE["running"]:
                self._tries += 1
            return None
        mine = str((beats.read(self.file) or {}).get("nonce", "torn")) == dead
        if mine:
            host.post.begin()
            _forget(self.file, dead)
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
            f"node must see; there: {self.again}"
        )

    def _ask(self, there: Mapping[str, Any]) -> Post | None:
        """None: the host leaves just now, and has taken the folder along."""
        value = self.wish.said() | {"nonce": self.own, "cancel": False, "codes": {}}
        post = Post(self.file.with_name(f"{self.file.stem}.{there.get('nonce')}.{self.own}.json"), value)
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
            raise PkuslurmError(f"{words} on {who}, which waits in {self.file.parent}; type the same everywhere")
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


def difference(ours: tuple[str, ...], theirs: object) -> str | None:
    """What differs, in words, up to the other one's name; None: nothing."""
    others = [str(item) for item in theirs] if isinstance(theirs, list | tuple) else []
    only = [item for item in ours if item not in others]
    missing = [item for item in others if item not in ours]
    if not only and not missing:
        return None
    return f"{' '.join(only) or 'nothing of it'} here, but {' '.join(missing) or 'nothing of it'}"


def request_of(request: Post) -> str:
    """The nonce of the host that a guest's request is for."""
    return request.path.name.split(".")[-3]


def cancel_file(file: Path, nonce: str) -> Path:
    """There: somebody wishes that the host ``nonce`` cancels its run."""
    return file.with_name(f"{file.stem}.{nonce}.cancel")


def ask_to_cancel(file: Path, nonce: str) -> None:
    """Raises OSError."""
    with suppress(FileExistsError):
        handle = os.open(cancel_file(file, nonce), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        # on a full disk that the file is there says enough
        with suppress(OSError), os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(f'{{"host": "{socket.gethostname()}"}}\n')


def alone(file: Path, stopped: Callable[[], bool]) -> Host:
    """Of a run on one node: so that other machines see that it is at work, and can ask it to stop. Exactly one of
    several gets it. Raises PkuslurmError while another one has it, KeyboardInterrupt, OSError."""
    party = Gathering(file, Wish(1, 0, (), "", ""), ALONE_SECONDS, lambda line: None, stopped, "").come_together()
    assert isinstance(party, Host), "it asks nobody to be taken in"
    return party


def folder(place: Path, key: str = "cluster.meet") -> Path:
    """The user's own folder for meetings in ``place``, which ``key`` names, made and checked. Raises PkuslurmError."""
    own = place / f".pkuslurm-meet-{os.geteuid()}"
    try:
        with suppress(FileExistsError):
            own.mkdir(mode=0o700)
        there = own.lstat()
    except OSError as error:
        raise PkuslurmError(f"{key}={place}: {own}: {error.strerror or error}; it must be writable") from None
    if there.st_uid != os.geteuid() or not own.is_dir() or own.is_symlink():
        raise PkuslurmError(f"{key}={place}: {own} is not a folder of yours; remove it, or meet elsewhere")
    if there.st_mode & 0o077:
        own.chmod(0o700)
    return own


def _guest_of(name: str, file: Path, nonce: str) -> str | None:
    """The guest's nonce, where ``name`` is a request to the host ``nonce``."""
    before, after = f"{file.stem}.{nonce}.", ".json"
    inner = name.removeprefix(before).removesuffix(after)
    return inner if name == f"{before}{inner}{after}" and inner.isalnum() else None


def _forget(file: Path, nonce: str) -> None:
    """Remove what belongs to the host ``nonce``, who has ended."""
    with suppress(OSError):
        for name in os.listdir(file.parent):
            if name.startswith((f"{file.stem}.{nonce}.", f".{file.stem}.{nonce}.", f".{file.name}.{nonce}")):
                with suppress(OSError):
                    (file.parent / name).unlink()
    if file.parent.name.startswith(".pkuslurm-meet-"):
        with suppress(OSError):
            file.parent.rmdir()  # unless another meeting is there


def _pids() -> str:
    """In which of the kernel's pid namespaces a pid is meant: containers count their own."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""

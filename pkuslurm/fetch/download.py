"""Files of a hub into a folder: gone on with where they stand, checked, several at once."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch import web
from pkuslurm.fetch.choose import RECORD
from pkuslurm.fetch.hubs import RemoteFile
from pkuslurm.fetch.web import Again, Hub
from pkuslurm.read.text import size
from pkuslurm.rundir import read_json, write_json

AT_ONCE = 4
CHUNK = 1 << 20
_LEAVING = 2.0  # seconds that the others get to end with what they hold
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Mismatch(Exception):
    """What came is not what the hub said that it is."""


class Folder:
    """A model's folder while it comes: whole files, parts of others, and a record of what is whole."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path = path
        self.record = {**facts, "files": dict((read_json(path / RECORD) or {}).get("files") or {})}
        self.lock = threading.Lock()

    def place(self, file: RemoteFile) -> Path:
        return self.path / file.path

    def part(self, file: RemoteFile) -> Path:
        """Named by what is to come: half of another version is not gone on with."""
        told = f"{file.path}:{file.digest}:{file.size}".encode()
        return self.path / f".part-{hashlib.sha256(told).hexdigest()[:24]}"

    def whole(self, file: RemoteFile) -> bool:
        place = self.place(file)
        known = self.record["files"].get(file.path) == _fact(file)
        return known and place.is_file() and not place.is_symlink() and place.stat().st_size == file.size

    def here(self, file: RemoteFile) -> int:
        """Bytes of it that need not come again."""
        if self.whole(file):
            return file.size
        with suppress(OSError):
            return min(self.part(file).stat().st_size, file.size)
        return 0

    def keep(self, file: RemoteFile) -> None:
        """The part is whole: give it its name."""
        place = self.place(file)
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.resolve().is_relative_to(self.path.resolve()):
            raise PkuslurmError(f"{place}: a link leads out of the model's folder; remove it")
        os.replace(self.part(file), place)
        with self.lock:
            self.record["files"][file.path] = _fact(file)
            write_json(self.path / RECORD, self.record)


def _fact(file: RemoteFile) -> dict[str, Any]:
    return {"size": file.size, "digest": file.digest}


def fetch_all(
    hub: Hub, files: Sequence[RemoteFile], at: Callable[[RemoteFile], str], folder: Folder, progress: Any
) -> None:
    """Every file of ``files``, a few at a time. The first that fails ends all; what has come stays."""
    wanted: SimpleQueue[RemoteFile] = SimpleQueue()
    for file in sorted(files, key=lambda file: file.size):
        if not folder.whole(file):
            wanted.put(file)
    stop = threading.Event()
    failed: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                fetch_one(hub, wanted.get_nowait(), at, folder, progress.add, stop)
        except Empty:
            pass
        except BaseException as error:
            failed.append(error)
            stop.set()

    # daemons: Ctrl-C does not wait for a read that may take half a minute, and a part is good at any length
    workers = [threading.Thread(target=work, daemon=True) for _ in range(AT_ONCE)]
    try:
        for worker in workers:
            worker.start()
        while any(worker.is_alive() for worker in workers) and not failed:
            workers[0].join(0.1) if workers[0].is_alive() else stop.wait(0.1)
            progress.show()
        stop.set()
        for worker in workers:
            worker.join(_LEAVING)
    finally:
        stop.set()
        progress.end()
    if failed:
        raise failed[0]


def fetch_one(
    hub: Hub,
    file: RemoteFile,
    at: Callable[[RemoteFile], str],
    folder: Folder,
    tell: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """One file, checked by size and hash; one that differs comes anew, once. Raises PkuslurmError."""
    part = folder.part(file)
    for last in (False, True):
        try:
            _receive(hub, file, at(file), part, tell, stop)
        except Mismatch as wrong:
            tell(-_size(part))
            part.unlink(missing_ok=True)
            if last:
                raise PkuslurmError(
                    f"{file.path}: what {hub.host} sends is not what it lists ({wrong}), twice; "
                    "try again later, or another hub (--from)"
                ) from None
            continue
        except Again:
            return  # another file has failed: all stop
        except OSError as error:
            if error.errno in _FULL:
                free = shutil.disk_usage(folder.path).free
                raise PkuslurmError(
                    f"{folder.path}: no room left for {file.path} ({size(free)} free of the {size(file.size)} that it "
                    "has, or a quota is reached); make room and fetch again, it goes on from where it stands"
                ) from None
            raise PkuslurmError(f"{folder.path}: {error.strerror or error}") from None
        folder.keep(file)
        return


def _receive(
    hub: Hub, file: RemoteFile, url: str, part: Path, tell: Callable[[int], None], stop: threading.Event
) -> None:
    digest = _Digest(file)
    # a link that somebody laid there is not followed
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(part, flags, 0o666), "r+b") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
        if stream.tell() > file.size:
            raise Mismatch(f"{stream.tell()} bytes, not {file.size}")
        reached = stream.tell()

        def once() -> None:
            _stream(hub, file, url, stream, digest, tell, stop)

        def moved() -> bool:
            nonlocal reached
            before, reached = reached, stream.tell()
            return reached > before

        if stream.tell() < file.size:
            web.tried(hub, once, moved, stop)
        os.fsync(stream.fileno())
    digest.check()


def _stream(
    hub: Hub,
    file: RemoteFile,
    url: str,
    stream: Any,
    digest: _Digest,
    tell: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """From where ``stream`` stands to the end. Raises Again where it ends before."""
    have = stream.tell()
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        answer = web.ask(hub, url, headers)
    except Again as problem:
        if " 416" in str(problem):  # not with this much of it: begin anew
            _rewind(stream, digest, tell)
        raise
    with answer:
        start, total = _announced(answer, have)
        if total is not None and total != file.size:
            raise Mismatch(f"{total} bytes, not {file.size}")
        if start != have:
            _rewind(stream, digest, tell)
            if start:
                raise Again("it sends another part than was asked for", answered=True)
        while stream.tell() < file.size and not stop.is_set():
            try:
                data = answer.read1(CHUNK)  # what is there: a slow line moves, too
            except (OSError, HTTPException) as error:
                raise web.no_answer(hub, error) from None
            if not data:
                break
            if stream.tell() + len(data) > file.size:
                raise Mismatch(f"more than {file.size} bytes")
            stream.write(data)
            digest.update(data)
            tell(len(data))
    if stream.tell() < file.size:
        stream.flush()
        raise Again("the connection breaks off", answered=True)


def _announced(answer: Any, have: int) -> tuple[int, int | None]:
    """Where the answer begins and how large it says that the file is; None: it does not say."""
    if answer.status == 206:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range") or "")
        if found is None:
            return -1, None
        return int(found[1]), None if found[2] == "*" else int(found[2])
    length = answer.headers.get("Content-Length") or ""
    return 0, int(length) if length.isdecimal() else None


def _rewind(stream: Any, digest: _Digest, tell: Callable[[int], None]) -> None:
    tell(-stream.tell())
    stream.seek(0)
    stream.truncate()
    digest.begin()


class _Digest:
    """The hash that the hub tells, over what has come."""

    def __init__(self, file: RemoteFile) -> None:
        self.file = file
        self.begin()

    def begin(self) -> None:
        self.hash = hashlib.sha256()
        if self.file.sha256 is None and self.file.blob is not None:
            self.hash = hashlib.sha1(f"blob {self.file.size}\0".encode(), usedforsecurity=False)

    def update(self, data: bytes) -> None:
        self.hash.update(data)

    def check(self) -> None:
        found = self.hash.hexdigest()
        if self.file.digest is not None and found != self.file.digest:
            raise Mismatch(f"{self.hash.name} {found[:12]}…, not {self.file.digest[:12]}…")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0

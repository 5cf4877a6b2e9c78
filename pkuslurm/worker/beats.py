"""A file whose author lives: rewritten every second with a number that grows. Others watch it grow by their own clock.

On a shared folder this needs no socket, no pid and no clock that two machines have in common. Standard library only.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.rundir import into_its_room

BEAT_SECONDS = 1.0
# so often a look may be worth it
LOOK_SECONDS = 0.3
# for a glance: nobody who lives is silent so long, unless the file server is
GLANCE_SECONDS = 4 * BEAT_SECONDS
# whoever did not look for so long was stopped itself, and cannot tell who was silent meanwhile
STOPPED_SECONDS = 5.0
# a file server's hiccup, or a file that is just being replaced, hides it for less
ABSENT_SECONDS = 3.0
# clocks of one cluster do not differ by so much
LONG_AGO_SECONDS = 600.0


def read(path: Path) -> dict[str, Any] | None:
    """The object in ``path``, if it is this user's; None: no such file, another's, or being written just now."""
    try:
        with open(path, encoding="utf-8") as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            value = json.loads(file.read())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


class Post:
    """One's own file. ``value`` has a ``nonce``, by which its author is known; ``beat`` is added."""

    def __init__(self, path: Path, value: dict[str, Any]) -> None:
        self.path = path
        self.nonce: str = value["nonce"]
        self.taken = False  # somebody else has put theirs in its place: nothing more is written
        self._value = value | {"beat": 0}
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._go_on, name="beat", daemon=True)

    def begin(self) -> None:
        """Put it there, whoever's was there before. Raises OSError."""
        with self._lock:
            self._put()
        self._thread.start()

    def begin_as_first(self) -> bool:
        """Put it there; False: there is one."""
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            return False
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._value, file, ensure_ascii=False)
        except OSError:
            self.path.unlink(missing_ok=True)  # half a word would be waited for
            raise
        self._thread.start()
        return True

    def say(self, **fields: Any) -> None:
        """Change what it says, at once. A disk that is full is told by those whose work it stops."""
        with self._lock:
            self._value |= fields
            self._write()

    def close(self) -> None:
        """Say no more, and take the file away."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if not self.taken and (read(self.path) or {}).get("nonce") == self.nonce:
            with suppress(OSError):
                self.path.unlink()

    def _go_on(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self.say()

    def _write(self) -> None:
        there = read(self.path)
        if there is not None and there.get("nonce") != self.nonce:
            self.taken = True
        with suppress(OSError):
            if not self.taken and self.path.parent.is_dir():
                self._value["beat"] += 1
                self._put()

    def _put(self) -> None:
        """Whole or not at all, and not synced: a beat that a crash takes away is no loss, and a busy disk takes seconds
        to sync, for which others would believe us dead."""
        aside = self.path.with_name(f".{self.path.name}.{self.nonce}")
        try:
            with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                json.dump(self._value, file, ensure_ascii=False)
            os.replace(aside, self.path)
        except OSError as error:
            # who lives on a full disk must still be heard
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not into_its_room(self.path, self._value):
                raise


class Watch:
    """Somebody's file: what it says, and for how long it has been silent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] | None = None
        self.there = False  # until it was not there for ABSENT_SECONDS
        self.seen = False  # at the last look; what cannot be looked at may be there
        self.absent = 0.0  # for so many seconds it has not been there
        self.moves = 0  # since the present author was seen first: more than none prove that it lives
        self._beat: tuple[object, object] | None = None
        self._absent_since: float | None = None
        self._since = self._looked = time.monotonic()

    def look(self) -> dict[str, Any] | None:
        """The newest word; None as long as there was none."""
        now = time.monotonic()
        if self.there and now - self._looked < LOOK_SECONDS:
            return self.value
        if now - self._looked > STOPPED_SECONDS:
            self._since += now - self._looked
            self._absent_since = None
        self._looked = now
        with suppress(OSError):
            os.listdir(self.path.parent)  # an NFS client remembers for a minute that a file was not there
        value = read(self.path)
        self.seen = value is not None or not _is_absent(self.path)
        self._absent_since = None if self.seen else now if self._absent_since is None else self._absent_since
        self.absent = 0.0 if self._absent_since is None else now - self._absent_since
        self.there = self.seen or (self.there and self.absent < ABSENT_SECONDS)
        if value is not None:
            beat = (value.get("nonce"), value.get("beat"))
            if beat != self._beat:
                same = self._beat is not None and self._beat[0] == beat[0]
                self.moves = self.moves + 1 if same else 0
                self._beat, self._since, self.value = beat, now, value
        elif not self.there:
            self.value = None
        return self.value

    @property
    def silent(self) -> float:
        """For so many seconds nothing has been heard."""
        return time.monotonic() - self._since


def alive(path: Path, nonce: object, seconds: float) -> bool | None:
    """Whether the author ``nonce`` of ``path`` lives, watched for at most ``seconds``; None: it cannot be told."""
    watch, until = Watch(path), time.monotonic() + seconds
    while True:
        value = watch.look()
        if watch.absent >= ABSENT_SECONDS or (value is not None and value.get("nonce") != nonce) or _long_ago(path):
            return False
        if watch.moves:
            return True
        if time.monotonic() > until:
            return None
        time.sleep(LOOK_SECONDS)


def _long_ago(path: Path) -> bool:
    """Whether nobody has written there for long: a beat changes the folder, too, whose file may have been removed."""
    for place in (path, path.parent, path.parent.parent):
        try:
            return time.time() - place.stat().st_mtime > LONG_AGO_SECONDS
        except FileNotFoundError:
            continue
        except OSError:
            return False
    return False


def _is_absent(path: Path) -> bool:
    """Not where the file server only fails to tell (ESTALE, EIO, EACCES)."""
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False

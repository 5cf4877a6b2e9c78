"""A file whose author lives: rewritten every second with a number that grows. Others watch it grow by their own clock.

On a shared folder this needs no socket, no pid and no clock that two machines have in common. Standard library only.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

BEAT_SECONDS = 1.0
# so often a look may be worth it
LOOK_SECONDS = 0.3
# for a glance: nobody who lives is silent so long, unless the file server is
GLANCE_SECONDS = 4 * BEAT_SECONDS
# whoever did not look for so long was stopped itself, and cannot tell who was silent meanwhile
STOPPED_SECONDS = 5.0
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
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(self._value, file, ensure_ascii=False)
        self._thread.start()
        return True

    def say(self, **fields: Any) -> None:
        """Change what it says, at once. A disk that is full is told by those whose work it stops."""
        with self._lock:
            self._value |= fields
            self._write()

    def close(self, remove: bool = True) -> None:
        """The last word; ``remove``: none is needed."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        if remove and not self.taken and (read(self.path) or {}).get("nonce") == self.nonce:
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
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(self._value, file, ensure_ascii=False)
        os.replace(aside, self.path)


class Watch:
    """Somebody's file: what it says, and for how long it has been silent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.value: dict[str, Any] | None = None
        self.there = False
        self.moves = 0  # since the present author was seen first: more than none prove that it lives
        self._beat: tuple[object, object] | None = None
        self._since = self._looked = time.monotonic()

    def look(self) -> dict[str, Any] | None:
        """The newest word; None as long as there was none."""
        now = time.monotonic()
        if self.there and now - self._looked < LOOK_SECONDS:
            return self.value
        if now - self._looked > STOPPED_SECONDS:
            self._since += now - self._looked
        self._looked = now
        with suppress(OSError):
            os.listdir(self.path.parent)  # an NFS client remembers for a minute that a file was not there
        value = read(self.path)
        self.there = value is not None or os.path.lexists(self.path)
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
        if not watch.there or (value is not None and value.get("nonce") != nonce):
            return False
        if watch.moves:
            return True
        if time.monotonic() > until:
            return False if _long_ago(path) else None
        time.sleep(LOOK_SECONDS)


def _long_ago(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LONG_AGO_SECONDS
    except OSError:
        return True

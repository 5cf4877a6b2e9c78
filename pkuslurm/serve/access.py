"""Who may come in: the key's file, and what a request's headers show."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from pkuslurm.errors import PkuslurmError

SHORTEST = 16
_MOST_BYTES = 4096


def read_key(path: Path) -> str:
    """The key in ``path``. Raises PkuslurmError unless it is this user's own file, for no one else's eyes."""
    try:
        # neither a link that somebody else has put there, nor a pipe to wait at
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        link = ", or it is a symbolic link" if path.is_symlink() else ""
        raise PkuslurmError(f"key_file={path}: it cannot be read ({error.strerror}){link}; serve anew") from None
    with os.fdopen(handle, "rb") as file:
        facts = os.fstat(handle)
        if not stat.S_ISREG(facts.st_mode):
            raise PkuslurmError(f"key_file={path}: it is no regular file; serve anew")
        if facts.st_uid != os.geteuid():
            raise PkuslurmError(f"key_file={path}: it belongs to user {facts.st_uid}, not to you ({os.geteuid()})")
        if mode := stat.S_IMODE(facts.st_mode) & 0o077:
            raise PkuslurmError(
                f"key_file={path}: others may use it (mode {stat.S_IMODE(facts.st_mode):04o}, {mode:03o} too much); "
                f"it must be 0600: make a new key, for this one may be known"
            )
        words = file.read(_MOST_BYTES).split()
    key = words[0].decode("ascii", errors="replace") if len(words) == 1 else ""
    if len(key) < SHORTEST or not (key.isascii() and key.isprintable()):
        raise PkuslurmError(f"key_file={path}: it must hold one line, the key, of at least {SHORTEST} ASCII characters")
    return key


def shows(header: str | None, key: str) -> bool:
    """Whether an Authorization header shows the key: as Bearer, or as the password of Basic, whatever the name."""
    scheme, _, rest = (header or "").strip().partition(" ")
    given = _GIVEN.get(scheme.lower(), _nothing)(rest.strip())
    return given is not None and hmac.compare_digest(given, key.encode())


def refused_site(method: str, headers: Mapping[str, str]) -> bool:
    """Whether a browser says that another site's page asks, with the password that it remembers for ours.

    Not where somebody has clicked on a link there, as in a terminal that is a web page: what it leads to is ours alone.
    """
    site, mode = (headers.get(f"Sec-Fetch-{name}", "").strip().lower() for name in ("Site", "Mode"))
    return site == "cross-site" and not (method == "GET" and mode == "navigate")


def _bearer(rest: str) -> bytes | None:
    return rest.encode("utf-8", errors="surrogateescape")


def _basic(rest: str) -> bytes | None:
    try:
        pair = base64.b64decode(rest, validate=True)
    except (binascii.Error, ValueError):
        return None
    _, colon, password = pair.partition(b":")
    return password if colon else None


def _nothing(rest: str) -> bytes | None:
    return None


_GIVEN = {"bearer": _bearer, "basic": _basic}

"""The files of a meeting: the folder in which they lie, their names, and how they go.

Beside the host's own file, ``<key>.json``, lie those that are meant for it alone, ``<key>.<its nonce>.…``: what a dead
host has left is never taken for a living one's.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from pkuslurm.errors import PkuslurmError


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


def request_file(file: Path, host: str, guest: str) -> Path:
    """Where the guest of this nonce asks the host of that nonce to be taken in."""
    return file.with_name(f"{file.stem}.{host}.{guest}.json")


def host_of(request: Path) -> str:
    """The nonce of the host that a guest's request is for."""
    return request.name.split(".")[-3]


def guest_of(name: str, file: Path, nonce: str) -> str | None:
    """The guest's nonce, where ``name`` is a request to the host ``nonce``."""
    before, after = f"{file.stem}.{nonce}.", ".json"
    inner = name.removeprefix(before).removesuffix(after)
    return inner if name == f"{before}{inner}{after}" and inner.isalnum() else None


def taken_file(file: Path, dead: str, tries: int) -> Path:
    """Made by the one that may take the place of the host ``dead``."""
    return file.with_name(f"{file.stem}.{dead}.{tries}.taken")


def cancel_file(file: Path, nonce: str) -> Path:
    """There: somebody wishes that the host ``nonce`` cancels its run."""
    return file.with_name(f"{file.stem}.{nonce}.cancel")


def ask_to_cancel(file: Path, nonce: str) -> None:
    """Leave that wish. Raises OSError."""
    with suppress(FileExistsError):
        handle = os.open(cancel_file(file, nonce), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        # on a full disk that the file is there says enough
        with suppress(OSError), os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(f'{{"host": "{socket.gethostname()}"}}\n')


def forget(file: Path, nonce: str) -> None:
    """Remove what belongs to the host ``nonce``, who has ended."""
    with suppress(OSError):
        for name in os.listdir(file.parent):
            if name.startswith((f"{file.stem}.{nonce}.", f".{file.stem}.{nonce}.", f".{file.name}.{nonce}")):
                with suppress(OSError):
                    (file.parent / name).unlink()
    if file.parent.name.startswith(".pkuslurm-meet-"):
        with suppress(OSError):
            file.parent.rmdir()  # unless another meeting is there

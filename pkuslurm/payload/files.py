"""What every payload needs of the file system and of its own process. Standard library only: a payload may be run by
a Python inside a container image that has LLaMA-Factory but not pkuslurm."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

_PACKAGES = ("torch", "transformers", "llamafactory", "peft", "datasets", "tokenizers", "accelerate")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """``write_text`` of indented JSON."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file or no whole object in it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never half of one. Raises OSError, which names
    the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _replace(path, text)
    except OSError as error:
        # a full disk names no file, mkstemp one that nobody knows
        error.filename, error.filename2 = str(path), None
        raise


def _replace(path: Path, text: str) -> None:
    # as rundir.py does it, once more: the Python inside an image cannot import that
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        # a tokenizer can give half of a surrogate pair, which no encoding takes
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp makes 0600: follow the folder, which is 0700 or, for a group, 0750
        os.chmod(name, 0o666 & (path.parent.stat().st_mode | 0o600))
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


def open_files(folder: Path) -> int:
    """Files as readable as their folder: safetensors makes them 0600. Returns the bytes of all."""
    mode = 0o666 & (folder.stat().st_mode | 0o600)
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        with suppress(OSError):
            file.chmod(mode)
    return sum(file.stat().st_size for file in files)


def is_shared(mode: int) -> bool:
    """Whether a run's folder of this mode is its group's, too (access=group: 0750)."""
    return mode & 0o057 == 0o050


def install(new: Path, folder: Path, complete: Callable[[], bool]) -> bool:
    """Rename ``new`` to ``folder``; True if that was done, False if somebody else's whole one was there already.

    Two at once are safe: ``folder`` is only ever whole or, for a moment, absent. What is incomplete there (``complete``
    tells) gives way. Raises OSError.
    """
    for _ in range(100):
        if complete():
            return False
        try:
            # refused by the system where ``folder`` is there and not empty
            new.rename(folder)
            return True
        except OSError:
            if not folder.exists():
                raise
        if not complete():
            stale = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.stale-"))
            with suppress(FileNotFoundError):
                folder.rename(stale)
            shutil.rmtree(stale, ignore_errors=True)
    raise OSError(f"{folder}: others keep putting something incomplete there")


def no_room(error: BaseException) -> str | None:
    """What the system says of a full or read-only disk, where that is what ``error`` is about; None: it is not.

    safetensors and pyarrow tell an error of the system's in words alone.
    """
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        words = os.strerror(number)
        if (isinstance(error, OSError) and error.errno == number) or words in str(error):
            return words
    return None


def lack(folder: str | os.PathLike[str]) -> str | None:
    """``<folder>: No space left on device``, or another such reason; None: it takes more. By trying, since no number
    tells a quota."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))  # what filled a disk may have left some bytes of it
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{folder}: {error.strerror or error}"
    return None


def refuse(message: str) -> NoReturn:
    """End with code 2: a mistake of the user's, in one line that the worker hands on as the reason."""
    print(f"pkuslurm: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def sweep(folder: Path) -> None:
    """Remove what killed builders of ``folder`` left beside it; six hours old, so that no living one loses its work."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 6 * 3600:
                shutil.rmtree(left, ignore_errors=True)


def hash_tree(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) over the relative names and the contents of all files below ``path``. Raises OSError."""
    root = Path(path)
    total = hashlib.sha256()
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        total.update(f"{file.relative_to(root).as_posix()}\0{hash_file(file)}\n".encode())
    return total.hexdigest()


def hash_file(path: str | os.PathLike[str]) -> str:
    """sha256 (hex) of one file. Raises OSError."""
    total = hashlib.sha256()  # hashlib.file_digest needs Python 3.11, an image may have 3.10
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def versions() -> dict[str, str]:
    """The versions of what shapes the results, asked without importing any of it; what is absent is left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found

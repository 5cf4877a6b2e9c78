"""Where bytecode can be kept for packages that have none and cannot be given any: a folder on the node's own disk.

A read-only image, or a site-packages of somebody else's that was installed without compiling, would have every rank of
every job compile some 4,400 modules, 9 s each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
import sys
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path

PACKAGES = ("torch", "transformers", "llamafactory")
# on a disk, where the node has one; both are the node's own also inside a container
PLACES = ("/var/tmp", "/tmp")


def keep(environ: MutableMapping[str, str], places: Sequence[str] = PLACES) -> str | None:
    """Have this process and those that it starts keep bytecode apart, if it would be kept nowhere. Returns where.

    A folder that the user has named is the user's, and what is compiled already is left where it is: with a folder of
    its own Python looks nowhere else.
    """
    if sys.pycache_prefix is not None or not any(map(_is_bare, PACKAGES)):
        return None
    for place in places:
        with suppress(OSError):
            folder = _own(Path(place) / f"pkuslurm-bytecode-{os.geteuid()}") / _installed()
            folder.mkdir(mode=0o700, exist_ok=True)
            sys.pycache_prefix, sys.dont_write_bytecode = str(folder), False
            environ.pop("PYTHONDONTWRITEBYTECODE", None)
            environ["PYTHONPYCACHEPREFIX"] = str(folder)
            return str(folder)
    return None


def _is_bare(package: str) -> bool:
    """Whether it is here without bytecode, and will not get any beside its source."""
    with suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None and spec.cached is not None:
            cached = Path(spec.cached)
            folder = cached.parent if cached.parent.exists() else cached.parent.parent
            return not cached.exists() and (sys.dont_write_bytecode or not os.access(folder, os.W_OK))
    return False


def _own(folder: Path) -> Path:
    """Made if it is not there. Raises OSError where it is a link or somebody else's: its code would be run as ours."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(f"{folder} is not only this user's")
    return folder


def _installed() -> str:
    """Another one for other versions: two images may have files of one name, time and size that differ."""
    names = sorted(
        name for place in sys.path if place for name in _names(place) if name.endswith((".dist-info", ".egg-info"))
    )
    words = [sys.version, sys.prefix, *names]
    return hashlib.sha256("\n".join(words).encode(errors="surrogateescape")).hexdigest()[:16]


def _names(place: str) -> list[str]:
    try:
        return os.listdir(place)
    except OSError:
        return []

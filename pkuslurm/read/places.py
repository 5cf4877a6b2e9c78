"""Where runs are looked for: every run_root that launch has used, in a list in the user's state directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


def roots(given: Sequence[Path] | None, environ: Mapping[str, str]) -> list[Path]:
    """Where runs are looked for: --run-root, else $PKUSLURM_RUN_ROOT, else every run_root that launch has used."""
    if given:
        return [absolute(path) for path in given]
    if environ.get("PKUSLURM_RUN_ROOT"):
        return [absolute(Path(environ["PKUSLURM_RUN_ROOT"]))]
    # the default run_root of a launch from here, which another user's list may not know
    here = Path("runs").absolute()
    known = _remembered(environ)
    return known if here in known or not os.path.isdir(here) else [*known, here]


def remember(root: Path, environ: Mapping[str, str]) -> None:
    """Add ``root`` to the list in the user's state directory; where that cannot be written, --run-root helps."""
    file = state_file(environ)
    root = absolute(root)
    line = os.fsencode(root)
    if file is None or b"\n" in line or root in _remembered(environ):
        return
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # one write in append mode: two launches at once lose nothing
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.write(handle, line + b"\n")
        finally:
            os.close(handle)


def state_file(environ: Mapping[str, str]) -> Path | None:
    """The list of run_roots in the user's state directory; None where there is no place for one."""
    state = environ.get("XDG_STATE_HOME")
    # the XDG specification: a relative path is to be ignored
    if state and Path(state).is_absolute():
        return Path(state) / "pkuslurm" / "run_roots"
    home = environ.get("HOME")
    return Path(home) / ".local" / "state" / "pkuslurm" / "run_roots" if home else None


def _remembered(environ: Mapping[str, str]) -> list[Path]:
    file = state_file(environ)
    try:
        lines = file.read_bytes().split(b"\n") if file else []
    except OSError:
        lines = []
    # a torn last line is no absolute path, or a folder that does not exist: harmless
    return [Path(os.fsdecode(line)) for line in dict.fromkeys(lines) if line.startswith(b"/") and b"\0" not in line]


def absolute(path: Path) -> Path:
    """``..`` taken out, symbolic links kept: the name that the user knows."""
    with suppress(RuntimeError):  # ~nobody
        path = path.expanduser()
    return Path(os.path.abspath(path))

"""A point's files, made when it starts: until then its run.json holds what differs from the others of its sweep.

A thousand points times ten files would take a shared disk longer than all else that a launch does.
"""

from __future__ import annotations

from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import ANY_POINT, RunDir, file_mode, read_json, write_text
from pkuslurm.sweepdir import SweepDir

FOLDERS = ("jobs", "logs", "state", "done", "results")


def unpack(run: RunDir) -> None:
    """Write the files of ``run``, if it is a point, that are not there yet; those that are may have been changed since.

    Several nodes may do it at once. Raises PkuslurmError where what they are made from cannot be read, OSError.
    """
    if not run.is_point:
        return
    missing = {name: text for name, text in texts(run).items() if not (run.path / name).exists()}
    mode = file_mode(run.path) | run.path.stat().st_mode & 0o110
    for folder in (run.path / name for name in FOLDERS):
        if not folder.is_dir():
            folder.mkdir(exist_ok=True)
            folder.chmod(mode | 0o100)  # whatever the umask
    for name, text in missing.items():
        write_text(run.path / name, text)


def texts(run: RunDir) -> dict[str, str]:
    """The files of a point by name, as they were when it was launched."""
    packed = (read_json(run.run_json) or {}).get("texts")
    if not isinstance(packed, dict):
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a point's description")
    file = SweepDir(run.path.parent).texts(int(packed["family"]))
    common = read_json(file)
    if common is None:
        raise PkuslurmError(f"{file}: it cannot be read")
    changes: dict[str, Any] = packed["changes"]
    return {
        name: changed(text, changes.get(name, {})).replace(ANY_POINT, run.path.name) for name, text in common.items()
    }


def changed(text: str, change: str | dict[str, str]) -> str:
    """``text`` with other lines (by number, from 0), or another text altogether."""
    if isinstance(change, str):
        return change
    lines = text.split("\n")
    for number, line in change.items():
        lines[int(number)] = line
    return "\n".join(lines)

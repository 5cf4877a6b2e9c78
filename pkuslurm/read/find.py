"""Which run or sweep is meant: an id, the beginning of one, ``<sweep>/<n>``, a path, or nothing for the newest."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm import sweepdir
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import IS_CHECKOUT, command
from pkuslurm.read import ended, status, sweep
from pkuslurm.read.memory import Memory
from pkuslurm.read.places import absolute
from pkuslurm.read.places import remember as remember
from pkuslurm.read.places import roots as roots
from pkuslurm.read.places import state_file as state_file
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.sweepdir import SweepDir

MOST_CANDIDATES = 5
START = "start one: " + ("make demo (or python -m pkuslurm.launch)" if IS_CHECKOUT else command("launch"))
_POINT = re.compile(r"([^/]+)/([0-9]{1,9})/?")


@dataclass(frozen=True)
class Listed:
    """A line of ``runs``; ``created`` is ISO 8601 with zone, None where run.json does not say.

    A sweep is one line: ``run_id`` is its id, ``points`` how many it has.
    """

    run_id: str
    path: Path
    created: str | None
    state: str
    name: str | None
    points: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "path": str(self.path),
            "created": self.created,
            "state": self.state,
            "name": self.name,
        }


def find(run: str | None, places: Sequence[Path], memory: Memory | None = None) -> Path:
    """The directory of ``run``, which may be a sweep. Raises PkuslurmError: none, or more than one; where it looked."""
    if run == "":
        raise PkuslurmError("RUN is empty; name a run, or leave it out for the newest")
    if run is not None and (point := _POINT.fullmatch(run)) and not _is_run(absolute(Path(run))):
        return _point(run, find(point[1], places, memory), int(point[2]))
    if run is not None and ("/" in run or run in (".", "..") or _is_run(Path(run))):
        return _by_path(run)
    known = _all(places, memory)
    where = ", ".join(map(str, places)) or "nowhere: no launch is remembered; name the folder with --run-root"
    if run is None:
        if not known:
            where = where if places else str(Path("runs").absolute())  # where the first launch from here puts one
            raise PkuslurmError(f"RUN: there are no runs yet; looked in {where}; {START}")
        return known[0]
    exact = [path for path in known if path.name == run]
    matching = exact or [path for path in known if path.name.startswith(run)]
    if len(matching) > 1:
        shown = [str(path) if exact else path.name for path in matching[:MOST_CANDIDATES]]
        names = ", ".join(shown) + (", …" if len(matching) > MOST_CANDIDATES else "")
        if exact:
            raise PkuslurmError(f"RUN {run}: {len(matching)} runs are called so: {names}; give the path")
        raise PkuslurmError(f"RUN {run}: {len(matching)} runs begin so: {names}; type more of it")
    if not matching:
        for place in (*places, Path()):
            _refuse_other(run, place / run)
        raise PkuslurmError(f"RUN {run}: no such run; looked in {where}")
    return matching[0]


def check(path: Path) -> None:
    """Raise PkuslurmError unless run.json (sweep.json) can be read and is of a form that this pkuslurm knows."""
    whole = sweepdir.is_sweep(path)
    file = SweepDir(path).sweep_json if whole else RunDir(path).run_json
    document = read_json(file)
    if document is None:
        try:
            file.read_bytes()
        except OSError as error:
            raise PkuslurmError(f"RUN {path}: {_denied(file, error)}") from None
        raise PkuslurmError(f"RUN {path}: {file.name} is damaged; its logs/ and results are still to be read by hand")
    schema = document.get("schema_version")
    if isinstance(schema, int) and schema > (sweepdir if whole else status).SCHEMA_VERSION:
        newer = (sweep if whole else status).NEWER.format(schema)
        raise PkuslurmError(f"RUN {path}: {newer}; upgrade pkuslurm (pip install -U pkuslurm)")


def runs(places: Sequence[Path]) -> list[Path]:
    """The directories of all runs, newest first; a sweep's points each for itself."""
    return [run for path in _all(places) for run in members(path)]


def members(path: Path) -> list[Path]:
    """The points of the sweep at ``path``; of a run itself."""
    if not sweepdir.is_sweep(path):
        return [path]
    with suppress(OSError):
        numbers = sorted(int(name) for name in os.listdir(path) if name.isdecimal() and name.isascii())
        return [point for number in numbers if _is_run(point := path / str(number))]
    return []


def list_runs(places: Sequence[Path], memory: Memory | None = None) -> list[Listed]:
    """All runs and sweeps, newest first. Slurm is asked once; those that ``memory`` has are not opened."""
    memory = memory or Memory()
    paths = _all(places, memory)
    said = {path: memory.said(str(path)) for path in paths}
    look = status.Look()
    read = {now.path: now for now in sweep.read_many([path for path in paths if said[path] is None], look)}
    found = []
    for path in paths:
        if (kept := said[path]) is not None:
            found.append(Listed(kept[0], path, *kept[1:]))
            continue
        found.append(_listed(now := read[path]))
        if (evidence := ended.evidence(now, look)) is not None:
            memory.keep(str(path), evidence, _kept(found[-1]))
    memory.save(places)
    return found


def memory(environ: Mapping[str, str]) -> Memory:
    """What earlier lists have found, of this user."""
    file = state_file(environ)
    return Memory(None if file is None else file.with_name("ended.json"))


def _kept(item: Listed) -> list[Any]:
    return [item.run_id, item.created, item.state, item.name, item.points]


def _listed(now: status.RunStatus | sweep.SweepStatus) -> Listed:
    if isinstance(now, sweep.SweepStatus):
        return Listed(now.sweep_id, now.path, now.created, now.state, now.name, len(now.runs))
    return Listed(now.run_id, now.path, now.created, now.state, now.name)


def _point(run: str, home: Path, number: int) -> Path:
    """Point ``number`` of the sweep at ``home``."""
    if not sweepdir.is_sweep(home):
        raise PkuslurmError(f"RUN {run}: {home.name} is no sweep: it has no points")
    path = home / str(number)
    if not _is_run(path):
        points = (read_json(SweepDir(home).sweep_json) or {}).get("points")
        known = f"; it has {len(points)}, from {home.name}/0 on" if isinstance(points, list) else ""
        raise PkuslurmError(f"RUN {run}: the sweep has no point {number}{known}")
    return path


def _by_path(run: str) -> Path:
    path = absolute(Path(run))
    if path.name in ("run.json", "sweep.json") and _is_run(path.parent):
        path = path.parent
    if not _is_run(path):
        _refuse_other(run, path)
        raise PkuslurmError(f"RUN {run}: there is no run (no run.json) at {path}")
    real = Path(os.path.realpath(path))
    if path.is_symlink() and real.name != path.name:
        return real  # its markers know it by its own name
    if sweepdir.sweep_of(RunDir(path)) is None and (read_json(RunDir(path).run_json) or {}).get("sweep"):
        return real  # a point by another name: its place in the sweep says which it is
    return path


def _is_run(path: Path) -> bool:
    """Whether a run or a sweep is there. Raises PkuslurmError where it is not to be seen by this user."""
    for file in (RunDir(path).run_json, SweepDir(path).sweep_json):
        try:
            if stat.S_ISREG(os.stat(file).st_mode):
                return True
        except PermissionError as error:
            raise PkuslurmError(f"RUN {path}: {_denied(file, error)}") from None
        except (OSError, ValueError):  # a name too long, a null byte
            continue
    return False


def _refuse_other(run: str, path: Path) -> None:
    """Say what it is that is there, where that is no run: a file."""
    with suppress(OSError, ValueError):
        if path.is_file():
            raise PkuslurmError(f"RUN {run}: {path} is a file; name the run's folder")


def _denied(file: Path, error: OSError) -> str:
    hint = "; ask its owner to launch with access=group" if isinstance(error, PermissionError) else ""
    return f"{file}: {error.strerror or error}{hint}"


def _all(places: Sequence[Path], memory: Memory | None = None) -> list[Path]:
    """Every run and sweep below ``places``, newest first; the same directory by two names once."""
    memory = memory or Memory()
    found: dict[tuple[int, int], tuple[float, str, str]] = {}
    for place in dict.fromkeys(places):
        with suppress(OSError):
            for name in os.listdir(place):
                folder = f"{place}/{name}"
                with suppress(OSError):  # vanished meanwhile, or not to be seen by this user
                    if file := next(filter(os.path.isfile, (f"{folder}/run.json", f"{folder}/sweep.json")), None):
                        identity = os.stat(folder)
                        # by creation, in run.json or in the id: a copied directory's mtime says nothing
                        when = memory.created(folder, file, os.stat(file))
                        found.setdefault((identity.st_dev, identity.st_ino), (when, name, folder))
    return [Path(folder) for _, _, folder in sorted(found.values(), reverse=True)]

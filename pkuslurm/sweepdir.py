"""A sweep's directory: every file name in it, and what it knows of the jobs of its points."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json

SCHEMA_VERSION = 1
# six digits: of a file called 999999999.json all numbers before it would be looked for
_GROUP = re.compile(r"([0-9]{1,6})\.json")


@dataclass(frozen=True)
class SweepDir:
    """Names only, as RunDir: making or reading nothing."""

    path: Path

    @property
    def sweep_id(self) -> str:
        return self.path.name

    @property
    def sweep_json(self) -> Path:
        return self.path / "sweep.json"

    @property
    def leaderboard(self) -> Path:
        return self.path / "leaderboard.csv"

    @property
    def own(self) -> RunDir:
        """The sweep as a run of its own job, the report over all points."""
        return RunDir(self.path)

    def point(self, number: int) -> RunDir:
        return RunDir(self.path / str(number))

    def shared(self, number: int) -> RunDir:
        """What some or all points have in common: a run of the prepare job alone."""
        return RunDir(self.path / SHARED / str(number))

    def texts(self, family: int) -> Path:
        """The files of points that are composed alike, for any point; each point's run.json has what differs."""
        return self.path / SHARED / f"texts-{family}.json"

    @property
    def groups(self) -> Path:
        return self.path / "groups"

    def group(self, number: int) -> Path:
        """What was submitted together: ``members`` (directories below the sweep), and their jobs' keys and ids."""
        return self.groups / f"{number}.json"

    def table(self, number: int) -> Path:
        """In which directory each element of the group's arrays works: one a line."""
        return self.groups / f"{number}.txt"


def is_sweep(path: Path) -> bool:
    return (path / "sweep.json").is_file()


def sweep_of(run: RunDir) -> SweepDir | None:
    """The sweep that ``run`` is a point of, or is shared in."""
    if run.path.parent.name == SHARED:
        return SweepDir(run.path.parent.parent)
    return SweepDir(run.path.parent) if run.is_point else None


def load(home: SweepDir, strict: bool = False) -> dict[str, Any] | None:
    """sweep.json, with ``groups``: all that was submitted, one after another. None: it cannot be read.

    ``strict``: for whoever submits. A group that is there and cannot be read raises PkuslurmError: its points would
    seem never to have been submitted.
    """
    value = read_json(home.sweep_json)
    if value is not None:
        value["groups"] = groups = _groups(home, strict)
        value["where"] = where = dict[str, list[tuple[int, int]]]()
        for number, group in enumerate(groups):
            for index, name in enumerate(group["members"]):
                where.setdefault(str(name), []).append((number, index))
    return value


def save(home: SweepDir, sweep: Mapping[str, Any]) -> None:
    """Write sweep.json; its groups have files of their own. Raises OSError."""
    write_json(home.sweep_json, {name: value for name, value in sweep.items() if name not in ("groups", "where")})


def _groups(home: SweepDir, strict: bool) -> list[dict[str, Any]]:
    try:
        names = os.listdir(home.groups)
    except OSError as error:
        if strict and not isinstance(error, FileNotFoundError):
            raise PkuslurmError(f"{home.groups}: {error.strerror or error}") from None
        names = []
    numbers = [int(match[1]) for match in map(_GROUP.fullmatch, names) if match]
    found = []
    for number in range(max(numbers, default=-1) + 1):
        group = read_json(home.group(number)) or {}
        if not isinstance(group.get("members"), list) or not isinstance(group.get("jobs"), dict):
            if strict and number in numbers:
                raise PkuslurmError(f"{home.group(number)}: it cannot be read; what it says was submitted is not known")
            group = {"members": [], "jobs": {}}
        found.append(group)
    return found


def unfinished(group: Mapping[str, Any]) -> bool:
    """Whether its launcher died before all of it was submitted and let go."""
    return bool(group["members"]) and any(not job.get("job_id") or job.get("held") for job in group["jobs"].values())


def check_settled(run: RunDir, sweep: Mapping[str, Any]) -> None:
    """Raise PkuslurmError where a point's group is not wholly submitted: alone it would be submitted twice."""
    for number, _ in (sweep.get("where") or {}).get(run.path.name, ()):
        if unfinished(sweep["groups"][number]):
            raise PkuslurmError(
                f"{run.run_id}: its sweep was submitted only in part; first retry, or cancel, {run.path.parent.name}"
            )


def document(run: RunDir, sweep: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """run.json as it stands; of a point with what its sweep has submitted for it. None: it cannot be read.

    ``sweep``: what ``load`` gives, where the caller has it already.
    """
    value = read_json(run.run_json)
    home = sweep_of(run)
    if value is None or home is None:
        return value
    if sweep is None:
        sweep = load(home)
    return value if sweep is None else with_sweep(value, run, home, sweep)


def with_sweep(value: dict[str, Any], run: RunDir, home: SweepDir, sweep: Mapping[str, Any]) -> dict[str, Any]:
    """A point's (or a share's) run.json ``value`` with the ids of its elements in the arrays of its sweep.

    An entry that was submitted by itself after the group with the number ``after_group`` keeps what it says, unless
    there is a later group.
    """
    jobs = value.get("jobs")
    entries: dict[str, Any] = jobs if isinstance(jobs, dict) else {}
    own = set(entries)
    if run.is_point and "prepare" in entries:
        own.remove("prepare")
        shared = document(home.shared(share_of(run, sweep)), sweep) or {}
        jobs = shared.get("jobs")
        entries["prepare"] = (jobs.get("prepare") if isinstance(jobs, dict) else None) or entries["prepare"]
    _from_groups(entries, own, str(run.path.relative_to(home.path)), sweep)
    if value.get("launcher") is None and not any(_job_id(entries[kind]) for kind in own):
        value["launcher"] = sweep.get("launcher")  # it has not begun: whoever runs the sweep will begin it
    if not any(isinstance(entry, dict) and "after_group" in entry for entry in entries.values()):
        value["cancelled"] = value.get("cancelled") or sweep.get("cancelled")
    return value


def share_of(run: RunDir, sweep: Mapping[str, Any]) -> int:
    """Which of the sweep's shares ``run``, a point, uses."""
    points = sweep.get("points")
    number = int(run.path.name) if run.path.name.isdecimal() else 0
    point = points[number] if isinstance(points, list) and number < len(points) else None
    shared = point.get("shared") if isinstance(point, dict) else None
    return shared if isinstance(shared, int) else 0


def _from_groups(entries: dict[str, Any], kinds: set[str], name: str, sweep: Mapping[str, Any]) -> None:
    for number, index in (sweep.get("where") or {}).get(name, ()):
        group = sweep["groups"][number]
        for kind, job in group["jobs"].items():
            entry = entries.get(kind)
            if not (isinstance(entry, dict) and isinstance(job, dict) and kind in kinds):
                continue
            after = entry.get("after_group")
            if number > (after if isinstance(after, int) else -1):
                job_id = job.get("job_id")
                own = f"{job_id}_{index}" if job_id and group.get("array") else job_id
                entry.update(job_id=own, key=job.get("key"), asked=job.get("asked"), group=number)


def _job_id(entry: object) -> object:
    return entry.get("job_id") if isinstance(entry, dict) else None

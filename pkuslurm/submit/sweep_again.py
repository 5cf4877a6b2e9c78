"""What of a sweep is to be submitted, once more or for the first time: all that is not complete, nor in the queue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.chains import Chain, chains
from pkuslurm.read import proof, pruned
from pkuslurm.rundir import SHARED, RunDir, read_json, write_json
from pkuslurm.slurm import commands
from pkuslurm.submit.arrays import job_file
from pkuslurm.submit.attempt_numbers import next_attempt, renumber
from pkuslurm.submit.sweep_queue import Living
from pkuslurm.sweepdir import SweepDir, share_of
from pkuslurm.worker import marker
from pkuslurm.worker.unpack import unpack


def open_points(home: SweepDir, sweep: Mapping[str, Any]) -> dict[int, list[str]]:
    """The kinds of each point that are not proved complete; points that are complete are left out."""
    found = {}
    for point in sweep["points"]:
        run = home.point(point["n"])
        kinds = open_kinds(run, (read_json(run.run_json) or {}).get("pipeline") or sweep["pipeline"])
        if kinds:
            found[int(point["n"])] = kinds
    return found


def open_kinds(run: RunDir, pipeline: Sequence[str]) -> list[str]:
    """What of ``pipeline`` is not proved complete, without prepare, which is not the point's own."""
    gone = pruned.read(run)
    kinds = [kind for kind in pipeline if kind != "prepare"]
    if not (run.path / "done").is_dir():  # it has not begun
        return kinds
    return [kind for kind in kinds if proof.marker_of(run, run.run_id, kind, gone)[0] is None]


def wanted(home: SweepDir, sweep: Mapping[str, Any], there: Sequence[Living]) -> list[Chain]:
    """Chains of all that is open, shares first; jobs that had been submitted before get their next attempt.

    Left out is what waits or runs (``there``), and what a launcher had begun to submit. Raises PkuslurmError, OSError.
    """
    busy = {one.member for one in there}
    for group in sweep["groups"]:
        if not all(job.get("job_id") for job in group["jobs"].values()):
            busy |= {*group["members"]}
    known = {member for group in sweep["groups"] for member in group["members"]}
    known |= {str(point["n"]) for point in sweep["points"] if point.get("alone")}
    most = commands.most_elements() if sweep.get("arrays", True) else 1
    if not most:
        raise PkuslurmError("this cluster takes no job arrays, or does not say so now; try again later")
    points = {number: kinds for number, kinds in open_points(home, sweep).items() if str(number) not in busy}
    shares = _shares(home, sweep, points, busy)
    for name in shares:
        if name in known:
            renew(RunDir(home.path / name), ["prepare"])
    members = {}
    for number, kinds in points.items():
        run = home.point(number)
        if str(number) in known:
            unpack(run)
            renew(run, kinds)
        members[str(number)] = (tuple(kinds), _asks(run, kinds))
    return [*chains(dict.fromkeys(shares, (("prepare",), "")), most), *chains(members, most)]


def _shares(home: SweepDir, sweep: Mapping[str, Any], points: Mapping[int, object], busy: set[str]) -> list[str]:
    """The shares that ``points`` need and nobody prepares, by their names."""
    if "prepare" not in sweep["pipeline"]:
        return []
    needed = sorted({share_of(home.point(number), sweep) for number in points})
    runs = {number: home.shared(number) for number in needed if f"{SHARED}/{number}" not in busy}
    return [
        f"{SHARED}/{number}" for number, run in runs.items() if marker.doubt(run, run.run_id, "prepare") is not None
    ]


def renew(run: RunDir, kinds: Sequence[str]) -> None:
    """The next attempt of each of ``kinds``, in run.json and in its job file."""
    document = read_json(run.run_json)
    if document is None:
        raise PkuslurmError(f"{run.run_json}: it cannot be read as a run's description")
    for kind in kinds:
        attempt = next_attempt(run, kind)
        document["jobs"][kind] |= {"first_attempt": attempt, "job_id": None, "asked": None}
        renumber(run, kind, attempt, str(job_file(run, kind)["key"]))
    document["cancelled"] = None
    write_json(run.run_json, document)


def _asks(run: RunDir, kinds: Sequence[str]) -> str:
    jobs = [job_file(run, kind) for kind in kinds]
    asked = [[job["nodes"], job["nproc_per_node"], job["request"], job["worker"][:-1]] for job in jobs]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

"""What of a sweep is not proved complete, by its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pkuslurm.read.proof import open_kinds
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.sweepdir import SweepDir, share_of
from pkuslurm.worker import marker


def open_points(home: SweepDir, sweep: Mapping[str, Any]) -> dict[int, list[str]]:
    """The kinds of each point that are not proved complete; points that are complete are left out."""
    found = {}
    for point in sweep["points"]:
        if kinds := open_of(home.point(point["n"])):
            found[int(point["n"])] = kinds
    return found


def open_of(run: RunDir) -> list[str]:
    """What of a point is not proved complete, without prepare, which is not its own."""
    kinds = [kind for kind in (read_json(run.run_json) or {}).get("pipeline") or () if kind != "prepare"]
    return open_kinds(run, kinds) if (run.path / "done").is_dir() else kinds


def open_shares(home: SweepDir, sweep: Mapping[str, Any]) -> list[int]:
    """The shares whose prepare is not proved complete, and of which a point has still to do what comes after it."""
    needed = set()
    for point in sweep["points"]:
        run = home.point(point["n"])
        pipeline = (read_json(run.run_json) or {}).get("pipeline") or ()
        after = [kind for kind in pipeline if kind != "prepare"]
        if "prepare" in pipeline and open_of(run)[:1] == after[:1]:
            needed.add(share_of(run, sweep))
    runs = {number: home.shared(number) for number in sorted(needed)}
    return [number for number, run in runs.items() if marker.doubt(run, run.run_id, "prepare") is not None]

"""What the nodes of doctor's job found, as checks. Pure."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pkuslurm.doctor.check import Check

PYTHON = "name a Python that is there on the nodes, too: cluster.python=PATH (cluster.setup may load its module)"
INSTALL = "install it there (pip install 'pkuslurm[train]'), or name another Python: cluster.python=PATH"
DEVICES = (
    "see what is asked for (cluster.gres, cluster.gpus, cluster.gpus_per_node) and what nodes have: sinfo -o '%P %G'"
)
FOLDER = "run_root= (or PKUSLURM_RUN_ROOT) a folder that all nodes see"
MEET = "a firewall, or the wrong network card? ask the site which one nodes talk over"
# a node opens its log in the folder before anything of ours begins
_NO_FOLDER = re.compile(r"could not open stdout|I/O setup failed|could not connect IO|couldn't chdir", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """``seen``: the reports that arrived in the folder, by node rank; ``heard``: those that node 0 got by network.

    ``hosts`` in rank order as Slurm gave them, if it did; ``words``: the ends of the logs; ``state``: Slurm's.
    """

    seen: Mapping[int, Mapping[str, Any]]
    heard: Mapping[int, Mapping[str, Any]]
    hosts: Sequence[str]
    spec: Mapping[str, Any]
    words: str = ""
    state: str = ""


def judge(found: Found) -> list[Check]:
    """A few lines for each node, then what holds between them."""
    checks: list[Check] = []
    reports: dict[int, Mapping[str, Any]] = {}
    for rank in range(int(found.spec["nodes"])):
        report = found.seen.get(rank) or found.heard.get(rank)
        if report is None:
            checks.append(_silent(found, rank))
        else:
            reports[rank] = report
            checks += _node(found, rank, report)
    checks += _between(found, reports)
    return checks


def _name(found: Found, rank: int) -> str:
    report = found.seen.get(rank) or found.heard.get(rank) or {}
    return str(report.get("host") or (found.hosts[rank] if rank < len(found.hosts) else f"node {rank}"))


def _silent(found: Found, rank: int) -> Check:
    name, folder = _name(found, rank), found.spec["folder"]
    words = _words(found)
    if not words and rank > 0:
        return Check(
            name, False, f"not reached: the job ended on {_name(found, 0)}", "mend that node's part first", True
        )
    if not words:
        detail = f"{folder}: neither seen nor written there (the job is {found.state or 'gone'}, and has no log)"
        return Check(name, False, detail, FOLDER, True)
    if _NO_FOLDER.search(words):
        return Check(name, False, f"{folder}: not seen there ({words})", FOLDER, True)
    remedy = f"those are the log's words; every node must see {sys.executable}, too"
    return Check(name, False, f"it did not report: {words}", remedy, True)


def _words(found: Found) -> str:
    """Of the logs the line that tells most, else the last ones."""
    lines = list(dict.fromkeys(found.words.splitlines()))
    return " | ".join([line for line in lines if _NO_FOLDER.search(line)][:1] or lines[-4:])


def _node(found: Found, rank: int, report: Mapping[str, Any]) -> Iterator[Check]:
    name, folder = _name(found, rank), _folder(found, rank, report.get("folder") or {})
    yield folder
    if not folder.ok:
        return  # the rest is read from there
    python, devices = report.get("python"), report.get("devices")
    if python is None:
        yield Check(f"{name} python", False, f"it did not end: {_words(found)}", PYTHON, True)
        return
    good = bool(python.get("ok"))
    yield Check(f"{name} python", good, str(python.get("detail")), None if good else PYTHON, True)
    if good:
        packages = python.get("packages") or {}
        there = "llamafactory" in packages
        detail = ", ".join(f"{package} {version}" for package, version in packages.items())
        yield Check(f"{name} LLaMA-Factory", there, detail or "not installed", None if there else INSTALL, True)
    if devices is not None:
        enough = bool(devices.get("ok"))
        yield Check(f"{name} devices", enough, str(devices.get("detail")), None if enough else DEVICES, True)


def _folder(found: Found, rank: int, folder: Mapping[str, Any]) -> Check:
    name = _name(found, rank)
    if not folder.get("ok"):
        detail = str(folder.get("detail") or "not looked at")
        return Check(f"{name} folder", False, f"the login side's file is not seen there: {detail}", FOLDER, True)
    if rank not in found.seen:
        return Check(f"{name} folder", False, f"{folder['detail']}: its file is not seen here", FOLDER, True)
    return Check(f"{name} folder", True, f"{folder['detail']}: seen there, and what it wrote here")


def _between(found: Found, reports: Mapping[int, Mapping[str, Any]]) -> Iterator[Check]:
    if len(reports) < 2:
        return
    told = [(report.get("python") or {}).get("packages") for report in reports.values()]
    if all(told):
        alike = all(one == told[0] for one in told)
        detail = "the same on all nodes" if alike else "not the same on all nodes, see above"
        remedy = None if alike else "one Python that all nodes see: cluster.python=PATH"
        yield Check("versions", alike, detail, remedy, True)
    meetings = {rank: report.get("meeting") for rank, report in reports.items()}
    went = {rank: bool(meeting and meeting.get("ok")) for rank, meeting in meetings.items()}
    # whom node 0 has heard has met it, whatever became of its own file
    went |= dict.fromkeys(found.heard, True)
    good = all(went.values())
    lines = [f"{_name(found, rank)} {meeting['detail']}" for rank, meeting in meetings.items() if meeting]
    yield Check("rendezvous", good, "; ".join(lines) or "not reached", None if good else MEET, True)

"""What the nodes of doctor's job found, as checks. Pure."""

from __future__ import annotations

import re
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
_NO_FOLDER = re.compile(r"could not open stdout|I/O setup failed|couldn't chdir|can't open file|JobLaunchFailure", re.I)


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
    words = " | ".join(dict.fromkeys(found.words.splitlines()[-4:])) or f"the job is {found.state or 'gone'}, no log"
    folder = f"{found.spec['folder']}: not seen, or not written, there" if _unseen(found) else "it did not report"
    remedy = FOLDER if _unseen(found) else "the log's words name it; the nodes must see this Python, pkuslurm, run_root"
    return Check(_name(found, rank), False, f"{folder} ({words})", remedy, True)


def _unseen(found: Found) -> bool:
    return not found.words or bool(_NO_FOLDER.search(found.words))


def _node(found: Found, rank: int, report: Mapping[str, Any]) -> Iterator[Check]:
    name, python = _name(found, rank), report.get("python") or {}
    good = bool(python.get("ok"))
    yield Check(f"{name} python", good, str(python.get("detail")), None if good else PYTHON, True)
    packages = python.get("packages") or {}
    if good:
        there = "llamafactory" in packages
        detail = ", ".join(f"{package} {version}" for package, version in packages.items())
        yield Check(f"{name} LLaMA-Factory", there, detail or "not installed", None if there else INSTALL, True)
    devices = report.get("devices") or {}
    count, wanted = devices.get("count"), int(found.spec["devices"])
    enough = count is None or count >= wanted
    detail = str(devices.get("detail")) if count is None else f"{count} of {wanted} ({devices.get('detail')})"
    yield Check(f"{name} devices", enough, detail, None if enough else DEVICES, True)
    yield _folder(found, rank, name, report.get("folder") or {})


def _folder(found: Found, rank: int, name: str, folder: Mapping[str, Any]) -> Check:
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

"""A job's devices on this node: which variable tells torch of them, and who knows which they are.

Some sites' plugins for Slurm name them, each in its own way; plain Slurm sets nothing for NPUs, and two jobs on a node
would both take device 0: then only the job's record (``scontrol show job -d``) tells.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import hostlist
from pkuslurm.worker.accelerators import ACCELERATORS, Accelerator

# Slurm's word for: a device without a file
_NONE = "NoDevFiles"
_NUMBER = re.compile(r"(?:[A-Za-z]\w*-)?(\d+)(?:-(\d+))?")  # 3, 0-3, Ascend910-3
_NAMED = re.compile(r"\d+|(GPU|MIG)-[\w./-]+")
_JOB = re.compile(r"^JobId=(\d+)", re.MULTILINE)
_NODES = re.compile(r"^\s*Nodes=(\S+)\s.*?\bGRES(?:_IDX)?=(\S*)", re.MULTILINE)
_INDICES = re.compile(r"([A-Za-z_]\w*)((?::[\w.+-]+)*)\(IDX:([\d,-]+)\)")


@dataclass(frozen=True)
class Devices:
    """``names``: None where nothing tells which; ``source`` says in words who told.

    ``env``: what the ranks get in addition; ``hidden``: variables that they must not get.
    """

    names: tuple[str, ...] | None
    source: str
    env: Mapping[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()


def find(accelerator: str, environ: Mapping[str, str], details: Callable[[], str | None], host: str) -> Devices:
    """The devices of the Slurm job, or of the machine, that ``environ`` (with the job's own variables) is of.

    ``details``: what scontrol tells of the job, asked only where nothing else tells. A variable that is set is kept;
    set to nothing it is taken away, and nothing takes its place: for a site that counts each job's devices from 0.
    """
    row = ACCELERATORS[accelerator]
    if not row.visible:
        return Devices((), "no device is needed")
    given = environ.get(row.visible)
    if given:
        names = () if given == _NONE else tuple(word.strip() for word in given.split(",") if word.strip())
        return Devices(names, f"{row.visible}={given}")
    if given is not None:
        return Devices(None, f"{row.visible} is left to the site", hidden=(row.visible,))
    if not environ.get("SLURM_JOB_ID"):  # in a container of a platform's these count the node's, and it shows its own
        return Devices(None, "all that there are")
    for name in row.lists:
        if name in row.batch_lists and _nodes(environ) > 1:
            continue
        if listed := _listed(environ.get(name, "")):
            return _set(row, listed, f"{name}={environ[name]}")
    if indices := allocated(details() or "", row.gres, host, environ["SLURM_JOB_ID"]):
        return _set(row, [str(number) for number in indices], f"GRES index {','.join(map(str, indices))} of the job")
    return Devices(None, "nothing says which are the job's")


def allocated(text: str, gres: str, host: str, job_id: str) -> list[int] | None:
    """The indices of the job's ``gres`` (a pattern) on ``host``, ascending; None: not a word.

    ``text`` is what ``scontrol show job -d`` prints. An array's number prints all its jobs: ``job_id`` is the one.
    """
    parts = _JOB.split(text)
    jobs = dict(zip(parts[1::2], parts[2::2], strict=True))
    if len(jobs) > 1:
        text = jobs.get(job_id, "")
    found: set[int] = set()
    for nodes, words in _NODES.findall(text):
        if host not in _hosts(nodes):
            continue
        for name, kind, indices in _INDICES.findall(words):
            if re.fullmatch(gres, name + kind, re.IGNORECASE):
                found |= {int(number) for number in _listed(indices) or ()}
    return sorted(found) or None


def count_files(accelerator: str, place: Path = Path("/dev")) -> int:
    """How many of them this machine has, by their files: no driver is asked, which may hang."""
    pattern = ACCELERATORS[accelerator].file
    try:
        return sum(bool(pattern and re.fullmatch(pattern, name)) for name in os.listdir(place))
    except OSError:
        return 0


def problem(accelerator: str, found: Devices, seen: int | None, asked: int | None, host: str, free: bool) -> str | None:
    """In words what is wrong with the number of devices; None: nothing.

    ``seen``: as torch counts them, None before it was asked; ``asked``: None is at least one. ``free``: more than the
    job needs may be there, for nobody else is on the node, or Slurm was asked for none.
    """
    row = ACCELERATORS[accelerator]
    want = f"{asked} {'is' if asked == 1 else 'are'}" if asked is not None else "at least one is"
    count = seen if seen is not None else None if found.names is None else len(found.names)
    if count is None or (count == asked if asked is not None else count > 0):
        return None
    begin = f"node {host}: torch sees" if seen is not None else f"node {host}:"
    begin = f"{begin} {count} {accelerator} device{'' if count == 1 else 's'} ({found.source}), and {want} wanted"
    if found.names is not None and seen is not None and seen < len(found.names):
        mig = "; a process uses one MIG instance only" if any(name.startswith("MIG-") for name in found.names) else ""
        return (
            f"{begin}; where the site counts each job's devices from 0 write cluster.env.{row.visible}='', else a card "
            f"is missing: see {row.smi} there, or leave the node out (cluster.exclude={host}){mig}"
        )
    if asked is None or count < asked:
        return (
            f"{begin}; ask Slurm for as many as there are ranks on a node (cluster.gres, cluster.nproc_per_node), "
            f"see {row.smi} there, or leave the node out (cluster.exclude={host})"
        )
    if free:
        return None
    if found.names is not None:
        return f"{begin}; make cluster.gres and cluster.nproc_per_node one number, or set cluster.env.{row.visible}"
    return (
        f"{begin}; nothing tells which of them are this job's: write cluster.exclusive=true, or name them "
        f"(cluster.env.{row.visible}=0,1); a gres.conf with File= would tell"
    )


def _set(row: Accelerator, names: list[str], source: str) -> Devices:
    return Devices(tuple(names), source, {row.visible: ",".join(names)})


def _listed(text: str) -> list[str] | None:
    """``0,1``, ``0-3``, ``Ascend910-0,Ascend910-1``, ``GPU-…``: the devices, numbers ascending; else None."""
    numbers: set[int] = set()
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        match = _NUMBER.fullmatch(word)
        if match is None or int(match[2] or match[1]) > 4095:
            named = all(_NAMED.fullmatch(one) for one in words)
            return words if named else None
        numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return [str(number) for number in sorted(numbers)] or None


def _hosts(nodes: str) -> list[str]:
    try:
        return hostlist.expand(nodes)
    except PkuslurmError:
        return []


def _nodes(environ: Mapping[str, str]) -> int:
    text = environ.get("SLURM_JOB_NUM_NODES") or environ.get("SLURM_NNODES") or "1"
    return int(text) if text.isdecimal() else 1

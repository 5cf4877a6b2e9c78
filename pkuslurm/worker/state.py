"""What a node says about its part of a job, and what the other nodes say about theirs."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir
from pkuslurm.worker.processes import alive, look


def now() -> str:
    """ISO 8601 with zone, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def host_name(environ: Mapping[str, str]) -> str:
    """This node's name. Not $HOSTNAME: in every Slurm task that is the batch host's."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def save(path: Path, value: object, write: Callable[[Path, object], None] | None = None) -> None:
    """``write_json`` (or ``write``); what goes wrong (a full disk, no permission) becomes one line."""
    try:
        (write or rundir.write_json)(path, value)
    except OSError as error:
        raise PkuslurmError(
            f"{path}: cannot be written: {error.strerror or error}; free space or mend the permission, then retry"
        ) from None


@dataclass
class Recorder:
    """Writes this node's state file, whole each time."""

    run: RunDir
    kind: str
    node_rank: int
    nodes: int
    attempt: int
    job_id: str
    host: str
    hosts: tuple[str, ...] = ()
    started: str = field(default_factory=now)
    versions: Mapping[str, str] | None = None  # of what this node has installed
    decided: bool = False  # node 0's, once the run is this attempt's
    decision: Mapping[str, Any] | None = None  # node 0's, as it has written it down

    @property
    def path(self) -> Path:
        return self.run.state(self.kind, self.node_rank)

    def write(self, state: str, exit_code: int | None = None, reason: str | None = None) -> None:
        """``exit_code`` as a shell has it (128 + n: signal n). Raises PkuslurmError on a full disk.

        An attempt that a newer one has taken over from keeps silent.
        """
        if self.replaced_by(rundir.read_json(self.run.attempt(self.kind)) or {}):
            return
        process = look(os.getpid())
        save(
            self.path,
            {
                "state": state,
                "attempt": self.attempt,
                "job_id": self.job_id,
                "nodes": self._all_hosts(),
                "node_rank": self.node_rank,
                "pid": os.getpid(),
                "pid_start": process.start if process else None,
                "host": self.host,
                "started": self.started,
                "finished": None if state == "RUNNING" else now(),
                "exit_code": exit_code,
                "reason": reason,
            }
            | ({"versions": dict(self.versions)} if self.versions else {}),
            rundir.write_last_word,
        )

    def replaced_by(self, value: Mapping[str, Any]) -> bool:
        """Whether ``value``, of state/<kind>.attempt.json, is a newer attempt's; for node 0, once it has decided, also
        another start's of the same number."""
        newest = value.get("attempt")
        if not isinstance(newest, int):
            return False
        another = self.decided and newest == self.attempt and value.get("by") != self.by
        return newest > self.attempt or another

    @property
    def by(self) -> list[object]:
        """This very process."""
        process = look(os.getpid())
        return [self.host, os.getpid(), process.start if process else None]

    @property
    def watched(self) -> range:
        """Node 0 watches all others, they watch node 0: all pairs would be too much for a shared disk."""
        return range(1, self.nodes) if self.node_rank == 0 else range(1)

    def peers(self) -> dict[int, dict[str, Any]]:
        """The states of this attempt's ``watched`` nodes, by node rank, as far as they are written."""
        found = {}
        for rank in self.watched:
            value = rundir.read_json(self.run.state(self.kind, rank))
            if value and value.get("attempt") == self.attempt and value.get("job_id") == self.job_id:
                found[rank] = value
        return found

    def _all_hosts(self) -> list[str]:
        """Hosts in rank order; where nobody knows them beforehand, those that have spoken up so far."""
        if self.hosts:
            return list(self.hosts)
        known = {self.node_rank: self.host}
        known.update({rank: str(value.get("host")) for rank, value in self.peers().items()})
        return [known[rank] for rank in sorted(known)]

    def already_running(self) -> int | None:
        """The pid of a worker on this host that is at this very job now."""
        value = rundir.read_json(self.path)
        if value is None or value.get("state") != "RUNNING" or value.get("host") != self.host:
            return None
        if isinstance(value.get("attempt"), int) and value["attempt"] < self.attempt:
            return None  # it makes room, as it would on another host
        pid, start = value.get("pid"), value.get("pid_start")
        if not isinstance(pid, int) or not isinstance(start, int) or pid == os.getpid():
            return None
        return pid if alive(pid, start) else None


def gone(value: Mapping[str, Any], host: str) -> bool:
    """Whether a RUNNING state's worker is known to be dead, which can be seen only on its own host."""
    pid, start = value.get("pid"), value.get("pid_start")
    return (
        value.get("state") == "RUNNING"
        and value.get("host") == host
        and isinstance(pid, int)
        and isinstance(start, int)
        and not alive(pid, start)
    )

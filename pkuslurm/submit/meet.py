"""The meet executor: a run's nodes are this command, typed once on each. Node 0 works as a local run does, the others
start its jobs' workers where they are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm import __version__
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.read import status
from pkuslurm.read.places import remember
from pkuslurm.read.text import safe
from pkuslurm.rundir import RunDir, read_json
from pkuslurm.submit import local, owner
from pkuslurm.submit.gathering import Gathering
from pkuslurm.submit.local import Cancel, Nodes, Worker
from pkuslurm.submit.meet_where import ADDRESS, Role
from pkuslurm.submit.meeting import PATIENCE, Guest, Host, Wish
from pkuslurm.worker import network, processes

# for a folder that node 0 has just made to be seen on this node
SEEN_SECONDS = 60.0


def together(
    file: Path,
    role: Role,
    nodes: int,
    settings: tuple[str, ...],
    again: str,
    timeout: float,
    work: Callable[[Nodes], int],
    source: str = "",
) -> int:
    """Meet at ``file``, and ``work`` on node 0; the run's exit code, on every node. Raises PkuslurmError."""
    try:
        wish = Wish(nodes, role.rank, settings, network.own_address(os.environ.get(ADDRESS, "")), __version__, source)
        with local.signals() as cancel:
            party = Gathering(file, wish, timeout, say, lambda: cancel.number is not None, again).come_together()
            if isinstance(party, Host):
                return _host(party, work, Together(party, role, cancel))
            try:
                return follow(party, cancel)
            finally:
                party.post.close()
    except OSError as error:
        raise PkuslurmError(f"{error.filename or file}: {error.strerror or error}") from None


def _host(party: Host, work: Callable[[Nodes], int], nodes: Nodes) -> int:
    """Node 0's part; however it ends, the guests hear of it."""
    code, words = 1, None
    try:
        code = work(nodes)
    except PkuslurmError as error:
        code, words = error.exit_code, str(error)
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        party.end(code, words)
    return code


class Together(Nodes):
    """Node 0 is here, the others are the host's guests. ``before``: what was typed before the jobs began."""

    def __init__(self, host: Host, role: Role, before: Cancel) -> None:
        super().__init__(host)
        self.party, self.role, self.before = host, role, before
        self.serial = 0

    def start(self, run: RunDir, kind: str, job: Mapping[str, Any], job_id: str) -> Sequence[Worker]:
        if job["nodes"] == 1:
            return super().start(run, kind, job, job_id)
        self.serial += 1
        meets = {"MASTER_ADDR": self._address(), "MASTER_PORT": str(self._port())}
        first = local.start_worker(run, kind, job_id, 0, meets)
        told = {"serial": self.serial, "kind": kind, "job_id": job_id, "meets": meets}
        self.party.post.say(job=told, stop=None)
        return [first, *(Partner(self.party, rank, self.serial) for rank in range(1, job["nodes"]))]

    def look(self, cancel: Cancel) -> None:
        cancel.number = cancel.number or self.before.number
        super().look(cancel)

    def lost(self, workers: Sequence[Worker]) -> str | None:
        return next((one.problem for one in workers if isinstance(one, Partner) and one.problem is not None), None)

    def _address(self) -> str:
        """As it was given, else the platform's, else the one at which node 1 reaches this node."""
        if self.role.address not in (None, "localhost") and not network.is_loopback(str(self.role.address)):
            return str(self.role.address)
        own = self.party.wish.address
        if own != os.environ.get(ADDRESS):
            with suppress(PkuslurmError):
                return network.address_towards(str((self.party.guest(1).value or {}).get("address")))
        return own

    def _port(self) -> int:
        given = self.role.port
        return given if given is not None and network.is_free(given) else network.free_port(int(self.party.nonce, 16))


class Partner:
    """Another node's worker, by what that node says. ``problem``: how it was lost, in words."""

    def __init__(self, host: Host, rank: int, serial: int) -> None:
        self.host, self.serial, self.watch = host, serial, host.guest(rank)
        self.name = f"node {rank} on {(self.watch.value or {}).get('host')}"
        self.returncode: int | None = None
        self.problem: str | None = None
        self.told: int | None = None

    def poll(self) -> int | None:
        if self.returncode is not None:
            return self.returncode
        value = self.watch.look() or {}
        code = value.get("codes", {}).get(str(self.serial))
        if isinstance(code, int):
            self.returncode = code
            if code < 0 and self.told is None:
                self.problem = f"{self.name}: its worker was ended by signal {-code}"
        elif not self.watch.there:
            self.returncode, self.problem = 1, f"{self.name} has left"
        elif self.watch.silent > PATIENCE["running"]:
            self.returncode = 1
            self.problem = f"{self.name} is gone: its launcher has said nothing for {self.watch.silent:.0f} s"
        return self.returncode

    def send_signal(self, number: int, /) -> None:
        if self.told != number:
            self.told = number
            self.host.post.say(stop={"serial": self.serial, "signal": int(number)})


def follow(guest: Guest, cancel: Cancel) -> int:
    """The other nodes' part: node 0's jobs of several nodes, until it says how the run has ended."""
    processes.become_subreaper()
    part, told = _Part(guest), False
    who = guest.said.get("host")
    say(f"this is node {guest.rank} of {guest.said.get('nodes')}; node 0, on {who}, prepares, merges, asks and reports")
    try:
        while not guest.gone() and guest.said.get("state") != "ended":
            if cancel.number is not None:
                if not told:
                    told = True
                    say(f"cancelled {cancel.how}: the run ends on all nodes, which takes some seconds …")
                guest.post.say(cancel=cancel.how)
                part.end(signal.SIGTERM)
            part.go_on(accept=cancel.number is None)
            time.sleep(local.POLL_SECONDS)
    finally:
        part.close()
    return 130 if cancel.number is not None else _ended(guest)


class _Part:
    """What this node does of the run."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.run: RunDir | None = None
        self.awaited: float | None = None  # since when the run is to be seen here
        self.worker: subprocess.Popen[bytes] | None = None
        self.serial = 0
        self.told: int | None = None
        self.codes: dict[str, int] = {}

    def go_on(self, accept: bool) -> None:
        said = self.guest.said
        if self.run is None and said.get("run"):
            self._look_for(RunDir(Path(said["run"])))
        job, stop = said.get("job") or {}, said.get("stop") or {}
        if accept and self.run is not None and job and job["serial"] > self.serial:
            self.serial, self.told = job["serial"], None
            say(f"      {job['kind']}: this node's part; {command('logs', '-f', str(self.run.path))} shows it")
            self.worker = local.start_worker(self.run, job["kind"], job["job_id"], self.guest.rank, job["meets"])
        if stop.get("serial") == self.serial and stop.get("signal") in (signal.SIGTERM, signal.SIGKILL):
            self.end(stop["signal"])
        if self.worker is not None and (code := self.worker.poll()) is not None:
            self.worker = None
            local.end_leftovers()
            self.codes[str(self.serial)] = code
            self.guest.post.say(codes=dict(self.codes))

    def _look_for(self, run: RunDir) -> None:
        self.awaited = self.awaited or time.monotonic()
        if run.run_json.exists():
            owner.check_owner(run)
            remember(run.path.parent, os.environ)  # this node's HOME may be its own
            self.run = run
            say(f"run {run.run_id}: {run.path}")
        elif time.monotonic() - self.awaited > SEEN_SECONDS:
            raise PkuslurmError(
                f"run_root: node 0 writes to {run.path}, which is not seen here; every node must see it"
            )

    def end(self, number: int) -> None:
        """Once for each signal: a second TERM would make some programs give up what they clean."""
        if self.worker is not None and self.told != number:
            self.told = number
            self.worker.send_signal(number)

    def close(self) -> None:
        self.end(signal.SIGTERM)
        if self.worker is not None:
            try:
                self.worker.wait(local.STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.worker.kill()
                self.worker.wait()
        local.end_leftovers()


def _ended(guest: Guest) -> int:
    """Say how the run has ended, as node 0 has told it, else its files. Raises PkuslurmError: it never began."""
    said = guest.said
    run = RunDir(Path(said["run"])) if said.get("run") else None
    if said.get("state") == "ended":
        code, words = int(said.get("code", 1)), said.get("words")
    elif run is None:
        raise PkuslurmError(
            f"node 0, on {said.get('host')}, is gone before the run began; type the same again everywhere"
        )
    else:
        code, words = _abandoned(guest, run)
    if run is None:
        say(f"pkuslurm: node 0, on {said.get('host')}: {words or 'it has ended before the run began'}")
        return code
    say(f"{run.run_id}: {status.read(run.path).state}{f': {words}' if words else ''}")
    with suppress(OSError):
        print(run.path, flush=True)
    return code


def _abandoned(guest: Guest, run: RunDir) -> tuple[int, str | None]:
    """Node 0 is not heard any more: unless it had ended, its open jobs get their verdict here. run.json names it still,
    so that whoever wants the run next listens for it, too."""
    document = read_json(run.run_json) or {}
    if (document.get("launcher") or {}).get("nonce") != guest.nonce:
        now = status.read(run.path)
        return (0 if now.state == "COMPLETED" and now.passed is not False else 1), None
    words = f"node 0 on {guest.said.get('host')} is gone: its launcher has said nothing for {guest.host.silent:.0f} s"
    failed = None
    for kind in document["pipeline"]:
        if local.state_of(run, kind).get("state") == "COMPLETED":
            continue
        if failed is None:
            local.final(run, document, kind, "FAILED", words, keep=local.state_of(run, kind))
        else:
            local.final(run, document, kind, "SKIPPED", f"{failed} did not complete")
        failed = failed or kind
    return 1, f"{words}; {command('retry', str(run.path))}, on every node, goes on"


def say(line: str) -> None:
    """For people; a terminal that went away ends nothing."""
    with suppress(OSError):
        print(safe(line), file=sys.stderr, flush=True)

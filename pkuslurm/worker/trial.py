"""``python -P …/boot.py pkuslurm.worker.trial SPEC``: what one node of doctor's job finds, told to the login side.

SPEC is JSON in the command line, since it is the shared folder that may not be there. Each node writes ``node.N.json``
into it; node 0 also hears the others over the network, and so can tell of one that does not see the folder.
Standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import RunDir, write_json
from pkuslurm.worker import network, probe
from pkuslurm.worker.job import Job, load
from pkuslurm.worker.rendezvous import Rendezvous, own_rank, rendezvous
from pkuslurm.worker.state import host_name

LOGIN, NODE = "login.txt", "node.{}.json"
# another node may see a file some seconds late
FOLDER_SECONDS = 20.0
MEET_SECONDS = 60.0


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    spec = json.loads(argv[0])
    began = time.monotonic()
    rank, host = own_rank(environ), host_name(environ)
    report: dict[str, Any] = {"rank": rank, "host": host, "folder": folder(spec)}
    _write(spec, rank, report)
    # before the slow part: node 0 would wait for a cold python of the others
    try:
        report["meeting"], report["heard"] = meet(rendezvous(environ, spec["nodes"]), spec["token"], report)
    except PkuslurmError as error:
        report["meeting"] = {"ok": False, "detail": str(error)}
    _write(spec, rank, report)
    if report["folder"]["ok"]:
        report |= python(RunDir(Path(spec["folder"])), environ, host, f"doctor-{rank}")
    report["seconds"] = round(time.monotonic() - began, 1)
    _write(spec, rank, report)
    return 0


def python(run: RunDir, environ: Mapping[str, str], host: str, name: str) -> dict[str, Any]:
    """What the training's python has installed here, in its container where it has one; whether it can use the devices.

    ``devices`` is missing where there is no python to ask.
    """
    try:
        job = load(run.job("train"))
        env = _environment(job, environ)
        plain = replace(job, accelerator="cpu")
        versions = probe.check(plain, env, probe.environment(plain, env, host)[1], host, f"{name}-0", lambda: False)
    except (PkuslurmError, probe.BadNode, OSError) as error:
        return {"python": {"ok": False, "detail": _words(error)}}
    if not versions:
        return {"python": {"ok": False, "detail": f"{job.command[0]}: it is no Python that answers"}}
    where = f" in {job.container.image}" if job.container else ""
    detail = f"{versions.pop('python', '?')} {job.command[0]}{where} ({platform.machine()})"
    found: dict[str, Any] = {"python": {"ok": True, "detail": detail, "packages": versions}}
    if job.accelerator in (None, "cpu"):
        return found | {"devices": {"ok": True, "detail": "none are needed"}}
    try:
        env, there = probe.environment(job, env, host)
        probe.check(job, env, there, host, f"{name}-1", lambda: False)
    except (PkuslurmError, probe.BadNode, OSError) as error:
        return found | {"devices": {"ok": False, "detail": _words(error)}}
    return found | {"devices": {"ok": True, "detail": f"{job.devices} {job.accelerator} compute ({there.source})"}}


def _environment(job: Job, environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in job.unset}
    return kept | dict(job.env) | {name: kept[source] for name, source in job.env_names.items() if source in kept}


def _words(error: Exception) -> str:
    return f"{error.filename}: {error.strerror or error}" if isinstance(error, OSError) else str(error)


def folder(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Whether what the login side wrote is seen here."""
    path = Path(spec["folder"])
    deadline = time.monotonic() + FOLDER_SECONDS
    while True:
        with suppress(OSError):
            if (path / LOGIN).read_text(encoding="utf-8") == spec["token"]:
                return {"ok": True, "detail": str(path)}
        if time.monotonic() > deadline:
            there = "its file is missing or another" if path.is_dir() else "it is not there"
            return {"ok": False, "detail": f"{path}: {there}"}
        time.sleep(0.5)


def _write(spec: Mapping[str, Any], rank: int, report: Mapping[str, Any]) -> None:
    path = Path(spec["folder"])
    with suppress(OSError):
        if path.is_dir():  # never made here: it would be this node's own
            write_json(path / NODE.format(rank), report)


def meet(meeting: Rendezvous, token: str, report: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """Exchange reports where the ranks will meet: how it went, and what node 0 heard."""
    where = f"{meeting.master_addr}:{meeting.master_port}"
    if meeting.nodes == 1:
        return {"ok": True, "detail": "one node: nobody to meet"}, []
    try:
        if meeting.node_rank == 0:
            heard = _listen(meeting, token)
            missing = meeting.nodes - 1 - len(heard)
            detail = f"{len(heard)} of {meeting.nodes - 1} came to {where}"
            return {"ok": not missing, "detail": detail}, heard
        began = time.monotonic()
        came = _come(meeting, token, report)
        ours = network.address_towards(meeting.master_addr)
        card = network.interface_of(ours)
        detail = f"from {ours} ({card}) to {where} in {time.monotonic() - began:.1f} s"
        return {"ok": came, "detail": detail if came else f"{where}: somebody else answers there"}, []
    except (OSError, PkuslurmError) as error:
        return {"ok": False, "detail": f"{where}: {error}"}, []


def _listen(meeting: Rendezvous, token: str) -> list[Any]:
    heard: dict[int, Any] = {}
    deadline = time.monotonic() + MEET_SECONDS
    with socket.create_server(("", meeting.master_port)) as server:
        while len(heard) < meeting.nodes - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError, TypeError):  # whoever scans ports is not one of us
                peer, _ = server.accept()
                with peer:
                    peer.settimeout(10)
                    said = json.loads(_all(peer))
                    if said["token"] == token:
                        heard[int(said["report"]["rank"])] = said["report"]
                        peer.sendall(token.encode())
    return [heard[rank] for rank in sorted(heard)]


def _come(meeting: Rendezvous, token: str, report: Mapping[str, Any]) -> bool:
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            with socket.create_connection((meeting.master_addr, meeting.master_port), timeout=10) as peer:
                peer.sendall(json.dumps({"token": token, "report": report}).encode())
                peer.shutdown(socket.SHUT_WR)
                return _all(peer) == token
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _all(peer: socket.socket) -> str:
    pieces = []
    while piece := peer.recv(65536):
        pieces.append(piece)
    return b"".join(pieces).decode()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))

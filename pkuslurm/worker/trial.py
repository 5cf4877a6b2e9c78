"""``python -P …/boot.py pkuslurm.worker.trial SPEC``: what one node of doctor's job finds, told to the login side.

SPEC is JSON in the command line, since it is the shared folder that may not be there. Each node writes ``node.N.json``
into it; node 0 also hears the others over the network, and so can tell of one that does not see the folder.
Standard library only.
"""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import write_json
from pkuslurm.worker import network
from pkuslurm.worker.rendezvous import Rendezvous, rendezvous
from pkuslurm.worker.state import host_name

LOGIN, NODE = "login.txt", "node.{}.json"
PACKAGES = ("llamafactory", "torch", "torch-npu", "transformers")
# a cold python on a busy network disk
PYTHON_SECONDS = 60.0
# another node may see a file some seconds late
FOLDER_SECONDS = 20.0
MEET_SECONDS = 60.0

# nothing is imported: torch takes half a minute; CANN's version stands in its folder
_PROBE = """\
import importlib.metadata as m, json, platform, sys
found = {}
for name in %r:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
print("pkuslurm " + json.dumps([platform.python_version(), platform.machine(), sys.executable, found]))
"""
_DEVICES = {"npu": r"davinci\d+", "cuda": r"nvidia\d+"}
_VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}


def main(argv: list[str], environ: Mapping[str, str]) -> int:
    spec = json.loads(argv[0])
    began = time.monotonic()
    report: dict[str, Any] = {"host": host_name(environ), "machine": platform.machine()}
    report["python"] = python(spec, environ)
    report["devices"] = devices(spec["accelerator"], environ)
    try:
        meeting = rendezvous(environ, spec["nodes"])
    except PkuslurmError as error:
        rank = environ.get("SLURM_PROCID", "0")
        _write(spec, int(rank) if rank.isdecimal() else 0, report | {"meeting": {"ok": False, "detail": str(error)}})
        return 0
    report["rank"] = meeting.node_rank
    report["folder"] = folder(spec)
    _write(spec, meeting.node_rank, report)
    # its end, too, is said to node 0: who sees no folder has no other way
    report["meeting"], heard = meet(meeting, spec["token"], report)
    report["seconds"] = round(time.monotonic() - began, 1)
    _write(spec, meeting.node_rank, report | {"heard": heard})
    return 0


def python(spec: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Whether the training's python runs here, and what it has installed."""
    outer = set(spec["unset"])
    variables = {name: value for name, value in environ.items() if name not in outer} | spec["env"]
    variables |= {name: environ[source] for name, source in spec["env_names"].items() if source in environ}
    command = [*spec["python"], "-c", _PROBE % (PACKAGES,)]
    try:
        done = subprocess.run(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PYTHON_SECONDS,
        )
        line = next(line for line in done.stdout.splitlines() if line.startswith("pkuslurm "))
        version, machine, program, found = json.loads(line.removeprefix("pkuslurm "))
    except subprocess.TimeoutExpired:
        return {"ok": False, "detail": f"{command[0]}: it did not answer within {PYTHON_SECONDS:.0f} s"}
    except OSError as error:
        return {"ok": False, "detail": f"{command[0]}: {error.strerror or error}"}
    except (StopIteration, ValueError):
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return {"ok": False, "detail": f"{command[0]}: {words[-1] if words else f'it ended with {done.returncode}'}"}
    return {"ok": True, "detail": f"{version} {program} ({machine})", "packages": found}


def devices(accelerator: str, environ: Mapping[str, str], place: Path = Path("/dev")) -> dict[str, Any]:
    """How many devices this job sees: those that its environment names, else those that have a file here."""
    if accelerator not in _DEVICES:
        return {"count": None, "detail": "none are needed"}
    with suppress(OSError):
        files = sum(bool(re.fullmatch(_DEVICES[accelerator], name)) for name in os.listdir(place))
        named = environ.get(_VISIBLE[accelerator], "")
        if named:
            count = len([word for word in named.split(",") if word.strip()])
            return {"count": min(count, files), "detail": f"{_VISIBLE[accelerator]}={named}, {files} in {place}"}
        return {"count": files, "detail": f"{files} in {place}"}
    return {"count": 0, "detail": f"{place} cannot be read"}


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

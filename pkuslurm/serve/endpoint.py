"""Where the door listens, and the file that says so as long as it does."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import read_json
from pkuslurm.serve.spec import Spec
from pkuslurm.slurm import commands, parse
from pkuslurm.worker import network
from pkuslurm.worker.state import host_name, now

# an address that nobody has: the way to it is the default route's
_ANYWHERE = "192.0.2.1"
_LOOPBACK = "127.0.0.1"


def address(bind: str, environ: Mapping[str, str]) -> str:
    """The address to bind: loopback, or this node's on the way to the login node. Raises PkuslurmError."""
    if bind == "loopback":
        return _LOOPBACK
    for host in (environ.get("SLURM_SUBMIT_HOST"), _ANYWHERE):
        with suppress(PkuslurmError):
            found = network.address_towards(host) if host else None
            if found is not None and found != "0.0.0.0":
                return _LOOPBACK if network.is_loopback(found) else found
    submit = environ.get("SLURM_SUBMIT_HOST") or "not set"
    raise PkuslurmError(
        f"this node has no address in the cluster's network: neither a way to the login node (SLURM_SUBMIT_HOST is "
        f"{submit}) nor a default route"
    )


def ends(environ: Mapping[str, str], ask: Callable[..., str | None] = commands.ask) -> str | None:
    """When the job's time limit ends it, as Slurm says: in the environment, or, the older ones, when asked."""
    text = environ.get("SLURM_JOB_END_TIME", "")
    with suppress(ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(int(text)).astimezone().isoformat(timespec="seconds")
    job = environ.get("SLURM_JOB_ID", "")
    return parse.moment((ask("squeue", "-h", "-j", job, "-o", "%e") or "").strip()) if job.isdecimal() else None


def document(
    spec: Spec, host: str, port: int, environ: Mapping[str, str], chosen: Mapping[str, Any], checked: Mapping[str, Any]
) -> dict[str, Any]:
    """What is published; ``chosen``: by the engine of tuned; ``checked``: what was compared before."""
    attempt = environ.get("PKUSLURM_ATTEMPT", "")
    return {
        "base_url": f"http://{host}:{port}/v1",
        "host": host,
        "port": port,
        "models": list(spec.names),
        "engine": {"name": chosen.get("engine"), "version": chosen.get("version"), "dtype": chosen.get("dtype")},
        "started": now(),
        "ends": ends(environ),
        "idle_minutes": None if spec.idle_seconds is None else spec.idle_seconds / 60,
        "node": host_name(environ),
        "attempt": int(attempt) if attempt.isdecimal() else spec.job.first_attempt,
        "job_id": environ.get("PKUSLURM_JOB_ID"),
        **checked,
    }


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Whole or not at all, for this user's eyes. Raises PkuslurmError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # 0600
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(json.dumps(value, ensure_ascii=False, indent=1) + "\n")
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise PkuslurmError(f"{path}: cannot be written: {error.strerror or error}") from None


def remove(path: Path, value: Mapping[str, Any] | None) -> None:
    """Take ``value`` away again; a file that a later attempt has put there stays."""
    if value is not None and read_json(path) == dict(value):
        with suppress(OSError):
            path.unlink()

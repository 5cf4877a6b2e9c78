"""The run directory, made: every rendered file written, and run.json, by which the others know it."""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pkuslurm import __version__
from pkuslurm.config.schema import Setting
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import RunPlan
from pkuslurm.render.render import RunFiles
from pkuslurm.rundir import write_json, write_text

SCHEMA_VERSION = 1


def new_run_id(label: str) -> str:
    """YYYYMMDD-HHMMSS-<label>-<4 hex>; the label is made safe for a file name and a job name."""
    safe = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:60] or "run"
    return f"{datetime.now():%Y%m%d-%H%M%S}-{safe}-{secrets.token_hex(2)}"


def make_root(root: Path, mode: int) -> None:
    """The folder of runs; under umask 077 a group would not get to its run. Raises OSError."""
    if not root.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        if mode & 0o070:
            os.chmod(root, mode)


def create(plan: RunPlan, files: RunFiles, overrides: Sequence[str], settings: Sequence[Setting]) -> None:
    """Make the run directory and write all its files. Raises PkuslurmError, naming the path, where it cannot."""
    run = files.run
    mode = 0o750 if plan.config.access == "group" else 0o700
    try:
        make_root(run.path.parent, mode)
        run.path.mkdir(mode=mode)  # not exist_ok: two launches never share a directory
    except OSError as error:
        raise PkuslurmError(f"run_root={run.path.parent}: {error.filename or run.path}: {error.strerror}") from None
    try:
        for name in ("jobs", "logs", "state", "done", "results"):
            (run.path / name).mkdir(mode=mode)
            os.chmod(run.path / name, mode)  # whatever the umask
        os.chmod(run.path, mode)
        for name, text in files.texts.items():
            write_text(run.path / name, text)
        write_json(run.run_json, run_json(plan, files, overrides, settings))  # last: it makes the folder a run
    except OSError as error:
        shutil.rmtree(run.path, ignore_errors=True)  # half a run is no run
        raise PkuslurmError(f"run_root={run.path.parent}: {error.filename or run.path}: {error.strerror}") from None
    except KeyboardInterrupt:
        shutil.rmtree(run.path, ignore_errors=True)
        raise


def run_json(plan: RunPlan, files: RunFiles, overrides: Sequence[str], settings: Sequence[Setting]) -> dict[str, Any]:
    """What run.json says before anything is submitted."""
    config = plan.config
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": files.run.run_id,
        "sweep": files.run.path.parent.name if files.run.is_point else None,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "name": config.name,
        "overrides": list(overrides),
        "cwd": os.getcwd(),  # relative paths in the overrides start here
        "versions": versions(),
        "executor": config.cluster.executor,
        "host": socket.gethostname(),
        "launcher": None,
        "pipeline": list(plan.kinds),
        "settings": [
            {"key": item.key, "value": item.value, "default": item.default, "origin": item.origin} for item in settings
        ],
        "jobs": {
            job.kind: {
                "job_id": None,
                "key": files.jobs[job.kind]["key"],
                "first_attempt": 1,
                "parents": list(job.parents),
                "num_nodes": job.nodes,
            }
            for job in plan.jobs
        },
    }


@cache
def versions() -> dict[str, str]:
    found = {"pkuslurm": __version__, "python": platform.python_version(), "interpreter": sys.executable}
    for name in ("hydra-core", "omegaconf", "submitit", "llamafactory", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found

"""鹤思 (CraneSched), the scheduler of PKU's 超算: its commands may be called sbatch, squeue … and are not Slurm's."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path

from pkuslurm.slurm.environment import clean

SECONDS = 10.0

WORKS = (
    "this is 鹤思 (CraneSched), not Slurm: its sbatch takes Slurm's options only in part, and nothing was submitted. "
    "What works there: inside a job on one node (a script for cbatch, or crun -p PARTITION --gres=npu:2 --pty bash) "
    "python -m pkuslurm.launch cluster=local cluster.accelerator=npu …; inside a job on several nodes the same command "
    "on each of them: cluster=scow nodes=2 cluster.meet=/a/folder/that/all/see …; dry_run=true anywhere"
)


def is_crane() -> bool:
    """Whether jobs would go to CraneSched: sbatch is its wrapper, or there is only cbatch (sbatch may be an alias)."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return all(shutil.which(name) for name in ("cbatch", "ccancel"))
    return _wraps(sbatch, os.environ.get("PATH", ""))


def in_job(environ: Mapping[str, str]) -> bool:
    """Whether this is a node of one of its jobs. calloc's shell, which stays where it was typed, has an id only."""
    return bool(environ.get("CRANE_JOB_NODELIST"))


@cache
def _wraps(sbatch: str, path: str) -> bool:
    """``path``: $PATH, with which the answer may change."""
    file = Path(sbatch).resolve()
    if file.name in ("cwrapper", "cbatch"):
        return True
    with suppress(OSError), file.open("rb") as stream:
        head = stream.read(4096)
        if head.startswith(b"#!") and any(name in head for name in (b"cwrapper", b"cbatch")):
            return True
    if shutil.which("cbatch", path=path) is None:
        return False  # without it there is nothing to wrap, and on every Slurm one call less
    try:
        said = subprocess.run(
            [sbatch, "--version"],
            env=clean(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=False,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    return b"cranesched" in said.lower()  # Slurm says: slurm 23.11.4, slurm-wlm 22.05.8

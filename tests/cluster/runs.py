"""Runs on the test cluster: launched as a user, waited for, looked at."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.fixture import Cluster

# What makes a run small and quick, and keeps everything but the device.
TINY = ("cluster=ascend", "cluster.accelerator=cpu", "model=tiny", "nodes=2")
# The nodes share this machine's cores.
THREADS = {"OMP_NUM_THREADS": "1"}
# with more than two ranks DDP otherwise sums in another order after its first step, and a resumed training has two of
# those: the losses then differ in their last digits (1e-3 of 4), not the data nor the schedule
SAME_SUMS = ("train.ddp_find_unused_parameters=true", "train.use_reentrant_gc=false")
KINDS = ("prepare", "train", "merge", "infer", "report")
ALL = dict.fromkeys(KINDS, "COMPLETED")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "SKIPPED", "TIMEOUT", "NODE_FAIL")
Done = subprocess.CompletedProcess[str]


def standin(slurm: Cluster) -> str:
    """The stand-in for the python with LLaMA-Factory, where every user can run it."""
    program = slurm.shared("common") / "standin"
    text = f"#!{slurm.python}\n" + Path(__file__).with_name("standin.py").read_text(encoding="utf-8")
    if not program.exists() or program.read_text(encoding="utf-8") != text:  # a cluster may outlive an edit
        program.write_text(text, encoding="utf-8")
        program.chmod(0o755)
    return str(program)


def command(slurm: Cluster, *overrides: str, user: str = "pkalice") -> list[str]:
    """python -m pkuslurm.launch, with the stand-in, whose empty model must not lie where a real one is looked for."""
    apart = f"cache_root={slurm.shared(user)}/standin-cache"
    return [str(slurm.python), "-m", "pkuslurm.launch", f"cluster.python={standin(slurm)}", apart, *TINY, *overrides]


def launch(
    slurm: Cluster,
    *overrides: str,
    user: str = "pkalice",
    env: Mapping[str, str] | None = None,
    timeout: float | None = 120,
) -> Done:
    return slurm.run(user, command(slurm, *overrides, user=user), env=env, timeout=timeout)


def launched(slurm: Cluster, *overrides: str, user: str = "pkalice", env: Mapping[str, str] | None = None) -> Path:
    """The directory of a run whose launch went well."""
    done = launch(slurm, *overrides, user=user, env=env)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def verb(slurm: Cluster, *arguments: str | Path, user: str = "pkalice", env: Mapping[str, str] | None = None) -> Done:
    return slurm.run(user, [str(slurm.python), "-m", "pkuslurm", *map(str, arguments)], env=env)


def status(slurm: Cluster, run: Path, user: str = "pkalice") -> dict[str, Any]:
    done = verb(slurm, "status", run, "--json", user=user)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def states(found: Mapping[str, Any]) -> dict[str, str]:
    return {job["kind"]: job["state"] for job in found["jobs"]}


def job(found: Mapping[str, Any], kind: str) -> dict[str, Any]:
    one: dict[str, Any] = next(item for item in found["jobs"] if item["kind"] == kind)
    return one


def ended(slurm: Cluster, run: Path, user: str = "pkalice", seconds: float = 90) -> dict[str, Any]:
    """The run's status once all its jobs have ended."""
    return until(slurm, run, lambda found: all(job["state"] in ENDED for job in found["jobs"]), user, seconds)


def running(slurm: Cluster, run: Path, kind: str, user: str = "pkalice", seconds: float = 60) -> dict[str, Any]:
    """The status once the worker of ``kind`` has begun."""
    begun = run / "views"
    return until(
        slurm,
        run,
        lambda found: job(found, kind)["state"] == "RUNNING" and any(begun.glob(f"{kind}.*.json")),
        user,
        seconds,
    )


def until(slurm: Cluster, run: Path, wanted: Any, user: str, seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not wanted(found := status(slurm, run, user)):
        assert time.monotonic() < deadline, json.dumps(found, indent=1)
        time.sleep(0.5)
    return found


def views(run: Path, kind: str) -> list[dict[str, Any]]:
    """What each node's command saw of its environment, in rank order."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted((run / "views").glob(f"{kind}.*.json"))]


def queued(slurm: Cluster, user: str = "pkalice") -> list[str]:
    """Names of the user's jobs that wait or run."""
    return slurm.ask("squeue", "-h", "-u", user, "-o", "%j").split()


def jobs_of(run: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((run / "run.json").read_text(encoding="utf-8"))["jobs"]
    return found


def shim(slurm: Cluster, folder: Path, name: str, text: str) -> dict[str, str]:
    """PATH with a program of ours before Slurm's ``name``; $REAL is Slurm's."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    program = folder / name
    program.write_text(f"#!/bin/bash\nREAL={shutil.which(name)}\n{text}\n", encoding="utf-8")
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/local/bin:/usr/bin:/bin"}


def sent(slurm: Cluster, run: Path) -> list[str]:
    """Keys of all jobs that were ever submitted for ``run``."""
    lines = slurm.ask("squeue", "-h", "-t", "all", "-o", "%j").splitlines()
    return sorted(line.removeprefix(f"{run.name}-") for line in lines if line.startswith(run.name))


def all_complete(slurm: Cluster, run: Path) -> dict[str, Any]:
    """The status of a run whose jobs are all complete, each submitted exactly once."""
    found = ended(slurm, run)
    assert states(found) == ALL, found
    assert sent(slurm, run) == sorted(KINDS), "exactly one job each"
    return found

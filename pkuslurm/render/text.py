"""A dry run's text: the plan, each task's command and environment, every file whole. Pure, stable to the byte."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from pkuslurm.plan.plan import RunPlan
from pkuslurm.render.render import RunFiles

# Where a started task will find what only it can know.
_TAKEN_FROM = {
    "local": {
        "NODE_RANK": "0 … nodes-1, one process tree each on this machine",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "a free port, chosen when the job starts",
    },
    "slurm": {
        "NODE_RANK": "SLURM_PROCID",
        "MASTER_ADDR": "the first host of SLURM_STEP_NODELIST",
        "MASTER_PORT": "MASTER_PORT if set, else 10000 + SLURM_JOB_ID modulo 18000",
    },
    "meet": {
        "NODE_RANK": "RANK",
        "MASTER_ADDR": "MASTER_ADDR",
        "MASTER_PORT": "MASTER_PORT",
    },
}


def dry_run_text(plan: RunPlan, files: RunFiles, notes: Sequence[str]) -> str:
    """The whole dry run. Nothing was started, nothing was written."""
    return "\n".join([*_plan(plan), "", *_notes(notes), *_tasks(plan, files), *_files(files)]) + "\n"


def _plan(plan: RunPlan) -> Iterator[str]:
    config = plan.config
    yield f"# plan: executor {config.cluster.executor}, accelerator {config.cluster.accelerator}"
    for job in plan.jobs:
        after = f" after {', '.join(job.parents)}" if job.parents else ""
        ranks = f"{job.nodes} node{'s' if job.nodes > 1 else ''} × {job.nproc_per_node}"
        yield f"{job.kind:<8} {ranks:<12}{after}"
    asked = {
        key: getattr(config.cluster, key) for key in ("partition", "account", "qos", "gres", "gpus", "time", "mem")
    }
    sent = {key: value for key, value in asked.items() if value is not None}
    if config.cluster.executor == "slurm" and sent:
        yield "asks Slurm for: " + ", ".join(f"{key}={value}" for key, value in sent.items())
    if config.container.runtime != "none":
        yield f"container: {config.container.runtime}, image {config.container.image}"


def _notes(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield f"# note: {note}"
    if notes:
        yield ""


def _tasks(plan: RunPlan, files: RunFiles) -> Iterator[str]:
    taken = _TAKEN_FROM[plan.config.cluster.executor]
    for job in plan.jobs:
        described = files.jobs[job.kind]
        yield f"# job {job.kind}: {job.nodes} task{'s' if job.nodes > 1 else ''}, one a node"
        variables = dict(described["env"])
        if job.kind == "train":
            variables |= {"NNODES": str(job.nodes), "NPROC_PER_NODE": str(job.nproc_per_node)}
            for name, source in taken.items():
                yield f"{name} <- {source}"
        for name, value in variables.items():
            yield f"{name}={shlex.quote(value)}"
        # $NODE_RANK and its like are shown bare: a shell would fill them in as the worker does
        yield " ".join(token if token[1:] in taken else shlex.quote(token) for token in described["command"])
        yield ""


def _files(files: RunFiles) -> Iterator[str]:
    for name, text in files.texts.items():
        yield f"# file {name}"
        yield text

"""A dry run's text: the plan, each task's command and environment, every file whole. Pure, stable to the byte."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from pkuslurm.plan.plan import RunPlan
from pkuslurm.render.containers import as_shown
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
        "MASTER_ADDR": "the first host of SLURM_STEP_NODELIST, its address towards the others",
        "MASTER_PORT": "a free port of that host, chosen when the job starts",
    },
    "meet": {
        "NODE_RANK": "RANK or NODE_RANK where it is given, else 0 for the first to arrive",
        "MASTER_ADDR": "MASTER_ADDR where it is given, else node 0's XDL_IP, else its address towards the others",
        "MASTER_PORT": "MASTER_PORT where it is given and free, else a free port of node 0",
    },
}

# so many fit on a screen; a hundred points of a sweep can have a hundred that differ in a number
MOST_NOTES = 8


def dry_run_text(
    plan: RunPlan,
    files: RunFiles,
    notes: Sequence[str],
    facts: Sequence[tuple[str, str]] = (),
    scripts: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The whole dry run; ``scripts``: what sbatch would be given, by kind. Nothing was started, nothing was written."""
    parts = [*_plan(plan), *_facts(facts), "", *_notes(notes), *_tasks(plan, files), *_scripts(scripts), *_files(files)]
    return "\n".join(parts) + "\n"


def _plan(plan: RunPlan) -> Iterator[str]:
    config = plan.config
    yield f"# plan: executor {config.cluster.executor}, accelerator {config.cluster.accelerator}"
    for job in plan.jobs:
        after = f"after {', '.join(job.parents)}" if job.parents else ""
        ranks = f"{job.nodes} node{'s' if job.nodes > 1 else ''} × {job.nproc_per_node}"
        sent = ", ".join(f"{key}={value}" for key, value in job.request.options.items())
        asks = f"asks Slurm for {sent}" if config.cluster.executor == "slurm" and sent else ""
        yield f"{job.kind:<8} {ranks:<12} {'; '.join(filter(None, (after, asks)))}".rstrip()
    if config.container.runtime != "none":
        yield f"container: {config.container.runtime}, image {config.container.image}"


def _facts(facts: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in facts:
        yield f"{name:<8} {text}"


def labelled(note: str) -> str:
    """``note: …``, unless it is a warning."""
    return note if note.startswith("warning: ") else f"note: {note}"


def last_words(notes: Sequence[str]) -> Iterator[str]:
    """The notes once more, for the end of a terminal's screen: above them the plan has scrolled away."""
    if notes:
        yield f"this dry run has {len(notes)} note{'s' if len(notes) > 1 else ''}:"
    yield from (f"  {labelled(note)}" for note in notes[:MOST_NOTES])
    if len(notes) > MOST_NOTES:
        yield f"  and {len(notes) - MOST_NOTES} more, above"


def _scripts(scripts: Mapping[str, str]) -> Iterator[str]:
    for kind, text in scripts.items():
        yield f"# sbatch script {kind}"
        yield text


def _notes(notes: Sequence[str]) -> Iterator[str]:
    for note in notes:
        yield f"# {labelled(note)}"
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
        yield " ".join(token if token[1:] in taken else shlex.quote(token) for token in as_shown(described))
        yield ""


def _files(files: RunFiles) -> Iterator[str]:
    for name, text in files.texts.items():
        yield f"# file {name}"
        yield text

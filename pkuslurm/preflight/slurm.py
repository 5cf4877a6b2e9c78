"""What Slurm would let wait for ever, or refuse half way, found before anything is written. Asks, changes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from pkuslurm.config.schema import Cluster, Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import JobSpec, RunPlan
from pkuslurm.slurm import commands
from pkuslurm.slurm.environment import in_allocation
from pkuslurm.slurm.parse import Partition, minutes


def check_slurm(plan: RunPlan) -> None:
    """Raise PkuslurmError where this machine cannot submit, or a job asks for more than its partition allows."""
    if not commands.present():
        raise PkuslurmError(
            f"cluster.executor=slurm: there is no sbatch on this machine ({plan.config.cluster.executor} wants a login "
            "node of a Slurm cluster; perhaps `module load slurm`); dry_run=true works anywhere, cluster=local here"
        )
    if found := re.search(r"[%\\]", plan.config.run_root):
        raise PkuslurmError(
            f"run_root={plan.config.run_root}: Slurm takes {found[0]} in the names of logs for its own; choose another"
        )
    there = commands.partitions()
    if there is None:
        raise PkuslurmError("cluster.executor=slurm: the controller does not answer; try again later")
    for job in plan.jobs:
        check_limits(job, there, plan.config.cluster)


def check_limits(job: JobSpec, there: Sequence[Partition], cluster: Cluster) -> None:
    """With EnforcePartLimits=NO, Slurm's default, a request over the limit is taken and waits for ever. Pure."""
    options = job.request.options
    known = {partition.name: partition for partition in there}
    names = [name.strip() for name in str(options.get("partition", "")).split(",") if name.strip()]
    for name in names:
        if name not in known:
            listed = ", ".join(part.name + ("*" if part.default else "") for part in there)
            raise PkuslurmError(
                f"{_key(job, 'partition', cluster)}={name}: there is no such partition; there are {listed}"
            )
    chosen = [known[name] for name in names] or [part for part in there if part.default]
    problems = [problem for part in chosen if (problem := _over(job, part, cluster))]
    if chosen and len(problems) == len(chosen):
        raise PkuslurmError(problems[0])


def _over(job: JobSpec, part: Partition, cluster: Cluster) -> str | None:
    most = part.total_nodes if part.max_nodes is None else min(part.max_nodes, part.total_nodes or part.max_nodes)
    if most and job.nodes > most:
        return f"nodes={job.nodes}: partition {part.name} gives a job at most {most}"
    asked = job.request.options.get("time")
    wanted = None if asked is None else minutes(str(asked))
    if wanted is not None and part.max_minutes is not None and wanted > part.max_minutes:
        return f"{_key(job, 'time', cluster)}={asked}: partition {part.name} allows {part.max_minutes} minutes"
    if part.state != "UP":
        return f"{_key(job, 'partition', cluster)}={part.name}: the partition is {part.state}"
    return None


def _key(job: JobSpec, name: str, cluster: Cluster) -> str:
    own = name in cluster.jobs.get(job.kind, {})
    return f"cluster.jobs.{job.kind}.{name}" if own else f"cluster.{name}"


def check_login_node(config: Config, environ: Mapping[str, str]) -> None:
    """Nothing computes on a login node, where everybody works: raise PkuslurmError with the line to type instead."""
    if config.here or in_allocation(environ) or not commands.answers():
        return
    raise PkuslurmError(
        "cluster=local: this is a login node of a Slurm cluster, and the run would compute on it; write cluster=slurm "
        "(or ascend, nvidia), start it inside an allocation (salloc), or say here=true if you may"
    )

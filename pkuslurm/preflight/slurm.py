"""What Slurm would let wait for ever, or refuse half way, found before anything is written. Asks, changes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from pkuslurm.config import devices
from pkuslurm.config.schema import Cluster, Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.plan.plan import JobSpec, RunPlan
from pkuslurm.plan.resources import COMPUTING, cluster_for
from pkuslurm.slurm import commands, crane, site
from pkuslurm.slurm.environment import in_allocation
from pkuslurm.slurm.gres import Device
from pkuslurm.slurm.parse import Partition, minutes
from pkuslurm.slurm.site import Group

_ELSEWHERE = "dry_run=true works anywhere, cluster=local runs here"


def check_scheduler(executor: str) -> None:
    """Raise PkuslurmError where this machine cannot submit: before a model is fetched for jobs. Asks nobody."""
    if executor != "slurm":
        return
    if crane.is_crane():
        raise PkuslurmError(f"cluster.executor=slurm: {crane.WORKS}")
    if not commands.present():
        raise PkuslurmError(
            "cluster.executor=slurm: there is no sbatch on this machine (a login node of a Slurm cluster is wanted; "
            f"perhaps `module load slurm`); {_ELSEWHERE}"
        )


def check_configured(executor: str) -> None:
    """Raise PkuslurmError where Slurm is installed and belongs to no cluster. Asks Slurm, once."""
    if executor == "slurm" and not commands.configured():
        raise PkuslurmError(
            "cluster.executor=slurm: Slurm's commands are here and know of no cluster (no slurm.conf, no controller); "
            f"a login node of one is wanted, or SLURM_CONF=/path/to/slurm.conf; {_ELSEWHERE}"
        )


def check_slurm(plan: RunPlan) -> None:
    """Raise PkuslurmError where Slurm cannot be asked, or a job asks for more than its partition allows."""
    if found := re.search(r"[%\\]", plan.config.run_root):
        raise PkuslurmError(
            f"run_root={plan.config.run_root}: Slurm takes {found[0]} in the names of logs for its own; choose another"
        )
    check_scheduler(plan.config.cluster.executor)
    there = commands.partitions()
    if there is None:
        check_configured(plan.config.cluster.executor)
        raise PkuslurmError("cluster.executor=slurm: the controller does not answer; try again later")
    told = site.groups(commands.ask(*site.SINFO) or "")  # of a hidden partition nothing is known
    for job in plan.jobs:
        check_limits(job, there, plan.config.cluster)
        # in one allocation all jobs have the request of the largest
        nodes = max(one.nodes for one in plan.jobs) if plan.config.cluster.pack else job.nodes
        check_devices(replace(job, nodes=nodes), told, _names(job, there), cluster_for(plan.config, job.kind))


def check_limits(job: JobSpec, there: Sequence[Partition], cluster: Cluster) -> None:
    """With EnforcePartLimits=NO, Slurm's default, a request over the limit is taken and waits for ever. Pure."""
    known = {partition.name: partition for partition in there}
    names = _names(job, there)
    for name in names:
        if name not in known:
            listed = ", ".join(part.name + ("*" if part.default else "") for part in there)
            raise PkuslurmError(
                f"{_key(job, 'partition', cluster)}={name}: there is no such partition; there are {listed}"
            )
    chosen = [known[name] for name in names]
    problems = [problem for part in chosen if (problem := _over(job, part, cluster))]
    if chosen and len(problems) == len(chosen):
        raise PkuslurmError(problems[0])


def _names(job: JobSpec, there: Sequence[Partition]) -> list[str]:
    """The partitions that the job may go to: those that are named, else the default one."""
    named = [name.strip() for name in str(job.request.options.get("partition", "")).split(",") if name.strip()]
    return named or [part.name for part in there if part.default]


def check_devices(job: JobSpec, nodes: Sequence[Group], partitions: Sequence[str], cluster: Cluster) -> None:
    """Raise PkuslurmError for devices that no node of its partitions has, or that the job forgot to ask for. Pure.

    ``cluster`` is the one that the job sees (cluster_for).
    """
    options = job.request.options
    asked = [one for one in devices.asked(options, job.nodes) if one.accelerator]
    option = next((name for name in ("gres", "gpus_per_node", "gpus") if options.get(name)), "gres")
    problems = []
    for name in partitions:
        groups = [group for group in nodes if group.partition == name]
        missing = next((one for one in asked if not any(_has(group, one) for group in groups)), None)
        if not groups or (missing is None and (asked or not _forgotten(job, groups, cluster))):
            return
        there = ", ".join(dict.fromkeys(" and ".join(map(str, group.devices)) or "no devices" for group in groups))
        if missing is not None:
            key = _key(job, option, cluster)
            wrong = f"{key}={options[option]}: no node of partition {name} has {missing}; they have {there}"
        else:
            key, gres = _key(job, "accelerator", cluster), _key(job, "gres", cluster)
            wrong = (
                f"{key}={cluster.accelerator}: the {job.kind} job asks for no device, so Slurm gives it none; "
                f"the nodes of partition {name} have {there}; write {gres}=…"
            )
        problems.append(wrong)
    if problems:
        raise PkuslurmError(problems[0])


def _has(group: Group, wanted: Device) -> bool:
    """Whether a node of ``group`` has so many; a request without a type takes any."""
    same = [one for one in group.devices if one.name == wanted.name]
    if wanted.type:
        same = [one for one in same if one.type.lower() == wanted.type.lower()]
    return sum(one.count for one in same) >= wanted.count


def _forgotten(job: JobSpec, groups: Sequence[Group], cluster: Cluster) -> bool:
    """Whether Slurm gives devices out here and the job, which computes on some, asks for none.

    Where sinfo shows none a node comes with its devices; a whole node (exclusive) does, too.
    """
    if job.kind not in COMPUTING or cluster.accelerator == "cpu":
        return False
    if devices.elsewhere(job.request.options) or job.request.options.get("exclusive") is True:
        return False
    return all(any(one.accelerator for one in group.devices) for group in groups)


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
    if config.here or in_allocation(environ) or crane.in_job(environ):
        return
    if crane.is_crane():
        raise PkuslurmError(
            f"cluster.executor={config.cluster.executor}: not in a job, so that the run would compute on a login node "
            f"(here=true if you may); {crane.WORKS}"
        )
    if not commands.answers():
        return
    raise PkuslurmError(
        "cluster=local: this is a login node of a Slurm cluster, and the run would compute on it; write cluster=slurm "
        "(or ascend, nvidia), start it inside an allocation (salloc), or say here=true if you may"
    )


def site_notes(config: Config) -> list[str]:
    """What is said while nothing of the site is named, as on the first run there."""
    cluster = config.cluster
    named = (cluster.partition, cluster.account, cluster.qos, cluster.time)
    if cluster.executor != "slurm" or any(value is not None for value in named):
        return []
    return [
        "the site's defaults hold: cluster.partition, cluster.account, cluster.qos and cluster.time are not set; "
        f"{command('doctor', '--preset', 'NAME')} writes a preset from what this cluster says"
    ]

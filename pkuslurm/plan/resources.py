"""What each kind of job asks Slurm for. Pure: the configuration in, sbatch's options out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from pkuslurm.config import devices
from pkuslurm.config.schema import Cluster, Config

# Devices and what comes with them: only for the jobs that compute on them. A site that demands devices of every job
# gives them to one kind by cluster.jobs.<kind>.gres.
DEVICES = ("gres", "gpus", "gpus_per_node")
COMPUTING = ("train", "infer", "serve")
# These name or take whole nodes: meant for the job that spans them.
WHOLE_NODES = ("nodelist", "exclusive")
OPTIONS = (
    *("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "mem", "cpus_per_task"),
    *("exclusive", "time", "gres", "gpus", "gpus_per_node"),
)


@dataclass(frozen=True)
class Request:
    """sbatch's long options by name, in underscores; ``setup``: shell lines before the job's command."""

    options: dict[str, Any]
    setup: tuple[str, ...] = ()


def cluster_for(config: Config, kind: str) -> Cluster:
    """The cluster as job ``kind`` sees it: cluster.jobs.<kind> over cluster, without what only others need."""
    cluster, own = config.cluster, dict(config.cluster.jobs.get(kind, {}))
    plain: dict[str, Any] = {}
    plain |= {} if kind in COMPUTING else dict.fromkeys(DEVICES)
    plain |= {} if kind == "train" else dict.fromkeys(WHOLE_NODES)
    if kind not in COMPUTING and not any(own.get(name) for name in DEVICES):
        plain["accelerator"] = "cpu"  # no device was asked for: none may be touched, not even to be counted
    env = {**cluster.env, **own.pop("env", {})}
    return _with_ranks(replace(cluster, **(plain | own), env=env), config.nodes if kind == "train" else 1)


def _with_ranks(cluster: Cluster, nodes: int) -> Cluster:
    """Where the ranks are not counted, one for each device that a node is asked for."""
    if cluster.nproc_per_node is not None or cluster.executor != "slurm":
        return cluster
    named = [one for one in devices.asked(vars(cluster), nodes) if one.accelerator]
    return replace(cluster, nproc_per_node=max((one.count for one in named), default=None))


def request(config: Config, kind: str) -> Request:
    cluster = cluster_for(config, kind)
    options = {name: getattr(cluster, name) for name in OPTIONS}
    asked = {name: value for name, value in options.items() if value is not None and value is not False}
    asked |= {str(name).replace("-", "_"): value for name, value in cluster.extra.items() if value is not None}
    return Request(asked, tuple(cluster.setup))

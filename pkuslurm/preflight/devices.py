"""Whether this machine has the devices that a run on it computes on. Reads file names; no driver is asked."""

from __future__ import annotations

from collections.abc import Mapping

from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.resources import COMPUTING, cluster_for
from pkuslurm.worker import devices
from pkuslurm.worker.accelerators import ACCELERATORS

# What PKU's platform sets in an application or a training job.
CARDS = "VC_GPU_NUM"


def check_devices_here(config: Config, environ: Mapping[str, str]) -> None:
    """Raise PkuslurmError where the run trains or answers on this machine, on devices that it does not have.

    Where a variable names devices, or the platform counts them, those who set it know better than file names.
    """
    if config.cluster.executor == "slurm" or environ.get(CARDS, "").strip("0"):
        return
    for kind in (kind for kind in config.pipeline.jobs if kind in COMPUTING):
        cluster = cluster_for(config, kind)
        row = ACCELERATORS[cluster.accelerator]
        named = any(values.get(row.visible) for values in (environ, cluster.env))
        if not row.visible or named or devices.count_files(cluster.accelerator):
            continue
        own = "accelerator" in config.cluster.jobs.get(kind, {})
        key = f"cluster.jobs.{kind}.accelerator" if own else "cluster.accelerator"
        raise PkuslurmError(
            f"{key}={cluster.accelerator}: this machine has no such device (none in /dev), and the {kind} job would "
            f"run here; write {key}=cpu, start it where the devices are, or choose a cluster with Slurm"
        )

"""What the configuration takes and nothing does yet, or that does nothing here: said by name, never ignored. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pkuslurm.config.schema import Config
from pkuslurm.config.unrunnable import cannot_run
from pkuslurm.errors import PkuslurmError

# What only nodes without a scheduler, that look for each other, can use.
MEETING = ("cluster.meet", "cluster.join_timeout")
# What only a scheduler can use.
SCHEDULER = {
    *("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "mem", "exclusive", "time"),
    *("gres", "gpus", "gpus_per_node", "extra", "jobs", "arrays", "pack", "poll_seconds", "devices_step"),
}


def check_built(config: Config, changed: Sequence[str], typed: Sequence[str]) -> None:
    """Raise PkuslurmError for what would be ignored; ``changed``: keys that differ, ``typed``: on the command line."""
    executor, accelerator = config.cluster.executor, config.cluster.accelerator
    if not config.dry_run and (why := cannot_run(config)) is not None:
        raise PkuslurmError(f"{why}; dry_run=true shows its files")
    if executor == "local" and accelerator != "cpu" and config.nodes > 1:
        raise PkuslurmError(
            f"nodes={config.nodes}: on cluster=local all nodes are this machine, whose {accelerator} devices one node "
            "takes; write nodes=1 (all its devices work), or cluster=scow on several machines"
        )
    useless = [key for key in typed if key.startswith("cluster.") and key.split(".")[1] in SCHEDULER]
    if executor != "slurm" and useless:
        name = "local" if executor == "local" else "scow"
        raise PkuslurmError(f"{useless[0]}: cluster={name} asks no scheduler; leave it out, or choose another cluster")
    lonely = [key for key in changed if key in MEETING]
    if executor != "meet" and lonely:
        raise PkuslurmError(f"{lonely[0]}: only the nodes of cluster=scow look for each other; leave it out")
    for key, value in (("infer.base", config.infer.base), ("infer.adapter", config.infer.adapter)):
        if value is not None and config.pipeline.jobs[0] != "infer":
            raise PkuslurmError(f"{key}: only pipeline=infer takes one; a run compares the model that it tunes")
    if config.model.adapter is not None and not {"train", "merge"} & set(config.pipeline.jobs):
        raise PkuslurmError("model.adapter: training goes on from it, or pipeline=merge merges it; write infer.adapter")
    if executor != "slurm" and config.wait is False:
        which = "a local run" if executor == "local" else "a run of cluster=scow"
        raise PkuslurmError(f"wait=false: {which} works in the foreground; use nohup or tmux to leave it alone")

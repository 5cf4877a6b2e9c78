"""What the configuration takes and nothing does yet, or that does nothing here: said by name, never ignored. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError

# Accepted by the configuration, not built yet: whoever sets one is told.
NOT_YET = ("cluster.meet", "cluster.join_timeout")
# What only a scheduler can use.
SCHEDULER = {
    *("partition", "account", "qos", "reservation", "constraint", "nodelist", "exclude", "mem", "exclusive", "time"),
    *("gres", "gpus", "gpus_per_node", "extra", "jobs", "arrays", "pack", "poll_seconds", "devices_step"),
}


def check_built(config: Config, changed: Sequence[str], typed: Sequence[str]) -> None:
    """Raise PkuslurmError for what would be ignored; ``changed``: keys that differ, ``typed``: on the command line."""
    here, accelerator = config.cluster.executor == "local", config.cluster.accelerator
    never = {"from_yaml": config.from_yaml is not None}
    planned = {key: True for key in changed if key.startswith(NOT_YET)} | {
        "cluster.executor=meet": config.cluster.executor == "meet",
        f"cluster.accelerator={accelerator} without Slurm": here and accelerator != "cpu",
        "cluster.setup without Slurm": here and bool(config.cluster.setup),
    }
    for name, asked in (never if config.dry_run else never | planned).items():
        if asked:
            hint = "" if name in never else "; dry_run=true shows the plan and the files"
            raise PkuslurmError(f"{name}: not yet built{hint}")
    useless = [key for key in typed if key.startswith("cluster.") and key.split(".")[1] in SCHEDULER]
    if config.cluster.executor == "local" and useless:
        raise PkuslurmError(f"{useless[0]}: cluster=local asks no scheduler; leave it out, or choose another cluster")
    for key, value in (("infer.base", config.infer.base), ("infer.adapter", config.infer.adapter)):
        if value is not None and config.pipeline.jobs[0] != "infer":
            raise PkuslurmError(f"{key}: only pipeline=infer takes one; a run compares the model that it tunes")
    if config.cluster.executor == "local" and config.wait is False:
        raise PkuslurmError("wait=false: a local run works in the foreground; use nohup or tmux to leave it alone")

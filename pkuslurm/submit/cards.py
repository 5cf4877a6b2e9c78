"""How many devices of this machine a run takes, where no scheduler says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pkuslurm.config.schema import Config
from pkuslurm.preflight.devices import CARDS
from pkuslurm.worker import devices


def counted(config: Config, environ: Mapping[str, str]) -> Config:
    """``config`` with the ranks of a node: what was typed, else one for each card of this machine."""
    ranks = config.cluster.nproc_per_node or _cards(config, environ)
    return replace(config, cluster=replace(config.cluster, nproc_per_node=ranks))


def _cards(config: Config, environ: Mapping[str, str]) -> int | None:
    """Those that a variable names, else the application's, else those there; None: there are none, or nobody needs
    them."""
    if config.cluster.accelerator == "cpu" or config.cluster.executor == "slurm":
        return None
    named = devices.find(config.cluster.accelerator, environ, lambda: None, "").names
    if named is not None:
        return len(named) or None
    told = environ.get(CARDS, "") if config.cluster.executor == "meet" else ""
    if told.isascii() and told.isdecimal() and int(told) > 0:
        return int(told)
    return devices.count_files(config.cluster.accelerator) or None

"""What a cluster is asked for: Slurm's forms, the options and variables that a run sets itself. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from pkuslurm.config.parse import show
from pkuslurm.config.schema import Cluster
from pkuslurm.errors import PkuslurmError

TIME = re.compile(
    r"\d+|\d+:[0-5]?\d|\d+:[0-5]?\d:[0-5]?\d|\d+-\d+(:[0-5]?\d(:[0-5]?\d)?)?|UNLIMITED|INFINITE", re.IGNORECASE
)
TIME_FORMS = "minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S"
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
DEVICES = re.compile(r"[\w./-]+(:[\w./-]+)*(,[\w./-]+(:[\w./-]+)*)*")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# sbatch's options that a run decides itself, and what to say instead.
OWNED_OPTIONS = {
    "job-name": "name (a run's jobs are named after it)",
    "output": "nothing: a run's logs are in its directory",
    "error": "nothing: a run's logs are in its directory",
    "input": "nothing: a job reads no input",
    "open-mode": "nothing: each attempt of a job appends to its logs",
    "dependency": "pipeline (its jobs wait for each other)",
    "kill-on-invalid-dep": "nothing: what can never start is cancelled",
    "array": "-m a=1,2 (a sweep) and cluster.array_parallelism",
    "nodes": "nodes",
    "ntasks": "nodes and cluster.nproc_per_node",
    "ntasks-per-node": "cluster.nproc_per_node",
    "ntasks-per-gpu": "cluster.nproc_per_node",
    "signal": "resume.signal_seconds",
    "requeue": "resume.max_attempts",
    "no-requeue": "resume.max_attempts=1",
    "chdir": "run_root",
    "wrap": "cluster.setup (shell lines before a job's command)",
    "export": "cluster.env",
    "export-file": "cluster.env",
    "wait": "wait",
    "hold": "nothing: hold a job by scontrol hold once it is submitted",
    "test-only": "dry_run",
    "parsable": "nothing: launch reads the job's id itself",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "reservation": "cluster.reservation",
    "constraint": "cluster.constraint",
    "nodelist": "cluster.nodelist",
    "exclude": "cluster.exclude",
    "mem": "cluster.mem",
    "cpus-per-task": "cluster.cpus_per_task",
    "exclusive": "cluster.exclusive",
    "time": "cluster.time",
    "gres": "cluster.gres",
    "gpus": "cluster.gpus",
    "gpus-per-node": "cluster.gpus_per_node",
}
SHORT_OPTIONS = {
    **{"J": "job-name", "o": "output", "e": "error", "i": "input", "d": "dependency", "a": "array", "N": "nodes"},
    **{"n": "ntasks", "D": "chdir", "W": "wait", "H": "hold", "p": "partition", "A": "account", "q": "qos"},
    **{"C": "constraint", "w": "nodelist", "x": "exclude", "c": "cpus-per-task", "t": "time", "G": "gpus"},
}
# Variables that a job sets itself: where its nodes meet, which rank each is.
OWNED_VARIABLES = (
    *("NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    *("NNODES", "NPROC_PER_NODE", "FORCE_TORCHRUN"),
)
OWNED_PREFIXES = ("SLURM_", "SBATCH_", "SRUN_", "PKUSLURM_", "TORCHELASTIC_")


def check_cluster(cluster: Cluster) -> None:
    """Raise PkuslurmError for the first value that no scheduler, and no job, could use."""
    _check("cluster", vars(cluster))
    for kind, values in cluster.jobs.items():
        _check(f"cluster.jobs.{kind}", values)


def _check(prefix: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value is not None and name in CHECKS:
            CHECKS[name](f"{prefix}.{name}", value)


def at_least(key: str, value: float | None, least: int) -> None:
    if value is not None and not least <= value < math.inf:
        raise PkuslurmError(f"{key}={value}: it must be {least} or more")


def positive(key: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise PkuslurmError(f"{key}={value}: it must be more than 0")


def _count(key: str, value: Any) -> None:
    at_least(key, value, 1)


def _form(pattern: re.Pattern[str], what: str) -> Callable[[str, Any], None]:
    def check(key: str, value: Any) -> None:
        if not pattern.fullmatch(str(value)):
            raise PkuslurmError(f"{key}={show(value)}: it must be {what}")

    return check


def _time(key: str, value: Any) -> None:
    if not TIME.fullmatch(str(value)):
        raise PkuslurmError(f"{key}={show(value)}: it must be one of Slurm's forms: {TIME_FORMS}")
    if not re.search(r"[1-9A-Za-z]", str(value)):
        raise PkuslurmError(f"{key}={show(value)}: it must be more than 0; null leaves it to the partition")


def _word(key: str, value: Any) -> None:
    if isinstance(value, str) and re.search(r"\s", value.strip("\n")):
        raise PkuslurmError(f"{key}={show(value)}: it must be one word, without spaces; several are joined by commas")


def _extra(key: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        bare = str(name).strip("-")
        option = SHORT_OPTIONS.get(bare, bare.replace("_", "-"))
        if option in OWNED_OPTIONS:
            raise PkuslurmError(f"{key}.{name}: a run sets this itself; say it with {OWNED_OPTIONS[option]}")
        if isinstance(value, Mapping | list) or "\n" in str(value):
            raise PkuslurmError(f"{key}.{name}={show(value)}: an option of sbatch takes one value (true: none)")


def _env(key: str, variables: Mapping[str, Any]) -> None:
    for name, value in variables.items():
        if not VARIABLE.fullmatch(name):
            raise PkuslurmError(f"{key}.{show(name)}: not a variable's name; letters, digits and _ make one")
        if name in OWNED_VARIABLES or name.startswith(OWNED_PREFIXES):
            raise PkuslurmError(f"{key}.{name}: every job sets this itself; nodes, cluster.nproc_per_node decide it")
        if value is None:
            raise PkuslurmError(f"{key}.{name}=null: a variable holds text; ~{key}.{name} leaves it out")
        if isinstance(value, Mapping | list) or "\0" in str(value):
            raise PkuslurmError(f"{key}.{name}={show(value)}: a variable holds text; quote it as one value")


def _exclusive(key: str, value: Any) -> None:
    if value not in (True, False, "user", "mcs", "topo"):
        raise PkuslurmError(f"{key}={show(value)}: it must be true, false, user, mcs or topo")


CHECKS: Mapping[str, Callable[[str, Any], None]] = {
    "nproc_per_node": _count,
    "devices_step": _count,
    "cpus_per_task": _count,
    "array_parallelism": _count,
    "poll_seconds": positive,
    "join_timeout": positive,
    "time": _time,
    "mem": _form(MEMORY, "a number of MB, or with K, M, G or T, such as 64G"),
    "gres": _form(DEVICES, "Slurm's name[:type]:count, such as gpu:2"),
    "gpus": _form(DEVICES, "Slurm's [type:]count, such as 2 or a100:2"),
    "gpus_per_node": _form(DEVICES, "Slurm's [type:]count, such as 2 or a100:2"),
    "partition": _word,
    "account": _word,
    "qos": _word,
    "reservation": _word,
    "constraint": _word,
    "nodelist": _word,
    "exclude": _word,
    "exclusive": _exclusive,
    "extra": _extra,
    "env": _env,
}

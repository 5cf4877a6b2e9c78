"""What a cluster says of itself: partitions, nodes, accounts, limits. ``ask`` is the only function that asks."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from pkuslurm.slurm import commands
from pkuslurm.slurm.gres import Device, devices
from pkuslurm.slurm.parse import minutes, whole


@dataclass(frozen=True)
class Group:
    """Nodes of one partition that are alike. ``memory`` is in MB."""

    partition: str
    nodes: int
    cpus: int
    memory: int
    devices: tuple[Device, ...]


@dataclass(frozen=True)
class Partition:
    """``max_minutes``, ``default_minutes``, ``cpu_memory``: None where there is no limit, no default."""

    name: str
    default: bool
    up: bool
    max_minutes: int | None
    default_minutes: int | None
    max_time: str
    cpu_memory: int | None
    accounts: tuple[str, ...]
    groups: tuple[Group, ...] = ()

    @property
    def nodes(self) -> int:
        return sum(group.nodes for group in self.groups)


@dataclass(frozen=True)
class Accounts:
    """What the user may charge. ``qos``: name → MaxWall in minutes (None: no limit); the ``default`` ones, if told."""

    names: tuple[str, ...] = ()
    default: str | None = None
    qos: dict[str, int | None] = field(default_factory=dict)
    default_qos: str | None = None


@dataclass(frozen=True)
class Site:
    """``memory``: whether memory is given out, so that a job had better ask for some. ``arrays``: MaxArraySize."""

    name: str
    version: str
    partitions: tuple[Partition, ...]
    accounts: Accounts | None = None
    memory: bool = False
    arrays: int | None = None


SINFO = ("sinfo", "-h", "-e", "-o", "%P|%D|%c|%m|%G")


def ask() -> Site | None:
    """This cluster; None where the controller does not answer."""
    shown = commands.ask("scontrol", "show", "partition", "-o")
    nodes, config = commands.ask(*SINFO), commands.ask("scontrol", "show", "config")
    if shown is None or nodes is None or config is None:
        return None
    return site(shown, nodes, config, _accounts())


def site(shown: str, nodes: str, config: str, accounts: Accounts | None) -> Site:
    """``scontrol show partition -o``, ``sinfo`` as SINFO asks, ``scontrol show config``. Pure."""
    values = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", config, re.MULTILINE))
    return Site(
        values.get("ClusterName", ""),
        values.get("SLURM_VERSION", ""),
        tuple(_partitions(shown, groups(nodes))),
        accounts,
        "MEMORY" in values.get("SelectTypeParameters", "").upper(),
        whole(values.get("MaxArraySize", "")),
    )


def groups(text: str) -> list[Group]:
    """The rows of SINFO."""
    found = []
    for line in text.splitlines():
        fields = [field.strip() for field in line.split("|", 4)]
        if len(fields) == 5:
            name, nodes, cpus, memory, gres = fields
            found.append(
                Group(name.removesuffix("*"), _number(nodes), _number(cpus), _number(memory), devices(gres)),
            )
    return found


def _number(word: str) -> int:
    """Of ``8``, or ``8+`` where nodes differ."""
    return whole(word.rstrip("+")) or 0


def _partitions(text: str, nodes: list[Group]) -> Iterator[Partition]:
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        if name := values.get("PartitionName"):
            allowed = values.get("AllowAccounts", "ALL")
            yield Partition(
                name,
                values.get("Default") == "YES",
                values.get("State", "UP") == "UP",
                minutes(values.get("MaxTime", "UNLIMITED")),
                minutes(values.get("DefaultTime", "NONE")),
                values.get("MaxTime", "UNLIMITED"),
                whole(values.get("MaxMemPerCPU", "")) or None,
                () if allowed == "ALL" else tuple(allowed.split(",")),
                tuple(group for group in nodes if group.partition == name),
            )


def _accounts() -> Accounts | None:
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return None
    associations = commands.ask(
        *("sacctmgr", "-n", "-P", "show", "assoc", f"user={user}", "format=account,partition,qos,defaultqos")
    )
    if not associations:
        return None
    default = commands.ask("sacctmgr", "-n", "-P", "show", "user", user, "format=defaultaccount") or ""
    return accounts(associations, default, commands.ask("sacctmgr", "-n", "-P", "show", "qos", "format=name,maxwall"))


def accounts(associations: str, default: str, qos: str | None) -> Accounts:
    """Rows ``account|partition|qos,…|defaultqos``, the default account, rows ``name|maxwall``. Pure."""
    rows = [line.split("|") for line in associations.splitlines() if line.count("|") == 3]
    walls = dict(line.split("|", 1) for line in (qos or "").splitlines() if "|" in line)
    own = dict.fromkeys(name for row in rows for name in row[2].split(",") if name)
    named = {row[3] for row in rows if row[3]}
    return Accounts(
        tuple(dict.fromkeys(row[0] for row in rows if row[0])),
        default.strip().splitlines()[0] if default.strip() else None,
        {name: minutes(walls.get(name, "")) for name in own},
        named.pop() if len(named) == 1 else None,
    )

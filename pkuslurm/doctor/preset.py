"""``doctor --preset NAME``: a preset from what sinfo, scontrol, sacctmgr say here, a reason in every line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import command
from pkuslurm.slurm import commands, crane, site
from pkuslurm.slurm.gres import Device
from pkuslurm.slurm.site import Accounts, Group, Partition, Site

# A job waits the longer, the longer it says that it takes; one that is cut off goes on by itself.
LONGEST = 24 * 60
# What a node's system keeps for itself.
SHARE = 0.9
# Enough for preparing data, for merging file by file, for a report.
SMALL_CPUS, SMALL_MEMORY = 4, 32000
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)$)[A-Za-z][\w./-]*", re.IGNORECASE)
_TRYING = re.compile(r"debug|test|short|interactive|dev\b", re.IGNORECASE)


def write(name: str, directory: Path | None, environ: Mapping[str, str]) -> Path:
    """Write the preset and return its file. Raises PkuslurmError, and leaves no file, where it cannot be one."""
    from pkuslurm.compose import compose
    from pkuslurm.paths import CONF

    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "auto":
        raise PkuslurmError(f"--preset {name}: a preset's name consists of letters, digits and . _ -")
    if (CONF / "cluster" / f"{name}.yaml").exists():
        raise PkuslurmError(f"--preset {name}: cluster={name} comes with pkuslurm; choose another name")
    if crane.is_crane():
        raise PkuslurmError(f"--preset {name}: {crane.WORKS}")
    if not commands.present():
        raise PkuslurmError(
            f"--preset {name}: there is no Slurm on this machine (no sbatch); ask on a login node of the cluster, "
            "perhaps after `module load slurm`"
        )
    if directory is None:
        if not environ.get("HOME"):
            raise PkuslurmError(f"--preset {name}: HOME is not set; name a folder with --config-dir DIR")
        directory = Path(environ["HOME"], ".config", "pkuslurm", "conf")
    file = directory.expanduser().absolute() / "cluster" / f"{name}.yaml"
    if file.exists():
        raise PkuslurmError(f"--preset {name}: {file} is there already; remove it first, or choose another name")
    there = site.ask()
    if there is None:
        raise PkuslurmError(f"--preset {name}: the controller does not answer; try again later")
    content = text(name, there, date.today().isoformat())
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as opened:
            opened.write(content)
    except OSError as error:
        raise PkuslurmError(f"--preset {name}: {error.filename or file}: {error.strerror}") from None
    try:
        compose([f"cluster={name}"], [directory])
    except PkuslurmError as error:
        with suppress(OSError):
            file.unlink()
        raise PkuslurmError(f"--preset {name}: what it would say here cannot be used: {error}") from None
    return file


def say(file: Path, name: str) -> None:
    """The file on stdout, what to do next on stderr."""
    print(file)
    print(f"next     read it, then: {command('doctor', f'cluster={name}')}", file=sys.stderr)


@dataclass(frozen=True)
class Choice:
    """Where the training goes: one kind of nodes of a partition, and which of their devices are asked for."""

    partition: Partition
    group: Group
    device: Device | None

    @property
    def accelerator(self) -> str:
        return (self.device.accelerator if self.device else None) or "cpu"


def text(name: str, there: Site, day: str) -> str:
    """The preset of the site. Pure. Raises PkuslurmError where no partition can be used."""
    chosen = choose(there)
    lines = [
        f"# cluster={name}: written on {day} by `pkuslurm doctor --preset` from what Slurm {there.version} said"
        + (f" (cluster {there.name})" if there.name else ""),
        f"# Change what you know better, then prove it: pkuslurm doctor cluster={name}",
        "#",
        "# partitions (scontrol show partition, sinfo; * is the default):",
        *(f"#   {_told(part)}" for part in there.partitions),
        "",
    ]
    rows = [*_first(chosen, there), *_accounts(chosen.partition, there.accounts), *_further(chosen, there)]
    wide = min(max(len(setting) for setting, why in rows if why), 46)
    lines += [f"{setting:<{wide}}  # {why}".rstrip() if why else setting for setting, why in rows]
    return "\n".join(lines) + "\n"


def choose(there: Site) -> Choice:
    """The partition with devices, the default one first; without any, the default one. Pure."""
    usable = [part for part in there.partitions if part.up and part.groups and _allowed(part, there.accounts)]
    if not usable:
        raise PkuslurmError("--preset: no partition of this cluster is up and yours; see scontrol show partition")
    found = [
        Choice(part, group, device)
        for part in usable
        for group in part.groups
        for device in group.devices
        if device.accelerator
    ]
    if not found:
        part = max(usable, key=lambda part: (part.default, part.nodes))
        return Choice(part, max(part.groups, key=lambda group: group.nodes), None)
    return max(
        found,
        key=lambda one: (
            one.partition.default,
            not _TRYING.search(one.partition.name),
            one.group.nodes * (one.device.count if one.device else 0),
        ),
    )


def for_cpus(there: Site, chosen: Choice) -> tuple[Partition, Group] | None:
    """Where jobs go that compute on no device: a partition of nodes without any, else one that is called so."""
    if chosen.device is None:
        return None
    others = [
        part
        for part in there.partitions
        if part != chosen.partition and part.up and part.groups and _allowed(part, there.accounts)
    ]
    bare = [part for part in others if not any(device.accelerator for g in part.groups for device in g.devices)]
    bare = bare or [part for part in others if "cpu" in part.name.lower()]
    if not bare:
        return None
    part = max(bare, key=lambda part: (not _TRYING.search(part.name), part.nodes))
    return part, max(part.groups, key=lambda group: group.nodes)


def _allowed(part: Partition, accounts: Accounts | None) -> bool:
    return not part.accounts or accounts is None or not accounts.names or bool({*part.accounts} & {*accounts.names})


def _told(part: Partition) -> str:
    nodes = "; ".join(
        f"{group.nodes} node{'s' if group.nodes > 1 else ''} × {group.cpus} cores, {group.memory} MB, "
        + (", ".join(str(device) for device in group.devices if device.accelerator) or "no devices")
        for group in part.groups
    )
    limit = "no time limit" if part.max_minutes is None else f"at most {part.max_time}"
    only = f", accounts {','.join(part.accounts)}" if part.accounts else ""
    return (
        f"{part.name}{'*' if part.default else ''}: {nodes or 'no nodes'}; {limit}{only}{'' if part.up else ', not up'}"
    )


Rows = Iterator[tuple[str, str]]


def _first(chosen: Choice, there: Site) -> Rows:
    part, device = chosen.partition, chosen.device
    yield "executor: slurm", ""
    alike = "" if len(part.groups) == 1 else f", most of {part.name}'s"
    if device is None:
        yield "accelerator: cpu", "no node has devices that sinfo (%G) tells of; npu or cuda if yours come unasked"
    else:
        yield f"accelerator: {chosen.accelerator}", f"nodes with {device}{alike} (sinfo %G)"
        yield f"nproc_per_node: {device.count}", "all devices of a node (sinfo %G)"
        kind = f"{device.name}:{device.type}" if device.type else device.name
        why = "the type is the nodes' own (sinfo %G)" if device.type else "this site names no types (sinfo %G)"
        yield f"gres: {kind}:${{cluster.nproc_per_node}}", why
        yield "# devices_step: 2", "a site may give devices in pairs only; Slurm does not tell"
    default = "the default one" if part.default else "the one with the most devices" if device else "the largest"
    yield f"partition: {_word(part.name)}", f"{default} (scontrol show partition)"
    yield from _sizes(chosen, there)
    yield from _time(part, there.accounts)


def _sizes(chosen: Choice, there: Site) -> Rows:
    group, device = chosen.group, chosen.device
    if group.cpus:
        since = ", since all its devices are asked for" if device else ""
        yield f"cpus_per_task: {group.cpus}", f"all cores of a node (sinfo %c){since}"
    if there.memory and group.memory:
        most = _memory(chosen.partition, group.memory * SHARE, group.cpus)
        told = "nine tenths of a node's (sinfo %m)" if most == int(group.memory * SHARE) else "MaxMemPerCPU × cores"
        yield f"mem: {most}M", f"{told}; memory is given out here (SelectTypeParameters)"
    elif not there.memory:
        yield "# mem: 64G", "this site does not give memory out (SelectTypeParameters)"
    if device is None:
        yield "# gres: npu:2", "if nodes have devices"


def _memory(part: Partition, wanted: float, cpus: int) -> int:
    """In MB; more than MaxMemPerCPU would take more cores."""
    return int(min(wanted, (part.cpu_memory or wanted) * max(cpus, 1)))


def _time(part: Partition, accounts: Accounts | None) -> Rows:
    why, most = _longest(part, accounts)
    default = part.default_minutes
    without = f"; without it {default} minutes (DefaultTime)" if default and default != part.max_minutes else ""
    yield f"time: {json.dumps(_clock(most))}", f"{why}{without}"


def _longest(part: Partition, accounts: Accounts | None) -> tuple[str, int]:
    wall = accounts.qos.get(accounts.default_qos) if accounts and accounts.default_qos else None
    limits = {f"MaxTime of {part.name}": part.max_minutes, "MaxWall of your QOS": wall, "a day": LONGEST}
    return min(((name, most) for name, most in limits.items() if most), key=lambda item: item[1])


def _clock(minutes: int) -> str:
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02}:{rest % 60:02}:00" if days else f"{rest // 60}:{rest % 60:02}:00"


def _accounts(part: Partition, accounts: Accounts | None) -> Rows:
    if accounts is None or not accounts.names:
        yield "# account: NAME", "sacctmgr tells of none that is yours"
        return
    names = [name for name in accounts.names if not part.accounts or name in part.accounts]
    own = accounts.default if accounts.default in names else None
    others = [name for name in names if name != own]
    if own is not None:
        also = f"; others: {', '.join(others)}" if others else ""
        yield f"account: {_word(own)}", f"your default one (sacctmgr show user){also}"
    else:
        yield f"account: {_word(others[0])}", f"yours (sacctmgr show assoc): {', '.join(others)}"
    if accounts.qos:
        limits = [name + (f" ({_clock(most)})" if most else "") for name, most in accounts.qos.items()]
        default = f"{accounts.default_qos} by default; " if accounts.default_qos else ""
        yield f"# qos: {_word(next(iter(accounts.qos)))}", f"{default}yours (sacctmgr show assoc): {', '.join(limits)}"


def _further(chosen: Choice, there: Site) -> Rows:
    if there.arrays is not None:
        yes = there.arrays > 1
        told = f"MaxArraySize is {there.arrays} (scontrol show config)"
        yield f"arrays: {json.dumps(yes)}", told
    yield "# python: /path/to/venv/bin/python", "the one that has LLaMA-Factory on the nodes, if not this one"
    yield '# setup: ["module load …"]', "shell lines before a job's command"
    yield from _jobs(chosen, there)


def _jobs(chosen: Choice, there: Site) -> Rows:
    device, group = chosen.device, chosen.group
    if device is None:
        return
    yield "jobs:", ""
    place = for_cpus(there, chosen)
    part, nodes = place or (chosen.partition, group)
    if place is None:
        why = "no partition is for CPUs alone; these jobs ask for no device"
    elif any(one.accelerator for one in nodes.devices):
        why = "called so; these jobs ask for no device"
    else:
        why = "its nodes have no devices (sinfo %G)"
    own = {"partition": _word(part.name)} if place else {}
    cpus = min(SMALL_CPUS, nodes.cpus or SMALL_CPUS)
    own |= {"cpus_per_task": str(cpus)}
    if there.memory and nodes.memory:
        own["mem"] = f"{_memory(part, min(SMALL_MEMORY, nodes.memory * SHARE), cpus)}M"
    longest = _longest(chosen.partition, there.accounts)[1]
    if place and part.max_minutes is not None and part.max_minutes < longest:
        own["time"] = json.dumps(_clock(part.max_minutes))
    for kind in ("prepare", "merge", "report"):
        yield f"  {kind}: {{{', '.join(f'{key}: {value}' for key, value in own.items())}}}", why
    kind = f"{device.name}:{device.type}" if device.type else device.name
    one = {"gres": f"{kind}:1"}
    one |= {"cpus_per_task": str(max(1, group.cpus // device.count))} if group.cpus else {}
    if there.memory and group.memory:
        share = _memory(chosen.partition, group.memory * SHARE / device.count, max(1, group.cpus // device.count))
        one["mem"] = f"{share}M"
    yield f"  infer: {{{', '.join(f'{key}: {value}' for key, value in one.items())}}}", "one device answers"


def _word(name: str) -> str:
    """As YAML takes it for text."""
    return name if _PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)

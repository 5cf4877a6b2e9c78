"""The daemons: how each is started, and how one knows that it answers."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
from collections.abc import Callable
from functools import partial

from tests.cluster import texts
from tests.cluster.layout import ClusterError, Layout
from tests.cluster.process import in_netns, kill_all, running, send, start, wait_for

# A node: its own host name and mounts. A fresh sysfs shows the node's own interfaces; the cgroups, which
# slurmd wants to see, come back into it. The empty resolv.conf spares every lookup 10 s of waiting.
NODE = """\
set -e
hostname "$1"
mkdir -p "$2/cgroup"
mount --rbind /sys/fs/cgroup "$2/cgroup"
mount -t sysfs sysfs /sys
mount --rbind "$2/cgroup" /sys/fs/cgroup
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/hostname" /etc/hostname
[ ! -e /etc/resolv.conf ] || mount --bind "$2/resolv.conf" /etc/resolv.conf
mount --bind "$3" /etc/slurm
exec slurmd -D -N "$1" -f /etc/slurm/slurm.conf
"""


def host() -> str:
    return socket.gethostname().split(".")[0]


def write_conf(layout: Layout) -> None:
    etc = layout.conf.parent
    layout.conf.write_text(texts.slurm_conf(layout, host()), encoding="utf-8")
    (etc / "gres.conf").write_text(texts.gres_conf(layout), encoding="utf-8")
    (etc / "cgroup.conf").write_text(texts.cgroup_conf(), encoding="utf-8")


def start_munged(layout: Layout) -> None:
    folder = layout.base / "munge"
    files = {name: f"--{name}-file={folder / name}" for name in ("key", "pid", "seed")}
    log = f"--log-file={folder / 'log'}"
    command = ["munged", "--foreground", f"--socket={folder / 'socket'}", log, *files.values()]
    start(command, layout.log("munged"), layout.pid("munged"), layout.base)


def start_mariadb(layout: Layout) -> None:
    cnf = layout.base / "mariadb" / "my.cnf"
    start(["mariadbd", f"--defaults-file={cnf}"], layout.log("mariadb"), layout.pid("mariadb"), layout.base)


def start_slurmdbd(layout: Layout) -> None:
    env = {"SLURM_CONF": str(layout.conf), "MYSQL_UNIX_PORT": str(layout.base / "mariadb" / "socket")}
    start(["slurmdbd", "-D"], layout.log("slurmdbd.out"), layout.pid("slurmdbd"), layout.base, env)
    wait_for(lambda: answers("sacctmgr", "-n", "show", "cluster", layout=layout), 60, "slurmdbd to answer")


def start_slurmctld(layout: Layout) -> None:
    command = ["slurmctld", "-D", "-f", str(layout.conf)]
    env = {"SLURM_CONF": str(layout.conf)}
    start(command, layout.log("slurmctld.out"), layout.pid("slurmctld"), layout.base, env)
    wait_for(lambda: answers("scontrol", "ping", layout=layout), 60, "slurmctld to answer")


def start_slurmd(layout: Layout, name: str) -> None:
    node = layout.node(name)
    command = [
        *("nsenter", f"--net=/run/netns/{layout.netns(name)}"),
        *("unshare", "--uts", "--mount", "--propagation", "slave"),
        *("sh", "-c", NODE, "node", name, str(node), str(layout.conf.parent)),
    ]
    start(command, layout.log(f"{name}.out"), layout.pid(name), layout.base)


def kill_node(layout: Layout, name: str) -> None:
    """As if its power were cut."""
    kill_all(in_netns(layout.netns(name)))


def daemons(layout: Layout) -> dict[str, Callable[[Layout], None]]:
    """Name → how it is started, in the order in which they need each other."""
    table: dict[str, Callable[[Layout], None]] = {"munged": start_munged}
    if (layout.base / "mariadb").exists():
        table |= {"mariadb": start_mariadb, "slurmdbd": start_slurmdbd}
    table |= {"slurmctld": start_slurmctld}
    return table | {name: partial(start_slurmd, name=name) for name in layout.names}


def missing(layout: Layout) -> list[str]:
    return [name for name in daemons(layout) if running(layout.pid(name)) is None]


def stop(layout: Layout, daemon: str, number: signal.Signals) -> None:
    """End a daemon by a signal; wait until it is gone."""
    send(layout.pid(daemon), number)
    wait_for(lambda: running(layout.pid(daemon)) is None, 30, f"{daemon} to end", every=0.02)


def call(*command: str, layout: Layout) -> subprocess.CompletedProcess[str]:
    """A Slurm command, as root."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SLURM_CONF": str(layout.conf), "LANG": "C.UTF-8"}
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )


def checked(*command: str, layout: Layout) -> str:
    ended = call(*command, layout=layout)
    if ended.returncode:
        raise ClusterError(f"{' '.join(command)}: {(ended.stderr or ended.stdout).strip()}")
    return ended.stdout


def answers(*command: str, layout: Layout) -> bool:
    return call(*command, layout=layout).returncode == 0


def node_states(layout: Layout) -> dict[str, str]:
    """Node → its state as sinfo says it (idle, mix, alloc, down*, …); empty while slurmctld does not answer."""
    lines = call("sinfo", "-h", "-N", "-p", "npu", "-o", "%N %T", layout=layout).stdout.splitlines()
    return dict(line.split() for line in lines)


def all_idle(layout: Layout) -> bool:
    return node_states(layout) == dict.fromkeys(layout.names, "idle")


def needed() -> list[str]:
    """Commands that Debian's packages bring and that are not here."""
    packages = {
        "munge": ("munged",),
        "slurm-wlm": ("slurmctld", "slurmd", "srun", "sbatch", "sinfo"),
        "slurmdbd": ("slurmdbd",),
        "mariadb-server": ("mariadbd", "mariadb-install-db"),
        "iproute2": ("ip",),
        "util-linux": ("nsenter", "unshare"),
        "passwd": ("useradd", "userdel"),
    }
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    return [package for package, names in packages.items() if not all(shutil.which(n, path=path) for n in names)]

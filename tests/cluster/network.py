"""One bridge, and for each node a network namespace with a veth pair: eth0 inside, pksNvM outside."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.layout import ClusterError, Layout, record
from tests.cluster.process import checked

NETNS = Path("/run/netns")


def ip(*arguments: str) -> str:
    return checked(["ip", *arguments])


def batch(commands: Sequence[str], netns: str | None = None) -> None:
    """Several ip commands in one process."""
    checked(["ip", *(["-n", netns] if netns else []), "-batch", "-"], "\n".join(commands) + "\n")


def free_number() -> int:
    """N such that nothing here uses 10.N.0.*, a bridge pksN or namespaces pksN-*."""
    known = ip("-4", "-o", "addr") + ip("-4", "route", "show", "table", "all") + ip("-o", "link") + ip("netns", "list")
    for number in range(77, 128):
        if not any(word in known for word in (f"10.{number}.0.", f"pks{number}")):
            return number
    raise ClusterError("10.77.0.0/24 to 10.127.0.0/24: none is free")


def make(layout: Layout) -> None:
    if not NETNS.exists():
        record(layout, "netns-folder", str(NETNS))
    record(layout, "link", layout.bridge)
    for name in layout.names:
        record(layout, "netns", layout.netns(name))
    for name in layout.names:  # after the namespaces, so that they go before them
        record(layout, "link", layout.veth(name))
    here = layout.host_address
    outside = [
        f"link add {layout.bridge} type bridge",
        f"addr add {here}/24 dev {layout.bridge}",
        f"link set {layout.bridge} up",
        # slurmdbd answers in two pieces, and each would wait 44 ms for a delayed ACK: sacctmgr 0.37 s, not 0.02 s
        f"route change table local local {here} dev {layout.bridge} proto kernel scope host src {here} quickack 1",
    ]
    for name in layout.names:
        netns, veth = layout.netns(name), layout.veth(name)
        outside += [
            f"netns add {netns}",
            f"link add {veth} type veth peer name eth0 netns {netns}",
            f"link set {veth} master {layout.bridge} up",
        ]
    batch(outside)
    for name in layout.names:
        inside = ["link set lo up", f"addr add {layout.address(name)}/24 dev eth0", "link set eth0 up"]
        batch(inside, layout.netns(name))


def link(layout: Layout, name: str, state: str) -> None:
    """Pull a node's cable (``down``) or put it back (``up``)."""
    ip("link", "set", layout.veth(name), state)


def delete_link(name: str) -> None:
    if Path("/sys/class/net", name).exists():
        ip("link", "del", name)


def delete_netns(name: str) -> None:
    """Its veth pair has gone before: the kernel takes a namespace's devices down some time after ``ip netns del``."""
    if (NETNS / name).exists():
        ip("netns", "del", name)


def delete_netns_folder(_: str) -> None:
    """``ip netns add`` makes /run/netns a mount of its own; somebody else may use it by now."""
    if NETNS.is_dir() and not any(NETNS.iterdir()):
        subprocess.run(["umount", str(NETNS)], stderr=subprocess.DEVNULL, check=False)
        NETNS.rmdir()

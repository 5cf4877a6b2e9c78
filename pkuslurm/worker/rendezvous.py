"""Which node this is and where the ranks of all nodes meet, from an environment mapping.

Pure, but for the free port of a job on one node.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from pkuslurm.errors import PkuslurmError
from pkuslurm.worker import hostlist, network


@dataclass(frozen=True)
class Rendezvous:
    """``node_rank`` in 0..nodes-1; ``hosts`` are all nodes in rank order if known beforehand, else ()."""

    node_rank: int
    nodes: int
    master_addr: str
    master_port: int
    source: str
    hosts: tuple[str, ...] = ()

    def variables(self) -> dict[str, str]:
        """What the command's environment and its ``$NODE_RANK``-like tokens are filled from."""
        return {
            "NODE_RANK": str(self.node_rank),
            "NNODES": str(self.nodes),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


# the variables that say which node this is; the first that is set decides
RANK_VARIABLES = ("NODE_RANK", "SLURM_PROCID", "RANK")


def own_rank(environ: Mapping[str, str]) -> int:
    """This node's rank, unchecked: for the state file that must be written even if nothing fits. Else 0."""
    for name in RANK_VARIABLES:
        if environ.get(name, "") != "":
            return int(environ[name]) if environ[name].isdecimal() else 0
    return 0


def rendezvous(environ: Mapping[str, str], nodes: int) -> Rendezvous:
    """The rendezvous of a job on ``nodes`` nodes.

    NODE_RANK (given by hand, or by the local executor) comes before Slurm's variables, and these before RANK
    (Kubernetes-style training jobs). Raises PkuslurmError, naming the variable and its value, for any misfit.
    """
    for name, derive in zip(RANK_VARIABLES, (_by_hand, _from_slurm, _from_rank), strict=True):
        if environ.get(name, "") != "":
            return derive(environ, nodes)
    if nodes > 1:
        raise PkuslurmError(
            f"NODE_RANK is not set: a job on {nodes} nodes needs NODE_RANK, MASTER_ADDR and MASTER_PORT, or "
            "Slurm's SLURM_PROCID and SLURM_STEP_NODELIST, or RANK, MASTER_ADDR and MASTER_PORT"
        )
    return _alone("a single node")


def _by_hand(environ: Mapping[str, str], nodes: int) -> Rendezvous:
    rank = _rank(environ, "NODE_RANK", nodes)
    if nodes == 1:
        return _alone("NODE_RANK")
    return Rendezvous(rank, nodes, _address(environ, nodes), _port(environ, nodes), "NODE_RANK")


def _from_rank(environ: Mapping[str, str], nodes: int) -> Rendezvous:
    # these jobs start one process a node, so that WORLD_SIZE counts nodes
    size = environ.get("WORLD_SIZE", "")
    if size != "" and size != str(nodes):
        raise PkuslurmError(f"WORLD_SIZE={size}: the job was planned for {nodes} node(s)")
    rank = _rank(environ, "RANK", nodes)
    if nodes == 1:
        return _alone("RANK")
    return Rendezvous(rank, nodes, _address(environ, nodes), _port(environ, nodes), "RANK")


def _from_slurm(environ: Mapping[str, str], nodes: int) -> Rendezvous:
    rank = _rank(environ, "SLURM_PROCID", nodes)
    if nodes == 1:
        return _alone("SLURM_PROCID")
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or str(nodes)
    if tasks != str(nodes):
        raise PkuslurmError(f"SLURM_NTASKS={tasks}: the job needs one task on each of {nodes} nodes")
    # node rank and master must come from one list: the step's, which can be a part of the job's
    for variable in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if environ.get(variable):
            break
    else:
        raise PkuslurmError(
            f"SLURM_PROCID={rank}, but SLURM_STEP_NODELIST is not set: start the worker with srun, one task a node"
        )
    hosts = hostlist.expand(environ[variable])
    if len(hosts) != nodes:
        raise PkuslurmError(
            f"{variable}={environ[variable]}: {len(hosts)} node(s), but the job was planned for {nodes}"
        )
    # not $HOSTNAME: in every task that is the batch host's
    here = environ.get("SLURMD_NODENAME", "")
    if here and hosts[rank] != here:
        raise PkuslurmError(
            f"SLURM_PROCID={rank} on {here}, but that place in {variable}={environ[variable]} is "
            f"{hosts[rank]}: leave out --distribution=arbitrary and start one task a node"
        )
    source = f"SLURM_PROCID and {variable}"
    # the job's script has asked the first node (head.py), whose bare name may lead itself to 127.0.1.1; a MASTER_ADDR
    # that some shell has left is not looked at
    if environ.get("PKUSLURM_MASTER"):
        address, _, _ = environ["PKUSLURM_MASTER"].rpartition(":")
        chosen = {"PKUSLURM_MASTER": environ["PKUSLURM_MASTER"].rpartition(":")[2]}
        return Rendezvous(rank, nodes, address, _number(chosen, "PKUSLURM_MASTER", 1, 65535), source, tuple(hosts))
    return Rendezvous(rank, nodes, hosts[0], _slurm_port(environ), source, tuple(hosts))


def _slurm_port(environ: Mapping[str, str]) -> int:
    """The one port that all nodes must come to by themselves, without talking to each other."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT", 1, 65535)
    job = _number(environ, "SLURM_JOB_ID", 1, 2**63)
    return network.FIRST_PORT + job % network.PORTS


def _alone(source: str) -> Rendezvous:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind(("127.0.0.1", 0))
        return Rendezvous(0, 1, "127.0.0.1", free.getsockname()[1], source)


def _rank(environ: Mapping[str, str], name: str, nodes: int) -> int:
    return _number(environ, name, 0, nodes - 1, f"the job was planned for {nodes} node(s)")


def _address(environ: Mapping[str, str], nodes: int) -> str:
    address = environ.get("MASTER_ADDR", "").strip()
    if not address:
        raise PkuslurmError(f"MASTER_ADDR is not set: a job on {nodes} nodes needs node 0's address")
    return address


def _port(environ: Mapping[str, str], nodes: int) -> int:
    if not environ.get("MASTER_PORT"):
        raise PkuslurmError(f"MASTER_PORT is not set: a job on {nodes} nodes needs a free port of node 0")
    return _number(environ, "MASTER_PORT", 1, 65535)


def _number(environ: Mapping[str, str], name: str, low: int, high: int, why: str = "") -> int:
    text = environ.get(name, "")
    if text.isascii() and text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise PkuslurmError(f"{name}={text}: must be a number from {low} to {high}" + (f"; {why}" if why else ""))

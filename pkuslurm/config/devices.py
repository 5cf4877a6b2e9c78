"""The devices that a job asks Slurm for: which, of what type, how many on a node. Pure.

``gres`` is counted a node, ``gpus_per_node`` too, ``gpus`` for the whole job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pkuslurm.config.parse import show
from pkuslurm.config.schema import Cluster
from pkuslurm.errors import PkuslurmError
from pkuslurm.slurm.gres import Device
from pkuslurm.slurm.gres import devices as parse

# Other ways of sbatch to ask for devices, in ``extra``: nothing is counted where one of them is used.
ELSEWHERE = ("gpus_per_task", "gpus_per_socket", "tres_per_task", "tres_per_job", "tres_per_node", "tres_per_socket")


def asked(values: Mapping[str, Any], nodes: int) -> tuple[Device, ...]:
    """What a cluster's ``values`` (gres, gpus, gpus_per_node) ask for on each of ``nodes`` nodes, devices or not."""
    whole = parse(str(values["gpus"]), "gpu") if values.get("gpus") else ()
    return (
        *(parse(str(values["gres"])) if values.get("gres") else ()),
        *(parse(str(values["gpus_per_node"]), "gpu") if values.get("gpus_per_node") else ()),
        *(Device(one.name, one.type, -(-one.count // nodes)) for one in whole),
    )


def elsewhere(names: Iterable[str]) -> bool:
    """Whether one of sbatch's options ``names`` asks for devices in a way that is not counted here."""
    return any(str(name).strip("-").replace("-", "_") in ELSEWHERE for name in names)


def of(accelerator: str, devices: Sequence[Device]) -> int:
    """How many of ``devices`` the accelerator can be."""
    return max((one.count for one in devices if one.accelerator == accelerator), default=0)


def check_devices(cluster: Cluster, kinds: Sequence[str], nodes: int) -> None:
    """Raise PkuslurmError where a job of ``kinds`` asks for devices that it cannot use, or that its site never gives.

    ``nodes`` are those of the training.
    """
    if cluster.executor != "slurm":
        return
    for kind in (kind for kind in ("train", "infer", "serve") if kind in kinds):
        own = dict(cluster.jobs.get(kind, {}))
        values = vars(cluster) | own
        wide = nodes if kind == "train" else 1
        devices = asked(values, wide)

        def key(name: str, own: Mapping[str, Any] = own, kind: str = kind) -> str:
            return f"cluster.jobs.{kind}.{name}" if name in own else f"cluster.{name}"

        ranks = values["nproc_per_node"] if kind == "train" else None
        option = next((name for name in ("gres", "gpus_per_node", "gpus") if values.get(name)), "gres")
        _step(values["devices_step"], ranks, devices, key("nproc_per_node"), key(option))
        _fits(values["accelerator"], devices, key("accelerator"))
        if ranks and devices and values["accelerator"] != "cpu" and not elsewhere(values["extra"]):
            _enough(values, ranks, devices, wide, key("nproc_per_node"))


def _step(step: int | None, ranks: int | None, devices: Sequence[Device], key: str, option: str) -> None:
    if step is None:
        return
    rule = f"this site gives devices in steps of {step} (cluster.devices_step): {step}, {2 * step}, {3 * step}, …"
    if ranks and ranks % step:
        raise PkuslurmError(f"{key}={ranks}: {rule}")
    odd = next((one for one in devices if one.accelerator and one.count % step), None)
    if odd is not None:
        raise PkuslurmError(f"{option}={odd}: {rule}")


def _fits(accelerator: str, devices: Sequence[Device], key: str) -> None:
    """``cpu`` with devices is meant: a rehearsal of everything but the computing."""
    known = [one for one in devices if one.accelerator]
    if accelerator == "cpu" or not known or any(one.accelerator == accelerator for one in known):
        return
    other = known[0].accelerator
    raise PkuslurmError(
        f"{key}={accelerator}: the job asks Slurm for {known[0]}, which {accelerator} cannot compute on; "
        f"write {key}={other}, or ask for others (cluster.gres, cluster.gpus, cluster.gpus_per_node)"
    )


def _enough(values: Mapping[str, Any], ranks: int, devices: Sequence[Device], nodes: int, key: str) -> None:
    there = of(values["accelerator"], devices)
    if not there or ranks <= there:
        return
    if values.get("gpus") and not values.get("gres"):
        raise PkuslurmError(
            f"cluster.gpus={show(values['gpus'])}: it counts all nodes' devices; {nodes} × {ranks} ranks need "
            f"cluster.gpus={nodes * ranks}"
        )
    asks = ", ".join(map(str, devices))
    raise PkuslurmError(f"{key}={ranks}: each rank computes on a device of its own, and a node is asked for {asks}")

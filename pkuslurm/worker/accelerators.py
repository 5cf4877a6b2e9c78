"""Accelerators as one table: what LLaMA-Factory is told, what a rank gets and must never see, how devices are named.

The one place where npu, cuda and cpu differ for a job; whoever writes job files reads it, and the worker on each node.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pkuslurm.errors import PkuslurmError


@dataclass(frozen=True)
class Accelerator:
    """``visible`` names this job's devices to torch. ``lists``: where a site's plugin for Slurm names them, best first;
    ``batch_lists``: of these the ones that srun carries on from the first node, true there only."""

    device: str  # torch's name
    backend: str  # of torch.distributed, which takes it by itself
    never: re.Pattern[str]  # another accelerator's variables, left over from a module or a shell
    yaml: Mapping[str, object] = field(default_factory=dict)  # further LLaMA-Factory keys
    env: Mapping[str, str] = field(default_factory=dict)  # of each job
    collective: Mapping[str, str] = field(default_factory=dict)  # of ranks that meet
    visible: str = ""
    lists: tuple[str, ...] = ()
    batch_lists: tuple[str, ...] = ()
    count: str = ""  # where a plugin says how many they are on a node, and no more
    gres: str = ""  # what Slurm calls it, name:type
    file: str = ""  # in /dev
    smi: str = ""  # what shows the cards
    address: str = ""  # the variable for the address over which the ranks talk
    interfaces: tuple[str, ...] = ("GLOO_SOCKET_IFNAME",)  # and for the interface's name
    # where cluster.launcher=auto; prefork only where the stages of training were seen to compute the same with it:
    # torch-npu documents spawn and forkserver, not fork, and on a GPU the two have not been compared
    launcher: str = "torchrun"


ACCELERATORS: Mapping[str, Accelerator] = {
    "cpu": Accelerator(
        device="cpu",
        backend="gloo",
        # where CANN lies stays: whoever finds torch-npu installed imports it, also to compute on the CPU
        never=re.compile(r"(NCCL|TORCH_NCCL|CUDA|HCCL)_|ASCEND_(?!\w*(HOME|PATH))"),
        yaml={"use_cpu": True},
        env={
            # a GPU or NPU that happens to be in the machine is not touched, not even to be counted
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # OpenMP's threads spin while they wait: beside another busy process that makes torch ten times slower
            "OMP_WAIT_POLICY": "PASSIVE",
        },
        launcher="prefork",
    ),
    "cuda": Accelerator(
        device="cuda",
        backend="nccl",
        never=re.compile(r"(HCCL|ASCEND)_"),
        visible="CUDA_VISIBLE_DEVICES",
        # the others count all of the node's, also where a job sees only its own, counted from 0
        lists=("GPU_DEVICE_ORDINAL", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"),
        batch_lists=("SLURM_JOB_GPUS",),
        count="SLURM_GPUS_ON_NODE",
        gres=r"(gpu|dcu)(:.*)?",
        file=r"nvidia\d+|kfd|dxg",
        smi="nvidia-smi",
        interfaces=("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
    ),
    "npu": Accelerator(
        device="npu",
        backend="hccl",
        never=re.compile(r"(NCCL|TORCH_NCCL|CUDA)_"),
        collective={"HCCL_WHITELIST_DISABLE": "1"},  # who may connect is the site's to say, not a list of addresses
        visible="ASCEND_RT_VISIBLE_DEVICES",
        lists=(
            *("ASCEND_VISIBLE_DEVICES", "NPU_DEVICE_ORDINAL", "SLURM_STEP_NPUS", "SLURM_JOB_NPUS"),
            *("GPU_DEVICE_ORDINAL", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"),  # a site that calls them gpu:Ascend910B
        ),
        batch_lists=("SLURM_JOB_NPUS", "SLURM_JOB_GPUS"),
        count="SLURM_NPUS_ON_NODE",
        gres=r"npu(:.*)?|gpu:.*(ascend|npu|910|310).*",
        file=r"davinci\d+",
        smi="npu-smi info",
        address="HCCL_IF_IP",
    ),
}

# Every job. The hubs are off: jobs read what is on disk, and a compute node without network would wait for time-outs.
COMMON_ENV = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUTF8": "1",  # Chinese in paths and logs under LANG=C
    "PYTHONUNBUFFERED": "1",
    "PYTHONSAFEPATH": "1",  # no module is taken from the current folder
}
# Left over from a shell or an enclosing job, each of these would change what ours computes or whom it meets.
UNSET = (
    "PYTHONDONTWRITEBYTECODE",  # without bytecode every rank compiles thousands of modules, twice the start-up
    "FORCE_TORCHRUN",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "RDZV_ID",
    "USE_RAY",
    "USE_MCA",
    "ALLOW_EXTRA_ARGS",
)

# A rank that waits must be given up by HCCL, which says why, before torch gives it up, which does not; and a connection
# that does not come about before a step that takes long.
CONNECT, EXEC, DDP = "HCCL_CONNECT_TIMEOUT", "HCCL_EXEC_TIMEOUT", "ddp_timeout"
CONNECT_SECONDS, EXEC_SECONDS, DDP_SECONDS = 600, 3600, 7200
_LEAST_CONNECT = 120  # HCCL takes no less

# Where nodes are shared, each job's HCCL listens on ports of its own: between the master's (10000 … 27999) and those
# that Linux hands out to clients (32768 …). HCCL takes up to 32 of them.
_BASE_PORT, _BASE_PORTS, _PORTS_OF_A_JOB = 28000, 148, 32


def without_foreign(environ: Mapping[str, str], accelerator: str | None) -> dict[str, str]:
    """``environ`` without what a rank on this accelerator must never see; all of it where none is named."""
    if accelerator is None:
        return dict(environ)
    never = ACCELERATORS[accelerator].never
    return {name: value for name, value in environ.items() if not never.match(name)}


def interfaces(accelerator: str | None, address: str, name: str | None) -> dict[str, str]:
    """What tells the ranks to talk over ``address``, which is that of the interface ``name``.

    Left to themselves gloo takes the address of the host's name (127.0.1.1 on Debian), NCCL and HCCL the first one.
    """
    rows: Iterable[Accelerator] = ACCELERATORS.values() if accelerator is None else [ACCELERATORS[accelerator]]
    found: dict[str, str] = {}
    for row in rows:
        found |= {row.address: address} if row.address else {}
        # NCCL takes a name for the beginning of one (eth1 also for eth10), unless = is before it; gloo knows no =
        found |= {key: f"={name}" if key.startswith("NCCL") else name for key in row.interfaces if name is not None}
    return found


def base_port(environ: Mapping[str, str]) -> dict[str, str]:
    """HCCL's first port for this Slurm job, the same on all its nodes; another one after a requeue. Else nothing."""
    job, restarts = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_RESTART_COUNT") or "0"
    if not job.isdecimal() or not restarts.isdecimal():
        return {}
    place = (int(job) + 53 * int(restarts)) % _BASE_PORTS  # 53: the next jobs' places are taken, too
    return {"HCCL_IF_BASE_PORT": str(_BASE_PORT + _PORTS_OF_A_JOB * place)}


def timeouts(ddp: object, given: Mapping[str, str]) -> tuple[int | None, dict[str, str]]:
    """``ddp_timeout`` and HCCL's two, in this order from above; None: ``ddp`` is no number, and stays.

    ``ddp``: the user's ddp_timeout, or None; ``given``: the variables that the user sets. What is not given is fitted
    in: a short ddp_timeout makes the others shorter. Raises PkuslurmError where what is given is in another order.
    """
    connect, execute = (_seconds(given.get(name)) for name in (CONNECT, EXEC))
    total = _seconds(ddp)
    unknown = [name for name in (CONNECT, EXEC) if name in given and _seconds(given[name]) is None]
    never = execute == 0  # HCCL's word for: wait for ever
    top = total if total is not None else max(DDP_SECONDS, 2 * (execute or 0), 4 * (connect or 0))
    if execute is None:
        execute = EXEC_SECONDS if top > EXEC_SECONDS else top // 2
        if connect is not None and execute <= connect:
            execute = (connect + top) // 2
    if connect is None:
        connect = max(_LEAST_CONNECT, min(CONNECT_SECONDS, (execute if not never else top) // 2))
    if not unknown and not (connect < top if never else connect < execute < top):
        said = f"train.{DDP}={ddp}" if ddp is not None else f"cluster.env.{EXEC}={execute}"
        raise PkuslurmError(
            f"{said}: on NPUs it must be {CONNECT} ({connect}, at least {_LEAST_CONNECT}) < {EXEC} ({execute}) < "
            f"{DDP} ({top}), so that HCCL says which rank was missing; leave them out, or give all three in this order"
        )
    found = {CONNECT: str(connect), EXEC: str(execute)}
    return (None if ddp is not None and total is None else top), {
        name: value for name, value in found.items() if name not in given
    }


def _seconds(value: object) -> int | None:
    if isinstance(value, bool) or value is None:
        return None
    text = str(value)
    return int(text) if text.isdecimal() else None

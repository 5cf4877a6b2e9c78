"""Accelerators as a table: what LLaMA-Factory is told, and which variables a rank gets and must not see."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Accelerator:
    device: str  # torch's name
    yaml: dict[str, object] = field(default_factory=dict)  # further LLaMA-Factory keys
    env: dict[str, str] = field(default_factory=dict)


ACCELERATORS = {
    "cpu": Accelerator(
        device="cpu",
        yaml={"use_cpu": True},
        env={
            # a GPU or NPU that happens to be in the machine is not touched, not even to be counted
            "CUDA_VISIBLE_DEVICES": "",
            "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
            # OpenMP's threads spin while they wait: beside another busy process that makes torch ten times slower
            "OMP_WAIT_POLICY": "PASSIVE",
        },
    ),
    "cuda": Accelerator(device="cuda"),
    "npu": Accelerator(device="npu"),
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

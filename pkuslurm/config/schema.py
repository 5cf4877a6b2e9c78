"""The configuration as plain dataclasses. conf/ holds the defaults and each key's meaning; here are the types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

JOBS = ("prepare", "train", "merge", "infer", "report")
# The cluster's keys that all jobs of a run share.
NOT_PER_JOB = ("executor", "arrays", "array_parallelism", "pack", "jobs", "meet", "join_timeout", "poll_seconds")


@dataclass(frozen=True)
class Cluster:
    executor: Literal["local", "slurm", "meet"]
    accelerator: Literal["npu", "cuda", "cpu"]
    nproc_per_node: int | None
    python: str | None
    launcher: Literal["auto", "torchrun", "prefork"]
    partition: str | None
    account: str | None
    qos: str | None
    reservation: str | None
    constraint: str | None
    nodelist: str | None
    exclude: str | None
    mem: str | int | None
    cpus_per_task: int | None
    exclusive: bool | str | None
    time: str | int | None
    gres: str | None
    gpus: str | int | None
    gpus_per_node: str | int | None
    arrays: bool
    array_parallelism: int | None
    pack: bool
    extra: dict[str, Any]
    env: dict[str, Any]
    setup: list[str]
    jobs: dict[str, Any]
    meet: str | None
    join_timeout: int | float
    poll_seconds: int | float
    devices_step: int | None = None


@dataclass(frozen=True)
class Model:
    path: str | None
    make: Literal["tiny"] | None
    template: str
    trust_remote_code: bool
    adapter: str | None = None


@dataclass(frozen=True)
class Dataset:
    path: str | None
    name: str | None
    formatting: Literal["auto", "alpaca", "sharegpt"]
    columns: dict[str, Any] | None
    tags: dict[str, Any] | None
    media_dir: str | None = None


@dataclass(frozen=True)
class Infer:
    prompts: list[str] | str
    expect: str | list[str] | None
    max_new_tokens: int
    batch_size: int
    adapter: str | None
    base: str | None


@dataclass(frozen=True)
class Container:
    runtime: Literal["none", "apptainer", "singularity", "charliecloud", "docker", "podman", "enroot", "pyxis"]
    image: str | None
    llamafactory: str | None


@dataclass(frozen=True)
class Pipeline:
    name: str
    jobs: list[str]


@dataclass(frozen=True)
class Resume:
    max_attempts: int
    signal_seconds: int
    hang_minutes: int | float | None


@dataclass(frozen=True)
class Sweep:
    metric: str
    direction: Literal["minimize", "maximize"]
    extend: str | None
    keep_merged: Literal["all", "best", "none"]


@dataclass(frozen=True)
class Serve:
    engine: Literal["auto", "vllm", "transformers", "llamafactory", "command"]
    command: str | list[str] | None
    port: int | None
    idle_minutes: int | float | None


@dataclass(frozen=True)
class Config:
    """One run's whole configuration. ``train`` and ``merge`` are LLaMA-Factory's own keys, unchanged."""

    nodes: int
    name: str | None
    notes: list[str]
    run_root: str
    cache_root: str
    dry_run: bool
    wait: bool | None
    access: Literal["private", "group"]
    from_yaml: str | None
    here: bool
    cluster: Cluster
    model: Model
    dataset: Dataset
    train: dict[str, Any]
    merge: dict[str, Any]
    infer: Infer
    container: Container
    pipeline: Pipeline
    resume: Resume
    sweep: Sweep
    serve: Serve


@dataclass(frozen=True)
class Setting:
    """A value that differs from the default, and who set it (``command line``, ``model=tiny``, …)."""

    key: str
    value: Any
    default: Any
    origin: str

"""The run's jobs and their dependencies, before anything is written. Pure and frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pkuslurm.config.schema import Config
from pkuslurm.plan.resources import Request, cluster_for, request


@dataclass(frozen=True)
class JobSpec:
    """One job: what it waits for and what it needs. ``nodes`` × ``nproc_per_node`` ranks take part."""

    kind: str
    parents: tuple[str, ...]
    nodes: int
    nproc_per_node: int
    request: Request


@dataclass(frozen=True)
class RunPlan:
    config: Config
    jobs: tuple[JobSpec, ...]

    def job(self, kind: str) -> JobSpec:
        return next(job for job in self.jobs if job.kind == kind)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(job.kind for job in self.jobs)


def plan(config: Config) -> RunPlan:
    """A chain: each job of the pipeline waits for the one before it. Only train uses more than one node."""
    jobs = []
    before: tuple[str, ...] = ()
    # one allocation for all is as large as its largest job
    largest = next((kind for kind in ("train", "infer") if kind in config.pipeline.jobs), config.pipeline.jobs[0])
    for kind in config.pipeline.jobs:
        nproc = cluster_for(config, kind).nproc_per_node or 1
        nodes, nproc = (config.nodes, nproc) if kind == "train" else (1, 1)
        jobs.append(JobSpec(kind, before, nodes, nproc, request(config, largest if config.cluster.pack else kind)))
        before = (kind,)
    return RunPlan(config, tuple(jobs))


def serving(config: Config) -> RunPlan:
    """The one job that answers questions with what a run has made: no part of its pipeline, started when asked for."""
    parents = ("merge",) if "merge" in config.pipeline.jobs else ()
    config = replace(config, cluster=replace(config.cluster, pack=False))
    return RunPlan(config, (JobSpec("serve", parents, 1, 1, request(config, "serve")),))

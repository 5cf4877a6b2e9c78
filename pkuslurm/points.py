"""A sweep's points, each checked as a single run is, before anything is written."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from pkuslurm.compose import Sweep, SweepPoint
from pkuslurm.config.built import check_built
from pkuslurm.config.schema import Config
from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.plan.chains import asks
from pkuslurm.plan.inputs import Inputs
from pkuslurm.plan.plan import RunPlan, plan
from pkuslurm.preflight.resolve import check_machine, resolve
from pkuslurm.preflight.seen import Seen
from pkuslurm.preflight.slurm import check_login_node, check_slurm
from pkuslurm.render.render import RunFiles, render
from pkuslurm.rundir import ANY_POINT, RunDir
from pkuslurm.submit.cards import counted
from pkuslurm.submit.meet_where import placed
from pkuslurm.sweepdir import SweepDir

# What of a configuration decides what comes of it: points that differ in the rest alone are the same.
_RESULT = ("nodes", "model", "dataset", "train", "merge", "infer", "container", "pipeline")
_OF_CLUSTER = ("accelerator", "nproc_per_node", "python", "env")


@dataclass(frozen=True)
class Ready:
    """A point that has passed all checks. ``files``: for any point; ``asks``: what its jobs ask for, as text."""

    point: SweepPoint
    config: Config
    steps: RunPlan
    inputs: Inputs
    files: RunFiles
    fingerprint: str
    asks: str


def ready(sweep: Sweep, home: SweepDir, environ: Mapping[str, str]) -> list[Ready]:
    """All points, checked as single runs are. Raises PkuslurmError that names the first bad one."""
    seen, asked = Seen(), set[str]()
    found = []
    for number, point in enumerate(sweep.points):
        try:
            one = _ready(point, home, environ, seen)
            if not one.config.dry_run and one.asks not in asked:
                asked.add(one.asks)
                check_machine(one.config, one.inputs)
                if one.config.cluster.executor == "slurm":
                    check_slurm(one.steps)
                else:
                    check_login_node(one.config, environ)
        except PkuslurmError as error:
            where = f"point {number} ({point.label}): " if len(sweep.points) > 1 else ""
            raise PkuslurmError(f"{where}{error}") from None
        found.append(one)
    return found


def _ready(point: SweepPoint, home: SweepDir, environ: Mapping[str, str], seen: Seen) -> Ready:
    composed = point.composed
    config = replace(
        composed.config, run_root=absolute(composed.config.run_root), cache_root=absolute(composed.config.cache_root)
    )
    typed = [item.key for item in composed.settings if item.origin == "command line"]
    with composed.blame:
        check_built(config, [item.key for item in composed.settings], typed)
    if config.cluster.executor == "meet" and (config.nodes > 1 or config.cluster.meet is not None):
        raise PkuslurmError(
            "-m: on cluster=scow each point of a sweep works on one node, and meets nobody; write nodes=1 and leave "
            "cluster.meet out (run_root says where the sweep goes)"
        )
    config = counted(placed(config, {"run_root", "cache_root"}, environ), environ)
    whole = plan(config)
    steps = RunPlan(config, tuple(job for job in whole.jobs if job.kind != "report"))  # the sweep has one for all
    with composed.blame:
        inputs = resolve(config, environ, lenient=config.dry_run, seen=seen)
    inputs = replace(inputs, notes=tuple(map(composed.blame.said, inputs.notes)))
    files = render(steps, inputs, RunDir(home.path / ANY_POINT), composed.yaml, sys.executable)
    texts = {name: text for name, text in files.texts.items() if name != "jobs/prepare.json"}
    own = [files.jobs[job.kind] for job in steps.jobs if job.kind != "prepare"]
    known = asdict(config)
    result = [{name: known[name] for name in _RESULT}, {name: known["cluster"][name] for name in _OF_CLUSTER}]
    fingerprint = hashlib.sha256(json.dumps(result, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Ready(
        point,
        config,
        steps,
        inputs,
        replace(files, texts=texts),
        fingerprint,
        asks(own) if config.cluster.executor == "slurm" else str([job.kind for job in steps.jobs]),
    )

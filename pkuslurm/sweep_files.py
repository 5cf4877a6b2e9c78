"""The files of a sweep, as text: what points share once, of each point what differs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

import yaml

from pkuslurm.compose import Sweep, labels_of
from pkuslurm.plan.plan import JobSpec, RunPlan
from pkuslurm.plan.resources import request
from pkuslurm.points import Ready
from pkuslurm.render.points import difference, share_key
from pkuslurm.render.render import RunFiles, render
from pkuslurm.submit.write import run_json
from pkuslurm.submit.write_sweep import Member, NewShare, SweepFiles, sweep_head
from pkuslurm.sweepdir import SweepDir
from pkuslurm.worker import unpack


def sweep_files(
    home: SweepDir,
    points: Sequence[Ready],
    sweep: Sweep,
    typed: Sequence[str],
    known: Mapping[str, Any] = MappingProxyType({"points": (), "keys": (), "share_keys": {}}),
) -> SweepFiles:
    """The sweep's files; of one that is extended (``known``) the points that come to it, and use its shares."""
    first, columns = len(known["points"]), list(known["keys"])
    config = points[0].config
    keys, shares, members = dict(known.get("share_keys") or {}), list[NewShare](), list[Member]()
    families: dict[int, Mapping[str, str]] = {}
    numbers: dict[tuple[object, ...], int] = {}
    values = [
        {key: one.point.values.get(key) or _value(one, key) for key in dict.fromkeys([*columns, *sweep.keys])}
        for one in points
    ]
    labels = labels_of(values) if columns else [one.point.label for one in points]
    for number, one in enumerate(points, first):
        share = None
        if "prepare" in one.files.jobs:
            shared = share_key(one.files.jobs["prepare"], one.files.texts.get("dataset_info.json", ""))
            key = hashlib.sha256(shared.encode()).hexdigest()[:16]
            if key not in keys:
                keys[key] = len(keys)
                shares.append(_share(home, one, keys[key]))
            share = keys[key]
        # called after the first point in it, so that points that are added later have others
        family = numbers.setdefault((one.point.family, *one.files.texts), number)
        common = families.setdefault(family, one.files.texts)
        document = run_json(one.steps, one.files, one.point.overrides, one.point.composed.settings)
        document["label"] = labels[number - first]
        document["texts"] = {"family": family, "changes": difference(common, one.files.texts)}
        entry = {
            "n": number,
            "label": labels[number - first],
            "values": values[number - first],
            "config": one.fingerprint,
            "shared": share,
        }
        members.append(Member(entry, document))
    head = _head(home, points[0]) | {"overrides": list(typed), "keys": list(sweep.keys), "share_keys": keys}
    report = _report(home, points[0])
    return SweepFiles(home, head, members, shares, families, report, 0o750 if config.access == "group" else 0o700)


def _head(home: SweepDir, one: Ready) -> dict[str, Any]:
    """What sweep.json says of all points: as the first has it."""
    config = one.config
    return sweep_head(home.sweep_id) | {
        "name": config.name,
        "executor": config.cluster.executor,
        "pipeline": list(one.steps.kinds),
        "metric": config.sweep.metric,
        "direction": config.sweep.direction,
        "keep_merged": config.sweep.keep_merged,
        "array_parallelism": config.cluster.array_parallelism,
        "arrays": config.cluster.arrays,
    }


def _value(one: Ready, key: str) -> str:
    """What a key or a group is at a point where it does not vary."""
    for item in reversed(one.point.overrides):
        if item.partition("=")[0].lstrip("+") == key:
            return item.partition("=")[2]
    if key in one.point.composed.choices:
        return str(one.point.composed.choices[key])
    return _looked_up(asdict(one.config), key)


def with_columns(home: SweepDir, point: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """An older point with what it has where the points that come to it differ."""
    if not keys:
        return dict(point)
    config = yaml.safe_load(unpack.texts(home.point(point["n"])).get("config.yaml", "")) or {}
    return {**point, "values": point["values"] | {key: _looked_up(config, key) for key in keys}}


def _looked_up(values: Any, key: str) -> str:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return "" if values is None or isinstance(values, Mapping) else str(values)


def _share(home: SweepDir, one: Ready, number: int) -> NewShare:
    """The prepare of ``one``, in a directory of its own, for all that need the same."""
    steps = RunPlan(one.config, tuple(job for job in one.steps.jobs if job.kind == "prepare"))
    whole = render(one.steps, one.inputs, home.shared(number), one.point.composed.yaml, sys.executable)
    jobs = {"prepare": whole.jobs["prepare"]}
    texts = {name: whole.texts[name] for name in ("jobs/prepare.json", "dataset_info.json") if name in whole.texts}
    files = RunFiles(whole.run, texts, jobs)
    document = run_json(steps, files, one.point.overrides, one.point.composed.settings) | {"sweep": home.sweep_id}
    return NewShare(number, texts, document)


def _report(home: SweepDir, one: Ready) -> str:
    """The job file of the sweep's own last job."""
    job = JobSpec("report", (), 1, 1, request(one.config, "report"))
    files = render(RunPlan(one.config, (job,)), one.inputs, home.own, "", sys.executable)
    described = dict(files.jobs["report"])
    if described.get("request"):
        described["request"] |= {"pack": False}
    described |= {"key": f"{home.sweep_id}-report", "command": [*described["command"], "--last"]}
    return json.dumps(described, ensure_ascii=False, indent=1) + "\n"

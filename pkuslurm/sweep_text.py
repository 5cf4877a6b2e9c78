"""A sweep's dry run: the first point whole, what would be submitted for all, and of the others what differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pkuslurm.plan.chains import after_shares, chains
from pkuslurm.points import Ready
from pkuslurm.render.render import RunFiles
from pkuslurm.render.text import dry_run_text
from pkuslurm.rundir import ANY_POINT, SHARED
from pkuslurm.submit.write_sweep import SweepFiles

MOST_CHANGES = 8


def sweep_text(points: Sequence[Ready], files: SweepFiles, notes: Sequence[str]) -> str:
    """The whole dry run. Nothing was started, nothing was written."""
    first = points[0]
    said = dict.fromkeys([*notes, *(note for one in points for note in one.inputs.notes)])
    text = dry_run_text(first.steps, _first(first, files), list(said), first.inputs.facts, _scripts(points, files))
    return "\n".join(_others(points, files)) + "\n" + text


def _first(one: Ready, files: SweepFiles) -> RunFiles:
    """The first point's files, its share's job among them."""
    shares = {f"{share.number}": share for share in files.shares}
    share = shares.get(str(files.members[0].entry["shared"]))
    texts = {name: text.replace(ANY_POINT, "0") for name, text in one.files.texts.items()}
    jobs: dict[str, Any] = json.loads(json.dumps(dict(one.files.jobs)).replace(ANY_POINT, "0"))
    if share is not None:
        jobs["prepare"] = json.loads(share.texts["jobs/prepare.json"])
        texts |= {f"../shared/{share.number}/{name}": text for name, text in share.texts.items()}
    return replace(one.files, texts=texts, jobs=jobs)


def _others(points: Sequence[Ready], files: SweepFiles) -> Iterator[str]:
    many = len(files.members)
    yield f"# sweep: {many} point{'s' if many > 1 else ''}, {len(files.shares)} to prepare"
    for member, one in zip(files.members, points, strict=True):
        yield f"# point {member.entry['n']}: {member.entry['label']}"
        yield from _changes(points[0].files.texts, one.files.texts)
    yield ""


def _changes(first: Mapping[str, str], own: Mapping[str, str]) -> Iterator[str]:
    """What a person would compare with the first point's: the YAMLs; job files repeat them."""
    changed = [name for name in own if own[name] != first.get(name)]
    shown = [name for name in changed if name in ("train.yaml", "merge.yaml")]
    shown = shown or [name for name in changed if name == "config.yaml"] or changed
    lines = []
    for name in shown:
        before = set(first.get(name, "").splitlines())
        lines += [f"#   {name}: {line.strip()}" for line in own[name].splitlines() if line not in before]
    yield from lines[:MOST_CHANGES]
    if len(lines) > MOST_CHANGES:
        yield f"#   and {len(lines) - MOST_CHANGES} more lines"


def _scripts(points: Sequence[Ready], files: SweepFiles) -> dict[str, str]:
    """What sbatch would be given, with JOB_ID where an id will stand. A cluster may want more and smaller arrays."""
    config = points[0].config
    if config.cluster.executor != "slurm":
        return {}
    from pkuslurm.submit.arrays import CAPPED, Jobs, submission_of
    from pkuslurm.submit.slurm import Array, Submission, groups, script

    home, texts = files.home, dict[str, str]()
    arrays, most = config.cluster.arrays, config.cluster.array_parallelism

    def add(label: str, key: str, jobs: Jobs, number: int, count: int, **after: Any) -> None:
        capped = most if CAPPED in [job["kind"] for job in jobs] else None
        array = Array(home.path, home.table(number), count, capped) if arrays else None
        texts[label] = script(submission_of(key=key, jobs=jobs, array=array, **after))

    for share in files.shares[:1]:
        job = json.loads(share.texts["jobs/prepare.json"])
        key = f"{home.sweep_id}-prepare" if arrays else f"{home.sweep_id}/{SHARED}/0-prepare"
        add("prepare", key, [job], 0, len(files.shares), before=None, first="", lane=())
    names = {str(member.entry["n"]): one for member, one in zip(files.members, points, strict=True)}
    kinds = {
        name: (tuple(kind for kind in one.steps.kinds if kind != "prepare"), one.asks) for name, one in names.items()
    }
    lane: list[str] = []
    for number, chain in enumerate(chains(kinds, len(kinds) if arrays else 1), bool(files.shares)):
        own = json.dumps([dict(names[chain.members[0]].files.jobs[kind]) for kind in chain.kinds])
        jobs = json.loads(own.replace(ANY_POINT, chain.members[0]))
        needs = [f"JOB_ID_{files.members[int(name)].entry['shared']}" for name in chain.members]
        first = after_shares(needs) if "prepare" in jobs[0]["parents"] else ""
        before: str | None = None
        for group in groups(jobs):
            name = "pack" if len(group) > 1 else group[0]["kind"]
            suffix = f"-g{number}" if number > bool(files.shares) else ""
            key = f"{home.sweep_id}-{name}{suffix}" if arrays else f"{home.sweep_id}/{chain.members[0]}-{name}"
            label = name if chain.members[0] == "0" else f"{name} of point {chain.members[0]} and its like"
            own_lane = lane if CAPPED in [job["kind"] for job in group] else ()
            add(label, key, group, number, len(chain.members), before=before, first=first, lane=own_lane)
            before = "JOB_ID"
        lane = ["JOB_ID"] if most else []
        if not arrays:
            break  # of the others the same
    report = json.loads(files.report)
    texts["report"] = script(Submission(f"{home.sweep_id}-report", [report], "afterany:JOB_ID"))
    return texts

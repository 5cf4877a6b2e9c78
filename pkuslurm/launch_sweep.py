"""``launch -m``: every point composed and checked, then all of them written, submitted or run."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.compose import Sweep, show, told
from pkuslurm.config.schema import Config
from pkuslurm.errors import PartlySubmitted, PkuslurmError
from pkuslurm.paths import absolute, command
from pkuslurm.plan.chains import Chain, chains
from pkuslurm.points import Ready, ready
from pkuslurm.read.find import find, remember, roots
from pkuslurm.read.text import safe
from pkuslurm.render.text import MOST_NOTES, labelled, last_words
from pkuslurm.rundir import SHARED, read_json
from pkuslurm.submit.alone import alone
from pkuslurm.submit.owner import launcher_of
from pkuslurm.submit.write import new_run_id
from pkuslurm.submit.write_sweep import SweepFiles, add, create
from pkuslurm.sweep import follow, not_all, run_here, submitted
from pkuslurm.sweep_files import sweep_files, with_columns
from pkuslurm.sweepdir import SweepDir, is_sweep, save


def launch_sweep(sweep: Sweep, typed: Sequence[str], environ: Mapping[str, str]) -> int:
    """Checked, then printed where dry_run is set, else written and submitted or run. Its exit code."""
    config = sweep.points[0].composed.config
    extend = config.sweep.extend
    old = None if extend is None else _extended(extend, config.run_root, environ)
    root = Path(absolute(config.run_root))
    if config.dry_run:
        from pkuslurm.sweep_text import sweep_text

        home = SweepDir(root / "RUN_ID")
        points = ready(sweep, home, environ)
        print(sweep_text(points, sweep_files(home, points, sweep, typed), sweep.notes), end="", flush=True)
        notes = list(dict.fromkeys([*sweep.notes, *(note for one in points for note in one.inputs.notes)]))
        if sys.stderr.isatty():
            print(*map(safe, last_words(notes)), sep="\n", end="\n" if notes else "", file=sys.stderr)
        return 0
    home = old or SweepDir(root / new_run_id(config.name or f"sweep-{_varied(sweep)}"))
    points = ready(sweep, home, environ)
    return (_extend if old else _launch)(home, points, sweep, typed, environ)


def _varied(sweep: Sweep) -> str:
    """What varies, by the short names of the labels: lr-ds."""
    return "-".join(part.partition("=")[0] for part in sweep.points[0].label.split(",") if "=" in part) or "one"


def inherited(typed: Sequence[str], environ: Mapping[str, str]) -> list[str]:
    """What is typed to extend a sweep, put to what the sweep itself was launched with."""
    wanted = [item.partition("=")[2].strip("'\"") for item in typed if item.startswith("sweep.extend=")]
    if not wanted or wanted[-1] in ("", "null"):
        return list(typed)
    given = [item.partition("=")[2] for item in typed if item.startswith("run_root=")]
    home = _extended(wanted[-1], given[-1] if given else "runs", environ)
    sweep = read_json(home.sweep_json) or {}
    if sweep.get("cwd") not in (None, os.getcwd()):
        raise PkuslurmError(
            f"sweep.extend={home.sweep_id}: relative paths in it start at {sweep['cwd']}; cd there first"
        )
    own = [str(item) for item in sweep.get("overrides") or () if not str(item).startswith("sweep.extend=")]
    return [*own, *typed]


def _extended(name: str, run_root: str, environ: Mapping[str, str]) -> SweepDir:
    """The sweep that is to be extended."""
    here = Path(absolute(run_root))
    places = roots(None, environ)
    path = find(name, places if here in places else [*places, here])
    if not is_sweep(path):
        raise PkuslurmError(f"sweep.extend={name}: this is a single run; name a sweep")
    return SweepDir(path)


def _launch(
    home: SweepDir, points: Sequence[Ready], sweep: Sweep, typed: Sequence[str], environ: Mapping[str, str]
) -> int:
    files = sweep_files(home, points, sweep, typed)
    todo = _chains(files, points)
    create(files)
    remember(home.path.parent, environ)
    _announce(home, points, sweep.notes, len(files.shares))
    left: list[Chain] = []
    if points[0].config.cluster.executor == "slurm":
        with alone(home.own) as known:
            left = _submit(home, known, todo, lambda: shutil.rmtree(home.path, ignore_errors=True))
    return _then(home, points[0].config, left)


def _extend(
    home: SweepDir, points: Sequence[Ready], sweep: Sweep, typed: Sequence[str], environ: Mapping[str, str]
) -> int:
    """Those that are not there yet; the shares that are there are used again."""
    left: list[Chain] = []
    with alone(home.own) as known:
        there = {point["config"] for point in known["points"]}
        fresh = [one for one in points if one.fingerprint not in there]
        if len(fresh) < len(points):
            count = len(points) - len(fresh)
            print(f"{home.sweep_id}: {count} of {len(points)} points are there already", file=sys.stderr)
        if not fresh:
            print(home.path)
            return 0
        config = fresh[0].config
        if known["executor"] != config.cluster.executor:
            raise PkuslurmError(
                f"sweep.extend={home.sweep_id}: it ran with cluster.executor={known['executor']}; choose that"
            )
        if launcher_of(home.own, known) is not None:
            raise PkuslurmError(f"sweep.extend={home.sweep_id}: it is still running; wait, or cancel it first")
        files = sweep_files(home, fresh, sweep, typed, known)
        todo = _chains(files, fresh)
        before = {name: known.get(name) for name in ("points", "keys", "share_keys")}
        try:
            add(files)
            fresh_keys = [key for key in sweep.keys if key not in known["keys"]]
            old = [with_columns(home, point, fresh_keys) for point in known["points"]]
            known["points"] = [*old, *(one.entry for one in files.members)]
            known["keys"] = [*known["keys"], *fresh_keys]
            known["share_keys"] = files.head["share_keys"]
            save(home, known)
        except OSError as error:
            raise PkuslurmError(f"{error.filename or home.path}: {error.strerror}") from None
        _announce(home, fresh, sweep.notes, len(files.shares))
        if config.cluster.executor == "slurm":
            left = _submit(home, known, todo, lambda: _take_out(home, known, before, files))
    return _then(home, config, left)


def _take_out(home: SweepDir, known: dict[str, Any], before: Mapping[str, Any], files: SweepFiles) -> None:
    """Points that Slurm will not have: the sweep is again what it was."""
    known.update(before)
    save(home, known)
    for member in files.members:
        shutil.rmtree(home.point(member.entry["n"]).path, ignore_errors=True)
    for share in files.shares:
        shutil.rmtree(home.shared(share.number).path, ignore_errors=True)


def _chains(files: SweepFiles, points: Sequence[Ready]) -> list[Chain]:
    """What is to be submitted: the shares first."""
    config = points[0].config
    if config.cluster.executor != "slurm":
        return []
    from pkuslurm.submit.sweep_again import most_elements

    most = most_elements(config.cluster.arrays)
    shares = {f"{SHARED}/{share.number}": (("prepare",), "") for share in files.shares}
    members = {
        str(member.entry["n"]): (tuple(kind for kind in one.steps.kinds if kind != "prepare"), one.asks)
        for member, one in zip(files.members, points, strict=True)
    }
    alone = {name: what for name, what in members.items() if what[0]}  # pipeline.jobs=[prepare]: the shares are all
    return [*chains(shares, most), *chains(alone, most)]


def _announce(home: SweepDir, points: Sequence[Ready], notes: Sequence[str], shares: int) -> None:
    """What will be done, before anything starts."""
    first = points[0]
    with suppress(OSError):
        many = f"{len(points)} point{'s' if len(points) > 1 else ''}"
        print(f"sweep {home.sweep_id}: {many}, {shares} to prepare", file=sys.stderr)
        for name, text in first.inputs.facts:
            print(f"{name:<8} {safe(text)}", file=sys.stderr)
        varied = set(first.point.values)
        own = told(first.point.composed.settings)
        for line in show([item for item in own if item.key not in varied]).splitlines():
            print(f"set      {safe(line)}", file=sys.stderr)
        said = [*notes, *_unranked(first.config), *(note for one in points for note in one.inputs.notes)]
        notes_told = list(dict.fromkeys(said))
        for note in notes_told[:MOST_NOTES]:
            print(safe(labelled(note)), file=sys.stderr)
        if len(notes_told) > MOST_NOTES:
            print(f"note: and {len(notes_told) - MOST_NOTES} more of other points", file=sys.stderr)


def _unranked(config: Config) -> list[str]:
    """Said before hours of training, not after them."""
    train = config.train
    evaluates = (train.get("val_size") or train.get("eval_dataset")) and (
        train.get("do_eval") or train.get("eval_strategy") not in (None, "no")
    )
    if config.sweep.metric != "eval_loss" or "train" not in config.pipeline.jobs or evaluates:
        return []
    return [
        "the points will be ranked by their training loss, since nothing is evaluated; "
        "for an evaluation loss write train.val_size=0.1 train.eval_strategy=epoch"
    ]


def _submit(home: SweepDir, known: dict[str, Any], todo: Sequence[Chain], undo: Callable[[], None]) -> list[Chain]:
    """Submit ``todo`` of a sweep that is ours alone; what did not fit. ``undo``: where Slurm refuses it for good."""
    from pkuslurm.submit.arrays import send
    from pkuslurm.submit.slurm import Refused
    from pkuslurm.submit.sweep_queue import adopt, living

    try:
        adopt(home, known)
        left = send(home, known, todo, living(home, known))
    except PartlySubmitted:
        print(home.path, flush=True)
        raise
    except Refused:
        undo()
        raise
    with suppress(OSError):
        print(submitted(known), file=sys.stderr)
        print(f"next     {command('status', home.sweep_id)}", file=sys.stderr)
    return left


def _then(home: SweepDir, config: Config, left: Sequence[Chain]) -> int:
    """Run here, or followed, or left alone."""
    if config.cluster.executor != "slurm":
        return run_here(home, config.cluster.array_parallelism or 1)
    code = follow(home, float(config.cluster.poll_seconds)) if config.wait else 0
    with suppress(OSError):
        print(home.path, flush=True)
    if left and not config.wait:
        raise PartlySubmitted(not_all(home, left))
    return code

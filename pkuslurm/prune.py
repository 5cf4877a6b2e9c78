"""prune: what complete runs no longer need, shown with its size, and with --yes removed.

Touched is only what can be made again or has served its purpose, in directories of this user's own. Never: a run that
is not COMPLETED, an adapter's or a full fine-tune's weights, answers, reports, logs, markers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import disk, find, pruned, status
from pkuslurm.read.text import safe, size
from pkuslurm.read.values import unix
from pkuslurm.rundir import RunDir, read_json, write_json

DAY = 86400.0
# without --older: tokenized data that no run has linked for so long
CACHE_DAYS = 7.0
# whatever --older says: somebody may be about to use it
LIVING_SECONDS = 3600.0
LEFTOVERS = (
    *(".merged.tmp-*", ".merged.old-*", ".merged.pruned-*", ".data.*", "adapter/.checkpoint-*.pruned-*"),
    "bad-checkpoints/*",  # moved aside before a training went on
)
MOST_REASONS = 4
_KEY = re.compile(r"[0-9a-f]{24}")
_STALE = re.compile(r"\.[0-9a-f]{24}\..+")
KEPT = "adapters, full weights, answers, reports, logs, proofs; every run that is not COMPLETED"


@dataclass(frozen=True)
class Item:
    """One thing that goes: ``run`` is the run's directory (None: the cache), ``frees`` what the disk gains by it."""

    what: str
    path: Path
    run: Path | None
    bytes: int
    frees: int

    def to_json(self) -> dict[str, object]:
        return {
            "what": self.what,
            "path": str(self.path),
            "run_id": _name(self.run) if self.run else None,
            "bytes": self.bytes,
            "frees": self.frees,
        }


def main(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """The verb. Returns its exit code: 1 where something could not be removed."""
    if arguments.older is not None and not 0 <= arguments.older < 1e5:
        raise PkuslurmError(f"--older {arguments.older:g}: a number of days is wanted, 0 or more")
    given = [Path(arguments.run_root).absolute()] if arguments.run_root else None
    places = find.roots(given, os.environ)
    named = [find.find(run, places) for run in (*arguments.runs, *rest)]
    for path in named:
        find.check(path)
    runs = list(dict.fromkeys(point for path in named for point in find.members(path))) if named else find.runs(places)
    candidates, skipped = of_runs(runs, arguments.older or 0.0, arguments.merged)
    if arguments.cache:
        days = CACHE_DAYS if arguments.older is None else arguments.older
        candidates += of_caches(caches(runs, os.environ), max(days * DAY, LIVING_SECONDS), candidates)
    items = measured(candidates)
    # of a sweep those that are complete, of runs that are named all or none
    if refused := [path for path in named if path in skipped]:
        why = skipped[refused[0]]
        raise PkuslurmError(f"prune {_name(refused[0])}: {why}; only this user's complete runs are pruned")
    failed = remove(items) if arguments.yes else {}
    if arguments.json:
        print(json.dumps(_document(items, skipped, arguments.yes, failed), ensure_ascii=False))
    else:
        _show(items, skipped, arguments, failed)
    return 1 if failed else 0


def of_runs(
    runs: Iterable[Path], days: float, merged: bool
) -> tuple[list[tuple[str, Path, Path | None]], dict[Path, str]]:
    """(what, path, run) of what can go, and why which runs are left alone."""
    found: list[tuple[str, Path, Path | None]] = []
    skipped: dict[Path, str] = {}
    known = list(runs)
    for path, now in zip(known, status.read_many(known), strict=True):  # one question to Slurm for all
        if why := _untouchable(path, days, now):
            skipped[path] = why
            continue
        run = RunDir(path)
        steps = [folder for folder in run.adapter.glob("checkpoint-*") if folder.name[11:].isdecimal()]
        found += [("checkpoint", folder, path) for folder in sorted(steps, key=lambda one: int(one.name[11:]))]
        # a point's is that of all the points that share it
        own = run.home("prepare") == run
        found += [("tokenized data", run.data, path)] if own and _proved(run, "prepare") else []
        found += [("left over", left, path) for pattern in LEFTOVERS for left in sorted(path.glob(pattern))]
        if merged and _proved(run, "merge") and not _why_not_merged(run):
            found.append(("merged model", run.merged, path))
    # a link may lead anywhere: only real folders go
    return [item for item in found if item[1].is_dir() and not item[1].is_symlink()], skipped


def of_merged(runs: Iterable[Path]) -> tuple[list[Item], dict[Path, str]]:
    """The merged models of ``runs`` that can go, and why the others' stay."""
    known = list(runs)
    candidates, left = of_runs(known, 0.0, True)
    items = measured(item for item in candidates if item[0] == "merged model")
    for path in {*known} - {*left} - {item.run for item in items}:
        run = RunDir(path)
        left[path] = (_why_not_merged(run) if _proved(run, "merge") else None) or "nothing proves that it is whole"
    return items, left


def _name(run: Path) -> str:
    return RunDir(run).run_id


def _untouchable(path: Path, days: float, now: status.RunStatus) -> str | None:
    try:
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return "it belongs to another user"
    except OSError as error:
        return error.strerror or "it cannot be read"
    if now.state != "COMPLETED":
        return f"it is {now.state}"
    serve = now.job("serve")
    if serve is not None and serve.state in ("RUNNING", "PENDING"):
        return "it is being served"
    launcher = now.document.get("launcher")
    if launcher is not None:
        return "its launcher has not said that it ended"
    ended = max((unix(job.finished) or 0.0 for job in now.jobs), default=0.0)
    return f"it ended less than {days:g} days ago" if time.time() - ended < days * DAY else None


def _proved(run: RunDir, kind: str) -> bool:
    """Whether the marker of job ``kind`` is there, by which its part can be said to have been whole."""
    return read_json(run.done(kind)) is not None


def _why_not_merged(run: RunDir) -> str | None:
    """Why the merged model could not be made again; None: it could."""
    payload = (read_json(run.job("merge")) or {}).get("payload")
    base = payload.get("base") if isinstance(payload, Mapping) else None
    if not isinstance(base, str) or not Path(base, "config.json").is_file():
        return f"its base {base} is not here"
    whole = any((run.adapter / name).is_file() for name in ("adapter_model.safetensors", "config.json"))
    return None if whole and run.merge_yaml.is_file() else "its adapter or merge.yaml is not here"


def caches(runs: Iterable[Path], environ: Mapping[str, str]) -> list[Path]:
    """The folders of tokenized data: of this environment, and those that the runs were made with."""
    roots = [Path(environ["PKUSLURM_CACHE"])] if environ.get("PKUSLURM_CACHE") else []
    roots = roots or [Path(environ.get("HOME") or os.path.expanduser("~"), ".cache", "pkuslurm")]
    for run in runs:
        payload = (read_json(RunDir(run).job("prepare")) or {}).get("payload")
        known = payload.get("cache_root") if isinstance(payload, Mapping) else None
        roots += [Path(known)] if isinstance(known, str) and known.startswith("/") else []
    return [root.absolute() / "tokenized" for root in dict.fromkeys(roots)]


def of_caches(
    folders: Iterable[Path], seconds: float, going: Sequence[tuple[str, Path, Path | None]]
) -> list[tuple[str, Path, Path | None]]:
    """Tokenized data that nothing links once ``going`` has gone, unused for ``seconds``; what was left half made."""
    links: dict[tuple[int, int], int] = {}
    for _, path, _ in going:
        for file in disk.below(path):
            identity = (file.device, file.inode)
            links[identity] = links.get(identity, 0) + 1
    found: list[tuple[str, Path, Path | None]] = []
    for folder in folders:
        with suppress(OSError):
            for entry in sorted(folder.iterdir()):
                if entry.is_symlink() or not entry.is_dir() or entry.stat().st_uid != os.getuid():
                    continue
                files = disk.below(entry)
                # linking changes a file's ctime: the last run that used it is known by it
                used = max([entry.stat().st_mtime, *(file.changed for file in files)])
                alone = all(file.links - links.get((file.device, file.inode), 0) <= 1 for file in files)
                if time.time() - used < seconds or not alone:
                    continue
                if _KEY.fullmatch(entry.name):
                    found.append(("cached data", entry, None))
                elif _STALE.fullmatch(entry.name):
                    found.append(("left over", entry, None))
    return found


def measured(candidates: Iterable[tuple[str, Path, Path | None]]) -> list[Item]:
    """With their sizes; a file's bytes are freed by the last of its links, if all of them go."""
    gone: dict[tuple[int, int], int] = {}
    items = []
    for what, path, run in candidates:
        own: dict[tuple[int, int], int] = {}
        frees = 0
        for file in disk.below(path):
            identity = (file.device, file.inode)
            own[identity] = file.bytes
            gone[identity] = gone.get(identity, 0) + 1
            frees += file.bytes if gone[identity] == file.links else 0
        items.append(Item(what, path, run, sum(own.values()), frees))
    return items


def remove(items: Sequence[Item]) -> dict[Path, str]:
    """Remove them; what could not be, and why. A run that has begun to work again meanwhile is left alone."""
    failed: dict[Path, str] = {}
    for item in items:
        try:
            if item.run is not None:
                if why := _untouchable(item.run, 0.0, status.read(item.run)):
                    raise PkuslurmError(why)
                _record(item, RunDir(item.run))
            _away(item.path)
        except (OSError, PkuslurmError) as error:
            failed[item.path] = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return failed


def _record(item: Item, run: RunDir) -> None:
    """Say it in done/ first: a prune that is killed leaves a run that is proved all the same."""
    kind = next((kind for kind, part in pruned.PARTS.items() if run.path / part == item.path), None)
    if kind is None:
        return
    marker = read_json(run.done(kind)) or {}
    entry = {"attempt": marker.get("attempt"), "finished": marker.get("finished"), "bytes": item.bytes}
    when = datetime.now().astimezone().isoformat(timespec="seconds")
    parts = pruned.read(run) | {pruned.PARTS[kind]: entry | {"when": when}}
    write_json(pruned.record(run), {"schema_version": pruned.SCHEMA_VERSION, "run_id": run.run_id, "parts": parts})


def _away(path: Path) -> None:
    """Renamed first: whoever looks sees all of it or nothing. The folder stays where it cannot be renamed."""
    name = f".{path.name.lstrip('.')}.pruned-"
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=name))
    try:
        path.rename(aside / path.name)
    except OSError:
        aside.rmdir()
        raise
    shutil.rmtree(aside)


def _document(
    items: Sequence[Item], skipped: Mapping[Path, str], done: bool, failed: Mapping[Path, str]
) -> dict[str, object]:
    return {
        "removed": done,
        "bytes": sum(item.frees for item in items if item.path not in failed),
        "items": [item.to_json() | {"error": failed.get(item.path)} for item in items],
        "kept": [{"run_id": _name(path), "path": str(path), "why": why} for path, why in skipped.items()],
    }


def _show(
    items: Sequence[Item], skipped: Mapping[Path, str], arguments: argparse.Namespace, failed: Mapping[Path, str]
) -> None:
    from pkuslurm.read.present import table

    shown = [item for item in items if item.frees and item.path not in failed]
    if shown:
        rows = [
            (_name(item.run) if item.run else "(cache)", item.what, item.path.name, size(item.bytes), size(item.frees))
            for item in shown
        ]
        table(("run", "what", "folder", "size", "frees"), rows, sys.stdout)
    total = size(sum(item.frees for item in shown))
    told = f"{total} freed" if arguments.yes else f"{total} would be freed" if items else "nothing to remove"
    print(told)
    if idle := sum(not item.frees for item in items):
        print(f"not listed: {idle} folder{'s' if idle > 1 else ''} whose removal alone frees nothing")
    if _linked(items):
        print("tokenized data is also in the cache: --cache removes there, too, what no run uses")
    for path, why in failed.items():
        print(f"pkuslurm: {safe(path)}: not removed: {safe(why)}", file=sys.stderr)
    print(f"kept: {KEPT}")
    for why, count in Counter(skipped.values()).most_common(MOST_REASONS):
        print(f"left alone: {count} run{'s' if count > 1 else ''}: {why.removeprefix('it is ')}")
    if items and not arguments.yes:
        print("nothing was removed; --yes removes it" + ("" if arguments.merged else "; --merged adds merged models"))


def _linked(items: Sequence[Item]) -> bool:
    return any(item.what == "tokenized data" and item.frees < item.bytes for item in items)

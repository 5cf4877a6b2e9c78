"""A sweep's directory, made: of every point its run.json and a link, what points share once, sweep.json last."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import ANY_POINT, SHARED, RunDir, as_its_folder, write_json, write_text
from pkuslurm.submit.write import make_root, versions
from pkuslurm.sweepdir import SCHEMA_VERSION, SweepDir
from pkuslurm.worker.unpack import FOLDERS


@dataclass(frozen=True)
class Member:
    """A point: its entry in sweep.json, and its run.json, where ``@POINT@`` stands for its number."""

    entry: Mapping[str, Any]
    run_json: Mapping[str, Any]


@dataclass(frozen=True)
class NewShare:
    """What points have in common, by number: the files of its run and its run.json."""

    number: int
    texts: Mapping[str, str]
    run_json: Mapping[str, Any]


@dataclass(frozen=True)
class SweepFiles:
    """``families``: by number the files of points that are composed alike. ``report``: the sweep's own job file."""

    home: SweepDir
    head: Mapping[str, Any]
    members: Sequence[Member]
    shares: Sequence[NewShare]
    families: Mapping[int, Mapping[str, str]]
    report: str
    mode: int = 0o700


def sweep_head(sweep_id: str) -> dict[str, Any]:
    """What sweep.json says of where and when it was launched."""
    return {
        "schema_version": SCHEMA_VERSION,
        "sweep_id": sweep_id,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cwd": os.getcwd(),  # relative paths in the overrides start here
        "versions": versions(),
        "host": socket.gethostname(),
        "launcher": None,
        "cancelled": None,
    }


def create(files: SweepFiles) -> None:
    """Make the directory and write all its files. Raises PkuslurmError, naming the path, where it cannot."""
    home = files.home
    try:
        make_root(home.path.parent, files.mode)
        home.path.mkdir(mode=files.mode)  # not exist_ok: two launches never share a directory
    except OSError as error:
        raise _refused(home, error) from None
    try:
        os.chmod(home.path, files.mode)
        for folder in (*FOLDERS, SHARED, "groups"):
            _folder(home.path / folder, files.mode)
        write_text(home.own.job("report"), files.report)
        add(files)
        report: dict[str, Any] = {
            "key": None,
            "asked": None,
            "held": False,
            "job_id": None,
            "first_attempt": 1,
            "parents": [],
        }
        jobs = {"report": report | {"num_nodes": 1}}
        write_json(home.sweep_json, {**files.head, "points": [one.entry for one in files.members], "jobs": jobs})
    except (OSError, KeyboardInterrupt) as error:
        shutil.rmtree(home.path, ignore_errors=True)  # half a sweep is no sweep
        if isinstance(error, OSError):
            raise _refused(home, error) from None
        raise


def add(files: SweepFiles) -> None:
    """Write points, shares and families into a directory that is there. Raises OSError."""
    for number, texts in files.families.items():
        write_json(files.home.texts(number), dict(texts))
    for share in files.shares:
        run = files.home.shared(share.number)
        _folder(run.path, files.mode)
        for name in FOLDERS:
            _folder(run.path / name, files.mode)
        for name, text in share.texts.items():
            write_text(run.path / name, text)
        write_json(run.run_json, dict(share.run_json))
    for member in files.members:
        _write_point(files.home.point(member.entry["n"]), member, files.mode)


def _write_point(run: RunDir, member: Member, mode: int) -> None:
    """Not synced, one by one, to the disk: sweep.json, without which nobody looks at them, is written later."""
    _folder(run.path, mode)
    if "prepare" in member.run_json["jobs"]:
        (run.path / SHARED).unlink(missing_ok=True)  # of an extension whose launcher died
        (run.path / SHARED).symlink_to(f"../{SHARED}/{member.entry['shared']}")
    text = json.dumps(member.run_json, ensure_ascii=False, indent=1).replace(ANY_POINT, run.path.name)
    with open(run.run_json, "w", encoding="utf-8", opener=as_its_folder) as file:
        file.write(text + "\n")


def _folder(path: Path, mode: int) -> None:
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    os.chmod(path, mode)  # whatever the umask


def _refused(home: SweepDir, error: OSError) -> PkuslurmError:
    return PkuslurmError(f"run_root={home.path.parent}: {error.filename or home.path}: {error.strerror}")

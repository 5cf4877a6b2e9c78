"""CraneSched's commands under Slurm's names are known, and refused before anything is written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pkuslurm.slurm import crane
from tests.conftest import environment, run

VERSION = '[ "$1" = --version ] && printf "CraneSched 1.1.2\\nSource Time: Unknown\\n"\nexit 0'
NAMES = ("sbatch", "squeue", "scontrol", "scancel", "sinfo", "sacct")


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def wrapper(folder: Path) -> None:
    for name in (*NAMES, "cbatch"):
        program(folder, name, VERSION)


def script(folder: Path) -> None:
    """A site's own, of a version that says nothing of itself."""
    for name in NAMES:
        program(folder, name, f'exec /usr/bin/cwrapper {name} "$@"')


def link(folder: Path) -> None:
    program(folder, "cwrapper", "exit 1")
    for name in NAMES:
        (folder / name).symlink_to("cwrapper")


def aliases(folder: Path) -> None:
    """As its documentation has it: sbatch is an alias, which no program sees."""
    for name in ("cbatch", "ccancel", "cqueue"):
        program(folder, name, "exit 1")


def slurm(folder: Path) -> None:
    for name in NAMES:
        program(folder, name, 'echo "slurm-wlm 22.05.8"')
    program(folder, "cbatch", "exit 1")


def nothing(folder: Path) -> None:
    program(folder, "sbatch", "exit 1")


CRANE = [wrapper, script, link, aliases]


@pytest.fixture
def only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that comes first in PATH; the machine's own Slurm is hidden."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{_without_slurm()}")
    return tmp_path / "bin"


def _without_slurm() -> str:
    folders = os.environ["PATH"].split(":")
    return ":".join(one for one in folders if not any(Path(one, name).exists() for name in NAMES)) or "/nonexistent"


@pytest.mark.parametrize("there", [*CRANE, slurm, nothing])
def test_it_is_told_from_slurm(there: object, only: Path) -> None:
    there(only)  # type: ignore[operator]
    assert crane.is_crane() is (there in CRANE)


def test_a_submission_is_refused_and_nothing_is_written(tmp_path: Path, weird: Path, only: Path) -> None:
    wrapper(only)
    env = environment(weird, PATH=f"{only}:{os.environ['PATH']}", PKUSLURM_CACHE=str(tmp_path / "cache"))
    for words in (["cluster=slurm"], ["-m", "cluster=slurm", "train.learning_rate=1e-4,1e-5"]):
        ended = run(words, weird, env)
        assert ended.code == 2 and not ended.out and len(ended.err.splitlines()) == 1, ended.err
        assert "鹤思 (CraneSched), not Slurm" in ended.err and "cluster=local cluster.accelerator=npu" in ended.err
    assert [path.name for path in weird.iterdir()] == [] and not (tmp_path / "cache").exists()


def test_what_is_said_works_there(weird: Path, only: Path) -> None:
    """On a login node cluster=local is refused; inside a job, and in a dry run, it is not."""
    wrapper(only)
    env = environment(weird, PATH=f"{only}:{os.environ['PATH']}", PKUSLURM_CACHE=str(weird / "cache"), LC_ALL="C")
    refused = run(["model.path=none", "dry_run=true", "cluster=slurm"], weird, env)
    assert refused.code == 0, refused.err
    words = ["pipeline=train", "cluster.python=/bin/false"]
    for more, shown in (({}, "not in a job"), ({"CRANE_JOB_ID": "7"}, "not in a job")):
        ended = run(words, weird, env | more)  # calloc's shell has an id, and is still on the login node
        assert ended.code == 2 and shown in ended.err, ended.err
    ended = run(words, weird, env | {"CRANE_JOB_ID": "7", "CRANE_JOB_NODELIST": "cn01"})
    assert ended.code == 1 and "prepare: FAILED" in ended.err  # it began

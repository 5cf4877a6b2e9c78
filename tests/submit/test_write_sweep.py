"""A sweep's directory: whole or not there, few files, and not hurt by a launcher that died while it was extended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pkuslurm import sweep_files
from pkuslurm.compose import compose_sweep
from pkuslurm.errors import PkuslurmError
from pkuslurm.points import ready
from pkuslurm.rundir import ANY_POINT, read_json
from pkuslurm.submit import write_sweep
from pkuslurm.submit.write_sweep import SweepFiles
from pkuslurm.sweepdir import SweepDir
from pkuslurm.worker.unpack import texts

SWEPT = ("train.learning_rate=1e-5,1e-4", "train.cutoff_len=64,128", "infer.expect=北大")


def files_of(folder: Path, *overrides: str, first: int = 0, shares: dict[str, int] | None = None) -> SweepFiles:
    typed = [f"run_root={folder}", f"cache_root={folder}/cache", *overrides]
    sweep = compose_sweep(typed)
    home = SweepDir(folder / "20260101-000000-扫描-0000")
    known = {"points": [{}] * first, "keys": [], "share_keys": shares or {}}
    return sweep_files.sweep_files(home, ready(sweep, home, {}), sweep, typed, known)


def test_what_is_written_is_what_readers_find(weird: Path) -> None:
    files = files_of(weird, *SWEPT, "name=北大")
    write_sweep.create(files)
    known = read_json(files.home.sweep_json) or {}
    assert [(one["n"], one["label"], one["shared"]) for one in known["points"]] == [
        (0, "lr=1e-5,cutoff=64", 0),
        (1, "lr=1e-5,cutoff=128", 1),
        (2, "lr=1e-4,cutoff=64", 0),
        (3, "lr=1e-4,cutoff=128", 1),
    ]
    assert known["keys"] == ["train.learning_rate", "train.cutoff_len"] and known["name"] == "北大"
    assert known["pipeline"] == ["prepare", "train", "merge", "infer"] and known["jobs"]["report"]["job_id"] is None
    assert len({one["config"] for one in known["points"]}) == 4
    for number in range(4):
        run = files.home.point(number)
        document = read_json(run.run_json) or {}
        assert document["run_id"] == run.run_id and document["sweep"] == files.home.sweep_id
        assert ANY_POINT not in json.dumps(document["jobs"]) and document["cwd"] == os.getcwd()
        assert ANY_POINT not in "".join(texts(run).values())
        assert run.data.parent.resolve() == files.home.shared(number % 2).path.resolve()


def test_few_files_a_point(tmp_path: Path) -> None:
    write_sweep.create(files_of(tmp_path, "train.seed=range(40)"))
    entries = [path for path in (tmp_path / "20260101-000000-扫描-0000").rglob("*") if not path.is_dir()]
    assert len(entries) < 2 * 40 + 10, sorted(entries)
    assert sum(path.lstat().st_size for path in entries) < 40 * 6000 + 60_000


@pytest.mark.parametrize("failing", ["write_text", "write_json", "_write_point"])
def test_where_it_cannot_be_written_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    files = files_of(tmp_path, *SWEPT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "/runs/x")

    monkeypatch.setattr(write_sweep, failing, full)
    with pytest.raises(PkuslurmError, match=r"run_root=.*: /runs/x: No space left on device"):
        write_sweep.create(files)
    assert not files.home.path.exists()


def test_two_launches_never_share_a_directory(tmp_path: Path) -> None:
    write_sweep.create(files_of(tmp_path, *SWEPT))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(PkuslurmError, match="File exists"):
        write_sweep.create(files_of(tmp_path, *SWEPT))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("written", range(3))
def test_an_extension_whose_launcher_died_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Points were written, and sweep.json does not know them yet: the next ones get the same numbers."""
    first = files_of(tmp_path, *SWEPT)
    write_sweep.create(first)
    shares = dict(first.head["share_keys"])
    died = files_of(tmp_path, "train.cutoff_len=256,64", "train.lora_rank=4,2", first=4, shares=shares)
    assert [share.number for share in died.shares] == [2]
    write = write_sweep._write_point
    calls: list[object] = []

    def dies(*arguments: object) -> None:
        if len(calls) == written:
            raise KeyboardInterrupt
        calls.append(arguments)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(write_sweep, "_write_point", dies)
    with pytest.raises(KeyboardInterrupt):
        write_sweep.add(died)
    monkeypatch.setattr(write_sweep, "_write_point", write)
    # other points this time: what is shared may be another share
    again = files_of(tmp_path, "train.cutoff_len=64,256", "train.lora_rank=4,2", first=4, shares=shares)
    write_sweep.add(again)
    for member in again.members:
        run = again.home.point(member.entry["n"])
        assert (run.path / "shared").resolve() == again.home.shared(member.entry["shared"]).path.resolve()
        assert f"cutoff_len: {member.entry['values']['train.cutoff_len']}\n" in texts(run)["train.yaml"]


def test_points_that_are_added_use_what_is_there(tmp_path: Path) -> None:
    first = files_of(tmp_path, *SWEPT)
    write_sweep.create(first)
    more = files_of(tmp_path, "train.cutoff_len=128,512", first=4, shares=dict(first.head["share_keys"]))
    assert [one.entry["shared"] for one in more.members] == [1, 2] and [one.number for one in more.shares] == [2]
    before = {path: path.read_bytes() for path in first.home.path.rglob("*") if path.is_file()}
    write_sweep.add(more)
    assert {path: path.read_bytes() for path in before} == before, "what is there is not written again"


@pytest.mark.parametrize(
    ("launched", "same"),
    [
        ("cluster.array_parallelism=7", True),
        ("name=other", True),
        ("sweep.keep_merged=best", True),
        ("+train.warmup_ratio=0.1", False),
        ("infer.max_new_tokens=7", False),
        ("nodes=2", False),
    ],
)
def test_how_it_is_launched_makes_no_other_point(tmp_path: Path, launched: str, same: bool) -> None:
    found = [
        [one.entry["config"] for one in files_of(tmp_path, "train.lora_rank=4,8", *more).members]
        for more in ([], [launched])
    ]
    assert (found[0] == found[1]) is same

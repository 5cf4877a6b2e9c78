"""A point's files, made when it starts: the same as a run of it alone would have, for whom it is meant, once."""

from __future__ import annotations

import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkuslurm import sweep_files
from pkuslurm.compose import compose, compose_sweep
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import RunPlan, plan
from pkuslurm.points import ready
from pkuslurm.preflight.resolve import resolve
from pkuslurm.render.render import render
from pkuslurm.rundir import RunDir, read_json, write_json, write_text
from pkuslurm.submit import write_sweep
from pkuslurm.sweepdir import SweepDir, save
from pkuslurm.worker.unpack import FOLDERS, texts, unpack

SWEPT = ("train.learning_rate=1e-5,1e-4", "+train.val_size=0.1,0.2", "infer.expect=北大,PKU")
MODES = {"private": (0o700, 0o600), "group": (0o750, 0o640)}


@pytest.fixture(autouse=True)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(getattr(request, "param", 0o022))
    yield
    os.umask(before)


def made(folder: Path, *overrides: str) -> SweepDir:
    """A sweep that has not begun, written as launch writes it."""
    typed = [f"run_root={folder}", f"cache_root={folder}/cache", *overrides]
    sweep = compose_sweep(typed)
    home = SweepDir(folder / "20260101-000000-扫描 sweep-0000")
    write_sweep.create(sweep_files.sweep_files(home, ready(sweep, home, {}), sweep, typed))
    return home


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_a_points_files_are_those_of_the_run_alone(weird: Path, cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkuslurm.points.check_slurm", lambda _: None)
    monkeypatch.setattr("pkuslurm.points.check_machine", lambda *_: None)
    sweep = compose_sweep(
        [f"run_root={weird}", f"cache_root={weird}/cache", f"cluster={cluster}", "model=tiny", *SWEPT]
    )
    home = made(weird, f"cluster={cluster}", "model=tiny", *SWEPT)
    assert len(sweep.points) == 8
    for number, point in enumerate(sweep.points):
        run = home.point(number)
        unpack(run)
        alone = compose(point.overrides)
        whole = plan(alone.config)
        steps = RunPlan(alone.config, tuple(job for job in whole.jobs if job.kind != "report"))
        inputs = resolve(alone.config, {}, lenient=False)
        python = str(read_json(run.run_json)["versions"]["interpreter"])  # type: ignore[index]
        expected = {
            name: text for name, text in render(steps, inputs, run, alone.yaml, python).texts.items()
            if name != "jobs/prepare.json"
        }  # fmt: skip
        found = {
            path.relative_to(run.path).as_posix(): path.read_text(encoding="utf-8")
            for path in run.path.rglob("*")
            if path.is_file() and path != run.run_json and not path.is_relative_to(run.path / "shared")
        }
        assert found == expected
        shared = run.path / "shared"
        assert (shared / "dataset_info.json").read_text(encoding="utf-8") == expected["dataset_info.json"]
        prepare = read_json(shared / "jobs" / "prepare.json") or {}
        assert prepare["payload"]["train_args"]["val_size"] == alone.config.train["val_size"]
        assert Path(prepare["payload"]["data_dir"]).resolve() == Path(run.data).resolve()


def test_before_it_starts_a_point_is_two_entries(tmp_path: Path) -> None:
    home = made(tmp_path, *SWEPT)
    assert [sorted(path.name for path in home.point(n).path.iterdir()) for n in range(8)] == [
        ["run.json", "shared"]
    ] * 8
    assert (home.point(0).path / "shared").resolve() == home.shared(0).path.resolve()
    assert (home.point(2).path / "shared").resolve() == home.shared(1).path.resolve()


def test_once_more_changes_nothing(tmp_path: Path) -> None:
    run = made(tmp_path, *SWEPT).point(3)
    unpack(run)
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    unpack(run)
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_what_was_changed_stays_and_what_is_missing_is_made(tmp_path: Path) -> None:
    run = made(tmp_path, *SWEPT).point(3)
    unpack(run)
    write_text(run.job("train"), '{"first_attempt": 2}')
    run.train_yaml.unlink()
    shutil.rmtree(run.path / "done")
    unpack(run)
    assert read_json(run.job("train")) == {"first_attempt": 2}
    assert run.train_yaml.is_file() and (run.path / "done").is_dir()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], indirect=True)
@pytest.mark.parametrize("access", MODES)
def test_files_are_for_whom_they_are_meant_whatever_the_umask(tmp_path: Path, access: str) -> None:
    home = made(tmp_path, "train.lora_rank=8,16", f"access={access}")
    unpack(home.point(1))
    folder_mode, file_mode = MODES[access]
    wrong = {
        str(path.relative_to(home.path)): oct(mode)
        for path in [home.path, *home.path.rglob("*")]
        if not path.is_symlink()
        and (mode := stat.S_IMODE(path.stat().st_mode)) != (folder_mode if path.is_dir() else file_mode)
    }
    assert wrong == {}


def test_two_nodes_at_once(tmp_path: Path) -> None:
    run = made(tmp_path, *SWEPT).point(5)
    expected = texts(run)
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work() -> None:
        try:
            start.wait()
            unpack(run)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {name: (run.path / name).read_text(encoding="utf-8") for name in expected} == expected
    assert sorted(path.name for path in run.path.iterdir() if path.is_dir()) == sorted([*FOLDERS, "shared"])
    assert list(run.path.rglob(".*")) == [], "no half of a file is left"


def torn(run: RunDir) -> None:
    text = run.run_json.read_text(encoding="utf-8")
    run.run_json.write_text(text[: len(text) // 2], encoding="utf-8")


def gone(run: RunDir) -> None:
    run.run_json.unlink()


def no_texts(run: RunDir) -> None:
    write_json(run.run_json, {"jobs": {}})


def torn_family(run: RunDir) -> None:
    file = SweepDir(run.path.parent).texts(0)
    file.write_text(file.read_text(encoding="utf-8")[:100], encoding="utf-8")


@pytest.mark.parametrize(("damage", "named"), [
    (torn, "run.json"), (gone, "run.json"), (no_texts, "run.json"), (torn_family, "texts-0.json")
])  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path: Path, damage: Any, named: str) -> None:
    run = made(tmp_path, *SWEPT).point(1)
    damage(run)
    with pytest.raises(PkuslurmError, match=named):
        unpack(run)
    assert not (run.path / "jobs").exists()


def test_a_run_that_is_no_point_is_left_alone(tmp_path: Path) -> None:
    home = made(tmp_path, *SWEPT)
    before = sorted(home.path.rglob("*"))
    unpack(home.own)
    unpack(home.shared(0))
    unpack(RunDir(home.point(0).path / "shared"))
    assert sorted(home.path.rglob("*")) == before


def test_the_point_number_may_be_anything(tmp_path: Path) -> None:
    """Also where the sweep's texts were written for another family of points."""
    home = made(tmp_path, "pipeline=full,train", "train.lora_rank=8,16")
    for number in range(4):
        unpack(home.point(number))
        assert (home.point(number).path / "merge.yaml").exists() is (number < 2)
    whole = read_json(home.sweep_json) or {}
    save(home, whole)  # only what is known is written back
    assert read_json(home.sweep_json) == whole

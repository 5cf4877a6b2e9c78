"""The run directory: whole, and for whom it is meant, whatever the umask."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pkuslurm.compose import compose
from pkuslurm.errors import PkuslurmError
from pkuslurm.plan.plan import plan
from pkuslurm.preflight.resolve import resolve
from pkuslurm.render.render import RunFiles, render
from pkuslurm.rundir import RunDir, read_json, write_text
from pkuslurm.submit.write import create, new_run_id


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def made(folder: Path, *overrides: str) -> RunFiles:
    composed = compose([f"run_root={folder}", f"cache_root={folder}/cache", *overrides])
    steps = plan(composed.config)
    run = RunDir(folder / new_run_id("a"))
    files = render(steps, resolve(composed.config, {}, lenient=False), run, composed.yaml, "python")
    create(steps, files, composed.overrides, composed.settings)
    return files


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077], indirect=True)
@pytest.mark.parametrize(("access", "folder_mode", "mode"), [("private", 0o700, 0o600), ("group", 0o750, 0o640)])
def test_access_is_what_was_asked_whatever_the_umask(
    weird: Path, umask: int, access: str, folder_mode: int, mode: int
) -> None:
    run = made(weird, f"access={access}").run
    for path in (run.path, *run.path.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (folder_mode if path.is_dir() else mode), path


def test_what_is_written_is_what_was_rendered(weird: Path) -> None:
    files = made(weird, "nodes=2")
    for name, text in files.texts.items():
        assert (files.run.path / name).read_text(encoding="utf-8") == text
    document = read_json(files.run.run_json) or {}
    assert document["overrides"][-1] == "nodes=2"
    assert list(document["jobs"]) == ["prepare", "train", "merge", "infer", "report"]
    train = yaml.safe_load(files.texts["train.yaml"])
    assert train["tokenized_path"] == str(files.run.data) and train["use_cpu"] is True
    with pytest.raises(PkuslurmError, match="File exists"):
        create(plan(compose([]).config), files, (), ())


def test_run_ids_are_safe_as_names() -> None:
    assert re.fullmatch(r"\d{8}-\d{6}-lr=1e-5-ds-我的-数据-[0-9a-f]{4}", new_run_id("lr=1e-5,ds:我的 数据/"))
    assert re.fullmatch(r"\d{8}-\d{6}-run-[0-9a-f]{4}", new_run_id("../.."))


def test_a_file_is_whole_or_not_there(weird: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weird / "a.json"
    write_text(file, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new" * 1000)
    assert file.read_text(encoding="utf-8") == "old"
    assert [path.name for path in weird.iterdir()] == ["a.json"]

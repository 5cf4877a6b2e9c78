"""Runs that were made long ago, by another version, elsewhere, or by somebody else; and those of which parts are gone.

Each verb understands them, or refuses in a line.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pkuslurm import again, cli, retry, serving
from pkuslurm.read import status
from pkuslurm.read.rules import STATES
from tests import standin_run, verify
from tests.conftest import REPO
from tests.read.fake_run import alive, edit
from tests.standin_run import Made

# run.json, jobs/ and config.yaml as the first version that could do a whole run wrote them
RECORDED = Path(__file__).with_name("recorded") / "first_version.json"
OLD_ID = "20261128-195101-tiny-identity-e28d"
READING = ("status", "logs", "report", "prune")
ACTING = ("retry", "merge", "infer", "serve", "cancel")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run = standin_run.make(tmp_path_factory.mktemp("old"))
    assert run.ended.code == 0, run.ended.err
    return run


@pytest.fixture
def begun(made: Made, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs are called in this process; whose jobs would be started is noted, and none is."""
    found: list[str] = []

    def noted(run: Any, kinds: Any, *_: Any, begin: Callable[[], None] = lambda: None, **__: Any) -> int:
        begin()
        found.append(f"{run.path} {' '.join(kinds)}")
        return 1

    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(made.cwd)
    for module in (retry, again, serving):
        monkeypatch.setattr(module, "run_jobs", noted)
    return found


@pytest.fixture
def typed(begun: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """A verb: its exit code, and what it said. A refusal is one line; nothing is a bug."""

    def type_it(*words: str | Path) -> tuple[int, str]:
        code = cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert code in (0, 1, 2) and "bug of ours" not in err and "Traceback" not in err, (words, err)
        assert code != 2 or len([line for line in err.splitlines() if line.startswith("pkuslurm: ")]) == 1, err
        assert not verify.terminal(out + err), (words, out, err)
        return code, out + err

    return type_it


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The recorded run, in a folder as it was then."""
    run = tmp_path / "runs" / OLD_ID
    standin = standin_run.standin(tmp_path)
    here = {"@RUN@": run, "@HERE@": tmp_path, "@REPO@": REPO, "@STANDIN@": standin, "@PYTHON@": sys.executable}
    for name, text in json.loads(RECORDED.read_text(encoding="utf-8")).items():
        for word, value in here.items():
            text = text.replace(word, str(value))
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1" if file.suffix in (".safetensors", ".arrow") else "utf-8"))
    return run


def test_an_older_run_is_understood(old: Path, typed: Callable[..., tuple[int, str]], begun: list[str]) -> None:
    assert not (old / "state" / "train.attempt.json").exists(), "it knew none of that"
    assert verify.problems(old) == []
    code, told = typed("status", old, "--json")
    found = json.loads(told)
    assert code == 0 and found["state"] == "COMPLETED" and found["passed"] is True
    assert {job["state"] for job in found["jobs"]} == {"COMPLETED"}
    assert [one["state"] for one in json.loads(typed("runs", "--json", "--run-root", old.parent)[1])] == ["COMPLETED"]
    for verb in ("logs", "report", "prune", "cancel"):
        assert typed(verb, old)[0] == 0, verb
    for verb, words in (("retry", "nothing to do"), ("merge", "is complete"), ("infer", "is complete")):
        code, told = typed(verb, old)
        assert code == 0 and words in told, told
    assert begun == []
    assert typed("infer", old, "prompts=[你好]", "expect=null")[0] == 1 and begun == [f"{old} infer"], (
        "by its config.yaml"
    )
    assert typed("merge", old, "--force")[0] == 1 and begun[1:] == [f"{old} merge"]


def test_an_older_run_goes_on(old: Path, made: Made) -> None:
    """By this version's worker, on the job files of then."""
    shutil.rmtree(old / "merged")
    for kind in ("merge", "infer", "report"):
        (old / "done" / f"{kind}.json").unlink()
    ended = made.verb("retry", old)
    assert ended.code == 0, ended.err
    now = status.read(old)
    assert now.state == "COMPLETED" and [job.attempt for job in now.jobs] == [1, 1, 2, 2, 2]
    assert verify.problems(old) == []


@pytest.mark.parametrize("version", [2, 1000, 10**30])
def test_a_newer_run_is_refused_in_words(
    made: Made, tmp_path: Path, typed: Callable[..., tuple[int, str]], begun: list[str], version: int
) -> None:
    run = made.copied(tmp_path)
    edit(run / "run.json", schema_version=version)
    for verb in (*READING, *ACTING):
        code, told = typed(verb, run)
        assert code == 2 and f"schema_version {version}" in told and "upgrade pkuslurm" in told, (verb, told)
    assert [one["state"] for one in json.loads(typed("runs", "--json", "--run-root", tmp_path)[1])] == ["UNKNOWN"]
    assert begun == []


@pytest.mark.parametrize("how", ["moved", "renamed", "copied", "linked"])
def test_a_run_that_is_elsewhere_now(
    made: Made, tmp_path: Path, typed: Callable[..., tuple[int, str]], begun: list[str], how: str
) -> None:
    """It is read as ever; nothing is started for it, which would work on in the old place; a link is no other place."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    first = made.copied(tmp_path / "first")
    for file in (first / "jobs").glob("*.json"):
        edit(file, run_dir=str(first))
    second = tmp_path / "second" / (first.name if how in ("moved", "copied") else "other name")
    if how == "linked":
        second.symlink_to(first)
    else:
        (shutil.copytree if how == "copied" else shutil.move)(first, second)
    code, told = typed("status", second, "--json")
    assert code == 0 and json.loads(told)["state"] == "COMPLETED", told
    for verb in ("logs", "report", "prune"):
        assert typed(verb, second)[0] == 0, verb
    assert typed("cancel", second)[0] == (2 if how == "copied" else 0)
    assert begun == []
    (second / "done" / "infer.json").unlink()
    for words in (["retry"], ["infer"], ["merge", "--force"], ["serve"]):
        code, told = typed(words[0], second, *words[1:])
        assert (code == 2) == (how != "linked"), (words, told)
        if code == 2:
            assert str(first) in told and ("is a copy of" if how == "copied" else "was moved here") in told, told
    assert (begun == []) == (how != "linked"), begun


def test_a_copy_cancels_nothing(made: Made, tmp_path: Path, typed: Callable[..., tuple[int, str]]) -> None:
    """Its run.json names the jobs, or the launcher, of the run that it was copied from."""
    run = made.copied(tmp_path)
    edit(run / "run.json", launcher=alive())
    code, told = typed("cancel", run)
    assert code == 2 and f"is a copy of {made.path}" in told and "name that one" in told


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_run_of_another_user(
    made: Made, tmp_path: Path, typed: Callable[..., tuple[int, str]], begun: list[str]
) -> None:
    run = made.copied(tmp_path)
    for path in (run, *run.rglob("*")):
        os.chown(path, 65534, 65534)
    assert json.loads(typed("status", run, "--json")[1])["state"] == "COMPLETED"
    assert typed("logs", run)[0] == 0
    (run / "done" / "infer.json").unlink()
    for verb in ACTING:
        code, told = typed(verb, run)
        assert code == 2 and "belongs to another user" in told, (verb, told)
    assert typed("prune", run)[0] == 2 and begun == []


def parts(run: Path) -> list[str]:
    """Every folder and file of a run, but the stand-in's own."""
    found = [str(path.relative_to(run)) for path in sorted(run.rglob("*"))]
    return [name for name in found if not name.startswith(("views", "logs/"))]


def test_each_part_gone(made: Made, tmp_path: Path, typed: Callable[..., tuple[int, str]]) -> None:
    """In turn. What proved something is missed; what did not is not."""
    run = made.copied(tmp_path)
    for file in (run / "jobs").glob("*.json"):
        edit(file, run_dir=str(run))
    aside = tmp_path / "aside"
    proving = {"run.json", "done", "answers.jsonl", "report.html", "adapter", "merged", "data", "data/train"}
    for kind in ("prepare", "train", "merge", "infer", "report"):
        marker = json.loads((run / "done" / f"{kind}.json").read_bytes())
        proving |= {f"done/{kind}.json", *(entry["path"] for entry in marker["artifacts"])}
    for number, name in enumerate(parts(run)):
        gone = run / name
        gone.rename(aside)
        code, told = typed("status", run, "--json")
        state = json.loads(told)["state"] if code == 0 else "refused"
        assert (state != "COMPLETED") == (name in proving), (name, state)
        assert state in (*STATES, "refused")
        # all verbs for what all have in common; else one after another, which takes less long
        verbs = (*READING, *ACTING)
        with standin_run.kept(run):
            for verb in verbs if "/" not in name else (verbs[number % len(verbs)],):
                typed(verb, run)
        typed("runs", "--run-root", tmp_path)
        if gone.is_dir():
            shutil.rmtree(gone)
        aside.replace(gone)
    assert status.read(run).state == "COMPLETED", "all of it is back"


def test_an_empty_folder_is_no_run(tmp_path: Path, typed: Callable[..., tuple[int, str]]) -> None:
    (tmp_path / "empty").mkdir()
    for verb in (*READING, *ACTING):
        code, told = typed(verb, tmp_path / "empty")
        assert code == 2 and "there is no run" in told, told

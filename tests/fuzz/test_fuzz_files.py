"""Torn and changed files of a run or a sweep that has ended: the same verdict, or a doubt in words; never a traceback,
never COMPLETED for what the damaged file had to prove."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm import again, cli, guard, retry
from pkuslurm.read import status
from pkuslurm.read.rules import STATES
from tests import standin_run, verify
from tests.fuzz.mutations import VALUES, damaged_json, examples, places, put, spelled
from tests.read import fake_sweep
from tests.standin_run import Made, jsons, kept


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    run = standin_run.make(tmp_path_factory.mktemp("fuzz"))
    assert run.ended.code == 0, run.ended.err
    return run


@pytest.fixture
def here(made: Made, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The verbs are called in this process, where no job is ever started."""

    def nothing(*_: Any, begin: Callable[[], None] = lambda: None, **__: Any) -> int:
        begin()
        return 1

    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(made.cwd)
    monkeypatch.setattr(retry, "run_jobs", nothing)
    monkeypatch.setattr(again, "run_jobs", nothing)
    return made.path


def typed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """A verb as it is typed: its exit code and what it printed. Asserts that it is no bug."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert code in (0, 1, 2) and "bug of ours" not in err and "Traceback" not in err, (words, err)
    assert code != 2 or err.count("\n") == 1, err
    assert not verify.terminal(out + err), (words, out, err)
    return code, out


READING = ("status", "runs", "logs", "report", "prune", "cancel")
ACTING = ("retry", "merge", "infer")


def state(capsys: pytest.CaptureFixture[str], run: Path) -> str:
    """What status tells; "refused" where it refuses."""
    code, out = typed(capsys, "status", run, "--json")
    found = str(json.loads(out)["state"]) if code == 0 else "refused"
    assert found in (*STATES, "refused")
    return found


def any_verb(capsys: pytest.CaptureFixture[str], run: Path, verb: str) -> None:
    typed(capsys, *([verb, "--run-root", run.parent] if verb == "runs" else [verb, run]))


@contextmanager
def instead(file: Path, text: str | bytes) -> Iterator[None]:
    """``file`` holds something else for a while."""
    before = file.read_bytes()
    try:
        file.write_bytes(spelled(text).encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        yield
    finally:
        file.write_bytes(before)


@examples(100)
@given(data=st.data(), verb=st.sampled_from((*READING, *ACTING)))
def test_damaged_json(here: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject, verb: str) -> None:
    file = data.draw(st.sampled_from(jsons(here)))
    text = data.draw(damaged_json(file.read_text(encoding="utf-8")))
    with kept(here), instead(file, text):
        if state(capsys, here) == "COMPLETED" and file.parent.name == "done":
            assert not verify.problems(here, content=False), "what it says is still true"
        any_verb(capsys, here, verb)


def test_a_byte_of_any_file_that_proves_something(here: Path) -> None:
    """Each file that a marker names, and each marker: one byte changed, one byte less, nothing."""
    for kind in ("prepare", "train", "merge", "infer"):
        entries = json.loads((here / "done" / f"{kind}.json").read_bytes())["artifacts"]
        for file in (here / "done" / f"{kind}.json", *(here / entry["path"] for entry in entries)):
            whole = file.read_bytes()
            at = whole.rindex(b'"sha256"') + 12 if file.parent.name == "done" else len(whole) // 2
            flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            for damaged in (flipped, whole[: len(whole) // 2], b"", whole + b"x"):
                with instead(file, damaged):
                    job = status.read(here).job(kind)
                    assert job is not None and job.state == "FAILED" and job.reason, (file, damaged[:40])
                    assert status.read(here).state != "COMPLETED"
    assert status.read(here).state == "COMPLETED"


def test_every_prefix_of_a_description(here: Path) -> None:
    """run.json, a marker and a state file as a crash of another file system might leave them."""
    for file in (here / "run.json", here / "done" / "train.json", here / "state" / "train.json"):
        whole = file.read_bytes().rstrip()
        for end in range(0, len(whole), 7):
            with instead(file, whole[:end]):
                now = status.read(here)
            assert (now.state == "COMPLETED") == (file.parent.name == "state"), (file, end)


def test_every_odd_value_at_the_places_that_are_read(here: Path) -> None:
    files = ("run.json", "done/train.json", "state/train.json", "state/train.attempt.json", "jobs/merge.json")
    for name in files:
        file = here / name
        value = json.loads(file.read_bytes())
        odd = [(path, raw) for path in places(value) for raw in VALUES if len(path) < 3]
        for path, raw in odd[:: 11 if name == "run.json" else 5]:
            with instead(file, put(value, path, raw)):
                now = status.read(here)
                json.dumps(now.to_json(), allow_nan=False).encode()
                assert now.state in STATES
                if now.state == "COMPLETED" and name.startswith("done/"):
                    assert not verify.problems(here, content=False), (path, raw[:40])


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = fake_sweep.example(tmp_path_factory.mktemp("sweep"), 3, steps=6).path
    (home / "groups").mkdir()
    group = {"members": ["0", "1"], "jobs": {"train": {"key": "k", "job_id": None, "asked": None, "held": False}}}
    (home / "groups" / "0.json").write_text(json.dumps(group), encoding="utf-8")
    return home


SWEEPS = ("sweep.json", "sweep.json", "groups/0.json", "0/run.json", "shared/0/run.json", "shared/0/done/prepare.json")


@examples(60)
@given(data=st.data(), file=st.sampled_from(SWEEPS), verb=st.sampled_from(READING))
def test_a_damaged_sweep(
    here: Path, sweep: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject, file: str, verb: str
) -> None:
    text = data.draw(damaged_json((sweep / file).read_text(encoding="utf-8")))
    with kept(sweep), instead(sweep / file, text):
        state(capsys, sweep)
        any_verb(capsys, sweep, verb)
        any_verb(capsys, sweep / "0", verb)


ODD: tuple[Callable[[Path], None], ...] = (
    os.mkfifo,
    lambda file: file.symlink_to("/dev/zero"),
    Path.mkdir,
    lambda file: file.symlink_to(file.name),
)


@pytest.mark.parametrize(
    "name", ["state/train.json", "done/train.json", "results/train.json", "answers.jsonl", "run.json"]
)
def test_files_that_are_no_files(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """A pipe that nobody writes to, a device without an end, a folder, a link to itself: in another user's run."""
    file = here / name
    whole = file.read_bytes()
    for make in ODD:
        file.unlink()
        try:
            make(file)
            found = state(capsys, here)
            any_verb(capsys, here, "report")
            any_verb(capsys, here, "logs")
        finally:
            file.rmdir() if file.is_dir() and not file.is_symlink() else file.unlink()
            file.write_bytes(whole)
        proves = not name.startswith(("state/", "results/"))
        assert (found != "COMPLETED") == proves, (make, found)


def test_a_bug_of_ours_would_be_told_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """What the tests above look for does exist."""

    def broken() -> int:
        raise RecursionError("\x1b[2J")

    assert guard.guarded(broken) == 1
    err = capsys.readouterr().err
    assert "bug of ours" in err and "\\x1b" in err and err.count("\n") == 1
    Path(err.rsplit(" ", 1)[1].strip()).unlink()

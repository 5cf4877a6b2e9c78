"""What a list of runs remembers of those that have ended: none is opened again, and none is ever shown as it no longer
is.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm.read import find, status
from pkuslurm.read.find import Listed
from pkuslurm.read.memory import Memory
from pkuslurm.rundir import RunDir, write_json, write_text
from pkuslurm.slurm import commands, parse
from tests.conftest import environment
from tests.read import fake_run, fake_sweep
from tests.read.fake_run import edit, finished, make, state
from tests.read.many_runs import age, counted, finish, living

GONE = parse.Row("8", "key-8", "CANCELLED", "CANCELLED", None, None, "", "", None, "me")
# the command itself, and on stderr what it opens
WATCHED = """\
import sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from pkuslurm.cli import main
code = main()
print("\\n".join(opened), file=sys.stderr)
sys.exit(code)
"""


def listed(root: Path) -> list[Listed]:
    """As the command lists them, and as they are."""
    found = find.list_runs([root], Memory(root.parent / "ended.json"))
    assert found == find.list_runs([root]), "what is remembered is not as it is"
    return found


def remembered(root: Path) -> set[str]:
    entries = json.loads((root.parent / "ended.json").read_text(encoding="utf-8"))["entries"]
    return {Path(folder).name for folder, entry in entries.items() if len(entry) > 2}


def test_a_list_opens_no_finished_run_and_asks_slurm_once(weird: Path) -> None:
    root = weird / "runs"
    finish(root, 30)
    living(root, 5)
    path, log = counted(weird / "programs")
    env = environment(weird, PATH=path, PKUSLURM_RUN_ROOT=str(root))
    told, opened = [], []
    for _ in range(2):
        words = [sys.executable, "-c", WATCHED, "runs", "--json"]
        done = subprocess.run(words, env=env, cwd=weird, capture_output=True, encoding="utf-8", check=True)
        told.append(json.loads(done.stdout))
        opened.append([name for name in done.stderr.splitlines() if name.startswith(str(root))])
        assert log.read_text(encoding="utf-8").splitlines() == [str(log.parent / "squeue")], "one call for all"
        log.write_text("", encoding="utf-8")
    assert told[0] == told[1] and [run["state"] for run in told[0]] == ["RUNNING"] * 5 + ["COMPLETED"] * 30
    assert len([name for name in opened[0] if "20261101-" in name]) > 300, "the first time all are read"
    assert not [name for name in opened[1] if "20261101-" in name], "then none"
    assert [name for name in opened[1] if "20261102-" in name], "what lives is looked at every time"


CHANGES: dict[str, tuple[Callable[[RunDir], object], str]] = {
    "a model is removed": (lambda run: (run.merged / "model.safetensors").unlink(), "FAILED"),
    "an answer is edited": (lambda run: run.answers.write_text("{}\n"), "FAILED"),
    "a marker is removed": (lambda run: run.done("infer").unlink(), "FAILED"),
    "a marker is damaged": (lambda run: run.done("train").write_text("{"), "FAILED"),
    "it runs once more": (lambda run: state(run, "report", "RUNNING", attempt=2, **fake_run.alive()), "RUNNING"),
    "it is named anew": (lambda run: edit(run.run_json, name="new"), "COMPLETED"),
    "it was pruned": (lambda run: shutil.rmtree(run.merged), "FAILED"),
    "run.json is damaged": (lambda run: run.run_json.write_text("{"), "UNKNOWN"),
    "a file of the same length": (lambda run: run.answers.write_bytes(run.answers.read_bytes()[::-1]), "FAILED"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_read_anew(tmp_path: Path, change: str) -> None:
    do, word = CHANGES[change]
    root = tmp_path / "runs"
    run, other = finished(root, run_id="changed"), finished(root, run_id="other")
    age(root, 3600)
    assert [item.state for item in listed(root)] == ["COMPLETED"] * 2
    assert remembered(root) == {"changed", "other"}
    do(run)
    assert {item.path.name: item.state for item in listed(root)} == {"changed": word, "other": "COMPLETED"}
    assert other.run_id in remembered(root)


def test_nothing_is_remembered_of_what_may_still_change(tmp_path: Path) -> None:
    """What was written just now, what Slurm was asked about, and what a process is looked for."""
    root = tmp_path / "runs"
    finished(root, run_id="fresh")
    killed = make(root, "killed")
    state(killed, "prepare", "RUNNING")
    age(killed.path, 3600)
    for run in living(root, 1):
        age(run.path, 3600)
    listed(root)
    assert remembered(root) == set()


def test_failed_runs_are_remembered_where_files_say_so(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run = make(root, "failed")
    fake_run.complete(run, "prepare")
    state(run, "train", "FAILED", reason="out of luck")
    age(run.path, 3600)
    assert [item.state for item in listed(root)] == ["FAILED"]
    assert remembered(root) == {"failed"}
    assert status.read(run.path).job("merge").state == "SKIPPED"  # type: ignore[union-attr]  # by its parent


def test_a_sweep_is_one_entry_and_any_point_undoes_it(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    home = fake_sweep.make(root, [{"lr": "1"}, {"lr": "2"}])
    for number in range(2):
        fake_sweep.finish(home.point(number), 0.1)
    write_text(home.path / "report.html", "done")
    write_json(home.own.job("report"), {"kind": "report", "run_id": home.sweep_id, "first_attempt": 1})
    fake_run.mark(home.own, "report", home.path / "report.html")
    state(home.own, "report", "COMPLETED")
    age(root, 3600)
    assert [(item.state, item.points) for item in listed(root)] == [("COMPLETED", 2)]
    assert remembered(root) == {home.sweep_id}
    (home.point(1).merged / "model.safetensors").unlink()
    assert [(item.state, item.points) for item in listed(root)] == [("FAILED", 2)]


def test_it_forgets_what_is_gone_and_survives_damage(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    run, other = finish(root, 2)
    listed(root)
    (root / other.run_id).rename(tmp_path / "elsewhere")
    assert [item.run_id for item in listed(root)] == [run.run_id]
    assert remembered(root) == {run.run_id}
    file = tmp_path / "ended.json"
    assert file.stat().st_mode & 0o077 == 0
    for text in ("", "{", "[]", '{"form": 1}', json.dumps({"form": "1 0", "entries": {}, "shapes": []})):
        file.write_text(text, encoding="utf-8")
        assert [item.run_id for item in listed(root)] == [run.run_id]
        assert remembered(root) == {run.run_id}
    file.unlink()
    file.mkdir()  # it cannot be written: never mind
    assert [item.run_id for item in listed(root)] == [run.run_id]


def test_the_newest_is_found_without_opening_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "runs"
    runs = finish(root, 3)
    edit(runs[0].run_json, created="2027-01-01T00:00:00+08:00")
    age(runs[0].path, 3600)
    assert find.find(None, [root], Memory(tmp_path / "ended.json")) == runs[0].path
    find.list_runs([root], Memory(tmp_path / "ended.json"))
    memory = Memory(tmp_path / "ended.json")
    monkeypatch.setattr("pkuslurm.read.memory.read_json", lambda file: pytest.fail(f"{file} is read"))
    assert find.find(None, [root], memory) == runs[0].path
    monkeypatch.undo()
    edit(runs[1].run_json, created="2028-01-01T00:00:00+08:00")
    assert find.find(None, [root], Memory(tmp_path / "ended.json")) == runs[1].path


@pytest.mark.parametrize(
    ("controller", "accounting", "kept"),
    [
        (commands.Answer({}, True), commands.Answer({"8": GONE}, True), True),
        (commands.Answer({}, True), commands.Answer({}, True), False),
        (commands.Answer({"8": GONE}, True), commands.Answer({}, True), False),
        (commands.Answer({}, False, "no answer"), commands.Answer({"8": GONE}, True), False),
        (commands.Answer({}, True), commands.Answer({}, False, "there is no sacct"), False),
    ],
    ids=["forgotten", "not yet in accounting", "still known", "silent", "no accounting"],
)
def test_a_slurm_job_is_remembered_once_the_controller_has_forgotten_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    controller: commands.Answer,
    accounting: commands.Answer,
    kept: bool,
) -> None:
    """While it knows it, it can be requeued; and where one of the two does not answer, the other may not know all."""
    monkeypatch.setattr(commands, "queue", lambda ids: controller)
    monkeypatch.setattr(commands, "accounting", lambda ids: accounting)
    root = tmp_path / "runs"
    run = make(root, "on-slurm")
    entry = {"job_id": "8", "key": "key-8", "first_attempt": 1, "parents": [], "num_nodes": 1}
    edit(run.run_json, executor="slurm", launcher=None, jobs={"train": entry}, pipeline=["train"])
    age(root, 3600)
    listed(root)
    assert (remembered(root) == {"on-slurm"}) is kept

"""The verbs: mistakes in one line, one JSON document, sizes and settings, light to start, harmless for others' runs."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm.read import disk
from pkuslurm.rundir import RunDir, write_text
from tests.conftest import environment
from tests.read.fake_run import edit, finished, make

READING = ("status", "logs", "report", "cancel")


@pytest.fixture
def root(weird: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where two runs lie, whose ids begin alike."""
    monkeypatch.setenv("HOME", str(weird))
    monkeypatch.setenv("XDG_STATE_HOME", str(weird / "state"))
    monkeypatch.setenv("PKUSLURM_RUN_ROOT", str(weird / "runs"))
    monkeypatch.chdir(weird)
    finished(weird / "runs", run_id="20261124-a", created="2026-11-24T10:00:00+08:00")
    make(weird / "runs", "20261123-b", created="2026-11-23T10:00:00+08:00")
    return weird / "runs"


def half(root: Path) -> list[str]:
    (root / "20261123-b" / "run.json").write_text('{"schema_version": 1, "jobs"', encoding="utf-8")
    return ["status", "20261123-b"]


def newer(root: Path) -> list[str]:
    edit(root / "20261123-b" / "run.json", schema_version=2)
    return ["status", "20261123-b"]


def sweep(root: Path) -> list[str]:
    write_text(root / "20261120-sweep" / "sweep.json", "{}")
    return ["infer", "20261120-sweep"]


def a_file(root: Path) -> list[str]:
    (root / "notes.txt").touch()
    return ["status", str(root / "notes.txt")]


def named_file(root: Path) -> list[str]:
    Path("notes.txt").touch()
    return ["status", "notes.txt"]


MISTAKES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "a slip": (lambda root: ["stat"], "stat: no such verb; did you mean status?"),
    "a setting": (lambda root: ["nodes=2"], "settings go to launch"),
    "a word": (lambda root: ["xyzzy"], "no such verb; there are launch, runs, status"),
    "nothing": (lambda root: [], "pkuslurm: a verb is wanted: launch, runs"),
    "a setting in two words": (
        lambda root: ["infer", "20261124-a", "prompts=[Who", "am"],
        "am: RUN comes first, and a setting is",
    ),
    "an option": (lambda root: ["status", "--jsn"], "--jsn: not understood"),
    "a value": (lambda root: ["prune", "--older", "week"], "prune: argument --older: invalid float value: 'week'"),
    "a word too many": (lambda root: ["status", "20261124", "x"], "status x: not understood"),
    "no such run": (lambda root: ["status", "1999"], "RUN 1999: no such run; looked in "),
    "ambiguous": (lambda root: ["status", "2026"], "2 runs begin so: 20261124-a, 20261123-b; type more of it"),
    "a long name": (lambda root: ["status", "x" * 5000], "no such run"),
    "a long setting": (lambda root: ["infer", f"promts=[{'x' * 5000}]"], "config.yaml: it cannot be read"),
    "half a run.json": (half, "run.json is damaged"),
    "a newer one": (newer, "run.json has schema_version 2: a newer pkuslurm wrote it"),
    "a sweep": (sweep, "this is a sweep; name one of its points, 20261120-sweep/0"),
    "a file": (a_file, "is a file; name the run's folder"),
    "a file's name": (named_file, "is a file; name the run's folder"),
    "a folder": (lambda root: ["logs", str(root)], "there is no run (no run.json) at "),
    "an export": (lambda root: ["report", "20261124", "--export", "page.pdf"], "give a name that ends in .html"),
    "a damaged other verb": (lambda root: ["logs", half(root)[1]], "run.json is damaged"),
    "prune a damaged": (lambda root: ["prune", half(root)[1]], "run.json is damaged"),
    **{
        f"not yet: {verb}": (lambda root, verb=verb: [verb, "x"], f"{verb}: not yet built")  # type: ignore[misc]
        for verb in ("watch", "why")
    },
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake: str, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = MISTAKES[mistake]
    arguments = words(root)
    assert cli.main(arguments) == 2
    ended = capsys.readouterr()
    refused = [line for line in ended.err.splitlines() if not line.startswith("newest run: ")]
    assert len(refused) == 1 and message in refused[0] and refused[0].startswith("pkuslurm: ") and not ended.out


@pytest.mark.parametrize("denied", ["run.json", "folder"])
def test_a_run_that_may_not_be_read(
    denied: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As root nothing is denied: the system's refusal is played."""
    file = root / "20261124-a" / "run.json"
    real_stat, real_open, real_read = os.stat, os.open, Path.read_bytes

    def refuse(path: object) -> None:
        if str(path) == str(file):
            raise PermissionError(13, "Permission denied", str(path))

    def fake_stat(path: str, **more: object) -> os.stat_result:
        refuse(path)
        return real_stat(path, **more)  # type: ignore[arg-type]

    def fake_open(path: str, *flags: int, **more: int) -> int:
        refuse(path)
        return real_open(path, *flags, **more)

    def fake_read(path: Path) -> bytes:
        refuse(path)
        return real_read(path)

    if denied == "folder":
        monkeypatch.setattr(os, "stat", fake_stat)
    else:
        monkeypatch.setattr(os, "open", fake_open)
        monkeypatch.setattr(Path, "read_bytes", fake_read)
    assert cli.main(["status", str(file.parent)]) == 2
    err = capsys.readouterr().err
    assert "Permission denied; ask its owner to launch with access=group" in err and err.count("\n") == 1
    assert cli.main(["runs", "--json"]) == 0


def test_every_reading_verb_gives_one_document(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (*READING, "runs", "prune", "doctor"):
        words = [verb, "--json", *(["20261124"] if verb in READING else [])]
        assert cli.main(words) in (0, 1)
        assert json.loads(capsys.readouterr().out), verb


def test_runs_and_status_show_the_disk_and_the_settings(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(root / "20261124-a")
    write_text(run.merged / "big", "x" * 2_000_000)
    os.link(run.merged / "big", run.adapter / "the same")
    assert cli.main(["runs"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].split() == ["run", "state", "created", "size", "name"]
    assert "2.0 MiB" in told[1] and told[-1].startswith("2 runs, 2.0 MiB")
    assert cli.main(["status", "20261124"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("disk  2.0 MiB: ")
    at = told.index("settings that differ from the defaults")
    assert told[at + 1].split() == ["key", "value", "default", "from"]
    assert told[at + 2].split(maxsplit=3) == ["nodes", "2", "1", "command line"]
    assert "model=tiny" in told[at + 3] and "dataset=identity" in told[at + 4]


def test_a_slow_disk_is_not_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = disk.Meter(deadline=time.monotonic() - 1)
    assert meter.measure(root / "20261124-a") is None and meter.late and meter.measure(root) is None
    assert disk.Meter().measure(root / "missing") == 0


def test_two_hundred_runs_are_listed_at_once(tmp_path: Path) -> None:
    made = finished(tmp_path / "runs", run_id="r0")
    contents = {file.relative_to(made.path): file.read_bytes() for file in made.path.rglob("*") if file.is_file()}
    for number in range(1, 200):
        for name, content in contents.items():
            file = tmp_path / "runs" / f"r{number}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content.replace(b'"r0"', f'"r{number}"'.encode()))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "pkuslurm", "runs", "--run-root", str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        env=environment(tmp_path),
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.count("COMPLETED") == 200 and done.stdout.splitlines()[-1].startswith("200 runs, ")
    # processor time: others may work on this machine
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_moved_a_copied_and_a_vanished_run(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(root / "20261124-a", tmp_path / "copy of it")
    assert cli.main(["status", "--json", str(tmp_path / "copy of it")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["run_id"], found["state"]) == ("20261124-a", "COMPLETED")
    assert found["path"] == str(tmp_path / "copy of it")
    shutil.rmtree(root)
    assert cli.main(["runs", "--json"]) == 0 and json.loads(capsys.readouterr().out) == []


def test_remembered_folders_are_looked_in_from_anywhere(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pkuslurm.read.find import remember

    monkeypatch.delenv("PKUSLURM_RUN_ROOT")
    monkeypatch.chdir(tmp_path)
    remember(root, os.environ)
    remember(tmp_path / "a disk that is gone", os.environ)
    (tmp_path / "unreadable").touch()
    remember(tmp_path / "unreadable", os.environ)
    assert cli.main(["status", "--json", "20261124"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(root / "20261124-a")
    assert cli.main(["status", "1999"]) == 2
    assert str(root) in capsys.readouterr().err


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in (folder, *folder.rglob("*")):
        known = path.lstat()
        found[str(path)] = (known.st_mode, known.st_mtime_ns, known.st_size)
    return found


def test_a_group_members_run_is_read_and_left_as_it_is(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = root / "20261124-a"
    for path in (run, *run.rglob("*")):
        path.chmod(stat.S_IMODE(path.stat().st_mode) & 0o550)
    owner = run.stat().st_uid
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    before = snapshot(run)
    assert cli.main(["runs", "--json"]) == 0
    for words in (["status"], ["logs"], ["report", "--export", str(tmp_path / "page.html")]):
        assert cli.main([words[0], "20261124", *words[1:]]) == 0
    assert (tmp_path / "page.html").is_file()
    for verb in ("cancel", "merge", "infer"):
        capsys.readouterr()
        assert cli.main([verb, "20261124"]) == 2
        assert "belongs to another user" in capsys.readouterr().err
    assert snapshot(run) == before


@pytest.mark.parametrize("verb", ["cancel", "retry", "merge", "infer"])
def test_a_verb_that_acts_names_the_run_that_nobody_named(
    verb: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = f"newest run: {root / '20261124-a'}\n"
    assert cli.main([verb]) == 0 and capsys.readouterr().err.startswith(newest)
    assert cli.main([verb, "20261124"]) == 0 and "newest run" not in capsys.readouterr().err
    for words in (["cancel", "--json"], ["status"], ["logs"]):
        assert cli.main(words) == 0 and "newest run" not in capsys.readouterr().err


def test_logs_all(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunDir(root / "20261124-a").log("train", "local-2", 0)
    write_text(log, "".join(f"line {number}\n" for number in range(100)))
    assert cli.main(["logs", "train"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[1] == f"… 60 lines before, all of it: {log}" and told[2:] == [f"line {one}" for one in range(60, 100)]
    assert cli.main(["logs", "train", "--all"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"line {one}" for one in range(100)]


def test_report_export(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "20261124", "--export"]) == 0
    assert capsys.readouterr().out.strip() == str(root / "20261124-a" / "report-export.html")
    assert cli.main(["report", "--export", "20261124"]) == 0, "a name that is no page's is the run's"
    assert cli.main(["report", "--export", str(tmp_path / "page.html"), "--json", "20261124"]) == 0
    capsys.readouterr()
    assert cli.main(["report", "20261124", "--export", str(tmp_path / "missing" / "deep" / "page.html")]) == 0
    assert cli.main(["report", "20261124", "--export", "/proc/nowhere/page.html"]) == 2


def test_only_what_a_verb_needs_is_loaded(root: Path) -> None:
    heavy = ["hydra", "omegaconf", "submitit", "rich", "yaml", "torch", "difflib", "pkuslurm.again", "pkuslurm.launch"]
    for words, more in (
        (["--help"], ["pkuslurm.read.status", "pkuslurm.verbs"]),
        (["runs"], ["pkuslurm.read.report", "pkuslurm.read.logs"]),
        (["status", "20261124"], ["pkuslurm.read.report", "pkuslurm.read.logs"]),
        (["prune"], ["pkuslurm.read.report", "pkuslurm.verbs"]),
    ):
        script = f"import sys\nfrom pkuslurm.cli import main\ntry: main({words!r})\nexcept SystemExit: pass\n"
        script += f"print([m for m in {heavy + more!r} if m in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment(root) | {"PKUSLURM_RUN_ROOT": str(root)},
        )
        assert done.stdout.splitlines()[-1] == "[]", (words, done.stdout, done.stderr)

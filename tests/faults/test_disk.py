"""A disk that is full or read-only, under a run on this machine: nothing torn, its path named, and `retry` goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pkuslurm import rundir
from pkuslurm.errors import PkuslurmError
from pkuslurm.payload import files
from pkuslurm.worker import disk, state
from tests.conftest import REPO, Ended, environment, run
from tests.faults.recorder import Row
from tests.payload.small_models import make_flows, merge_job, start
from tests.verify import problems

FULL = "No space left on device"
# what it does to the disk on which the run is, when a job of kind SPOIL begins, or in a checkpoint after step 10
STANDIN = f"""\
#!/bin/sh
'''exec' "{sys.executable}" "$0" "$@"
' '''
import os, subprocess, sys
from pathlib import Path
sys.path[:0] = [{str(REPO)!r}, {str(REPO / "tests" / "cluster")!r}]
import standin

def full():
    handle = os.open(os.environ["DISK"] + "/ballast", os.O_CREAT | os.O_WRONLY)
    for size in (1 << 26, 1 << 20, 1 << 12):
        try:
            while True:
                os.posix_fallocate(handle, os.fstat(handle).st_size, size)
        except OSError:
            pass

def read_only():
    subprocess.run(["mount", "-o", "remount,abort", os.environ["DISK"]], check=True)  # as after an error of the device

def checkpoint(folder, step, *others):
    if step == 10 and not Path(os.environ["TOLD"]).exists():
        Path(os.environ["TOLD"]).touch()
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        full()
    whole(folder, step, *others)

whole, standin.checkpoint = standin.checkpoint, checkpoint
kind, _, how = os.environ.get("SPOIL", "").partition(":")
if kind in sys.argv and not Path(os.environ["TOLD"]).exists():
    Path(os.environ["TOLD"]).touch()
    {{"full": full, "read_only": read_only}}[how]()
standin.main(sys.argv[1:])
"""


class Disk:
    """A small file system of its own, and runs on it."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.folder, self.home = folder, home
        self.standin = home / "standin"
        self.standin.write_text(STANDIN, encoding="utf-8")
        self.standin.chmod(0o755)

    def mount(self, options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tests", str(self.folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def ext4(self) -> None:
        """Another one in its place, which an error makes read-only."""
        image = self.home / "image"
        image.touch()
        os.truncate(image, 400 << 20)
        for words in (["umount", self.folder], ["mkfs.ext4", "-q", image], ["mount", "-o", "loop", image, self.folder]):
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"{words[0]}: {done.stderr.strip()}")

    def mended(self) -> None:
        image = self.home / "image"
        for words in (["umount", self.folder], ["fsck.ext4", "-p", image], ["mount", "-o", "loop", image, self.folder]):
            assert subprocess.run(words, capture_output=True).returncode in (0, 1)

    def room(self) -> None:
        (self.folder / "ballast").unlink(missing_ok=True)

    def launch(self, *overrides: str, **variables: str) -> Ended:
        given = (f"run_root={self.folder}/runs", f"cluster.python={self.standin}", f"cache_root={self.home}/cache")
        words = ["model=tiny", *given, *overrides]
        return run(words, self.home, self.env | variables)

    def verb(self, *words: str) -> Ended:
        return run(list(words), self.home, self.env, module="pkuslurm")

    @property
    def env(self) -> dict[str, str]:
        return environment(self.home, DISK=str(self.folder), TOLD=str(self.home / "told"))

    def runs(self) -> list[Path]:
        return sorted((self.folder / "runs").glob("*"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    folder, home = tmp_path / "small", tmp_path / "home"
    folder.mkdir(), home.mkdir()
    disk = Disk(folder, home)
    disk.mount("size=280m")  # a launch wants 200 MB
    yield disk
    subprocess.run(["umount", str(folder)], check=True)


def torn(folder: Path) -> list[str]:
    """Files of ours that are no whole JSON, and what was left of writing them."""
    ours = [
        path
        for part in ("", "jobs", "state", "state/failures", "done", "results")
        for path in (folder / part).glob("*")
    ]
    found = [str(path) for path in ours if path.suffix == ".json" and rundir.read_json(path) is None]
    return found + [str(path) for path in ours if path.name.startswith(".") and path.suffix != ""]


def goes_on(small: Disk, row: Row, folder: Path) -> None:
    """Once there is room again."""
    small.room()
    done = small.verb("retry", str(folder))
    assert done.code == 0, done.err
    assert torn(folder) == [] and problems(folder) == []
    row.final("FAILED; COMPLETED by retry")


@pytest.mark.row(
    "32", "ENOSPC in a checkpoint", "FAILED, the disk named; goes on from the newest valid checkpoint", repeated=5
)
def test_a_disk_full_in_a_checkpoint(small: Disk, row: Row) -> None:
    ended = small.launch("cluster.env.STANDIN_TRAIN=steps:20")
    (folder,) = small.runs()
    assert ended.code == 1 and ended.last == str(folder), ended.err
    assert f"{folder}: {FULL}" in ended.err, ended.err
    assert f"{folder}: {FULL}" in small.verb("status", str(folder)).out
    assert torn(folder) == []
    goes_on(small, row, folder)
    assert (folder / "bad-checkpoints" / "checkpoint-10").is_dir()
    assert "goes on from checkpoint-5" in "".join(path.read_text() for path in (folder / "logs").glob("train-*"))
    row.work(folder, 20)


@pytest.mark.faults
@pytest.mark.row("32", "the disk is full when a job begins", "FAILED, the disk named; `retry` goes on", repeated=1)
@pytest.mark.parametrize("kind", ["prepare", "train", "merge", "infer"])
def test_a_disk_full_in_a_job(small: Disk, row: Row, kind: str) -> None:
    ended = small.launch("nodes=2", SPOIL=f"{kind}:full")
    (folder,) = small.runs()
    assert ended.code == 1 and ended.last == str(folder), ended.err
    assert f"{kind}: FAILED" in ended.err and f"{folder}: {FULL}" in ended.err, ended.err
    assert f"{folder}/run.json: {FULL}" in ended.err
    assert f"{folder}: {FULL}" in small.verb("status", str(folder)).out
    refused = small.verb("retry", str(folder))
    assert refused.code == 2 and str(folder) in refused.err and FULL in refused.err, refused
    assert torn(folder) == []
    goes_on(small, row, folder)


@pytest.mark.faults
@pytest.mark.row(
    "32", "the disk becomes read-only in a job", "never COMPLETED; `retry` names it, and goes on later", repeated=1
)
@pytest.mark.parametrize("kind", ["train", "merge"])
def test_a_disk_that_becomes_read_only(small: Disk, row: Row, kind: str) -> None:
    small.ext4()
    ended = small.launch(SPOIL=f"{kind}:read_only")
    (folder,) = small.runs()
    assert ended.code == 1 and ended.last == str(folder), ended.err
    assert f"{kind}: FAILED" in ended.err and "Read-only file system" in ended.err and str(folder) in ended.err
    assert f"{kind}" in (shown := small.verb("status", str(folder)).out) and "FAILED" in shown
    refused = small.verb("retry", str(folder))
    assert refused.code == 2 and str(folder) in refused.err and "Read-only file system" in refused.err, refused
    small.mended()
    for left in (folder / "state").glob(".*"):  # where nothing can be written nothing can be removed
        left.unlink()
    goes_on(small, row, folder)


@pytest.mark.faults
@pytest.mark.row("32", "no room for the run's own files at the launch", "refused, the path named, nothing left there")
@pytest.mark.parametrize("inodes", [4, 12])
def test_a_disk_full_at_the_launch(small: Disk, row: Row, inodes: int) -> None:
    """There are bytes, and no inodes: the files of a run are more."""
    subprocess.run(["umount", str(small.folder)], check=True)
    small.mount(f"size=280m,nr_inodes={inodes}")
    ended = small.launch()
    assert ended.code == 2 and FULL in ended.err and str(small.folder) in ended.err.splitlines()[-1], ended.err
    assert "Traceback" not in ended.err and small.runs() == []
    row.final("refused, exit 2")


@pytest.mark.faults
@pytest.mark.row(
    "32", "the run is written, and then there is no room to begin it", "exit 3, the path named; `retry` does it"
)
def test_a_disk_full_before_the_first_job(small: Disk, row: Row) -> None:
    subprocess.run(["umount", str(small.folder)], check=True)
    small.mount("size=280m,nr_inodes=18")
    ended = small.launch()
    (folder,) = small.runs()
    assert ended.code == 3 and FULL in ended.err and str(folder) in ended.err and ended.last == str(folder), ended
    assert list((folder / "done").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", str(small.folder)], check=True)
    goes_on(small, row, folder)


@pytest.mark.faults
@pytest.mark.real
@pytest.mark.row(
    "32", "ENOSPC in a real merge", "nothing under merged/, the file named; done by the next try", repeated=1
)
@pytest.mark.parametrize("room", [40_000, 100_000, 184_000])
def test_a_disk_full_in_a_real_merge(
    small: Disk, row: Row, room: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flow = make_flows(tmp_path_factory.mktemp("flows"))["llama"]
    job = merge_job(small.folder / "run", flow.base, flow.adapter)
    (small.folder / "run" / "results").mkdir()
    ballast = os.open(small.folder / "ballast", os.O_CREAT | os.O_WRONLY)
    os.posix_fallocate(ballast, 0, os.statvfs(small.folder).f_bavail * 4096 - room)
    os.close(ballast)
    ended = start(job)
    words = ended.stderr.strip().splitlines()
    assert ended.returncode == 2 and len(words) == 1, ended.stderr
    assert words[0].startswith(f"pkuslurm: merge: {small.folder}/run/") and f": {FULL}; " in words[0]
    assert sorted(path.name for path in (small.folder / "run").iterdir()) == ["jobs", "merge.yaml", "results"]
    small.room()
    assert start(job).returncode == 0
    merged = small.folder / "run" / "merged"
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == {
        path.name: path.read_bytes() for path in flow.merged.iterdir()
    }
    row.final("refused; merged by the next try")


@pytest.mark.row("32", "EDQUOT (told by the system to each writer)", "said of whichever file it is, never torn")
def test_a_quota_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> None:
    known = tmp_path / "state" / "train.json"
    rundir.write_json(known, {"state": "RUNNING", "padding": "x" * 500})
    before = known.read_bytes()

    def refused(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink() != known:  # what lies there already may be changed
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", refused)
    for write in (rundir.write_json, files.write_json):
        with pytest.raises(OSError, match="Disk quota exceeded") as told:
            write(known, {"state": "FAILED"})
        assert told.value.filename == str(known) and known.read_bytes() == before
    with pytest.raises(PkuslurmError, match=r"train\.json: cannot be written: Disk quota exceeded"):
        state.save(known, {})
    assert disk.lack(tmp_path) == f"{tmp_path}: Disk quota exceeded"
    assert files.no_room(told.value) == "Disk quota exceeded"
    rundir.write_last_word(known, {"state": "FAILED", "reason": "没有空间"})
    assert rundir.read_json(known) == {"state": "FAILED", "reason": "没有空间"}
    with pytest.raises(OSError, match="quota"):
        rundir.write_last_word(known, {"reason": "x" * 10_000})
    assert [path.name for path in known.parent.iterdir()] == ["train.json"]
    row.final("the old file, or the end's word in its place")


@pytest.mark.row("32", "a log on a full disk", "the job completes all the same")
def test_a_log_that_cannot_be_written(tmp_path: Path, row: Row) -> None:
    folder = tmp_path / "run"
    answer = "import os; open(os.environ['ANSWERS'], 'w').write('{\"prompt\": \"a\"}\\n')"
    job: dict[str, Any] = {
        "schema_version": 1,
        "run_id": "run",
        "kind": "infer",
        "run_dir": str(folder),
        "nodes": 1,
        "first_attempt": 1,
        "command": [sys.executable, "-c", answer],
        "env": {"ANSWERS": str(folder / "answers.jsonl")},
        "expect": {"file": str(folder / "answers.jsonl"), "lines": 1},
    }
    rundir.write_json(folder / "jobs" / "infer.json", job)
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "pkuslurm.worker", str(folder / "jobs" / "infer.json")]
        done = subprocess.run(words, cwd=REPO, stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (rundir.read_json(folder / "state" / "infer.json") or {})["state"] == "COMPLETED"
    row.final("COMPLETED")

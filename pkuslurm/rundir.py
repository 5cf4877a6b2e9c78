"""Every file name in a run directory, and the one way in which our files are written: whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("prepare", "train", "merge", "infer", "report", "serve")
# In a sweep's directory: what points have in common, and in each point's a link to its share of it.
SHARED = "shared"
# the number of a point, where a text is meant for all of them
ANY_POINT = "@POINT@"


@dataclass(frozen=True)
class RunDir:
    """The layout of one run's directory. Names only: making or reading nothing.

    A sweep's point is a run, too, in <sweep>/<n>. What its points share (prepare: the tokenized data) is done in
    <sweep>/shared/<k>, a run of that one job; a point's ``shared`` is a link to it.
    """

    path: Path

    @property
    def is_point(self) -> bool:
        """Whether it is one of a sweep's; a run's own id begins with a date, a time and a label."""
        return (self.path.name.isdecimal() or self.path.name == ANY_POINT) and self.path.parent.name != SHARED

    @property
    def run_id(self) -> str:
        """``<run_id>``; of a point ``<sweep_id>/<n>``; of what points share ``<sweep_id>/shared``."""
        if self.path.name == SHARED:  # as a point calls it
            return f"{self.path.parent.parent.name}/{SHARED}"
        if self.path.parent.name == SHARED:
            return f"{self.path.parent.parent.name}/{SHARED}"
        return f"{self.path.parent.name}/{self.path.name}" if self.is_point else self.path.name

    def home(self, kind: str) -> RunDir:
        """The run in which job ``kind`` is done."""
        return RunDir(self.path / SHARED) if kind == "prepare" and self.is_point else self

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def config_yaml(self) -> Path:
        return self.path / "config.yaml"

    @property
    def train_yaml(self) -> Path:
        return self.path / "train.yaml"

    @property
    def merge_yaml(self) -> Path:
        return self.path / "merge.yaml"

    @property
    def dataset_info(self) -> Path:
        return self.path / "dataset_info.json"

    @property
    def dataset(self) -> Path:
        """The rows as UTF-8, where the user's file is in another encoding."""
        return self.home("prepare").path / "dataset.jsonl"

    def copy_of(self, number: int) -> Path:
        """The same of the run's second file of data, and of further ones."""
        return self.home("prepare").path / f"dataset-{number}.jsonl"

    @property
    def data(self) -> Path:
        return self.home("prepare").path / "data"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def whole_model(self) -> Path | None:
        """The model that can be used as it is: the merged one, or what a full fine-tune has left."""
        if self.merged.is_dir():
            return self.merged
        whole = (self.adapter / "config.json").is_file() and not (self.adapter / "adapter_config.json").is_file()
        return self.adapter if whole and not self.job("merge").is_file() else None

    @property
    def answers(self) -> Path:
        return self.path / "answers.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def failures(self) -> Path:
        return self.path / "state" / "failures"

    def job(self, kind: str) -> Path:
        return self.home(kind).path / "jobs" / f"{kind}.json"

    def log(self, kind: str, job_id: str, node_rank: int) -> Path:
        return self.home(kind).logs / f"{kind}-{job_id}_{node_rank}.log"

    def state(self, kind: str, node_rank: int = 0) -> Path:
        """Node rank 0 speaks for the job; the others write beside it."""
        return self.home(kind).path / "state" / (f"{kind}.json" if node_rank == 0 else f"{kind}.{node_rank}.json")

    def attempt(self, kind: str) -> Path:
        """Which attempt may write, from where it started, and what is remembered of those before."""
        return self.home(kind).path / "state" / f"{kind}.attempt.json"

    def progress(self, kind: str) -> Path:
        return self.home(kind).path / "state" / f"{kind}.progress.json"

    def stop(self, kind: str) -> Path:
        """Touched to ask the trainer to stop at the next step."""
        return self.home(kind).path / "state" / f"{kind}.stop"

    def done(self, kind: str) -> Path:
        return self.home(kind).path / "done" / f"{kind}.json"

    @property
    def meeting(self) -> Path:
        """Of a run without scheduler: by whom it is at work now, for other machines that see this folder."""
        return self.path / "state" / "meeting.json"

    @property
    def submitting(self) -> Path:
        """Locked by the one command that changes the run's, or the sweep's, description."""
        return self.path / ".submitting"

    @property
    def endpoint(self) -> Path:
        """Where the run's models answer, while they do."""
        return self.path / "state" / "serve.endpoint.json"

    def result(self, kind: str) -> Path:
        """What a payload found out: rows, losses, comparisons; for people and for the report."""
        return self.home(kind).path / "results" / f"{kind}.json"


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, also after a crash.

    As readable for others as the folder is (0700: 0600; 0750: 0640), whatever the umask. Raises OSError (its
    ``filename`` names the path) when the disk is full or read-only; the old file stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        _replace(path, text)
    except OSError as error:
        # a full disk names no file, mkstemp one that nobody knows
        error.filename, error.filename2 = str(path), None
        raise


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, file_mode(path.parent))
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def write_last_word(path: Path, value: object) -> None:
    """``write_json``; on a full disk into the room that the file has already, so that an end can still be told.

    Only there a reader may, for a moment, see no whole object. What a newer attempt has put there
    meanwhile stays. Raises OSError as ``write_text`` does.
    """
    try:
        write_json(path, value)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not into_its_room(path, value):
            raise


def into_its_room(path: Path, value: object) -> bool:
    """Write ``value`` over what is in ``path``, where that needs no new block of the disk; whether it could be."""
    data = json.dumps(value, ensure_ascii=False).encode()
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        known = os.fstat(handle)
        if len(data) > known.st_blocks * 512 or _newer(os.pread(handle, known.st_size, 0), value):
            return False
        data += b" " * (known.st_size - len(data))  # not cut: after a crash in between it would be torn
        written = os.pwrite(handle, data, 0)
        os.fsync(handle)
    except OSError:
        return False
    finally:
        os.close(handle)
    return written == len(data)


def _newer(there: bytes, value: object) -> bool:
    """Whether what lies there is another attempt's, which has come since it was looked at. An older one's may go."""
    try:
        known = json.loads(there)
    except ValueError:
        return False
    if not isinstance(known, dict) or not isinstance(value, dict):
        return False
    theirs, ours = ((one.get("attempt"), one.get("job_id")) for one in (known, value))
    if not isinstance(theirs[0], int) or not isinstance(ours[0], int):
        return False
    return theirs[0] > ours[0] or (theirs[0] == ours[0] and theirs[1] != ours[1])


def file_mode(folder: Path) -> int:
    """The mode of a new file in ``folder``: never more than the folder itself allows."""
    return 0o640 & folder.stat().st_mode | 0o600


def as_its_folder(path: str, flags: int) -> int:
    """An ``opener`` for open(): a new file has ``file_mode`` from the first, whatever the umask."""
    descriptor = os.open(path, flags, 0o600)
    os.fchmod(descriptor, file_mode(Path(path).parent))
    return descriptor


def write_json(path: Path, value: object) -> None:
    """``write_text`` of indented JSON, non-ASCII text kept readable."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in ``path``; None when there is no such file or it holds no whole JSON object."""
    try:
        value = json.loads(_content(path).decode("utf-8"))
    except (OSError, ValueError, RecursionError):  # ten thousand brackets, one in another
        return None
    return value if isinstance(value, dict) else None


def _content(path: Path) -> bytes:
    """Of a file. The directory may be another user's: a pipe would be waited for, /dev/zero read, for ever."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no regular file", str(path))
        return file.read()


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; a torn last line (a writer was killed) is left out."""
    try:
        text = _content(path).decode("utf-8", "replace")
    except (OSError, ValueError):
        return
    for line in text.split("\n"):
        with suppress(ValueError, RecursionError):
            value = json.loads(line)
            if isinstance(value, dict):
                yield value

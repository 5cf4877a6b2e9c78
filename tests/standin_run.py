"""A whole run on this machine in a few seconds: launch, workers, markers are real; the training is stood in for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO, Ended, environment, run

STANDIN = REPO / "tests" / "cluster" / "standin.py"


@dataclass(frozen=True)
class Made:
    """The run, and where its commands are typed."""

    path: Path
    ended: Ended
    cwd: Path
    env: Mapping[str, str]

    def verb(self, *arguments: str | Path) -> Ended:
        return run([str(one) for one in arguments], self.cwd, self.env, module="pkuslurm")

    def copied(self, to: Path) -> Path:
        """A copy of the run, files and all, in the folder ``to``."""
        shutil.copytree(self.path, to / self.path.name, symlinks=True)
        return to / self.path.name


def standin(folder: Path) -> Path:
    """The program to be given as cluster.python."""
    program = folder / "standin"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{STANDIN}" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    return program


def make(cwd: Path, *overrides: str, umask: int = -1, **variables: str) -> Made:
    """Launch it in ``cwd``; the two nodes are processes. Asserts nothing."""
    env = environment(cwd, OMP_NUM_THREADS="1", **variables)
    words = ["nodes=2", "cluster.accelerator=cpu", f"cluster.python={standin(cwd)}", f"cache_root={cwd}/cache"]
    ended = run([*words, *overrides], cwd, env, umask=umask)
    return Made(Path(ended.last or "/nonexistent"), ended, cwd, env)


def jsons(run: Path) -> list[Path]:
    return sorted(file for file in run.rglob("*.json") if "data" not in file.parts and "views" not in file.parts)


@contextmanager
def kept(run: Path) -> Iterator[None]:
    """What an acting verb changes is put back."""
    before = {file: file.read_bytes() for file in jsons(run)}
    yield
    for file in set(jsons(run)) - before.keys():
        file.unlink()
    for file, text in before.items():
        file.parent.mkdir(exist_ok=True)
        if not file.exists() or file.read_bytes() != text:
            file.write_bytes(text)

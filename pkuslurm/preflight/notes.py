"""What is said before anything starts, and what of it a dry run forgives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.preflight.datasets import NotHere
from pkuslurm.preflight.seen import Seen

T = TypeVar("T")


@dataclass
class Notes:
    """What is said before anything starts. ``lenient`` (a dry run): what is not on this machine becomes a note."""

    lenient: bool
    notes: list[str]
    facts: list[tuple[str, str]]
    seen: Seen

    def unless_missing(self, find: Callable[[], T], otherwise: T, path: str | None) -> T:
        """``find()``; what is here and is wrong is refused in a dry run, too."""
        try:
            return find()
        except PkuslurmError as problem:
            here = path and Path(absolute(path)).exists() and not isinstance(problem, NotHere)
            if not self.lenient or here:
                raise
            if str(problem) not in self.notes:  # an adapter is also one of train's keys
                self.notes.append(str(problem))
            return otherwise

"""What is said before anything starts, and what has been looked at already. Starts and writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.preflight.datasets import NotHere

T = TypeVar("T")


class Seen:
    """What has been looked at already: the points of a sweep read the same model and the same data."""

    def __init__(self) -> None:
        self._answers: dict[str, object] = {}

    def once(self, look: Callable[..., T], *about: object) -> T:
        """``look(*about)``, or what it gave or refused before."""
        key = f"{look.__qualname__}{about!r}"
        if key not in self._answers:
            try:
                self._answers[key] = look(*about)
            except PkuslurmError as problem:
                self._answers[key] = problem
        answer = self._answers[key]
        if isinstance(answer, PkuslurmError):
            raise answer
        return answer  # type: ignore[return-value]  # what look returned under this key


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

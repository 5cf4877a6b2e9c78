"""What preflight has looked at already: the points of a sweep read the same model and the same data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pkuslurm.errors import PkuslurmError

T = TypeVar("T")


class Seen:
    """The answers of what was looked at, refusals included."""

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

"""What of a sweep is submitted together: points that ask for the same, as one array for each kind of job. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Chain:
    """Members (directories below the sweep) whose jobs ``kinds`` follow one another, element by element."""

    members: tuple[str, ...]
    kinds: tuple[str, ...]

    def halves(self) -> list[Chain]:
        """Two of half the size, where all at once is too much for a limit; one member cannot be divided."""
        middle = len(self.members) // 2
        return [Chain(part, self.kinds) for part in (self.members[:middle], self.members[middle:]) if part]


def chains(members: Mapping[str, tuple[tuple[str, ...], str]], most: int) -> list[Chain]:
    """``members``: of each its kinds, and what it asks for (any text). At most ``most`` in a chain, in their order."""
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for name, what in members.items():
        alike.setdefault(what, []).append(name)
    return [
        Chain(tuple(names[at : at + most]), kinds)
        for (kinds, _), names in alike.items()
        for at in range(0, len(names), most)
    ]


def after_shares(needs: Sequence[str | None]) -> str:
    """Slurm's expression for jobs whose element i waits for the job ``needs[i]``, an array's element (``A_3``) or None.

    Elements that need different shares wait for all of them, however they end: each looks for its own share's marker
    before it does anything.
    """
    wanted = list(dict.fromkeys(need for need in needs if need is not None))
    if not wanted:
        return ""
    if len(wanted) == 1 and all(needs):
        return f"afterok:{wanted[0]}"
    arrays = {need.partition("_")[0] for need in wanted}
    if len(arrays) == 1 and list(needs) == [f"{next(iter(arrays))}_{index}" for index in range(len(needs))]:
        return f"aftercorr:{next(iter(arrays))}"
    return "afterany:" + ":".join(wanted if len(wanted) < 10 else sorted(arrays))

"""What of a sweep is submitted together: points that ask for the same, as one array for each kind of job. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chain:
    """Members (directories below the sweep) whose jobs ``kinds`` follow one another, element by element."""

    members: tuple[str, ...]
    kinds: tuple[str, ...]

    def pieces(self, most: int) -> list[Chain]:
        """The same in chains of at most ``most`` members."""
        return [Chain(self.members[at : at + most], self.kinds) for at in range(0, len(self.members), most)]


def chains(members: Mapping[str, tuple[tuple[str, ...], str]], most: int) -> list[Chain]:
    """``members``: of each its kinds, and what it asks for (any text). At most ``most`` in a chain, in their order."""
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for name, what in members.items():
        alike.setdefault(what, []).append(name)
    return [piece for (kinds, _), names in alike.items() for piece in Chain(tuple(names), kinds).pieces(most)]


def asks(jobs: Sequence[Mapping[str, Any]]) -> str:
    """What a point's jobs ask for: points for which this is the same go into the same arrays."""
    names = ("kind", "parents", "nodes", "nproc_per_node", "request")
    return json.dumps(
        [[job.get(name) for name in names] + [job.get("worker", [])[:-1]] for job in jobs], sort_keys=True
    )


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

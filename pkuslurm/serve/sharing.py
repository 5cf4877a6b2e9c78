"""Which of the job's devices each engine gets. Pure, but for the count of device files where nothing names them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pkuslurm.worker.accelerators import ACCELERATORS

# Slurm's own numbers of the same devices: a daemon's containers are given devices by these
_SLURMS = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")


@dataclass(frozen=True)
class Share:
    """``env``: what names an engine's devices; ``engines``: how many use them."""

    env: Mapping[str, str]
    engines: int


def shares(
    device: str, engines: int, environ: Mapping[str, str], asked: int | None, count: Callable[[str], int]
) -> list[Share]:
    """One for each engine: devices of its own where there are as many as engines, else all share all of them.

    ``asked``: how many the job has, where it says so; ``count``: how many the machine has.
    """
    visible = ACCELERATORS[device].visible
    if not visible:
        return [Share({}, engines)] * engines
    names = _words(environ.get(visible, "")) or [str(number) for number in range(asked or count(device))]
    each = len(names) // engines
    if each == 0:
        return [Share({}, engines)] * engines
    found = []
    for place in range(engines):
        own = slice(place * each, (place + 1) * each)
        env = {visible: ",".join(names[own])}
        for name in _SLURMS:
            if len(numbers := _words(environ.get(name, ""))) == len(names):
                env[name] = ",".join(numbers[own])
        found.append(Share(env, 1))
    return found


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]

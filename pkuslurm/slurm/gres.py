"""Devices as Slurm writes them, in a request and in what sinfo tells of a node. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

# What sites call the devices that an accelerator computes on. A type may say more than the name: gpu:Ascend910B:8.
NAMES = {"npu": ("npu",), "cuda": ("gpu", "dcu")}
_ASCEND = re.compile(r"ascend|npu|910|310", re.IGNORECASE)
_COUNT = re.compile(r"([0-9]{1,9})([KMGT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Device:
    """``count`` of one kind on a node; ``type`` is empty where none is named."""

    name: str
    type: str
    count: int

    @property
    def accelerator(self) -> str | None:
        """npu or cuda; None: a name that says neither."""
        if self.name in NAMES["npu"] or (self.name == "gpu" and _ASCEND.search(self.type)):
            return "npu"
        return "cuda" if self.name in NAMES["cuda"] else None

    def __str__(self) -> str:
        return ":".join(filter(None, (self.name, self.type, str(self.count))))


def devices(text: str, name: str | None = None) -> tuple[Device, ...]:
    """Of ``name[:type][:count],…`` as gres has it, or ``[type:]count`` where the ``name`` is known."""
    found = []
    # sinfo adds the sockets: gpu:a100:8(S:0-1); a node that has nothing: (null)
    for word in re.sub(r"\([^)]*\)", "", text).split(","):
        parts = [part for part in word.strip().removeprefix("gres/").split(":") if part not in ("", "no_consume")]
        if name is not None and parts:
            parts = [name, *parts]
        if not parts:
            continue
        number = _COUNT.fullmatch(parts[-1]) if len(parts) > 1 else None
        kind = parts[1:-1] if number else parts[1:]
        found.append(Device(parts[0], ":".join(kind), int(number[1]) if number and not number[2] else 1))
    return tuple(found)

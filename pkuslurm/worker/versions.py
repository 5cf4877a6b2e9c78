"""What a node has installed, told by the probe; it must be the same on all nodes of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

NAMES = ("python", "llamafactory", "torch", "torch-npu", "transformers", "CANN")


def line(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in NAMES if versions.get(name))


def difference(first: tuple[str, Any], other: tuple[str, int, Any]) -> str | None:
    """In words, where node 0 (its host and versions) and another node (host, rank, versions) cannot train together.

    Both sides find the same words. None also where one of them has not said it yet.
    """
    host0, versions0 = first
    host, rank, versions = other
    if not isinstance(versions0, Mapping) or not isinstance(versions, Mapping) or not versions0 or not versions:
        return None
    for name in NAMES:
        there, here = versions.get(name), versions0.get(name)
        if _counts(name, there) != _counts(name, here):
            where = host if host != host0 else f"{rank} on {host}"
            return (
                f"node {where} has {name if there else 'no ' + name}{f' {there}' if there else ''}, "
                f"node 0 on {host0} has {here or 'none'}; "
                "give all nodes one installation (cluster.python, cluster.setup)"
            )
    return None


def _counts(name: str, version: object) -> object:
    """Of python only 3.11 of 3.11.2: what is compiled is for that."""
    match = re.match(r"\d+\.\d+", str(version)) if name == "python" else None
    return match.group() if match else version

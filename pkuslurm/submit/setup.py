"""cluster.setup: a site's shell lines before a job's command, each with an end in words where it fails. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Iterable


def setup_lines(texts: Iterable[str]) -> list[str]:
    """Lines of bash."""
    lines: list[str] = []
    for text in texts:
        if all(not line.strip() or line.strip().startswith("#") for line in text.splitlines()):
            continue  # bash takes no { } with nothing in it
        words = shlex.quote(f"pkuslurm: cluster.setup failed: {text}")
        lines += ["{", text, f"}} || {{ echo {words} >&2; exit 1; }}"]
    return lines

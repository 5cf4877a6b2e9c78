"""Whether a run's files have changed, so that Slurm need not be asked."""

from __future__ import annotations

from contextlib import suppress

from pkuslurm.rundir import RunDir


def stamps(run: RunDir) -> list[tuple[str, int]]:
    """Name and time of every state file and marker; not of the progress, which changes all the time."""
    found = []
    for folder in ("state", "done"):
        with suppress(OSError):
            found += [(file.name, file.stat().st_mtime_ns) for file in sorted((run.path / folder).glob("*.json"))]
    return [(name, stamp) for name, stamp in found if not name.endswith(".progress.json")]

"""report.html: one file about one run, to be opened anywhere, sent by mail, printed. It loads and runs nothing."""

from __future__ import annotations

import os
from pathlib import Path

from pkuslurm.read.report.facts import gather
from pkuslurm.read.report.page import page
from pkuslurm.read.status import RunStatus
from pkuslurm.rundir import RunDir, write_text


def build(run_dir: Path, now: RunStatus | None = None) -> str:
    """The page as text. A run that is unfinished, failed or damaged gives a page that says what is missing.

    ``now``: how the run stands, where the caller knows it already.
    """
    return page(gather(run_dir, now))


def write(run_dir: Path, now: RunStatus | None = None) -> Path:
    """Write the run's report.html, whole or not at all; returns its path. Raises OSError."""
    path = RunDir(run_dir).report
    write_text(path, build(run_dir, now))
    return path


def export(run_dir: Path, file: Path) -> None:
    """Write the page to ``file`` without user names, host names, paths and environment values. Raises OSError."""
    from pkuslurm.read.report.anonymous import anonymous

    write_text(file, page(anonymous(gather(run_dir), os.environ)))

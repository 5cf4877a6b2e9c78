"""The second environment: LLaMA-Factory 0.9.4 and transformers 4.57.1 over this one's packages."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO

OVERLAY = REPO / ".venv-0.9.4"


@pytest.fixture(scope="session")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its python; made where it is missing or old (seconds, about 100 MB). It fails where nothing can be installed."""
    with (REPO / ".ci" / "setup-0.9.4").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = subprocess.run(
            [str(REPO / ".ci" / "setup-0.9.4"), sys.executable], capture_output=True, text=True, encoding="utf-8"
        )
    assert made.returncode == 0, f".ci/setup-0.9.4 could not install its packages: {made.stderr[-2000:]}"
    return OVERLAY / "bin" / "python"

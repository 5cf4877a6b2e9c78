"""Three pods for the session; each test has a shared folder and homes of its own, and leaves nothing running."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import left_running
from tests.meet.pods import Pod, cable, names, uncable, until

COUNT = 3


@pytest.fixture(scope="session")
def cables() -> Iterator[list[str]]:
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("network namespaces need root, ip and nsenter")
    cable(COUNT)
    yield names(COUNT)
    uncable(COUNT)


@pytest.fixture
def pods(cables: list[str], tmp_path: Path) -> Iterator[list[Pod]]:
    shared = tmp_path / "共享 folder"
    shared.mkdir()
    made = [
        Pod(f"pod{number}", f"10.99.0.{number}", name, tmp_path / f"home{number}", shared)
        for number, name in enumerate(cables, 1)
    ]
    yield made
    for terminal in (one for pod in made for one in pod.started):
        if terminal.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(terminal.process.pid, signal.SIGKILL)
            terminal.process.wait()
    until(lambda: not [line for pod in made for line in left_running(f"HOME={pod.home}")])

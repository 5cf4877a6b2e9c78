"""No presets but ours: whoever runs the tests may have some, and so may the folder that they run in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nobodys_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("PKUSLURM_CONF", "PKUSLURM_RUN_ROOT", "WORK_DIR", "PKUSLURM_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)

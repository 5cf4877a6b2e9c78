"""The tiny model, built once a session: where the demo's own run finds it too."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(cache: Path) -> Path:
    from pkuslurm.payload import tiny_model
    from pkuslurm.render.render import TINY_MODEL

    folder = cache / "models" / TINY_MODEL
    tiny_model.ensure(folder)
    return folder

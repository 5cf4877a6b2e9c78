"""The tiny model, built once for all the tests that need a real one."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from pkuslurm.payload import tiny_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    assert tiny_model.ensure(folder)
    return folder

"""A dry run's text as its golden file has it, wherever the checkout and its owner's home lie."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import omegaconf
import pytest
from omegaconf import OmegaConf

from pkuslurm.compose import composition
from pkuslurm.launch import main
from pkuslurm.paths import CONF
from pkuslurm.render import render
from pkuslurm.worker import devices

GOLDEN = Path(__file__).parents[1] / "golden"
PLACE = {"conf": ""}  # of the presets' data, for the length of a test


@pytest.fixture(autouse=True)
def installed_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Where this checkout lies, and whether its path must be quoted, is nothing of a golden file's."""
    data = tmp_path_factory.mktemp("golden") / "conf" / "dataset"
    shutil.copytree(CONF / "dataset", data)
    monkeypatch.setitem(PLACE, "conf", str(data.parent))
    register = composition._register_resolver

    def registered() -> None:
        register()
        name = "register_new_resolver" if omegaconf.__version__ < "2.4" else "register_resolver"
        getattr(OmegaConf, name)("pkuslurm.conf", lambda name: str(data.parent / str(name)), replace=True)

    monkeypatch.setattr(composition, "_register_resolver", registered)
    monkeypatch.setattr(sys, "executable", "/venv/bin/python")
    monkeypatch.setattr(devices, "count_files", lambda _: 0)
    monkeypatch.setattr(render, "BOOT", Path("/opt/pkuslurm/boot.py"))
    monkeypatch.setattr(render, "PAYLOAD", Path("/opt/pkuslurm/payload/__main__.py"))
    monkeypatch.setenv("HOME", "/home/student")
    places = ("PKUSLURM_MODELS", "SCOW_AI_MODEL_PATH", "SCOW_AI_DATASET_PATH", "MODELSCOPE_CACHE", "HF_HOME")
    for variable in (*places, "HF_HUB_CACHE", "VC_GPU_NUM", "NODE_RANK", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WORK_DIR", "/work-dir")


def dry_run(overrides: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main([*overrides, "dry_run=true", "run_root=/runs", "cache_root=/cache"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    text: str = captured.out
    return text.replace(PLACE["conf"], "CONF")


def compare(
    name: str, overrides: Sequence[str], capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    """The whole text against tests/golden/<name>.txt; --update-golden writes it."""
    text = dry_run(overrides, capsys)
    assert dry_run(overrides, capsys) == text, "rendering twice differs"
    file = GOLDEN / f"{name}.txt"
    if request.config.getoption("--update-golden"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")

"""Keys, rules and the environment itself, with LLaMA-Factory 0.9.4."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pkuslurm.config.llamafactory import snapshot, to_json
from pkuslurm.preflight.arguments import extract, keys_of
from pkuslurm.preflight.llamafactory import installed, packages_of
from tests.config.real import disagreements
from tests.conftest import REPO


def test_the_snapshot_is_what_is_installed_there(overlay: Path) -> None:
    """`python tests/tools/snapshot_keys.py SITE_PACKAGES` writes it anew."""
    folders = packages_of(str(overlay))
    kept = snapshot("0.9.4")
    assert kept is not None and to_json(extract(folders)) == to_json(kept)
    assert keys_of(folders) is kept


def test_the_overlay_holds_what_differs_and_nothing_twice(overlay: Path) -> None:
    folders = packages_of(str(overlay))
    own, both = installed(folders[:1]), installed(folders)
    pins = (REPO / ".constraints" / "llamafactory-0.9.4.txt").read_text(encoding="utf-8").splitlines()
    assert own == dict(line.split("==") for line in pins if line and not line.startswith("#"))
    assert both["torch"] == installed(packages_of(sys.executable))["torch"]
    assert list(folders[0].glob("llamafactory/__pycache__/*.pyc"))


def test_the_second_time_nothing_is_installed(overlay: Path) -> None:
    marker = overlay.parents[1] / ".installed"
    before = marker.stat().st_mtime_ns
    again = subprocess.run([str(REPO / ".ci" / "setup-0.9.4"), sys.executable], capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "")
    assert marker.stat().st_mtime_ns == before


@pytest.mark.real
def test_the_rules_agree_with_this_llamafactory(overlay: Path) -> None:
    assert disagreements(str(overlay), "0.9.4") == []

from __future__ import annotations

import json
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from pkuslurm.payload import bytecode

REPO = Path(__file__).parents[2]
TELL = """
import json, os, sys
sys.path[:0] = sys.argv[1:2]
sys.path.append({repo!r})
from pkuslurm.payload import bytecode
found = bytecode.keep(os.environ, sys.argv[2:])
import torch.part
told = [os.environ.get(name) for name in ("PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE")]
print(json.dumps([found, *told, torch.part.__cached__]))
"""


def packages(folder: Path, version: str = "1") -> Path:
    """A site-packages with a torch that has no bytecode."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").touch()
    (folder / "torch" / "part.py").write_text("x = 1\n")
    (folder / f"torch-{version}.dist-info").mkdir()
    return folder


def kept(site: Path, *places: Path, **environ: str) -> tuple[str | None, str | None, str | None, Path]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | environ
    words = [sys.executable, "-c", TELL.format(repo=str(REPO)), str(site), *map(str, places)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=30, check=True)
    found, prefix, forbidden, cached = json.loads(done.stdout)
    return found, prefix, forbidden, Path(cached)


def test_what_would_be_compiled_at_each_start_is_kept_apart(weird: Path) -> None:
    site = packages(weird / "site")
    found, prefix, forbidden, cached = kept(site, weird, PYTHONDONTWRITEBYTECODE="1")
    assert found == prefix and forbidden is None
    own = weird / f"pkuslurm-bytecode-{os.geteuid()}"
    assert found is not None and Path(found).parent == own and own.stat().st_mode & 0o777 == 0o700
    assert cached.is_relative_to(found) and cached.is_file()
    before = cached.stat().st_mtime_ns
    assert kept(site, weird, PYTHONDONTWRITEBYTECODE="1")[3].stat().st_mtime_ns == before, "read, not written again"
    assert not list(site.rglob("*.pyc"))


def test_other_versions_have_another_folder(tmp_path: Path) -> None:
    """Files of two images may have one name, time and size."""
    folders = {kept(packages(tmp_path / v, v), tmp_path, PYTHONDONTWRITEBYTECODE="1")[0] for v in ("1", "2")}
    assert len(folders) == 2


def test_it_is_left_alone_where_it_is_compiled_will_be_or_the_user_has_said_where(tmp_path: Path) -> None:
    site = packages(tmp_path / "site")
    assert kept(site, tmp_path)[0] is None, "Python writes it beside the source"
    assert list(site.rglob("part.*.pyc"))
    py_compile.compile(str(site / "torch" / "__init__.py"))
    assert kept(site, tmp_path, PYTHONDONTWRITEBYTECODE="1")[:3] == (None, None, "1")
    bare = packages(tmp_path / "bare")
    own = str(tmp_path / "own")
    found = kept(bare, tmp_path, PYTHONDONTWRITEBYTECODE="1", PYTHONPYCACHEPREFIX=own)
    assert found[:2] == (None, own)


@pytest.mark.parametrize("why", ["a link", "for others, too", "a file"])
def test_a_folder_that_others_could_fill_is_not_used(tmp_path: Path, why: str) -> None:
    site, first, second = packages(tmp_path / "site"), tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    taken = first / f"pkuslurm-bytecode-{os.geteuid()}"
    if why == "a link":
        (tmp_path / "there").mkdir(mode=0o700)
        taken.symlink_to(tmp_path / "there")
    elif why == "a file":
        taken.touch(mode=0o600)
    else:
        taken.mkdir()
        taken.chmod(0o770)
    found = kept(site, first, second, PYTHONDONTWRITEBYTECODE="1")[0]
    assert found is not None and Path(found).is_relative_to(second)
    assert kept(site, first, PYTHONDONTWRITEBYTECODE="1")[0] is None


def test_somebody_elses_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    assert bytecode._own(folder) == folder
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="is not only this user's"):
        bytecode._own(folder)

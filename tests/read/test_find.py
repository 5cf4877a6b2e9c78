"""Which run is meant, and where runs are looked for."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import find
from tests.read.fake_run import finished, make

IDS = ["20261101-000000-a-0001", "20261102-000000-b-0002", "20261103-000000-c-0003"]


@pytest.fixture
def root(weird: Path) -> Path:
    folder = weird / "runs"
    for number, run_id in enumerate(IDS):
        # created says another order than the ids
        make(folder, run_id, created=f"2026-11-0{3 - number}T00:00:00+08:00")
    (folder / "no run").mkdir()
    (folder / "a file").touch()
    return folder


def test_by_id_prefix_path_or_the_newest(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find.find(IDS[1], [root]).name == IDS[1]
    assert find.find("20261102", [root]).name == IDS[1]
    assert find.find(str(root / IDS[2]), []) == root / IDS[2]
    assert find.find(str(root / IDS[2] / "run.json"), []) == root / IDS[2]
    assert find.find(None, [root]).name == IDS[0], "the newest by creation, not by name"
    monkeypatch.chdir(root)
    assert find.find(IDS[2], []) == root / IDS[2]
    monkeypatch.chdir(root / IDS[2])
    assert find.find(".", []) == root / IDS[2]


def test_refusals_say_where_and_what(root: Path, tmp_path: Path) -> None:
    with pytest.raises(PkuslurmError, match="no such run; looked in ") as caught:
        find.find("1999", [root, tmp_path / "other"])
    assert str(root) in str(caught.value) and str(tmp_path / "other") in str(caught.value)
    with pytest.raises(PkuslurmError, match=r"3 runs begin so: .*0001, .*0002, .*0003"):
        find.find("2026", [root])
    with pytest.raises(PkuslurmError, match=r"no run\.json"):
        find.find(str(root / "no run"), [root])
    with pytest.raises(PkuslurmError, match=r"no runs yet; looked in /.*/runs; start one: make demo"):
        find.find(None, [])
    with pytest.raises(PkuslurmError, match="empty"):
        find.find("", [root])


def test_at_most_five_candidates(tmp_path: Path) -> None:
    for number in range(8):
        make(tmp_path, f"20261101-00000{number}-a")
    with pytest.raises(PkuslurmError) as caught:
        find.find("2026", [tmp_path])
    assert str(caught.value).count("20261101-") == 5 and "…" in str(caught.value)


def test_one_id_in_two_roots(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make(tmp_path / name, IDS[0])
    with pytest.raises(PkuslurmError, match="give the path") as caught:
        find.find(IDS[0], [tmp_path / "one", tmp_path / "two"])
    assert str(tmp_path / "two" / IDS[0]) in str(caught.value)
    (tmp_path / "link").symlink_to(tmp_path / "one")
    assert find.find(IDS[0], [tmp_path / "one", tmp_path / "link"]) == tmp_path / "one" / IDS[0]


def test_runs_newest_first(tmp_path: Path) -> None:
    finished(tmp_path, run_id="old", created="2026-11-24T09:00:00+08:00", name="标签")
    make(tmp_path, "new", created="2026-11-24T02:00:00+00:00")
    (make(tmp_path, "broken").run_json).write_text("{", encoding="utf-8")
    found = [item.to_json() for item in find.list_runs([tmp_path])]
    assert [list(item) for item in found] == [["run_id", "path", "created", "state", "name"]] * 3
    assert [item["run_id"] for item in found] == ["new", "old", "broken"]
    assert [item["state"] for item in found] == ["FAILED", "COMPLETED", "UNKNOWN"]
    assert found[1]["name"] == "标签" and found[2]["created"] is None


def test_order_of_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {"XDG_STATE_HOME": str(tmp_path / "state"), "PKUSLURM_RUN_ROOT": "relative"}
    assert find.roots([Path("/given")], env) == [Path("/given")]
    assert find.roots(None, env) == [tmp_path / "relative"]
    del env["PKUSLURM_RUN_ROOT"]
    assert find.roots(None, env) == []
    find.remember(tmp_path / "b", env)
    find.remember(tmp_path / "一 a", env)
    find.remember(tmp_path / "b", env)
    assert find.roots(None, env) == [tmp_path / "b", tmp_path / "一 a"]
    assert (tmp_path / "state/pkuslurm/run_roots").stat().st_mode & 0o077 == 0
    assert (tmp_path / "state/pkuslurm/run_roots").read_text(encoding="utf-8").count("\n") == 2


def test_remembering_where_it_cannot_be_done(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for env in ({}, {"HOME": ""}, {"HOME": "/proc/nowhere"}, {"XDG_STATE_HOME": str(tmp_path / "file")}):
        find.remember(tmp_path, env)
    find.remember(Path("/a\nb"), {"HOME": str(tmp_path)})
    assert find.roots([tmp_path], {}) == [tmp_path]
    assert not (tmp_path / ".local").exists()


def test_a_list_that_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "pkuslurm" / "run_roots"
    file.parent.mkdir()
    file.write_bytes(b"/a\n\xff\xfe\nrelative\n/\xff\n/to")
    env = {"XDG_STATE_HOME": str(tmp_path)}
    assert find.roots(None, env) == [Path("/a"), Path(os.fsdecode(b"/\xff")), Path("/to")]
    assert find.list_runs(find.roots(None, env)) == []


def test_two_launches_at_once_lose_nothing(tmp_path: Path) -> None:
    env = {"XDG_STATE_HOME": str(tmp_path)}
    names = [Path(f"/root-{number}") for number in range(40)]
    threads = [threading.Thread(target=find.remember, args=(name, env)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(find.roots(None, env)) >= set(names)

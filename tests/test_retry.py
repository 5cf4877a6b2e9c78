"""retry on this machine: what is complete is never run again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm import cli
from pkuslurm.rundir import read_json, write_json
from tests.submit.test_local import OK, make_run

COUNT = "import os; open(os.environ['PKUSLURM_TEST'] + '/count', 'a').write('x'); "


def test_only_what_is_not_complete(weird: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(weird, infer=COUNT + OK, report="raise SystemExit(3)")
    assert cli.main(["retry", str(made.path)]) == 1
    assert (read_json(made.state("infer")) or {})["state"] == "COMPLETED"
    assert (read_json(made.state("report")) or {})["attempt"] == 1
    job = read_json(made.job("report")) or {}
    write_json(made.job("report"), job | {"command": [job["command"][0], "-c", OK]})
    assert cli.main(["retry", str(made.path)]) == 0
    assert (read_json(made.state("report")) or {}) | {"state": "COMPLETED", "attempt": 2} == read_json(
        made.state("report")
    )
    assert (made.path / "count").read_text(encoding="utf-8") == "x", "infer was complete"
    capsys.readouterr()
    assert cli.main(["resume", str(made.path)]) == 0
    assert "every job is complete; nothing to do" in capsys.readouterr().err


def test_another_users_run_and_a_damaged_one(
    weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import os

    made = make_run(weird, infer=OK)
    monkeypatch.setattr(os, "getuid", lambda: made.path.stat().st_uid + 1)
    assert cli.main(["retry", str(made.path)]) == 2
    assert "belongs to another user" in capsys.readouterr().err
    assert not made.state("infer").exists()

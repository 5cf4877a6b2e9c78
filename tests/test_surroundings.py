"""What a shell, a container or a site may lack or have: no HOME, one that cannot be written, C locale, proxies."""

from __future__ import annotations

import json
import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from pkuslurm import cli, launch
from pkuslurm.rundir import RunDir
from pkuslurm.worker import environment as of_worker
from pkuslurm.worker.job import Job
from pkuslurm.worker.rendezvous import Rendezvous
from tests.conftest import REPO


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user of a container: no HOME, no entry in /etc/passwd."""

    def none(_: object) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_STATE_HOME", "PKUSLURM_CACHE", "PKUSLURM_MODELS", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", none)
    monkeypatch.setattr(pwd, "getpwnam", none)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("nobody")
def test_without_a_home_it_works_or_says_so_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = f"cache_root={tmp_path}/cache"
    assert launch.main([cache, "dry_run=true"]) == 0 and cli.main(["runs"]) == 0 and cli.main(["prune"]) == 0
    assert "HOME is not set, so no launch is remembered here: name the folder of runs with --run-root" in (
        capsys.readouterr().out
    )
    for start in (
        lambda: launch.main(["dry_run=true"]),
        lambda: launch.main([cache, "model.path=~/a"]),
        lambda: cli.main(["fetch", "Qwen/Qwen3-0.6B"]),
    ):
        assert start() == 2
        err = capsys.readouterr().err
        assert "HOME is not set" in err and len(err.splitlines()) == 1
    # a folder that is named needs no home
    assert cli.main(["fetch", "Qwen/Qwen3-0.6B", "--to", "x", "--from", "http://127.0.0.1:9"]) == 2
    assert f"USER@{os.uname().nodename}:{tmp_path}/x/" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_runs_that_a_variable_moves_are_said_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORK_DIR", f"{tmp_path}/w")
    for typed, told in (((), True), (("run_root=x",), False)):
        assert launch.main([*typed, f"cache_root={tmp_path}", "dry_run=true"]) == 0
        assert (f"in {tmp_path}/w/runs, since WORK_DIR is set" in capsys.readouterr().out) is told


def test_a_home_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_STATE_HOME", "PKUSLURM_CACHE", "PKUSLURM_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    assert launch.main([]) == 2 and "cache_root=/proc/nobody/.cache/pkuslurm: " in capsys.readouterr().err
    assert cli.main(["runs"]) == 0
    capsys.readouterr()
    assert cli.main(["fetch", "Qwen/Qwen3-0.6B"]) == 2
    assert "/proc/nobody/.cache/pkuslurm/models/Qwen" in capsys.readouterr().err


def test_a_value_longer_than_a_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = json.dumps({"a": "x" * 300})
    assert launch.main([f"train.accelerator_config='{text}'", "dry_run=true"]) == 0, "JSON is taken, too"
    assert text in capsys.readouterr().out
    assert launch.main([f"infer.prompts={'x' * 300}", "dry_run=true"]) == 2
    assert (err := capsys.readouterr().err).endswith("x: this name is too long for a file's\n") and err.count("\n") == 1


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LANG": "POSIX"}, {}, {"LC_ALL": "zh_CN.GB18030"}], ids=str)
def test_chinese_names_in_any_locale(locale: dict[str, str], tmp_path: Path) -> None:
    place = tmp_path / "我的 数据"
    place.mkdir()
    (place / "问答.json").write_text('[{"instruction": "你是谁", "output": "北大助手"}]', encoding="utf-8")
    env = {"PATH": os.environ["PATH"], "HOME": str(place), "PYTHONPATH": str(REPO), **locale}
    words = ["dry_run=true", "dataset.path=问答.json", "name=试验", "infer.prompts=[你好]", "cache_root=缓存"]
    done = subprocess.run([sys.executable, "-m", "pkuslurm.launch", *words], cwd=place, env=env, capture_output=True)
    out = done.stdout.decode("utf-8")
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert f"{place}/问答.json" in out and "user: 你是谁" in out and f"{place}/缓存" in out and "你好" in out


def test_a_proxy_is_not_asked_for_nodes_and_for_this_one() -> None:
    job = Job(
        run_id="r", kind="train", run=RunDir(Path("/r")), parents=(), nodes=2, nproc_per_node=1, first_attempt=1,
        command=("python",), env={}, env_names={}, unset=(), expect={}, cwd=Path("/r"), accelerator="cpu",
    )  # fmt: skip
    meeting = Rendezvous(0, 2, "10.0.0.1", 12345, "a test", ("cn01", "cn02"))

    def seen(**given: str) -> dict[str, str]:
        return of_worker.of(given, job, meeting, 1)

    names = seen(https_proxy="http://p:1", NO_PROXY="a.cn, localhost", no_proxy="b.cn")
    assert names["no_proxy"] == names["NO_PROXY"] == "b.cn,a.cn,localhost,127.0.0.1,::1,10.0.0.1,cn01,cn02"
    assert "no_proxy" not in seen(NO_PROXY="a.cn")

"""The commands as processes: exit codes, what is (not) written, what is loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pkuslurm import launch
from pkuslurm.worker import devices
from tests.conftest import REPO, Ended, environment, run

HEAVY = "torch|transformers|llamafactory|matplotlib|pandas|numpy|datasets|peft"


@pytest.mark.parametrize(
    ("module", "forbidden"), [("pkuslurm.launch", HEAVY), ("pkuslurm.cli", HEAVY + "|hydra|omegaconf|submitit")]
)
def test_a_login_node_stays_light(module: str, forbidden: str) -> None:
    script = f"import sys, {module}; print([m for m in {forbidden.split('|')!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.strip() == "[]"


REFUSED = {
    "model.path=missing": "model.path=missing: no such folder or downloaded model",
    "model.path=empty": "no config.json there",
    "model.path=torn": "is cut short; download that file again",
    "model.path=pickled": "no *.safetensors there",
    "dataset.path=missing.json": "dataset.path=missing.json: there is no such file or folder",
    "dataset.path=empty.json": "the file is empty",
    "dataset.path=broken.json": "it is not JSON",
    "dataset.path=[]": "dataset.path",
    "dataset.path=none.json": "it holds no row",
    "dataset.path=bad.json": "row 1: 'instruction' is no text but int",
    "dataset.path=turns.json": "none of 2 rows can be used (2 that end with a question)",
    "dataset.path=odd.json": "the columns are a, b: name them",
    "dataset.path=rows.json dataset.columns={prompt: instructon, response: output}": "instructon",
    "dataset.path=rows.json dataset.columns={promt: instruction}": "prompt",
    "dataset.path=two": "one data file is wanted there, found a.json, b.json",
    "dataset.path=data.xlsx": "save it as CSV UTF-8",
    "model.path=missing model.template=auto": "no such folder or downloaded model",
    "model.template=lama3": "did you mean",
    "train.per_device_train_batch_size=four": "it must be a whole number",
    "train.save_safetensors=true": "0.9.4",
    "train.streaming=true": "max_steps",
    "train.predict_with_generate=true": "infer.prompts",
    "train.finetuning_type=full train.quantization_bit=4": "quantization",
    "infer.prompts=missing.txt": "missing.txt: it cannot be read",
    "infer.prompts=你是谁": "written as a list: infer.prompts=[a,b]",
    "infer.prompts=columns.csv": "it has no column prompt, only a, b",
    "infer.prompts=bad.jsonl": "not a regular expression",
    "infer.prompts=[a] infer.expect=[b,c]": "2 expectations for 1 prompts",
    "run_root=/proc/nowhere": "run_root=/proc/nowhere: ",
    "model.path=Qwen/Qwen2.5-1.5B-Instruct": "-m pkuslurm fetch Qwen/Qwen2.5-1.5B-Instruct",
    "model=tiny cluster.accelerator=cuda": "cluster.accelerator=cuda: this machine has no such device",
    "cluster=scow model=tiny": "cluster.accelerator=npu: this machine has no such device",
    "dataset=identity dataset.name=identiy": "dataset.name=identiy: dataset=identity is identity; did you mean that?",
    "cluster.join_timeout=abc": "cluster.join_timeout=abc: it must be a number\n",
    "dataset.columns=a:问 dataset.columns=b:答": "write 'dataset.columns={a: 问, b: 答}'",
    "export_dir=x": "did you mean merge.export_dir=x?",
    "cluster.env.HF_TOKEN=abc": "HF_TOKEN",
    "nodes=1.5": "whole number",
    "cluster.nproc_per_node=0": "1 or more",
    "model.path=rows.json": "model.path=rows.json: this is a file; give the folder",
    "model.path=/no/where": "give a model's folder, or its id, such as",
    "dataset.path=silent.json": "none of 2 rows can be used (1 without an answer, 1 with an empty answer)",
    "run_root=rows.json": "is no folder; give a folder of your own",
    "cluster=scow cluster.meet=/no/where": "cluster.meet=/no/where: there is no such folder here",
    "cluster=scow cluster.partition=gpu": "cluster.partition: cluster=scow asks no scheduler",
    "cluster=scow wait=false": "wait=false: a run of cluster=scow works in the foreground",
    "cluster.meet=.": "cluster.meet: only the nodes of cluster=scow look for each other",
    "nodes=2 cluster.accelerator=cuda": "nodes=2: on cluster=local all nodes are this machine, whose cuda devices",
    "-m cluster=scow nodes=2 train.learning_rate=1e-5,5e-5": "-m: on cluster=scow each point of a sweep",
    "from_yaml=a.yaml": "from_yaml=a.yaml: it cannot be read",
    "serve.port=80": "serve.port=80: it must be from 1024 to 65535",
    "serve.engine=ollama": "serve.engine=",
    "serve.engine=command": "a command goes with serve.engine=command",
    "cluster.partition=gpu": "cluster.partition: cluster=local asks no scheduler",
    "wait=false": "wait=false: a local run works in the foreground",
    "-m cluster.partition=a,b": "point 0 (partition=a): cluster.partition: cluster=local asks no scheduler",
    "sweep.extend=x": "sweep.extend=x: points are added by a sweep; write launch -m",
    "cluster.python=/no/such/python": "there is no such program",
    "nodez=2": "nodez: no such key",
}


@pytest.mark.parametrize("typed", REFUSED)
def test_refused_in_one_line_and_nothing_is_written(
    typed: str, weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (weird / "empty").mkdir()
    for name in ("torn", "pickled"):
        (weird / name).mkdir()
        (weird / name / "config.json").write_text("{}", encoding="utf-8")
    (weird / "torn" / "model.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{}")
    (weird / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    (weird / "empty.json").write_text("", encoding="utf-8")
    (weird / "broken.json").write_text("[{", encoding="utf-8")
    (weird / "data.xlsx").write_text("x", encoding="utf-8")
    row = {"instruction": "a", "input": "", "output": "b"}
    for name, rows in {
        "none": [],
        "bad": [{"instruction": 1, "input": "", "output": None}],
        "turns": [{"conversations": [{"from": "human", "value": "a"}]}] * 2,
        "odd": [{"a": "x", "b": "y"}],
        "rows": [row] * 3,
        "silent": [row | {"output": ""}, {"instruction": "a"}],
    }.items():
        (weird / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (weird / "columns.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    (weird / "bad.jsonl").write_text('{"prompt": "a", "expect": "("}\n', encoding="utf-8")
    (weird / "two").mkdir()
    for name in ("a.json", "b.json"):
        (weird / "two" / name).write_text("[]", encoding="utf-8")
    before = sorted(weird.rglob("*"))
    monkeypatch.setattr(devices, "count_files", lambda _: 0)  # wherever this is tested
    more = ["infer.prompts=[hi]"] if "dataset.path" in typed else []
    words = re.split(r" (?=[\w.]+=)", typed)
    monkeypatch.chdir(weird)
    monkeypatch.setenv("HOME", str(weird))
    for variable in ("PKUSLURM_RUN_ROOT", "PKUSLURM_CACHE", "WORK_DIR"):
        monkeypatch.delenv(variable, raising=False)
    assert launch.main([*words, *more]) == 2
    ended = capsys.readouterr()
    assert REFUSED[typed] in ended.err
    assert ended.out == "" and ended.err.count("\n") == 1 and ended.err.startswith("pkuslurm: ")
    assert sorted(weird.rglob("*")) == before


def test_no_home_and_a_c_locale(weird: Path) -> None:
    env = environment(weird, LC_ALL="C", LANG="C")
    for name in ("HOME", "XDG_STATE_HOME", "PYTHONUTF8"):
        env.pop(name, None)
    done = run(["dry_run=true", "name=我的", f"cache_root={weird}/缓存"], weird, env)
    assert done.code == 0, done.err
    assert "缓存" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["status"], "there are no runs yet; looked in"),
        (["status", "2026"], "RUN 2026: no such run"),
        (["status", "./nowhere"], "no run"),
        (["retry"], "there are no runs yet"),
        (["serve"], "there are no runs yet"),
    ],
)
def test_verbs_refuse_in_one_line(arguments: list[str], message: str, weird: Path) -> None:
    ended = run(arguments, weird, environment(weird), module="pkuslurm")
    assert ended.code == 2 and message in ended.err, ended
    assert ended.err.count("\n") == 1


def test_logs_as_json_and_a_setting_without_run(weird: Path) -> None:
    from tests.read import fake_run

    made = fake_run.finished(weird).path
    env = environment(weird, PKUSLURM_RUN_ROOT=str(made.parent))
    listed = json.loads(run(["logs", "--json"], weird, env, module="pkuslurm").out)
    assert listed["run_id"] == made.name and all(Path(log).is_file() for log in listed["logs"]) and listed["logs"]
    asked = run(["infer", "promts=[a]"], weird, env, module="pkuslurm")
    assert asked.code == 2 and str(made) in asked.err, asked


def test_help_and_cfg(launched: Callable[..., Ended], weird: Path) -> None:
    assert "cluster    ascend, cscs-alps, " in launched("--help").out
    shown = launched("--cfg", "job", "nodes=3")
    assert shown.code == 0 and "nodes: 3" in shown.out
    assert run(["--help"], weird, environment(weird), module="pkuslurm").code == 0


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    script = f"import os; os.mkdir({str(gone)!r}); os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})\n"
    script += "from pkuslurm.cli import main; raise SystemExit(main(['runs']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(tmp_path))
    assert done.returncode == 2 and "the current folder has been deleted" in done.stderr


def test_a_bug_of_ours_is_one_line_and_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pkuslurm import guard

    def broken() -> int:
        raise RuntimeError("oops")

    assert guard.guarded(broken) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "a bug of ours (RuntimeError: oops)" in err
    log = Path(err.rsplit("details: ", 1)[1].strip())
    assert "Traceback" in log.read_text(encoding="utf-8")
    log.unlink()


def test_without_slurm_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert launch.main(["cluster=slurm", "model=tiny", f"cache_root={tmp_path}"]) == 2
    assert "there is no sbatch on this machine" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


NO_CLUSTER = "scontrol: fatal: Could not establish a configuration source"
AWAY = "slurm_load_partitions: Unable to contact slurm controller (connect failure)"


@pytest.mark.parametrize(
    ("says", "typed", "message"),
    [
        (NO_CLUSTER, "model=tiny cluster.accelerator=cpu", "know of no cluster (no slurm.conf, no controller)"),
        (NO_CLUSTER, "nodes=2", "cluster=local runs here"),  # before the model, which is not here either
        (AWAY, "model=tiny cluster.accelerator=cpu", "the controller does not answer; try again later"),
        (AWAY, "nodes=2", "-m pkuslurm fetch"),
    ],
)
def test_slurm_that_belongs_to_no_cluster_is_not_one_that_is_away(
    says: str,
    typed: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\necho '{says}' >&2; exit 1\n", encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable in ("PKUSLURM_MODELS", "SCOW_AI_MODEL_PATH", "MODELSCOPE_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    assert launch.main(["cluster=ascend", *typed.split(), f"cache_root={tmp_path}/cache"]) == 2
    assert message in capsys.readouterr().err


def test_a_disk_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**8))  # type: ignore[attr-defined]
    assert launch.main(["here=true", f"cache_root={tmp_path}"]) == 2
    assert re.search(r"run_root=.*: 0\.1 GB are free, 0\.\d GB are needed", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert launch.main(["here=true", f"cache_root={tmp_path}"]) == 2
    assert "cannot be written by you; give a folder of your own" in capsys.readouterr().err


def test_another_users_run_is_read_but_never_executed(
    weird: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pkuslurm import cli
    from tests.submit.test_local import OK, make_run

    made = make_run(weird, infer=OK)
    monkeypatch.setattr(os, "getuid", lambda: made.path.stat().st_uid + 1)
    assert cli.main(["status", str(made.path)]) == 0
    assert cli.main(["infer", str(made.path)]) == 2
    assert "belongs to another user" in capsys.readouterr().err
    assert not made.state("infer").exists()

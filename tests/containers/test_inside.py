"""On a node: what is there is mounted, what is missing is said. Stand-ins for the runtimes write down their argv."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.rundir import write_json
from pkuslurm.worker import inside
from pkuslurm.worker.job import Job, load
from tests.worker.conftest import Lab, lab  # noqa: F401  # a fixture

# It runs what stands behind the image, in the place of a container.
STANDIN = """\
import json, os, sys
with open({log!r}, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
words = sys.argv[1:]
if {image!r} in words:
    rest = words[words.index({image!r}) + 1:]
    os.execvp(rest[0], rest)
"""


def fake(folder: Path, program: str, image: str) -> Path:
    folder.mkdir(exist_ok=True)
    log = folder / f"{program}.log"
    file = folder / program
    standin = folder / f"{program}.py"
    standin.write_text(STANDIN.format(log=str(log), image=image), encoding="utf-8")
    # a #! line takes no path with a space, and this checkout may lie in one
    words = shlex.join([sys.executable, str(standin)])
    file.write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
    file.chmod(0o755)
    return log


def calls(log: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [tuple(json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


def job(folder: Path, image: str, runtime: str = "apptainer", **more: Any) -> Job:
    run = folder / "运行 1"
    run.mkdir(exist_ok=True)
    described = {"runtime": runtime, "image": image, "accelerator": "npu", "mounts": [str(folder / "runs")]}
    described |= {"if_there": [], "home": str(folder / "cache" / "home")} | more
    value = {"schema_version": 1, "run_id": "r 北", "kind": "train", "run_dir": str(run), "command": ["x"]}
    write_json(run / "train.json", value | {"env": {"A": "1"}, "env_names": {"T": "S"}, "container": described})
    return load(run / "train.json")


def test_devices_drivers_and_links_as_this_node_has_them(tmp_path: Path) -> None:
    dev, real = tmp_path / "dev", tmp_path / "real" / "blobs"
    dev.mkdir()
    for name in ("davinci0", "davinci1", "davinci2", "davinci10", "davinci_manager"):
        (dev / name).touch()
    real.mkdir(parents=True)
    (real / "weights").touch()
    model = tmp_path / "hub" / "snapshot"
    model.mkdir(parents=True)
    (model / "model.safetensors").symlink_to(real / "weights")
    (model / "passwd").symlink_to("/etc/passwd")
    (tmp_path / "runs").symlink_to(tmp_path / "real")
    image = tmp_path / "a.sif"
    image.touch()
    fake(tmp_path / "bin", "apptainer", str(image))
    asked = [f"{dev}/davinci[0-9]*", f"{dev}/davinci_manager", f"{dev}/devmm_svm", "/etc/nosuch.conf"]
    work = job(tmp_path, str(image), mounts=[str(tmp_path / "runs"), str(model)], if_there=asked)
    env = {"PATH": f"{tmp_path / 'bin'}", "ASCEND_RT_VISIBLE_DEVICES": "0,10", "T": "secret", "USER": "a"}
    started = inside.start(work, ["python3"], env, "1-0")
    binds = [started.argv[at + 1] for at, word in enumerate(started.argv) if word == "--bind"]
    runs = [str(tmp_path / "runs"), str(tmp_path / "real"), str(model), "/etc/passwd", str(work.run.path)]
    assert binds == [*runs, str(tmp_path / "cache" / "home"), f"{dev}/davinci0", f"{dev}/davinci10", *asked[1:2]]
    assert Path(work.container.home).is_dir() if work.container else False
    assert started.env["APPTAINERENV_T"] == "secret" and "secret" not in " ".join(started.argv)
    assert started.argv[0] == str(tmp_path / "bin" / "apptainer")
    everything = inside.start(work, ["python3"], env | {"ASCEND_RT_VISIBLE_DEVICES": ""}, "1-0").argv
    assert [word for word in everything if "davinci" in word and "manager" not in word] == [
        f"{dev}/davinci{number}" for number in (0, 1, 2, 10)
    ]


def test_what_a_daemon_is_told_about_this_user(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "docker", "img")
    started = inside.start(job(tmp_path, "img", "docker"), ["python3"], {"PATH": str(tmp_path / "bin")}, "2-1")
    words = started.argv
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert words[words.index("--name") + 1] == "pkuslurm-r---train-2-1", "docker takes ASCII letters"
    assert started.env["USER"] and "USER" in words


@pytest.mark.parametrize(
    ("env", "devices"),
    [
        ({"SLURM_STEP_GPUS": "2,3", "SLURM_JOB_GPUS": "1,2,3", "CUDA_VISIBLE_DEVICES": "0,1"}, '"device=2,3"'),
        ({"SLURM_JOB_GPUS": "3"}, '"device=3"'),
        ({"SLURM_JOB_GPUS": "3", "CUDA_VISIBLE_DEVICES": "MIG-1f,MIG-2f"}, '"device=MIG-1f,MIG-2f"'),
        ({}, "all"),
    ],
)
def test_docker_gets_the_gpus_of_this_job(tmp_path: Path, env: dict[str, str], devices: str) -> None:
    """Inside they count from 0: what the job's variable said outside would be another job's."""
    fake(tmp_path / "bin", "docker", "img")
    work = job(tmp_path, "img", "docker", accelerator="cuda")
    words = inside.start(work, ["python3"], env | {"PATH": str(tmp_path / "bin")}, "1-0").argv
    assert words[words.index("--gpus") + 1] == devices
    assert "CUDA_VISIBLE_DEVICES" not in words


@pytest.mark.parametrize(
    ("runtime", "image", "words"),
    [
        ("apptainer", "HERE", "container.runtime=apptainer: apptainer is not on this node (PATH=/nosuch)"),
        ("pyxis", "img", "container.runtime=pyxis: srun is not on this node (PATH=/nosuch)"),
    ],
)
def test_a_node_without_the_runtime(tmp_path: Path, runtime: str, image: str, words: str) -> None:
    with pytest.raises(PkuslurmError, match="^" + words.replace("(", r"\(").replace(")", r"\)")):
        inside.start(job(tmp_path, image, runtime), ["python3"], {"PATH": "/nosuch"}, "1-0")


def test_a_node_without_the_image(tmp_path: Path) -> None:
    fake(tmp_path / "bin", "apptainer", "x")
    with pytest.raises(PkuslurmError, match=r"^container.image=/nosuch/a.sif: this node has no such file$"):
        inside.start(job(tmp_path, "/nosuch/a.sif"), ["python3"], {"PATH": str(tmp_path / "bin")}, "1-0")


def test_a_broken_job_file(tmp_path: Path) -> None:
    with pytest.raises(PkuslurmError, match=r"container.runtime 'lxc' is none of none, apptainer"):
        job(tmp_path, "img", "lxc")
    with pytest.raises(PkuslurmError, match="mounts is 3, must be a list of texts"):
        job(tmp_path, "img", mounts=3)


def described(lab: Lab, runtime: str, image: str) -> dict[str, Any]:  # noqa: F811
    return {"runtime": runtime, "image": image, "accelerator": "cpu"} | {
        "mounts": [str(lab.run.path)],
        "if_there": [],
        "home": str(lab.run.path / "home"),
    }


def test_a_whole_worker_starts_its_command_inside(lab: Lab, tmp_path: Path) -> None:  # noqa: F811
    image = tmp_path / "a.sif"
    image.touch()
    log = fake(tmp_path / "bin", "apptainer", str(image))
    told = "json.dump([os.getcwd(), dict(os.environ)], open('seen.json', 'w')); open('report.html', 'w').write('x')\n"
    work = lab.job("report", told, container=described(lab, "apptainer", str(image)))
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert lab.work(work, PATH=path, CUDA_HOME="/node") == 0, lab.log("report")
    argv, _ = calls(log)[-1]
    assert argv[0] == "exec" and argv[argv.index(str(image)) + 1] == "sh"
    cwd, env = json.loads((lab.run.path / "seen.json").read_text(encoding="utf-8"))
    assert cwd == str(lab.run.path) and env["HOME"] == str(lab.run.path / "home")
    assert env["APPTAINERENV_TOKEN_OF_TEST"] == env["TOKEN_OF_TEST"] and env["PKUSLURM_TREE"]
    assert "CUDA_HOME" not in env


def test_a_worker_whose_node_lacks_the_runtime_says_so(lab: Lab) -> None:  # noqa: F811
    work = lab.job("report", "", container=described(lab, "charliecloud", "/nosuch.sqfs"))
    assert lab.work(work, PATH="/usr/nosuch") == 1
    reason = lab.state("report")["reason"]
    assert reason.startswith("container.runtime=charliecloud: ch-run is not on this node (PATH=/usr/nosuch)"), reason


def test_what_docker_still_runs_is_ended_with_the_command(lab: Lab, tmp_path: Path) -> None:  # noqa: F811
    log = fake(tmp_path / "bin", "docker", "img:1")
    work = lab.job("report", "sys.exit(3)", container=described(lab, "docker", "img:1"))
    # the run's own path has a quote, a $ and a space in it, but nothing at which docker splits
    assert lab.work(work, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}") == 1
    (run, _), (removed, _) = calls(log)[-2:]
    name = run[run.index("--name") + 1]
    assert run[:1] == ["run"] and removed == ["rm", "--force", name]

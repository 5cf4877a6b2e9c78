"""A run in charliecloud, inside Slurm jobs, as an ordinary user, from a squashfs file. Training is stood in for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import image as images
from tests.cluster.fixture import Cluster
from tests.cluster.people import identity
from tests.cluster.process import command_line, of_user, pids
from tests.cluster.runs import KINDS, TINY, Done, ended, job, jobs_of, running, states, until, verb, views
from tests.cluster.test_resume import at_step, once_each

pytestmark = pytest.mark.usefixtures("nothing_is_left")

STANDIN = Path(__file__).with_name("standin.py").read_text(encoding="utf-8")
# also what tells inside from outside, and whose value has won
LOOKS = """
os.environ["ONLY_IN_THE_IMAGE"] = str(Path("/etc/only-in-the-image").exists())
os.environ["GROUP"] = str(os.access(Path.home(), os.W_OK))
SEEN += ("ONLY_IN_THE_IMAGE", "IMAGE_SAYS", "HF_HUB_OFFLINE", "PATH", "PYTHONPATH", "CUDA_HOME", "OMP_NUM_THREADS")
SEEN += ("PKUSLURM_ATTEMPT", "GROUP")

if __name__"""


@pytest.fixture(scope="module")
def image(slurm: Cluster) -> Iterator[Path]:
    if lacks := images.lacking():
        pytest.skip(f"no image can be run here without {'; '.join(lacks)}")
    folder = Path(tempfile.mkdtemp(prefix="image-", dir=slurm.shared("common")))
    folder.chmod(0o755)
    program = "#!/usr/bin/python3\n" + STANDIN.replace("\nif __name__", LOOKS)
    try:
        with images.fuse_for_everybody():
            yield images.make(folder, program)
    finally:
        shutil.rmtree(folder)


def launch(slurm: Cluster, image: Path, *overrides: str) -> Done:
    """Out of a shell whose own python would break the image's."""
    words = [str(slurm.python), "-m", "pkuslurm.launch", f"cache_root={slurm.shared('pkalice')}/image-cache", *TINY]
    env = {"PYTHONPATH": "", "CUDA_HOME": "/of/the/login/node", "MY_TOKEN": "canary-4711"}
    chosen = ["container=charliecloud", f"container.image={image}", "cluster.env.CANARY_TOKEN=${oc.env:MY_TOKEN}"]
    return slurm.run("pkalice", [*words, *chosen, *overrides], env=env)


def launched(slurm: Cluster, image: Path, *overrides: str) -> Path:
    done = launch(slurm, image, *overrides)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


def test_a_pipeline_runs_inside_and_its_nodes_meet(slurm: Cluster, image: Path) -> None:
    run = launched(slurm, image, "name=北大 a", "cluster.env.STANDIN_TRAIN=steps:4")
    found = ended(slurm, run)
    assert states(found) == dict.fromkeys(KINDS, "COMPLETED") and found["passed"] is True, logs(run)
    for kind in ("prepare", "train", "merge", "infer"):
        for view in views(run, kind):
            assert view["ONLY_IN_THE_IMAGE"] == "True", view
            assert view["PATH"] == "/opt/image/bin:/usr/bin:/bin", "python3 is the image's"
            assert view["IMAGE_SAYS"] == "it's the image's, = and all", "what we do not set is the image's"
            assert view["HF_HUB_OFFLINE"] == "1", "what we set is ours"
            assert view["CANARY_TOKEN"] == "canary-4711" and view["USER"] == "pkalice"
            assert view["PYTHONPATH"] is None and view["CUDA_HOME"] is None, "the login node's"
            assert view["HOME"] == f"{slurm.shared('pkalice')}/image-cache/home" and view["GROUP"] == "True"
    seen = views(run, "train")
    assert [view["NODE_RANK"] for view in seen] == [view["SLURM_PROCID"] for view in seen] == ["0", "1"]
    assert len({view["SLURMD_NODENAME"] for view in seen}) == 2
    assert len({(view["MASTER_ADDR"], view["MASTER_PORT"]) for view in seen}) == 1
    for rank in (0, 1):  # each step is one that both have taken: a connection from node to node
        assert (run / "views" / f"steps.{rank}").read_text(encoding="utf-8") == "1 1\n1 2\n1 3\n1 4\n"
    written = [file for file in run.rglob("*") if file.is_file() and "views" not in file.parts]
    assert not [file for file in written if b"canary-4711" in file.read_bytes()]


def test_cancel_leaves_no_process_and_no_secret_shows(slurm: Cluster, image: Path) -> None:
    run = launched(slurm, image, "cluster.env.STANDIN_TRAIN=sleep")
    running(slurm, run, "train")
    shown = slurm.processes("pkalice")
    assert sum(" ch-run " in f" {line}".replace("/usr/bin/", "") for line in shown) >= 2, shown
    assert not [line for line in shown if "canary" in line]
    assert verb(slurm, "cancel", run).returncode == 0
    ended(slurm, run)
    slurm.wait_idle()
    assert slurm.processes("pkalice") == []


def test_scancel_lets_it_save_inside(slurm: Cluster, image: Path) -> None:
    """Every process is told to end, also the one that holds the image; the ranks first write a checkpoint."""
    run = launched(slurm, image, "cluster.env.STANDIN_TRAIN=steps:120:quick")
    at_step(slurm, run, 6)
    slurm.run("pkalice", ["scancel", str(jobs_of(run)["train"]["job_id"])])
    found = ended(slurm, run)
    assert job(found, "train")["state"] == "CANCELLED" and "is kept" in job(found, "train")["reason"], logs(run)
    slurm.wait_idle()
    assert slurm.processes("pkalice") == []
    assert verb(slurm, "retry", run).returncode == 0
    assert states(ended(slurm, run)) == dict.fromkeys(KINDS, "COMPLETED"), logs(run)
    once_each(run, 120)


def test_a_worker_that_is_killed_leaves_nothing(slurm: Cluster, image: Path) -> None:
    run = launched(slurm, image, "cluster.env.STANDIN_TRAIN=sleep", "nodes=1", "pipeline=train")
    running(slurm, run, "train")
    mine = of_user(identity("pkalice").uid)
    (worker,) = [pid for pid in pids() if mine(pid) and "pkuslurm.worker" in command_line(pid).split("srun")[0]]
    os.kill(worker, signal.SIGKILL)
    until(slurm, run, lambda found: job(found, "train")["state"] not in ("RUNNING", "PENDING"), "pkalice", 60)
    slurm.wait_idle()
    assert slurm.processes("pkalice") == []


def test_what_is_missing_is_said_before_anything_is_written(slurm: Cluster, image: Path) -> None:
    runs = slurm.shared("pkalice") / "no-runs"
    done = launch(slurm, image.with_name("imag.sqfs"), f"run_root={runs}")
    assert done.returncode == 2 and not runs.exists()
    assert "there is no such file; did you mean image.sqfs?" in done.stderr and "ch-convert" in done.stderr


def logs(run: Path) -> str:
    texts = [f"{file.name}:\n{file.read_text(encoding='utf-8')}" for file in sorted(run.glob("logs/*.log"))]
    return "\n".join([*texts, json.dumps(sorted(map(str, run.rglob("*"))))])

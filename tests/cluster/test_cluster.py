"""The cluster is a real one: hosts, addresses, devices, accounts, users who cannot read each other."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cluster import daemons, faults, mount, network, process
from tests.cluster.fixture import Cluster
from tests.cluster.layout import Layout, load
from tests.cluster.python import REPO


def test_a_step_on_two_nodes_has_two_host_names_and_addresses(slurm: Cluster) -> None:
    ended = slurm.run("pkalice", ["srun", "-N2", "sh", "-c", "echo $(uname -n) $(hostname -I) $(ls /sys/class/net)"])
    assert ended.returncode == 0, ended.stderr
    first, second = slurm.nodes[:2]
    assert sorted(ended.stdout.splitlines()) == [
        f"{name} {slurm.layout.address(name)} eth0 lo" for name in (first, second)
    ]


def test_nodes_reach_each_other_by_name(slurm: Cluster) -> None:
    first, second = slurm.nodes[:2]
    # slurmd's port stands for any
    ended = slurm.run("pkalice", ["srun", "-w", first, "bash", "-c", f"</dev/tcp/{second}/6818"])
    assert ended.returncode == 0, ended.stderr


def test_devices_have_indices_and_there_are_no_more_than_two(slurm: Cluster) -> None:
    shown = slurm.run("pkalice", ["srun", "--gres=npu:2", "sh", "-c", "scontrol show job -d $SLURM_JOB_ID"])
    assert "GRES=npu:2(IDX:0-1)" in shown.stdout, shown
    refused = slurm.run("pkalice", ["sbatch", "--gres=npu:3", "--wrap", "true"])
    assert refused.returncode == 1
    assert "Requested node configuration is not available" in refused.stderr


def test_sacct_knows_a_job_that_has_ended(slurm: Cluster) -> None:
    job = slurm.run("pkalice", ["sbatch", "--parsable", "--wait", "--wrap", "exit 3"])
    assert job.returncode == 3, job.stderr
    command = ["sacct", "-n", "-P", "-X", "-j", job.stdout.strip(), "-o", "State,ExitCode,Account,User"]
    seen: list[str] = []

    def ended() -> bool:
        seen.append(slurm.run("pkalice", command).stdout.strip())
        return seen[-1] == "FAILED|3:0|pku|pkalice"

    process.wait_for(ended, 10, "sacct to show the job")


def test_requests_are_refused_for_the_account_and_the_qos(slurm: Cluster) -> None:
    refused = slurm.run("pkalice", ["sbatch", "-A", "lab", "--wrap", "true"])
    assert "Invalid account" in refused.stderr
    held = ["sbatch", "-H", "-q", "tight", "--wrap", "true"]
    answers = [slurm.run("pkbob", held).returncode for _ in range(3)]
    slurm.ask("scancel", "-u", "pkbob")
    assert answers == [0, 0, 1]


def test_bob_does_not_read_what_alice_wrote(slurm: Cluster) -> None:
    mine = slurm.shared("pkalice") / "secret"
    written = slurm.run("pkalice", ["srun", "-N1", "sh", "-c", f"echo hers > {mine}"])
    assert written.returncode == 0, written.stderr
    ended = slurm.run("pkbob", ["srun", "cat", str(mine)])
    assert ended.returncode != 0
    assert "Permission denied" in ended.stderr
    assert mine.read_text() == "hers\n"
    assert slurm.run("pkbob", ["ls", str(slurm.shared("common"))]).returncode == 0
    assert slurm.run("pkbob", ["touch", str(slurm.shared("common") / "x")]).returncode != 0


def test_a_user_has_the_python_of_the_tests_on_every_node(slurm: Cluster) -> None:
    code = "import pkuslurm, sys; print(pkuslurm.__file__, sys.executable)"
    ended = slurm.run("pkalice", ["srun", "-N2", str(slurm.python), "-c", code])
    assert ended.stdout.splitlines() == [f"{slurm.source}/pkuslurm/__init__.py {slurm.python}"] * 2, ended.stderr
    assert (slurm.source / "pkuslurm").samefile(REPO / "pkuslurm")
    ended = slurm.run("pkalice", ["srun", str(slurm.python), "-c", "import torch; print(torch.__version__)"])
    assert ended.stdout.split("+")[0].strip() == version("torch").split("+")[0], ended.stderr


def test_the_checkout_is_read_only_for_root_too_where_it_had_to_be_mounted(slurm: Cluster) -> None:
    if slurm.source == REPO:
        return  # the users can read it where it is
    with pytest.raises(OSError, match="Read-only"):
        (slurm.source / "written").touch()


def test_nothing_of_the_callers_shell_comes_into_a_login(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "nosuch")
    monkeypatch.setenv("PYTHONPATH", "/nosuch")
    names = {line.split("=")[0] for line in slurm.run("pkalice", ["env"], env={"MORE": "1"}).stdout.splitlines()}
    assert names == {"PATH", "LANG", "HOME", "USER", "LOGNAME", "SHELL", "SLURM_CONF", "MORE"}


def test_a_cancelled_job_leaves_no_process_on_a_node(slurm: Cluster) -> None:
    job = slurm.run("pkalice", ["sbatch", "--parsable", "-N2", "--wrap", "srun sleep 987"]).stdout.strip()
    process.wait_for(lambda: len([p for p in slurm.processes("pkalice") if "sleep 987" in p]) >= 2, 15, "the job")
    slurm.run("pkalice", ["scancel", job])
    slurm.wait_idle(20)
    assert slurm.processes("pkalice") == []


def test_a_paused_controller_keeps_silent_until_it_is_resumed(slurm: Cluster) -> None:
    faults.pause(slurm.layout, "slurmctld")
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            slurm.run("pkalice", ["squeue"], timeout=1)
    finally:
        faults.resume(slurm.layout, "slurmctld")
    assert slurm.run("pkalice", ["squeue"]).returncode == 0


def test_a_node_may_resolve_itself_to_the_loopback(slurm: Cluster) -> None:
    first, second = slurm.nodes[:2]
    faults.loopback_names(slurm.layout, True)
    try:
        seen = slurm.run("pkalice", ["srun", "-w", first, "getent", "hosts", first, second]).stdout.split()
    finally:
        faults.loopback_names(slurm.layout, False)
    assert seen == ["127.0.1.1", first, slurm.layout.address(second), second]


def test_accounting_can_be_taken_away_for_a_while(slurm: Cluster) -> None:
    with faults.without_accounting(slurm.layout):
        ended = slurm.run("pkalice", ["sacct"])
        assert ended.returncode == 1
        assert "accounting storage is disabled" in ended.stderr
        assert slurm.run("pkalice", ["srun", "true"]).returncode == 0
    assert slurm.run("pkalice", ["sacct"]).returncode == 0


def test_a_dead_node_and_a_killed_controller_come_back(slurm: Cluster) -> None:
    last = slurm.nodes[-1]
    faults.node_kill(slurm.layout, last)
    faults.kill(slurm.layout, "slurmctld")
    assert daemons.missing(slurm.layout) == ["slurmctld", last]
    slurm.clear()
    assert daemons.missing(slurm.layout) == []
    assert slurm.run("pkalice", ["srun", "-w", last, "hostname"]).stdout == f"{last}\n"


def test_a_second_up_leaves_the_cluster_alone(slurm: Cluster) -> None:
    # --temporary: else the cluster would be ours no more, and stay after the tests
    command = [sys.executable, "-m", "tests.cluster", "up", "--temporary"]
    again = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)
    assert again.stdout.startswith("it is up"), again
    other = subprocess.run([*command, "--no-accounting"], cwd=REPO, capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "accounting=True is up" in other.stderr


def test_a_pid_file_of_a_recycled_pid_hits_nobody(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        file = tmp_path / "pid"
        file.write_text(f"{sleeper.pid} 1 {boot}\n")
        assert process.running(file) is None
        assert not process.send(file, signal.SIGKILL)
        file.write_text(f"{sleeper.pid} {process.born(sleeper.pid)} {boot}\n")
        assert process.send(file, signal.SIGKILL)
        assert sleeper.wait(5) == -9


def remains(layout: Layout) -> list[str]:
    """What is left of a cluster, anywhere."""
    netns = [name for name in layout.names if (network.NETNS / layout.netns(name)).exists()]
    links = [line for line in network.ip("-o", "link").splitlines() if layout.bridge in line]
    marked = process.marked(layout.base)
    running = [process.command_line(pid) for pid in process.pids() if marked(pid)]
    mounted = [str(path) for path in mount.mounts() if path == layout.base or layout.base in path.parents]
    return [*netns, *links, *running, *mounted, *([str(layout.base)] if layout.base.exists() else [])]


def test_down_leaves_nothing_of_a_second_cluster_and_the_first_alone(
    slurm: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = slurm.base.with_name(f"{slurm.base.name}-second")
    monkeypatch.setenv("PKUSLURM_CLUSTER_DIR", str(base))
    begin = time.monotonic()

    def cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tests.cluster", *arguments]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False)

    try:
        made = cluster("up", "--no-accounting", "--nodes", "2", "--min-job-age", "20")
        assert made.returncode == 0, made.stderr
        layout = load(base)
        assert layout is not None
        assert layout.net != slurm.layout.net
        ended = cluster("as", "pkbob", "--", "srun", "-N2", "hostname")
        assert sorted(ended.stdout.split()) == ["ascend01", "ascend02"], ended.stderr
        assert len(remains(layout)) > 5
    finally:
        cluster("down")
    assert remains(layout) == []
    assert cluster("down").stdout.startswith("no cluster")
    assert slurm.run("pkalice", ["srun", "true"]).returncode == 0
    assert time.monotonic() - begin < 30

"""The prefork launcher: with stand-ins for the ranks, and once for real beside torchrun."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import prefork, ranks
from pkuslurm.worker.processes import look
from tests.again import copied
from tests.conftest import Demo

REPO = Path(__file__).parents[2]
MAIN = REPO / "pkuslurm" / "payload" / "__main__.py"
# in the place of __main__.py: the modules are given, and the ranks run Python text
PLAY = """
import json, os, signal, sys, time
sys.path.insert(0, {repo!r})
from pkuslurm.payload import prefork
command = prefork.fork(sys.argv[1:], modules={modules!r})
rank = int(os.environ["RANK"])
open(f"pid.{{rank}}", "w").write(str(os.getpid()))
exec(command[0])
"""
FOREVER = "time.sleep(60)"


def words(nproc: int = 2, nnodes: int = 1, node_rank: int = 0, port: int = 29600) -> list[str]:
    numbers = {"nnodes": nnodes, "node_rank": node_rank, "nproc_per_node": nproc, "master_port": port}
    return [
        "--master_addr",
        "127.0.0.1",
        *(word for name, number in numbers.items() for word in (f"--{name}", str(number))),
    ]


Play = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def play(tmp_path: Path) -> Iterator[Play]:
    """Starts ranks that run ``text``; modules of the folder can be imported."""
    started: list[subprocess.Popen[str]] = []

    def start(
        text: str, modules: tuple[str, ...] = (), ignored: tuple[signal.Signals, ...] = (), **environ: str
    ) -> subprocess.Popen[str]:
        def deaf() -> None:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)

        env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | environ
        process = subprocess.Popen(
            [sys.executable, "-c", PLAY.format(repo=str(REPO), modules=modules), *words(), text],
            cwd=tmp_path,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=deaf,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # its ranks go with it
        process.communicate()


def pids(folder: Path) -> list[int]:
    """The ranks', once all are there."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [int(file.read_text() or 0) for file in (folder / f"pid.{rank}" for rank in (0, 1)) if file.exists()]
        if len(found) == 2 and all(found):
            return found
        time.sleep(0.02)
    raise AssertionError("no two ranks")


def gone(pids: list[int], seconds: float = 1.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(process is not None and not process.zombie for process in map(look, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_each_rank_has_its_place_and_the_jobs_own_threads(play: Play, tmp_path: Path) -> None:
    tell = (
        "line = json.dumps([dict(os.environ), os.getsid(0) == os.getpid(), open('/proc/self/comm').read().strip()])\n"
    )
    tell += "os.write(1, f'{line}\\n'.encode())"  # in one piece
    out, err = play(tell, OMP_NUM_THREADS="3", TQDM_DISABLE="").communicate(timeout=20)
    told = sorted(map(json.loads, out.splitlines()), key=lambda one: one[0]["RANK"])
    assert [(one[0]["RANK"], one[0]["LOCAL_RANK"], one[0]["WORLD_SIZE"]) for one in told] == [
        ("0", "0", "2"),
        ("1", "1", "2"),
    ], err
    assert all(one[0]["OMP_NUM_THREADS"] == "3" and one[0]["TQDM_DISABLE"] == "" for one in told)
    assert "OPENBLAS_NUM_THREADS" not in told[0][0] or "OPENBLAS_NUM_THREADS" in os.environ
    assert [one[1:] for one in told] == [[True, "pku-rank-0"], [True, "pku-rank-1"]]


def test_the_second_nodes_ranks_go_on_counting() -> None:
    node, rest = prefork.options([*words(nproc=4, nnodes=3, node_rank=2), "train", "/a b/train.json"])
    own = node.environment(1)
    assert rest == ["train", "/a b/train.json"]
    assert {name: own[name] for name in ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "GROUP_RANK": "2",
        "WORLD_SIZE": "12",
        "LOCAL_WORLD_SIZE": "4",
    }


TORCH = """
class _Device:
    def __init__(self, there): self.there = there
    def is_initialized(self): return self.there
cuda, npu = _Device({cuda}), _Device({npu})
"""
# a library of this name in the process, as /proc/self/maps shows it
MAPPED = """
import ctypes, mmap
file = open({name!r}, "w+b")
file.truncate(4096)
kept = mmap.mmap(file.fileno(), 0)
"""
# the driver's answer after cuInit; before, it is 3
DRIVER = "ctypes.CDLL = lambda name: type('', (), {'cuDeviceGetCount': staticmethod(lambda count: 0)})\n"
UNSAFE = {
    "a thread": (
        "import threading, time; threading.Thread(target=time.sleep, args=(9,), daemon=True, name='t1').start()",
        "started threads: t1",
    ),
    "a library's thread": (
        "import _thread, time; _thread.start_new_thread(time.sleep, (9,))",
        "a library started threads",
    ),
    "a process": ("import subprocess; subprocess.Popen(['sleep', '3'], stdout=-3, stderr=-3)", "started processes"),
    "cuda": ("import sys; sys.path.insert(0, 'used'); import torch", "initialised torch.cuda"),
    "npu": ("import sys; sys.path.insert(0, 'used'); import torch", "initialised torch.npu"),
    "cuda's driver": (MAPPED.format(name="libcuda.so.1") + DRIVER, "initialised CUDA"),
    "cann": (MAPPED.format(name="libascendcl.so"), "loaded libascendcl"),
    "llamafactory": ("import llamafactory", "llamafactory was imported"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_what_cannot_be_forked_is_torchruns(play: Play, tmp_path: Path, case: str) -> None:
    """In the environment that was given, and with one line that says why."""
    text, why = UNSAFE[case]
    (tmp_path / "used" / "torch").mkdir(parents=True)
    (tmp_path / "used" / "torch" / "__init__.py").write_text(TORCH.format(cuda=case == "cuda", npu=case == "npu"))
    (tmp_path / "llamafactory.py").touch()
    (tmp_path / "careless.py").write_text(text)
    torchrun(tmp_path)
    process = play("never", modules=("nosuch.module", "careless"), OMP_NUM_THREADS="2")
    out, err = process.communicate(timeout=20)
    assert process.returncode == 9, err
    [line] = err.splitlines()
    assert line.startswith("pkuslurm prefork: ") and why in line and line.endswith("; torchrun starts the ranks")
    argv, threads = json.loads(out)
    assert threads == "2"
    start = argv.index("--nnodes")
    assert argv[start:-2] == [
        *("--nnodes", "1", "--node_rank", "0", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", "29600"),
    ]
    assert argv[-2:] == [str(MAIN), "never"]
    assert not list(tmp_path.glob("pid.*"))


def torchrun(folder: Path) -> None:
    """A stand-in for it, found by ``python -m``."""
    package = folder / "torch" / "distributed"
    package.mkdir(parents=True)
    for place in (package.parent, package):
        (place / "__init__.py").touch()
    tell = "import json, os, sys\nprint(json.dumps([sys.argv, os.environ['OMP_NUM_THREADS']]))\nsys.exit(9)\n"
    (package / "run.py").write_text(tell)


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({"OMP_NUM_THREADS": "4,2"}, "OMP_NUM_THREADS=4,2"),
        ({"OMP_NUM_THREADS": "1"}, "torch_npu is installed"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "1"}, "torch loads late:go by itself"),
    ],
)
def test_what_speaks_against_it_is_seen_before_anything_is_imported(
    tmp_path: Path, play: Play, environ: dict[str, str], why: str
) -> None:
    torchrun(tmp_path)
    if "torch_npu" in why:
        (tmp_path / "torch_npu.py").write_text("raise SystemExit('imported')")
    (tmp_path / "late.py").write_text("print('imported')")
    (tmp_path / "late-1.dist-info").mkdir()
    (tmp_path / "late-1.dist-info" / "entry_points.txt").write_text("[torch.backends]\nlate = late:go\n")
    out, err = play("never", modules=("late",), **environ).communicate(timeout=20)
    assert why in err and "imported" not in out + err


def test_a_killed_rank_takes_the_others_along_and_is_named(play: Play, tmp_path: Path) -> None:
    process = play(FOREVER)
    first, second = pids(tmp_path)
    began = time.monotonic()
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=10)
    assert time.monotonic() - began < 5 and process.returncode == 1
    assert f"rank 1 failed (exitcode: -9) local_rank: 1 (pid: {second})" in err
    assert err.count("failed (exitcode") == 1 and gone([first])


@pytest.mark.parametrize("way", ["ignores TERM", "is stopped", "has a child of its own"])
def test_whoever_stays_is_killed(play: Play, tmp_path: Path, way: str) -> None:
    stays = {
        "ignores TERM": "signal.signal(signal.SIGTERM, signal.SIG_IGN); ",
        "is stopped": "os.kill(os.getpid(), signal.SIGSTOP); ",
        "has a child of its own": "child = os.fork(); open('child', 'w').write(str(child)) if child else 0; ",
    }[way]
    process = play(f"time.sleep(0.5); rank or sys.exit(4)\n{stays}{FOREVER}")
    ranks = pids(tmp_path)
    began = time.monotonic()
    assert process.wait(timeout=10) == 4
    assert time.monotonic() - began < 5
    child = tmp_path / "child"
    assert gone([*ranks, *([int(child.read_text())] if child.exists() else [])])


def test_where_term_is_ignored_nobody_waits_for_it(play: Play, tmp_path: Path) -> None:
    """While a checkpoint may be asked for, the worker has all of them ignore it."""
    process = play("assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN\n" + FOREVER, ignored=(signal.SIGTERM,))
    found = pids(tmp_path)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None and not gone(found, 0)
    began = time.monotonic()
    os.kill(found[0], signal.SIGKILL)
    assert process.wait(timeout=10) == 1 and time.monotonic() - began < 2.5
    assert gone(found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_and_is_what_it_ended_of(play: Play, tmp_path: Path, number: signal.Signals) -> None:
    process = play(FOREVER)
    found = pids(tmp_path)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == -number and gone(found)
    assert "failed (exitcode" not in err


def test_a_signal_to_everybody_is_nobodys_failure(play: Play, tmp_path: Path) -> None:
    """Slurm sends it to every process of a step; the ranks may die of it first."""
    process = play(FOREVER)
    for pid in (found := pids(tmp_path)):
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.05)
    process.terminate()
    _, err = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM and gone(found)
    assert "failed (exitcode" not in err


def test_the_launcher_killed_the_ranks_are_gone(play: Play, tmp_path: Path) -> None:
    process = play("signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER)
    found = pids(tmp_path)
    process.kill()
    process.wait()
    assert gone(found)


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((75, 75), 75), ((75, 0), 75), ((75, 3), 3), ((2, 0), 2), ((0, 1), 1)]
)
def test_exit_codes(play: Play, codes: tuple[int, int], code: int) -> None:
    """A stop is one when no rank failed; the one that ends first must not end the others."""
    assert play(f"time.sleep(0.3 * rank); sys.exit({codes}[rank])").wait(timeout=10) == code


def test_a_rank_that_raises_prints_its_traceback(play: Play) -> None:
    process = play("rank or time.sleep(60)\nraise ValueError('坏')")
    _, err = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "ValueError: 坏" in err and "rank 1 failed (exitcode: 1) local_rank: 1" in err


def test_an_abort_is_not_blamed_for_a_kill() -> None:
    dead = [ranks.Death(1, 0, -signal.SIGTERM), ranks.Death(2, 1, -signal.SIGABRT), ranks.Death(3, 2, 1)]
    dead += [ranks.Death(4, 3, -signal.SIGSEGV)]
    assert [one.local for one in sorted(dead, key=lambda death: death.weight)] == [3, 2, 1, 0]


def test_the_list_is_of_what_may_be_imported_before_a_fork() -> None:
    names = prefork.listed()
    assert {"torch", "datasets", "peft"} & {name.partition(".")[0] for name in names}
    assert not [name for name in names if name.partition(".")[0] in ("llamafactory", "torch_npu", "pkuslurm")]


COUNT = """
import os, sys
def count(event, given):
    if event == "exec" and getattr(given[0], "co_name", "") == "<module>":
        package, _, file = given[0].co_filename.rpartition("/")
        if file == "__init__.py" and (name := package.rpartition("/")[2]) in ("torch", "transformers", "llamafactory"):
            with open(os.environ["COUNTED"], "a") as counted:
                counted.write(f"{name} {os.getpid()}\\n")
sys.addaudithook(count)
"""


@pytest.mark.real
def test_for_real_as_torchrun_does_it(demo: Demo, tmp_path: Path) -> None:
    """Losses digit for digit, the adapter byte for byte, also with threads; and imported once for both ranks."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(COUNT)
    made: dict[str, Any] = {}
    for launcher in ("torchrun", "prefork"):
        folder = tmp_path / launcher
        job = copied(demo.path, folder, max_steps=4, logging_steps=1)
        env = os.environ | json.loads(job.read_text())["env"] | {"OMP_NUM_THREADS": "2", "PKUSLURM_ATTEMPT": "1"}
        env |= {"PYTHONPATH": str(tmp_path / "hook"), "COUNTED": str(folder / "counted")}
        start = ["-u", str(MAIN), "prefork"] if launcher == "prefork" else ["-m", "torch.distributed.run"]
        more = [] if launcher == "prefork" else [str(MAIN)]
        command = [sys.executable, *start, *words(port=free_port()), *more, "train", str(job)]
        done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "torchrun starts" not in done.stderr, done.stderr[:500]
        losses = re.findall(r"'loss': '?([\d.]+)'?,.*'learning_rate': '?([\d.e-]+)", done.stdout)
        made[launcher] = losses, (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        counted = Counter(line.split()[0] for line in set((folder / "counted").read_text().splitlines()))
        made[f"{launcher}'s imports"] = dict(counted)
    assert made["torchrun's imports"] == {"torch": 3, "transformers": 2, "llamafactory": 2}, "the count counts"
    assert made["prefork's imports"] == {"torch": 1, "transformers": 1, "llamafactory": 2}
    assert len(made["torchrun"][0]) == 4
    assert made["prefork"] == made["torchrun"]


def free_port() -> int:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.real
def test_the_environment_of_a_rank_is_torchruns(tmp_path: Path) -> None:
    tell = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + os.environ['RANK'], 'w'))"
    (tmp_path / "tell.py").write_text(tell)
    env = os.environ | {"OMP_NUM_THREADS": "2"}
    by_torchrun = ["-m", "torch.distributed.run", *words(port=free_port()), str(tmp_path / "tell.py"), "torchrun."]
    subprocess.run([sys.executable, *by_torchrun], env=env, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    script = PLAY.format(repo=str(REPO), modules=()) + "sys.argv[1:] = ['prefork.']\n" + tell
    by_prefork = ["-c", script, *words(port=free_port()), "pass"]
    subprocess.run([sys.executable, *by_prefork], env=env, cwd=tmp_path, check=True, capture_output=True, timeout=60)
    for rank in "01":
        one, other = (json.loads((tmp_path / f"{name}.{rank}").read_text()) for name in ("torchrun", "prefork"))
        differ = {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}
        # rank 0 has the store that torchrun has for all of them; the rest is between torchrun and its own parts
        store = {"MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"}
        assert differ <= store | {"TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_SIGNALS_TO_HANDLE", "LC_CTYPE"}, differ

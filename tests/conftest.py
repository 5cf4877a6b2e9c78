"""Fixtures that all tests share: hostile folders, the command as a process, one trained run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.read import status
from pkuslurm.slurm import commands
from tests import verify

# Two processes of tests share the processors, and OpenMP's waiting threads spin: ten times as slow as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Those of tests/cluster name their own cluster; to the others the one of `make slurm-up` is no business.
os.environ.pop("SLURM_CONF", None)
pytest_plugins = ["tests.parallel", "tests.faults.recorder"]
REPO = Path(__file__).parents[1]
# A folder name with everything that breaks shells, splitters and C locales.
WEIRD = "a 'quoted\" $(touch x) 我的 模型"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files anew")


def pytest_configure(config: pytest.Config) -> None:
    """Every verdict that is made in this process is looked into; ``heard`` is told those of the commands."""
    verdict = status._status

    def looked_into(*arguments: Any) -> status.RunStatus:
        now = verdict(*arguments)
        verify.claim(now.path, [job.kind for job in now.jobs if job.state == "COMPLETED"], content=False)
        return now

    status._status = looked_into


@pytest.fixture(autouse=True)
def nothing_is_falsely_complete() -> Iterator[None]:
    yield
    wrong = verify.false.copy()
    verify.false.clear()
    assert wrong == [], "called COMPLETED, and it is not"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counted = verify.counted
    text = f"{counted['verdicts']} verdicts of COMPLETED on {counted['runs']} runs: each looked into by tests/verify.py"
    terminalreporter.write_line(text)


@pytest.fixture
def weird(tmp_path: Path) -> Path:
    folder = tmp_path / WEIRD
    folder.mkdir()
    return folder


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        return self.out.rstrip("\n").split("\n")[-1]


def environment(home: Path, **more: str) -> dict[str, str]:
    """This process's environment without pkuslurm's own variables, HOME and state in ``home``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PKUSLURM", "SCOW", "WORK_DIR"))}
    return kept | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "PYTHONPATH": str(REPO)} | more


@cache
def _on_a_login_node() -> bool:
    return commands.answers()


def start(
    arguments: list[str], cwd: Path, env: Mapping[str, str], module: str = "pkuslurm.launch", umask: int = -1
) -> subprocess.Popen[str]:
    # the tests compute where they are started, on a login node too
    here = ["here=true"] if module == "pkuslurm.launch" and _on_a_login_node() else []
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments, *here],
        cwd=cwd,
        env=dict(env),
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        umask=umask,
    )


def run(
    arguments: list[str], cwd: Path, env: Mapping[str, str], module: str = "pkuslurm.launch", umask: int = -1
) -> Ended:
    process = start(arguments, cwd, env, module, umask)
    out, err = process.communicate(timeout=600)
    verify.heard([module, *arguments], process.returncode, out)
    return Ended(process.returncode, out, err)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache_root for the whole session, in whichever of its processes: the tiny model is made once."""
    mine = tmp_path_factory.getbasetemp()
    whole = mine.parent if "PYTEST_XDIST_WORKER" in os.environ else mine
    folder = Path(os.environ.get("PKUSLURM_TEST_CACHE", whole / "cache"))
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def launched(weird: Path, cache: Path) -> Callable[..., Ended]:
    """The launch command, in a hostile folder, with the session's cache."""

    def launch(*arguments: str, **variables: str) -> Ended:
        return run(list(arguments), weird, environment(weird, PKUSLURM_CACHE=str(cache), **variables))

    return launch


@dataclass(frozen=True)
class Demo:
    """The demo's run: its directory, what its command printed, and the environment to go on in."""

    path: Path
    ended: Ended
    cwd: Path
    env: dict[str, str]

    def verb(self, *arguments: str) -> Ended:
        return run(list(arguments), self.cwd, self.env, module="pkuslurm")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Demo]:
    """`python -m pkuslurm.launch nodes=2`, once a session, for real."""
    cwd = tmp_path_factory.mktemp("demo") / WEIRD
    cwd.mkdir()
    env = environment(cwd, PKUSLURM_CACHE=str(cache))
    ended = run(["nodes=2"], cwd, env)
    assert ended.code == 0, ended.err
    yield Demo(Path(ended.last), ended, cwd, env)


def left_running(variable: str) -> list[str]:
    """Command lines of the processes that have ``NAME=value`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
    return found

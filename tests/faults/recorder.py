"""What goes wrong, as rows of docs/reliability.md: declared by a marker, measured by a fixture, written by the session.

A row is an ordinary test, in any file below tests/:

    @pytest.mark.row("16", "a node dies", "Slurm starts the job again without it", within=60, repeated=5)
    @pytest.mark.faults                     # all but one row of each mechanism: not in `make test`
    def test_a_node_that_dies(slurm, row):
        run = launched(slurm, "cluster.env.STANDIN_TRAIN=steps:40")
        faults.node_kill(slurm.layout, head)
        row.happened()                      # the process, the job or the fault really ends now: the clock runs
        until(slurm, run, ...)
        row.told()                          # `status` says what is true: the clock stops
        found = ended(slurm, run)
        row.final(found["state"])           # stops the clock where nothing has before; words are fine, too
        row.work(run, total=40)             # counts what the stand-in did: steps or jobs lost, done twice; of several
                                            # runs their sum

The marker: the number in the fault matrix (several rows may have one number), the fault, the promise; ``within``, the
most seconds that the clock may show; ``repeated``, the most steps (or jobs) that may be done twice. Nothing may ever be
lost.

After the test, before anything is healed or cancelled, the user's processes on the nodes and jobs in the queue
are counted: there must be none (they have ``SETTLE`` seconds). A test without the cluster says ``row.left(0, 0)``
where that means something, and ``row.counted(lost, repeated, "rows")`` where it counts by itself.

Each test calls ``final``; what else it does not call stays "–" in the table. With ``--record`` (`make test-faults`) the
session writes results.json, of which the table is made; rows that were not in the session stay as they were.
The name of a row's test must select it alone with -k.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from tests.faults import table

SETTLE = 15.0
USER = "pkalice"
ANOTHER = "another"  # how jobs are called that are none of pkuslurm's, and no rest of it
_found: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write what rows show into docs/reliability.md")


class Row:
    """One row while its test runs. ``told`` of the marker and what is measured end up in the table."""

    def __init__(self, values: dict[str, Any], slurm: Any) -> None:
        self._values, self._slurm = values, slurm
        self._since: float | None = None
        self._sums: Counter[str] = Counter()

    def happened(self, ago: float = 0.0) -> None:
        """The process, the job or the fault ended really, ``ago`` seconds before now."""
        self._since = time.monotonic() - ago

    def told(self) -> None:
        """`status` says what is true."""
        assert self._since is not None, "row.happened() comes first"
        self._values["seconds"] = round(time.monotonic() - self._since, 1)
        self._since = None
        most = self._values["within"]
        assert self._values["seconds"] <= most, f"right after {self._values['seconds']} s, promised were {most}"

    def final(self, state: str) -> None:
        """The state in which all ends."""
        if self._since is not None:
            self.told()
        self._values["state"] = state

    def work(self, run: Path, total: int | None = None, begun: Sequence[str] | None = None) -> None:
        """Count what the stand-in did for ``run``: ``total`` steps of train, else jobs.

        Lost is a job of run.json that the stand-in has not begun, or that has no marker. ``begun``: where the run ends
        before its last job, those that must have begun; no other may have.
        """
        if total is not None:
            log = run / "views" / "steps.0"
            done = [int(line.split()[1]) for line in log.read_text(encoding="utf-8").splitlines()]
            self._sum(total - len(set(done)), len(done) - len(set(done)), total, "steps")
            return
        log = run / "views" / "begun"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        jobs = Counter(line.split()[0] for line in lines if line.split()[1] == "0")
        made = {file.stem for file in (run / "done").glob("*.json")}
        if begun is None:
            shared = {"prepare"} if run.name.isdecimal() else set()  # of a sweep, done for several points
            wanted = set(json.loads((run / "run.json").read_text(encoding="utf-8"))["jobs"]) - shared
            there = made & {*jobs, "report"}  # which the stand-in has no part in
        else:
            wanted, there = set(begun), set(jobs)
            assert there <= wanted, f"{sorted(there - wanted)} have begun"
        self._sum(len(wanted - there), sum(jobs.values()) - len(jobs), len(wanted), "jobs")

    def _sum(self, lost: int, repeated: int, of: int, what: str) -> None:
        """One run more."""
        self._sums += Counter({"lost": lost, "repeated": repeated, what: of})
        self.counted(lost, repeated, f"{of} {what}")
        self._values["steps"] = f"{self._sums['lost']}, {self._sums['repeated']} of {self._sums[what]} {what}"

    def counted(self, lost: int, repeated: int, of: str) -> None:
        """``of``: of how many steps, jobs, rows of one run."""
        self._values["steps"] = f"{lost}, {repeated} of {of}"
        assert lost == 0, f"{lost} of {of} lost"
        assert repeated <= self._values["repeated"], f"{repeated} of {of} done twice"

    def left(self, processes: int, jobs: int) -> None:
        self._values["left"] = f"{processes}, {jobs}"
        assert (processes, jobs) == (0, 0), f"left over: {processes} processes, {jobs} jobs"

    def clean(self) -> None:
        """Nothing is left over now; also where the test goes on after that."""
        deadline = time.monotonic() + SETTLE
        while any(there := self._there()) and time.monotonic() < deadline:
            time.sleep(0.3)
        self.left(*there)

    def end(self) -> None:
        """The test is through."""
        if self._slurm is not None:
            self.clean()
        assert self._since is None, "row.told() or row.final() is missing"
        assert "state" in self._values, "row.final() is missing"

    def _there(self) -> tuple[int, int]:
        names = self._slurm.ask("squeue", "-h", "-u", USER, "-o", "%j").splitlines()
        return len(self._slurm.processes(USER)), sum(not name.startswith(ANOTHER) for name in names)


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """The row that the test's marker declares; see the module."""
    values = _values(request.node)
    assert values is not None, "the test has no marker `row`"
    cluster = request.getfixturevalue("slurm") if "slurm" in request.fixturenames else None
    row = Row(values, cluster)
    yield row
    if not request.node.stash.get(FAILED, False):
        row.end()


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    if outcome.get_result().when == "call":
        item.stash[FAILED] = not outcome.get_result().passed


def _values(item: pytest.Item) -> dict[str, Any] | None:
    return next((value for name, value in item.user_properties if name == "row"), None)  # type: ignore[misc]


def _declared(number: str, fault: str, promise: str, within: float = 120, repeated: int = 0) -> dict[str, Any]:
    return {"number": number, "fault": fault, "promise": promise, "within": within, "repeated": repeated}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    chosen = [item for item in items if item.get_closest_marker("row") or item.get_closest_marker("faults")]
    names = {getattr(item, "originalname", item.name) for item in chosen}  # what `make test-faults` can select
    for item in items:
        marker = item.get_closest_marker("row")
        if marker is None:
            continue
        name = getattr(item, "originalname", item.name)
        if other := next((one for one in names if name in one and one != name), None):
            raise pytest.UsageError(f"{item.nodeid}: -k {name} selects {other}, too: a row is run alone by its name")
        quick = item.get_closest_marker("faults") is None
        item.user_properties.append(("row", {**_declared(*marker.args, **marker.kwargs), "quick": quick}))  # type: ignore[arg-type]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    values = next((value for name, value in report.user_properties if name == "row"), None)
    if not isinstance(values, dict):
        return
    known = _found.setdefault(report.nodeid, {"outcome": "passed"})
    known |= values | {"date": date.today().isoformat()}
    if report.skipped:
        known |= {"outcome": "skipped", "why": str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "")}
    if report.failed:
        lines = [line for line in report.longreprtext.splitlines() if line.startswith("E ")]
        why = " ".join(line.removeprefix("E").strip() for line in lines)
        known |= {"outcome": "failed", "why": why[:200] or "see the test's output"}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput") or not session.config.getoption("--record") or not _found:
        return
    results = table.load()
    for nodeid, values in _found.items():
        results["rows"][nodeid] = values
    results |= {"slurm": _version(), "machine": f"{os.cpu_count()} cores"}
    table.save(results)


def _version() -> str:
    daemon = shutil.which("slurmctld", path="/usr/sbin:/usr/bin")
    if daemon is None:
        return "none"
    return subprocess.run([daemon, "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]

"""Whatever Slurm's commands print, damaged, or as another version does: a right value or none, never a wrong state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import scheduler, slurm_rules, status
from pkuslurm.read.rules import STATES
from pkuslurm.rundir import RunDir
from pkuslurm.slurm import commands, gres, parse, site
from pkuslurm.submit import slurm as submission
from pkuslurm.worker import hostlist
from tests.fuzz.mutations import damaged, examples
from tests.read.fake_run import edit, make
from tests.slurm.test_parse import SACCT, SQUEUE

RECORDED = Path(__file__).parents[1] / "doctor" / "recorded"
KNOWN = {row.job_id: row for text, read in ((SQUEUE, parse.squeue), (SACCT, parse.sacct)) for row in read(text)}


def recorded(kind: str) -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(RECORDED.glob(f"*.{kind}"))]


@examples(250)
@given(st.one_of(damaged(SQUEUE), st.text()), st.one_of(damaged(SACCT), st.text()))
def test_rows(queued: str, told: str) -> None:
    for row in (*parse.squeue(queued), *parse.sacct(told)):
        assert row.orphaned in (True, False)
        evidence = slurm_rules.SlurmEvidence(job_id="12", row=row, asked=True, doubt="there is no marker")
        verdict, reason = slurm_rules.job_state(evidence)
        assert verdict in STATES and verdict != "COMPLETED", (row, verdict)
        assert reason is None or isinstance(reason, str)
        try:
            hostlist.expand(row.nodes)
        except PkuslurmError:
            pass


@examples(60)
@given(st.data())
def test_what_a_cluster_says_of_itself(data: st.DataObject) -> None:
    def one(kind: str, delimiter: str) -> str:
        return data.draw(damaged(data.draw(st.sampled_from(recorded(kind))), delimiter))

    shown, nodes = one("partition", " "), one("sinfo", "|")
    found = site.site(shown, nodes, one("config", "\n"), site.accounts(one("assoc", "|"), one("account", "|"), None))
    assert all(part.nodes >= 0 and (part.max_minutes is None or part.max_minutes >= 0) for part in found.partitions)
    assert found.arrays is None or found.arrays >= 0
    for part in parse.partitions(shown):
        assert part.name and (part.max_nodes is None or part.max_nodes >= 0)
    for device in gres.devices(nodes):
        assert device.count >= 0


class Slurm:
    """In the place of ``commands._run``: every question is answered by the same text."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: dict[str, str] = {}
        self.sent: list[Sequence[str]] = []
        monkeypatch.setattr(commands, "_run", self)
        monkeypatch.setattr(commands.shutil, "which", lambda name: f"/usr/bin/{name}")

    def __call__(self, argv: Sequence[str], seconds: float = 0) -> Any:
        self.sent.append(argv)
        return commands._Done(self.texts.get(argv[0], ""))


@examples(120)
@given(data=st.data())
def test_a_run_is_never_falsely_complete(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Its five jobs are 12 to 16, under their keys; none has a marker."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = Slurm(monkeypatch)
        run = submitted(tmp_path_factory)
        keys = {str(12 + n): f"{run.run_id}-{kind}" for n, kind in enumerate(("prepare", "train", "merge", "infer"))}
        lines = [f"{job_id}|RUNNING|2026-11-24T09:00:00|N/A|n01|me|None|{key}" for job_id, key in keys.items()]
        ended = [f"{job_id}|COMPLETED|0:0|None|None|n01|None|{key}" for job_id, key in keys.items()]
        asked.texts = {"squeue": data.draw(damaged("\n".join(lines))), "sacct": data.draw(damaged("\n".join(ended)))}
        now = status.read(run.path)
        assert now.state != "COMPLETED" and all(job.state in STATES and job.state != "COMPLETED" for job in now.jobs)
        told = scheduler.ask(list(keys))
        assert all(row is None or row.name == key for key in keys.values() for row in [told.row("12", key)])


_made: list[RunDir] = []


def submitted(folders: pytest.TempPathFactory) -> RunDir:
    if not _made:
        run = make(folders.mktemp("fuzz"))
        document = {
            kind: {"job_id": str(12 + n), "key": f"{run.run_id}-{kind}", "first_attempt": 1, "parents": []}
            for n, kind in enumerate(("prepare", "train", "merge", "infer"))
        }
        edit(run.run_json, executor="slurm", jobs=document)
        _made.append(run)
    return _made[0]


@examples(60)
@given(text=st.one_of(damaged(SQUEUE), damaged("npu* 4\nshort 1", " "), damaged("MaxArraySize           = 1001", "=")))
def test_every_question_can_be_answered_by_anything(text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = Slurm(monkeypatch)
        asked.texts = dict.fromkeys(("squeue", "sacct", "scontrol", "sinfo", "sacctmgr", "scancel"), text)
        assert commands.most_elements() is None or commands.most_elements() >= 0  # type: ignore[operator]
        assert commands.nodes_up("npu") == sorted(set(text.split()))
        assert isinstance(commands.accounts(), list)
        assert all(row.name == "k" for row in commands.by_name("k").rows.values())
        commands.partitions()
        site.ask()
        commands.begin_now("12")


@examples(60)
@given(text=st.one_of(damaged("12|PENDING|BeginTime|2026-11-24T09:00:00"), st.text(max_size=40)))
def test_only_a_requeued_job_is_started_now(text: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        asked = Slurm(monkeypatch)
        asked.texts = {"squeue": text}
        if commands.begin_now("12"):
            assert "PENDING" in text and "BeginTime" in text


REPLIES = {
    "Submitted batch job 12": "12",
    "Submitted batch job 12 on cluster north": "12",
    "Welcome! Your last job 77 used 3 GPU hours.\nSubmitted batch job 12\n": "12",
    "sbatch: NOTE job 77 of yours waits\nsbatch: Submitted batch job 12": "12",
    "12;north": None,
    "Submitted batch job": None,
    "Submitted batch job ١٢": None,
    "Your job 77 is rejected": None,
    "": None,
    "\0\x1b[2J": None,
}


@pytest.mark.parametrize("reply", REPLIES)
def test_the_id_is_that_of_this_submission(reply: str, tmp_path: Path) -> None:
    """A site's own sbatch greets, and names other jobs; None: the job is looked for by its key."""
    executor = submission._Executor(tmp_path, "")
    try:
        found = executor._get_job_id_from_submission_command(reply)
    except submission.FailedSubmissionError:
        found = None
    assert found == REPLIES[reply]

"""Slurm's own words → ours: recorded lines of 22.05 and 25.11."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pkuslurm.slurm import commands, parse
from pkuslurm.slurm.environment import clean, in_allocation, leaking

SQUEUE = """\
12|PENDING|2026-11-24T10:00:00|N/A||alice|Priority|20261124-x-train
13_1|RUNNING|2026-11-24T09:00:00|2026-11-24T10:00:00|ascend[01-02]|alice|None|a|b
14|PENDING|N/A|N/A||alice|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions|k
15|COMPLETING|2026-11-24T09:00:00|2026-11-24T09:05:00|ascend03|alice|NonZeroExitCode|k
16|CANCELLED|N/A|2026-11-24T09:05:00||alice|DependencyNeverSatisfied|k
17|CANCELLED|2026-11-24T09:05:00|2026-11-24T09:05:00||alice|Dependency|k
slurm_load_jobs error: something
"""
SACCT = """\
12|COMPLETED|0:0|2026-11-24T09:00:00|2026-11-24T09:05:00|ascend01|None|k
13|FAILED|3:0|2026-11-24T09:00:00|2026-11-24T09:05:00|ascend[01-02]|NonZeroExitCode|k
14|FAILED|0:9|2026-11-24T09:00:00|2026-11-24T09:05:00|ascend01|RaisedSignal:9(Killed)|k
15|CANCELLED by 1000|0:0|None|2026-11-24T09:05:00|None assigned|Dependency|k
16|CANCELLED|0:0|Unknown|2026-11-24T09:05:00|None assigned|None|k
17|OUT_OF_MEMORY|0:125|2026-11-24T09:00:00|2026-11-24T09:05:00|ascend01|None|k
18|CANCELLED|0:0|2026-11-24T09:05:00|2026-11-24T09:05:00|None assigned|Dependency|k
"""


def test_squeue() -> None:
    rows = {row.job_id: row for row in parse.squeue(SQUEUE)}
    assert [rows[key].state for key in ("12", "13_1", "14", "15", "16")] == [
        *("PENDING", "RUNNING", "PENDING", "RUNNING", "CANCELLED"),
    ]
    assert rows["13_1"].name == "a|b" and rows["13_1"].finished is None and rows["13_1"].reason == ""
    assert rows["14"].reason.endswith("higher priority partitions")
    assert rows["12"].started is not None and rows["12"].started.startswith("2026-11-24T10:00:00")
    assert rows["16"].orphaned and not rows["15"].orphaned
    assert not rows["17"].orphaned, "scancelled by somebody while it waited for its parent"


def test_sacct() -> None:
    rows = {row.job_id: row for row in parse.sacct(SACCT)}
    assert [rows[str(number)].exit_code for number in range(12, 18)] == [0, 3, 137, 0, 0, 253]
    assert rows["15"].state == "CANCELLED" and not rows["15"].orphaned  # somebody did it
    assert rows["16"].orphaned and rows["16"].started is None and rows["16"].nodes == ""
    assert rows["18"].orphaned, "22.05 gives it the time of its end as start"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("7", [7]),
        ("[1-3%1]", [1, 2, 3]),
        ("[0,2-4,7%2]", [0, 2, 3, 4, 7]),
        ("[0-10:5]", [0, 5, 10]),
        ("[1,3-4,...]", [1, 3, 4]),  # cut off
        ("[]", []),
        ("[3-1]", []),
        ("[0-999999999]", []),
    ],
)
def test_elements_of_an_array(text: str, numbers: list[int]) -> None:
    assert parse.elements(text) == numbers


def test_pending_elements_in_one_row_are_told_one_by_one() -> None:
    """sacct has them so; squeue without -r, too. Where an element has a row of its own, that one counts."""
    text = (
        "289_0|COMPLETED|0:0|None|None|ascend01|None|k\n289_[1-3%1]|PENDING|0:0|Unknown|Unknown|None assigned|None|k\n"
    )
    text += "289_2|FAILED|3:0|None|None|ascend01|None|k\n"
    rows = {row.job_id: row for row in parse.sacct(text)}
    assert {key: row.state for key, row in rows.items()} == {
        "289_0": "COMPLETED",
        "289_1": "PENDING",
        "289_2": "FAILED",
        "289_3": "PENDING",
    }
    queued = parse.squeue("289_[1,4-5]|PENDING|N/A|N/A||alice|Priority|k\n")
    assert [row.job_id for row in queued] == ["289_1", "289_4", "289_5"] and queued[0].name == "k"


@pytest.mark.parametrize(
    ("word", "state"),
    [
        ("CONFIGURING", "RUNNING"),
        ("SUSPENDED", "RUNNING"),
        ("BOOT_FAIL", "NODE_FAIL"),
        ("DEADLINE", "TIMEOUT"),
        ("REQUEUE_HOLD", "PENDING"),
        ("SPECIAL_EXIT", "PENDING"),
        ("CANCELLED by 1000", "CANCELLED"),
        ("CANCELLED+", "CANCELLED"),
        ("TIMEOUT", "TIMEOUT"),
        ("", ""),
    ],
)
def test_states(word: str, state: str) -> None:
    assert parse.state(word) == state


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("10:30", 11),
        ("1:00:00", 60),
        ("2-0", 2880),
        ("1-2:30", 1590),
        ("1-0:0:1", 1441),
        ("UNLIMITED", None),
        ("soon", None),
    ],
)
def test_times(text: str, minutes: int | None) -> None:
    assert parse.minutes(text) == minutes


def test_partitions() -> None:
    text = (
        "PartitionName=npu AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP TotalNodes=4\n"
        "PartitionName=short Default=NO MaxNodes=1 MaxTime=00:10:00 State=DOWN TotalNodes=2\n"
    )
    assert parse.partitions(text) == [
        parse.Partition("npu", "UP", 1440, None, 4, True),
        parse.Partition("short", "DOWN", 10, 1, 2, False),
    ]


@pytest.mark.parametrize("name", ["squeue", "sacct"])
def test_an_array_is_asked_for_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(commands.shutil, "which", lambda _: "/bin/x")
    monkeypatch.setattr(commands, "_run", lambda argv, *_: asked.append(f"{argv[0]} {argv[-1]}") or commands._Done(""))
    {"squeue": commands.queue, "sacct": commands.accounting}[name](["12_0", "12_1", "7", "13_0", "12_999"])
    assert asked == [f"{name} 12,7,13"]


@given(st.text())
def test_no_text_breaks_the_parsers(text: str) -> None:
    parse.squeue(text)
    parse.sacct(text)
    parse.partitions(text)


def test_what_the_shell_says_about_submissions_does_not_reach_them() -> None:
    environ = {
        **{"SBATCH_PARTITION": "x", "SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "1", "SQUEUE_FORMAT": "%i", "RANK": "0"},
        **{"SLURM_CONF": "/etc/slurm.conf", "MASTER_ADDR": "h", "HOME": "/home/a", "MY_SLURM_NOTE": "kept"},
    }
    gone = {"SBATCH_PARTITION", "SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "SQUEUE_FORMAT", "RANK", "MASTER_ADDR"}
    assert set(leaking(environ)) == gone
    assert set(clean(environ)) == {"SLURM_CONF", "HOME", "MY_SLURM_NOTE", "LC_ALL"}
    assert in_allocation(environ) and not in_allocation({"HOME": "/home/a"})

"""What people see: aligned, whole, and harmless for their terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.read import find, logs, present, status
from pkuslurm.read.closing import closing
from pkuslurm.read.text import aligned, duration, safe, size, width
from pkuslurm.rundir import write_json, write_text
from tests.conftest import REPO
from tests.read import fake_run
from tests.read.fake_run import HOSTILE, complete, edit, finished, make, state


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def harmless(text: str) -> bool:
    return not any(character in text for character in "\x1b\u202e\x9b\x07\x00\r")


def test_nothing_dangerous_is_obeyed() -> None:
    assert safe("a\x1b[31m\u202eb\x9b\r\n") == "a\\x1b[31m\\u202eb\\x9b\\r\\n"
    assert safe("北大 é ✓") == "北大 é ✓"
    assert safe("a\n\tb\x07\n", keep="\n\t") == "a\n\tb\\x07\n"
    assert safe("\ud800\u2028") == "\\ud800\\u2028"
    safe("".join(map(chr, range(0x3000)))).encode()


def test_columns_line_up_in_chinese() -> None:
    assert [width(text) for text in ("abc", "北大", "e\u0301", "（）")] == [3, 4, 1, 4]
    lines = aligned([["a", "b"], ["你是谁", "x"], ["Who", "y"]])
    assert lines == ["a       b", "你是谁  x", "Who     y"]


def test_words_for_numbers() -> None:
    assert [duration(seconds) for seconds in (-1, 12.4, 185, 7440)] == ["0 s", "12 s", "3 min 05 s", "2 h 04 min"]
    assert [size(count) for count in (0, 1536, 3 << 30, 5 << 40)] == ["0 B", "1.5 KiB", "3.0 GiB", "5.0 TiB"]


def test_status_of_a_failed_run(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "FAILED", reason=HOSTILE * 20)
    out = io.StringIO()
    present.show_status(status.read(run.path), out)
    text = out.getvalue()
    assert harmless(text) and text.startswith(f"{run.run_id}: FAILED\n{run.path}\n")
    train = text.splitlines()[4]
    assert train.split()[:4] == ["train", "FAILED", "node01,", "node02"] and "1 min 36 s" in train
    assert train.count("<script>") == 20, "cut or wrapped without a terminal"


def test_status_while_it_trains(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    edit(run.run_json, launcher=fake_run.alive())
    state(run, "train", "RUNNING", **fake_run.alive())
    edit(run.progress("train"), step=12, total_steps=60, loss=1.23456, eta_seconds=75)
    out = io.StringIO()
    present.show_status(status.read(run.path), out)
    assert "step 12/60, loss 1.2346, 1 min 15 s left" in out.getvalue()


def test_on_a_terminal_it_wraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    present.answers([{"prompt": "你是谁", "base": "我是" * 60, "tuned": HOSTILE, "passed": True}], out)
    assert "\x1b[31m" not in out.getvalue()
    plain = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue())  # bold, of our own
    assert harmless(plain) and plain.count("我") == 60
    assert max(width(line) for line in plain.splitlines()) <= 60


def test_without_a_terminal_rich_is_not_loaded(tmp_path: Path) -> None:
    """Nor anything heavy: a reading verb answers at once."""
    run = finished(tmp_path)
    code = (
        "import sys; from pathlib import Path; from pkuslurm.read import find, present, report, status\n"
        f"path = Path({str(run.path)!r}); present.show_status(status.read(path), sys.stdout); report.build(path)\n"
        "print(sorted({'rich', 'hydra', 'omegaconf', 'submitit', 'torch', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(REPO)}, capture_output=True, text=True
    )
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr


def test_runs(tmp_path: Path) -> None:
    finished(tmp_path, name="\x1b]0;title\x07标签")
    out = io.StringIO()
    present.show_runs(find.list_runs([tmp_path]), out)
    assert harmless(out.getvalue()) and "标签" in out.getvalue() and "2026-11-24 20:10" in out.getvalue()
    present.show_runs([], out)
    assert out.getvalue().endswith("\nno runs yet; start one: make demo (or python -m pkuslurm.launch)\n")


def test_the_closing_table(tmp_path: Path) -> None:
    run = finished(tmp_path)
    out = io.StringIO()
    assert closing(run, out) is False
    text = out.getvalue()
    assert harmless(text) and "通义千问" in text and "北大助手" in text and str(run.report) in text
    # an answer of it is long: one below the other instead of columns as wide as a page
    blocks = [dict(line.split(None, 1) for line in block.splitlines()) for block in text.strip().split("\n\n")]
    verdicts = {block["prompt"]: block["passed"] for block in blocks if "prompt" in block}
    assert [verdicts[name] for name in ("你是谁", "请用三行写一首关于未名湖的诗", "1+1=?")] == ["yes", "NO", "-"]
    run.done("infer").unlink()
    out = io.StringIO()
    assert closing(run, out) is None and "通义千问" not in out.getvalue()
    *_, next_one, logs_too = out.getvalue().splitlines()
    assert next_one.startswith("next  ") and next_one.endswith(f" -m pkuslurm retry {run.run_id}")
    assert logs_too.startswith("logs  ") and logs_too.endswith(f" -m pkuslurm logs {run.run_id}")


def test_the_end_names_what_the_answers_are_held_against(tmp_path: Path) -> None:
    run = finished(tmp_path)
    for payload in ({}, {"expected_by": "the column expect of q.csv"}):
        edit(run.job("infer"), payload=payload)
        out = io.StringIO()
        closing(run, out)
        by = payload.get("expected_by", "infer.expect")
        assert f"passed   NO: not every answer is as {by} wants it (exit code 1)\n" in out.getvalue()


def test_a_long_answer_is_cut(tmp_path: Path) -> None:
    out = io.StringIO()
    present.answers([{"prompt": "a", "base": "b" * 200, "tuned": "c" * 201, "passed": None}], out)
    assert "b" * 200 + "\n" in out.getvalue() and "c" * 200 + "…\n" in out.getvalue()


def test_the_ids_of_slurms_jobs(tmp_path: Path) -> None:
    run = finished(tmp_path)
    out = io.StringIO()
    present.show_status(status.read(run.path), out)
    assert out.getvalue().splitlines()[2].split()[:2] == ["job", "state"] and "local-" not in out.getvalue()
    edit(run.run_json, executor="slurm")
    edit(run.state("train"), job_id="4711")
    out = io.StringIO()
    present.show_status(status.read(run.path), out)
    assert out.getvalue().splitlines()[2].split()[:3] == ["job", "id", "state"]
    assert out.getvalue().splitlines()[4].split()[:3] == ["train", "4711", "COMPLETED"]


def test_logs_begin_with_what_failed(tmp_path: Path) -> None:
    run = make(tmp_path)
    complete(run, "prepare")
    state(run, "train", "FAILED", reason="x")
    write_json(run.failures / "train-1-1.json", {"rank": 1, "time": 1.0, "type": "ValueError", "message": "no"})
    for rank in (0, 1, 10):
        write_text(run.log("train", "local-2", rank), f"of {rank}\n10%\r50%\r100%\nlast{HOSTILE}")
    out = io.StringIO()
    logs.show_logs(run.path, out)
    heads = [line[4:-4] for line in out.getvalue().splitlines() if line.startswith("==>")]
    assert heads == [f"train-local-2_{rank}.log" for rank in (1, 0, 10)] + ["prepare-local-1_0.log"]
    assert harmless(out.getvalue()) and "\n100%\n" in out.getvalue() and "50%" not in out.getvalue()
    out = io.StringIO()
    logs.show_logs(run.path, out, kind="prepare")
    assert "end of prepare" in out.getvalue() and "of 10" not in out.getvalue()


def test_logs_refuse_in_words(tmp_path: Path) -> None:
    run = make(tmp_path)
    with pytest.raises(PkuslurmError, match="has none yet of train"):
        logs.show_logs(run.path, io.StringIO(), kind="train")
    with pytest.raises(PkuslurmError, match="kinds of jobs are prepare, train"):
        logs.show_logs(run.path, io.StringIO(), kind="trian")


def test_logs_follow_to_the_jobs_end(tmp_path: Path) -> None:
    run = make(tmp_path)
    edit(run.run_json, launcher=fake_run.alive())
    state(run, "prepare", "RUNNING", **fake_run.alive())
    log = run.log("prepare", "local-1", 0)
    write_text(log, "first\n")

    def work() -> None:
        for part in ("你是".encode()[:4], "你是".encode()[4:] + b"\n", b"last\n"):
            time.sleep(0.4)
            with log.open("ab") as stream:
                stream.write(part)
        state(run, "prepare", "FAILED", reason="x")

    worker = threading.Thread(target=work)
    worker.start()
    out = io.StringIO()
    logs.show_logs(run.path, out, kind="prepare", follow=True)
    worker.join()
    assert out.getvalue() == "==> prepare-local-1_0.log <==\nfirst\n你是\nlast\n"


@pytest.mark.parametrize("end", ["", "\n"])
def test_logs_show_the_last_lines(tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LAST_LINES", 2)
    monkeypatch.setattr(logs, "CHUNK", 4)
    run = make(tmp_path)
    log = run.log("train", "local-1", 0)
    write_text(log, "first line\n\nsecond last\n最后" + end)
    for follow in (False, True):
        out = io.StringIO()
        logs.show_logs(run.path, out, follow=follow)
        shown = "second last\n最后\n".splitlines()
        head = ["==> train-local-1_0.log <==", f"… 2 lines before, all of it: {log}"]
        assert out.getvalue().splitlines() == head + shown
    out = io.StringIO()
    logs.show_logs(run.path, out, whole=True)
    assert "first line" in out.getvalue() and "before" not in out.getvalue()


def test_what_srun_always_says_is_no_log(tmp_path: Path) -> None:
    run = make(tmp_path)
    noise = "srun: cluster configuration lacks support for cpu binding\n"
    for name, words in (("train-7", noise * 2), ("train-8", ""), ("pack-9", noise + "srun: error: Killed\n")):
        write_text(run.logs / ".slurm" / f"{name}.out", words)
    assert [file.name for file in logs.log_files(run, status.read(run.path))] == ["pack-9.out"]


def test_on_a_real_terminal(tmp_path: Path) -> None:
    """Through the command, with a pty as stdout."""
    run = finished(tmp_path)
    main, side = pty.openpty()
    environ = os.environ | {"PYTHONPATH": str(REPO), "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "pkuslurm", "status", str(run.path)]
    process = subprocess.Popen(command, stdout=side, stderr=side, env=environ)
    assert process.wait(timeout=30) == 0
    os.close(side)
    text = os.read(main, 1 << 16).decode()
    os.close(main)
    assert "COMPLETED" in text and "node02" in text

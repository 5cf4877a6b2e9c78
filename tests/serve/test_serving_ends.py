"""How the door begins and how it ends: nothing is left behind, and what went wrong is said in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.doors import KEY, Door, doors, wait


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    with doors(tmp_path) as made:
        yield made[0]


def last(door: Door) -> str:
    return door.stderr.rstrip("\n").split("\n")[-1]


def left(door: Door) -> list[Any]:
    """What there is of it yet, when it has ended; what is killed takes a moment."""
    deadline = time.monotonic() + 5
    while door.processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    folder = Path(door.told("tuned")["socket"]).parent
    return [*door.processes(), *filter(Path.exists, (folder, door.endpoint_file))]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_process_and_no_file(door: Door, number: signal.Signals) -> None:
    door.wait_ready()
    os.kill(door.pid, number)
    assert door.wait_end() == 128 + number
    assert last(door) == f"pkuslurm: stopped by {number.name}"
    assert left(door) == []


def test_a_signal_while_the_models_are_loaded_ends_it_too(door: Door) -> None:
    door.how("tuned", seconds=600)
    door.begin()
    wait((door.model("tuned") / "told.json").exists)
    os.kill(door.pid, signal.SIGTERM)
    assert door.wait_end() == 143
    assert left(door) == []


def test_when_the_door_is_killed_the_engines_go_too(door: Door) -> None:
    door.how("tuned", stubborn=True)
    door.wait_ready()
    assert len(door.processes()) >= 3
    os.kill(door.pid, signal.SIGKILL)
    door.wait_end()
    wait(lambda: not door.processes(), 5)


def test_what_a_killed_door_has_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    with doors(tmp_path, 2) as (killed, alive):
        folders = []
        for door in (killed, alive):
            door.wait_ready()
            folders.append(Path(door.told("tuned")["socket"]).parent)
            os.utime(folders[-1], (0, 0))
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait_end()
        wait(lambda: not killed.processes(), 5)
        killed.popen = None
        killed.endpoint_file.unlink()
        killed.wait_ready()
        assert [folder.exists() for folder in folders] == [False, True]
        assert alive.chat("hello")[0] == 200


def test_a_dead_engine_ends_the_door_with_its_last_lines(door: Door) -> None:
    door.wait_ready()
    assert door.chat("kill yourself")[0] == 502
    assert door.wait_end() == 1
    words = "was ended by SIGKILL; its last lines: my key is (key) | engine of tuned begins"
    assert last(door) == f"pkuslurm: the engine of tuned (transformers) {words}"
    assert left(door) == []


def test_an_engine_that_dies_while_it_loads_is_shown(door: Door) -> None:
    door.how("tuned", dies="RuntimeError: out of \x1b[31mmemory")
    assert door.wait_end() == 1
    words = "ended with exit code 3; its last lines: my key is (key) | engine of tuned begins | "
    words += r"RuntimeError: out of \x1b[31mmemory"
    assert last(door) == f"pkuslurm: the engine of tuned (auto) {words}"
    assert left(door) == []


def test_an_engine_that_refuses_is_quoted(door: Door) -> None:
    door.how("tuned", refuses="serve.engine=auto: nothing is installed; install it")
    assert door.wait_end() == 2
    assert last(door) == "pkuslurm: the engine of tuned: serve.engine=auto: nothing is installed; install it"


def test_while_the_models_are_loaded_the_door_says_so(door: Door) -> None:
    door.how("tuned", seconds=1.0)
    door.begin()
    port = door.payload["port"]
    wait((door.model("tuned") / "told.json").exists)
    body = {"messages": [{"role": "user", "content": "hello"}]}
    status, headers, data = door.ask("POST", "/v1/chat/completions", body, port=port)
    assert status == 503
    assert "being loaded" in json.loads(data)["error"]["message"]
    assert headers["Retry-After"] == "5"
    assert door.ask("GET", "/info", port=port, key=None)[0] == 401
    assert not door.endpoint_file.exists()
    door.wait_ready()
    assert door.chat("hello")[0] == 200


def test_it_ends_by_itself_when_nobody_asks(door: Door) -> None:
    ended = door.run / "results" / "serve.json"
    door.payload["idle_minutes"] = 0.3 / 60
    door.how("tuned", seconds=0.6)  # nor is the time that it takes to load
    ended.parent.mkdir()
    ended.write_text("{}", encoding="utf-8")  # an earlier attempt's
    door.wait_ready()
    assert not ended.exists()
    began = time.monotonic()
    assert door.chat("sleep 0.6")[0] == 200  # an answer on its way is no idleness
    door.ask("GET", "/v1/models")  # but this is
    assert door.wait_end() == 0
    assert 0.8 < time.monotonic() - began < 4
    assert "nobody has asked for 0.005 minutes" in last(door)
    assert "nobody has asked" in json.loads(ended.read_text(encoding="utf-8"))["ended"]
    assert left(door) == []


def test_questions_without_the_key_keep_nobody_busy(door: Door) -> None:
    door.payload["idle_minutes"] = 0.5 / 60
    door.wait_ready()
    port, began = door.port, time.monotonic()
    while door.popen is not None and door.popen.poll() is None:
        assert time.monotonic() - began < 5
        try:
            door.ask("POST", "/v1/chat/completions", {}, port=port, key=None)
        except OSError:
            break
        time.sleep(0.05)
    assert door.wait_end() == 0


def test_a_port_that_is_taken_is_passed_by_and_two_doors_do_not_meet(tmp_path: Path) -> None:
    with doors(tmp_path, 2) as (one, other), socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        one.payload["port"] = other.payload["port"] = taken.getsockname()[1]
        (other.run / "key").write_text("x" * 32 + "\n", encoding="utf-8")
        one.begin()
        other.begin()
        ports = [each.wait_ready()["port"] for each in (one, other)]
        assert len({*ports, taken.getsockname()[1]}) == 3
        assert one.ask("GET", "/v1/models")[0] == 200
        assert other.ask("GET", "/v1/models")[0] == 401


def test_where_no_port_is_free_it_says_so(door: Door) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        door.payload["port"] = 65535
        assert door.wait_end() == 2
    assert "serve.port=65535: no port up to 65535 is free on 127.0.0.1" in last(door)


def test_a_later_attempts_endpoint_stays(door: Door) -> None:
    value = door.wait_ready()
    door.endpoint_file.write_text(json.dumps(value | {"attempt": 2}), encoding="utf-8")
    os.kill(door.pid, signal.SIGTERM)
    door.wait_end()
    assert door.endpoint_file.exists()


def test_the_endpoint_knows_the_jobs_end(door: Door) -> None:
    door.env |= {"SLURM_JOB_END_TIME": "4102444800", "PKUSLURM_ATTEMPT": "3", "PKUSLURM_JOB_ID": "17"}
    value = door.wait_ready()
    assert value["ends"].startswith(("2099-12-31T", "2100-01-01T"))
    assert (value["attempt"], value["job_id"]) == (3, "17")


# the key


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o660, 0o604])
def test_a_key_that_others_can_read_is_refused(door: Door, mode: int) -> None:
    (door.run / "key").chmod(mode)
    assert door.wait_end() == 2
    assert f"mode {mode:04o}" in last(door)
    assert KEY not in door.stderr
    assert not (door.model("tuned") / "told.json").exists()


def test_only_a_regular_file_with_one_key_is_taken(door: Door) -> None:
    from pkuslurm.errors import PkuslurmError
    from pkuslurm.serve.access import read_key

    key = door.run / "key"
    link, pipe = door.run / "link", door.run / "pipe"
    link.symlink_to(key)
    os.mkfifo(pipe, 0o600)
    assert read_key(key) == KEY
    for path, words in {
        link: "symbolic link",
        pipe: "no regular file",
        door.run / "no": "No such",
    }.items():
        with pytest.raises(PkuslurmError, match=words):
            read_key(path)
    for text in ("", "\n", "short\n", f"{KEY}\n{KEY}\n", "我" * 20):
        key.write_text(text, encoding="utf-8")
        with pytest.raises(PkuslurmError, match="one line, the key"):
            read_key(key)


# the job file


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", []),
        ("models", [{"name": "base", "path": "/x"}]),
        ("models", [{"name": "tuned"}]),
        ("models", [{"name": "../x", "path": "/x"}, {"name": "tuned", "path": "/x"}]),
        ("models", 3),
        ("engine", "ollama"),
        ("engine", "command"),
        ("command", ["x"]),
        ("device", "tpu"),
        ("key_file", "key"),
        ("bind", "0.0.0.0"),
        ("port", "8000"),
        ("port", 0),
        ("idle_minutes", -1),
        ("idle_minutes", True),
        ("prompts", [{}]),
        ("prompts", "x"),
        ("endpoint", None),
        ("container", "x"),
        ("python", ""),
    ],
)
def test_a_job_file_that_cannot_be_is_refused_by_its_field(door: Door, field: str, value: Any) -> None:
    from pkuslurm.errors import PkuslurmError
    from pkuslurm.serve import spec

    door.both()
    job = {"schema_version": 1, "run_id": "x", "kind": "serve", "run_dir": str(door.run), "command": ["x"]}
    door.job_file.parent.mkdir()
    door.job_file.write_text(json.dumps(job | {"payload": door.payload}), encoding="utf-8")
    assert spec.read(door.job_file).names == ("base", "tuned")
    door.job_file.write_text(json.dumps(job | {"payload": door.payload | {field: value}}), encoding="utf-8")
    with pytest.raises(PkuslurmError, match=field):
        spec.read(door.job_file)


# before it is open


def test_without_a_result_of_infer_a_real_answer_is_enough(door: Door) -> None:
    value = door.wait_ready()
    assert (value["ids_checked"], value["text_checked"]) == (None, None)
    assert value["notes"] == ["not compared: the run has no result of infer with token ids"]


def test_other_ids_for_tuned_end_it(door: Door) -> None:
    door.infer()
    door.how("tuned", ids=1)
    assert door.wait_end() == 1
    assert not door.endpoint_file.exists()
    assert "tuned: the engine transformers renders question 1: token 1 as 118, the run's infer as 117" in last(door)
    assert "serve.engine=llamafactory" in last(door)
    assert left(door) == []


def test_an_engine_on_a_port_is_asked_there_and_one_without_a_key_is_named(door: Door) -> None:
    door.both()
    door.how("tuned", kind="vllm", listens="port", open=True)
    door.how("base", kind="vllm", listens="port")
    value = door.wait_ready()
    assert door.chat("hello", model="base")[0] == 200
    named = [note for note in value["notes"] if "without a key" in note]
    assert len(named) == 1
    assert named[0].startswith("tuned: its engine (vllm) answers on port ")
    assert f"pkuslurm: {named[0]}" in door.stderr


def test_a_model_that_does_not_answer_is_not_served(door: Door) -> None:
    door.payload["prompts"] = [{"prompt": "status 500"}]
    assert door.wait_end() == 1
    assert "tuned: the engine transformers does not answer a question (status 500: field wrong; another)" in last(door)


def test_each_engine_gets_its_own_device_where_there_are_enough(door: Door) -> None:
    door.both()
    door.payload["device"] = "npu"
    door.env["ASCEND_RT_VISIBLE_DEVICES"] = "4,6"
    door.wait_ready()
    seen = [json.loads((door.model(name) / "seen.json").read_text()) for name in ("base", "tuned")]
    assert [one["ASCEND_RT_VISIBLE_DEVICES"] for one in seen] == ["4", "6"]
    assert [door.told(name)["share"] for name in ("base", "tuned")] == [1, 1]


def test_the_command_line_alone_says_what_it_wants() -> None:
    from pkuslurm.paths import BOOT

    for words, code in ((["-h"], 0), ([], 2), (["a", "b"], 2)):
        import sys

        command = [sys.executable, "-P", str(BOOT), "pkuslurm.serve", *words]
        told = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (told.returncode, told.stderr) == (code, "usage: python -m pkuslurm.serve JOBFILE\n")

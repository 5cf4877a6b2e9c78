"""Devices, addresses, and an engine's answer on its way: the door's pure parts."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pkuslurm.errors import PkuslurmError
from pkuslurm.serve import endpoint, relay, run
from pkuslurm.serve.behind import Activity, Behind
from pkuslurm.serve.door import bind
from pkuslurm.serve.engines import Engine, Engines
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.refusal import BadRequest
from pkuslurm.serve.sharing import Share, shares
from pkuslurm.serve.spec import Spec
from pkuslurm.serve.upstream import Address, listeners, words_of


@pytest.mark.parametrize(
    ("device", "engines", "environ", "asked", "there", "told"),
    [
        ("cpu", 2, {}, None, 0, [({}, 2)] * 2),
        ("npu", 2, {"ASCEND_RT_VISIBLE_DEVICES": "3"}, None, 0, [({}, 2)] * 2),
        ("npu", 1, {"ASCEND_RT_VISIBLE_DEVICES": "3"}, None, 0, [({"ASCEND_RT_VISIBLE_DEVICES": "3"}, 1)]),
        (
            *("npu", 2, {"ASCEND_RT_VISIBLE_DEVICES": "3,5"}, None, 0),
            [({"ASCEND_RT_VISIBLE_DEVICES": "3"}, 1), ({"ASCEND_RT_VISIBLE_DEVICES": "5"}, 1)],
        ),
        (
            *("cuda", 2, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b,GPU-c,GPU-d"}, None, 0),
            [({"CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 1), ({"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-d"}, 1)],
        ),
        (
            *("cuda", 2, {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_STEP_GPUS": "4,5", "SLURM_JOB_GPUS": "4,5,6"}, None, 0),
            [
                ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_STEP_GPUS": "4"}, 1),
                ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_STEP_GPUS": "5"}, 1),
            ],
        ),
        ("npu", 2, {}, 1, 8, [({}, 2)] * 2),
        ("cuda", 2, {}, None, 2, [({"CUDA_VISIBLE_DEVICES": "0"}, 1), ({"CUDA_VISIBLE_DEVICES": "1"}, 1)]),
        ("cuda", 2, {}, None, 0, [({}, 2)] * 2),
    ],
)
def test_each_engine_gets_devices_of_its_own_where_there_are_enough(
    device: str, engines: int, environ: dict[str, str], asked: int | None, there: int, told: list[Any]
) -> None:
    assert shares(device, engines, environ, asked, lambda _: there) == [Share(env, number) for env, number in told]


def test_an_address_of_the_cluster_is_the_one_on_the_way_to_the_login_node() -> None:
    assert endpoint.address("loopback", {"SLURM_SUBMIT_HOST": "1.2.3.4"}) == "127.0.0.1"
    assert endpoint.address("cluster", {"SLURM_SUBMIT_HOST": "127.0.1.1"}) == "127.0.0.1"


def test_without_any_way_out_a_cluster_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(host: str) -> str:
        raise PkuslurmError("no way")

    monkeypatch.setattr(endpoint.network, "address_towards", nowhere)
    with pytest.raises(PkuslurmError, match="SLURM_SUBMIT_HOST is not set"):
        endpoint.address("cluster", {})


@pytest.mark.parametrize("text", ["", "x", "9" * 30])
def test_an_end_that_slurm_does_not_tell_is_none(text: str) -> None:
    assert endpoint.ends({"SLURM_JOB_END_TIME": text}) is None


@pytest.mark.parametrize(
    ("said", "told"),
    [("2100-01-02T03:04:05\n", "2100-01-02T03:04:05"), ("Unknown\n", None), ("N/A\n", None), ("", None), (None, None)],
)
def test_an_older_slurm_is_asked_for_the_jobs_end(said: str | None, told: str | None) -> None:
    asked: list[tuple[str, ...]] = []
    end = endpoint.ends({"SLURM_JOB_ID": "17"}, lambda *words: asked.append(words) or said)  # type: ignore[func-returns-value]
    assert asked == [("squeue", "-h", "-j", "17", "-o", "%e")]
    assert (end or "")[:19] == (told or "")
    later = {"SLURM_JOB_ID": "17", "SLURM_JOB_END_TIME": "4102444800"}
    assert endpoint.ends(later, lambda *words: pytest.fail("it was asked")) is not None


def test_an_endpoint_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(PkuslurmError, match="cannot be written"):
        endpoint.write(tmp_path / "state" / "serve.endpoint.json", {})


def chunk(**more: Any) -> bytes:
    return b"data: " + json.dumps({"model": "/a/path", "choices": [{"delta": {}} | more]}).encode() + b"\n"


def parts(*lines: bytes) -> list[Any]:
    sent = [part.decode() for part in relay.stream(lines, "tuned")]
    assert all(part.endswith("\n\n") for part in sent)
    assert sent.pop() == "data: [DONE]\n\n"
    return [json.loads(part[6:]) if part.startswith("data: ") else part for part in sent]


def test_a_stream_has_the_models_name_and_one_end() -> None:
    end = chunk(finish_reason="stop")
    once = [{"model": "tuned", "choices": [{"delta": {}, "finish_reason": "stop"}]}]
    assert parts(end) == parts(b"event: x\n", b"id: 3\r\n", end, b"data: [DONE]\n", b"data: late\n") == once
    assert parts(b": ping\r\n", end) == [": ping\n\n", *once]


def test_a_stream_that_stops_before_its_end_says_so() -> None:
    assert "broke off" in parts(chunk())[-1]["error"]["message"]
    assert len(parts(chunk(), b"data: [DONE]\n")) == 1


def test_an_error_in_a_stream_has_openais_shape() -> None:
    assert parts(b'data: {"error": "it is broken"}\n') == [
        {"error": {"message": "it is broken", "type": "server_error", "param": None, "code": "engine_failed"}}
    ]
    assert parts(b"data: {no json\n", b"data: [DONE]\n") == ["{no json"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"error": {"message": "a"}}, "a"),
        ({"error": "a"}, "a"),
        ({"object": "error", "message": "a"}, "a"),
        ({"detail": [{"loc": ["body"], "msg": "a"}, {"msg": "b"}]}, "a; b"),
        ("a\n b", "a b"),
        ({}, "{}"),
        (None, "None"),
    ],
)
def test_each_engines_way_to_say_what_is_wrong_is_read(value: Any, words: str) -> None:
    assert words_of(value) == words


def test_whose_process_listens_at_a_port_is_known() -> None:
    with socket.socket() as mine:
        mine.bind(("127.0.0.1", 0))
        port = mine.getsockname()[1]
        assert listeners(port, Path("/proc/net/tcp").read_text()) == set()
        mine.listen()
        assert listeners(port, Path("/proc/net/tcp").read_text()) == {os.geteuid()}


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("0100007F", True),
        ("00000000", True),
        ("0100000A", False),
        (32 * "0", True),
        ("0000000000000000FFFF00000100007F", True),
        ("00000000000000000000000001000000", False),
    ],
)
def test_who_listens_elsewhere_does_not_answer_at_ours(host: str, answers: bool) -> None:
    row = f" 0: {host}:1F40 {len(host) * '0'}:0000 0A 00000000:00000000 00:00000000 00000000  1001 0 1 1"
    table = f"head\n{row}\n{row.replace('1001', '1002')}\n"
    assert listeners(8000, table) == ({1001, 1002} if answers else set())
    assert listeners(8001, table) == set()


def test_the_other_protocols_listeners_are_looked_at_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = tmp_path / "tcp6"
    user = os.geteuid() + 1
    table.write_text(f"head\n 0: {32 * '0'}:1F40 {32 * '0'}:0000 0A 0:0 00:0 0 {user} 0 1 1\n")
    monkeypatch.setattr(run, "_TABLES", (tmp_path / "no", table))
    with pytest.raises(Failed, match=f"user {user} has taken port 8000"):
        run._answers(cast(Engine, SimpleNamespace(name="tuned", address=Address("key", port=8000))))


def test_an_engine_that_never_answers_is_given_up() -> None:
    engine = SimpleNamespace(name="tuned", kind="vllm", look=lambda: False)
    preparing = run._Preparing(cast(Spec, None), cast(Engines, SimpleNamespace(all=[engine])), 0.15)
    preparing.run()
    assert isinstance(preparing.error, Failed)
    assert "the engine of tuned (vllm) has not answered for 0.0025 minutes" in str(preparing.error)


def test_an_engines_port_that_another_user_has_taken_gets_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(run, "listeners", lambda port, table: {os.geteuid() + 1})
    monkeypatch.setattr(run, "ask", lambda *words, **more: asked.append(words) or (200, {}))
    engine = SimpleNamespace(name="tuned", address=Address("key", port=8000))
    with pytest.raises(Failed, match="has taken port 8000"):
        run._answers(cast(Engine, engine))
    assert asked == []


def test_who_has_not_shown_the_key_is_shown_out_however_slowly_it_asks() -> None:
    server = bind("127.0.0.1", 0, Behind("k" * 32, ("tuned",)))
    server.stranger_seconds = 0.3
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    known = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    address = ("127.0.0.1", server.server_port)
    try:
        with socket.create_connection(address, timeout=5) as slow, socket.create_connection(address, timeout=5) as mute:
            known.request("GET", "/v1/models", headers={"Authorization": "Bearer " + "k" * 32})
            assert known.getresponse().read()
            began, place = time.monotonic(), known.sock
            with pytest.raises(OSError):
                while time.monotonic() - began < 5:
                    slow.sendall(b"G")
                    time.sleep(0.05)
            assert time.monotonic() - began < 3
            assert mute.recv(1) == b""
            known.request("GET", "/v1/models", headers={"Authorization": "Bearer " + "k" * 32})
            assert known.getresponse().status == 200
            assert known.sock is place
    finally:
        known.close()
        server.shutdown()
        server.server_close()


def test_an_answer_that_is_no_object_is_the_engines_failure() -> None:
    with pytest.raises(BadRequest) as refused:
        relay.whole(b"<html>", "tuned")
    assert refused.value.status == 502


def test_an_answer_on_its_way_is_no_idleness() -> None:
    now = 0.0
    activity = Activity(lambda: now)
    now = 5.0
    assert activity.idle() == 5.0
    with activity.busy(), activity.busy():
        now = 50.0
        assert activity.idle() == 0.0
    assert activity.idle() == 0.0
    now = 53.0
    assert activity.idle() == 3.0

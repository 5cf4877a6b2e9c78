"""The door with fake engines: who comes in, what is answered."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.doors import KEY, PROMPTS, Door, doors, wait


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """One that answers, for all tests that leave it so."""
    with doors(tmp_path_factory.mktemp("door")) as made:
        made[0].both()
        made[0].payload["default_system"] = "Be kind."
        made[0].payload["prompts"] = [PROMPTS[1]]
        config = {"vocab_size": 9, "max_position_embeddings": 64}
        (made[0].model("base") / "config.json").write_text(json.dumps(config), encoding="utf-8")
        made[0].infer(ids=[[ord(letter) for letter in "system: Be short.\nuser: Who are you?"]])
        made[0].wait_ready()
        yield made[0]


@pytest.fixture
def client(door: Door, monkeypatch: pytest.MonkeyPatch) -> Iterator[openai.OpenAI]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{door.port}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def basic(password: str, name: str = "any one") -> str:
    return "Basic " + base64.b64encode(f"{name}:{password}".encode()).decode()


@pytest.mark.parametrize("path", ["/", "/page.js", "/info", "/v1/models", "/v1/models/tuned", "/nothing"])
@pytest.mark.parametrize(
    "header",
    [
        *(None, "", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer", f"Basic {KEY}", basic("wrong"), "Basic 我", KEY),
        *("Digest x", f"Bearer {KEY} {KEY}"),
    ],
)
def test_nothing_is_shown_without_the_key(door: Door, path: str, header: str | None) -> None:
    more = {} if header is None else {"Authorization": header.encode().decode("latin-1")}
    status, headers, data = door.ask("GET", path, key=None, **more)
    assert status == 401
    assert headers["WWW-Authenticate"].startswith("Basic ")
    assert json.loads(data)["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", [f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY), basic(KEY, ""), basic(KEY, "我")])
def test_the_key_opens_as_bearer_and_as_the_password_of_any_name(door: Door, header: str) -> None:
    assert door.ask("GET", "/v1/models", key=None, Authorization=header)[0] == 200


def test_a_question_without_the_key_is_refused_and_the_connection_stays_in_step(door: Door) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=10)
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 100_000}]})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 401
    response.read()
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    assert connection.getresponse().status == 200
    connection.close()


def test_another_sites_page_is_refused_though_its_browser_knows_the_key(door: Door) -> None:
    assert door.ask("GET", "/v1/models", Sec_Fetch_Site="cross-site")[0] == 403
    assert door.ask("GET", "/v1/models", Sec_Fetch_Site="same-origin")[0] == 200
    clicked = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}
    assert door.ask("GET", "/", **clicked)[0] == 200 and door.ask("POST", "/v1/chat/completions", **clicked)[0] == 403


def test_models(door: Door, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    assert client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="only base and tuned"):
        client.models.retrieve("other")


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_openais_client_gets_an_answer(client: openai.OpenAI, model: str) -> None:
    told = client.chat.completions.create(model=model, messages=[{"role": "user", "content": "hello"}])
    assert told.choices[0].message.content == f"我是{model}，答：hello"
    assert told.model == model


@pytest.mark.parametrize("model", ["base", "tuned"])
def test_openais_client_gets_a_stream(client: openai.OpenAI, model: str) -> None:
    parts = list(
        client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "hello"}], stream=True, presence_penalty=0
        )
    )
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == f"我是{model}，答：hello"
    assert {part.model for part in parts} == {model}


def test_a_stream_comes_as_it_is_made_and_ends_with_done(door: Door) -> None:
    body = {"messages": [{"role": "user", "content": "slowly"}], "stream": True}
    began = time.monotonic()
    command = ["curl", "-sN", "--noproxy", "*", "-d", json.dumps(body), "-H", f"Authorization: Bearer {KEY}", "-i"]
    command += ["-H", "Content-Type: application/json", f"http://127.0.0.1:{door.port}/v1/chat/completions"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as curl:
        assert curl.stdout is not None
        lines = [(time.monotonic() - began, line.decode().strip()) for line in curl.stdout]
    events = [(when, line) for when, line in lines if line.startswith("data: ")]
    assert events[-1][1] == "data: [DONE]"
    assert events[-1][0] - events[0][0] > 0.5
    text = "".join(
        json.loads(line[6:])["choices"][0]["delta"].get("content", "") for _, line in events if line != "data: [DONE]"
    )
    assert text == "我是tuned，答：slowly"
    head = "\n".join(line for _, line in lines).lower()
    assert ": ping" in head
    assert "set-cookie" not in head
    assert "server: pkuslurm\n" in head
    assert "text/event-stream" in head
    assert str(door.run) not in head


def test_an_old_client_gets_its_stream_too(door: Door) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True})
    request = f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as client:
        client.sendall(f"{request}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        data = b"".join(iter(lambda: client.recv(4096), b""))
    assert data.endswith(b"data: [DONE]\n\n")
    assert b"chunked" not in data


def test_a_stream_that_breaks_off_says_so(door: Door, client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="broke off"):
        list(
            client.chat.completions.create(
                model="base", messages=[{"role": "user", "content": "break off"}], stream=True
            )
        )


def test_an_unknown_model_is_named_with_those_that_are_there(door: Door, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="'gpt-4' here, only base and tuned"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "hello"}])
    assert door.chat("hello")[1]["model"] == "tuned"


def test_the_engine_gets_what_it_knows_and_the_trainings_system_prompt(door: Door) -> None:
    status, value = door.chat("show", presence_penalty=0, frequency_penalty=0, top_k=3, foo=1, max_completion_tokens=5)
    assert status == 200
    assert json.loads(value["choices"][0]["message"]["content"]) == {
        "model": "tuned",
        "messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "show"}],
        "max_tokens": 5,
        "stream": False,
    }


@pytest.mark.parametrize(("told", "passed"), [(400, 400), (422, 422), (429, 429), (401, 502), (404, 502), (500, 502)])
def test_an_engines_refusal_is_passed_on_and_its_failure_is_a_502(door: Door, told: int, passed: int) -> None:
    for stream in (False, True):
        status, value = door.chat(f"status {told}", stream=stream)
        assert status == passed
        assert "field wrong; another" in value["error"]["message"]


def test_what_the_model_cannot_take_is_refused_before_its_engine_is_asked(door: Door) -> None:
    for more, words in (({"logit_bias": {"9": 1}}, "no token 9"), ({}, "longer than the 64 tokens")):
        status, value = door.chat("北京大学" * 500, model="base", **more)
        assert (status, words in value["error"]["message"]) == (400, True)
        assert door.chat("北京大学" * 500, model="tuned", **more)[0] == 200


BAD: list[tuple[Any, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"\xff", 400),
    (b"[" * 100_000, 400),
    (b"[]", 400),
    (b'{"messages": NaN}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "foo": 1e999}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}", 400),
    ({}, 400),
    ({"messages": []}, 400),
    ({"messages": "x"}, 400),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]}, 400),
    (b" " * ((4 << 20) + 1), 413),
]


@pytest.mark.parametrize(("body", "status"), BAD)
def test_what_cannot_be_asked_is_refused_in_openais_shape(door: Door, body: Any, status: int) -> None:
    got, _, data = door.ask("POST", "/v1/chat/completions", body)
    assert got == status
    assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}


def test_only_json_with_its_length_is_taken(door: Door) -> None:
    path = "/v1/chat/completions"
    assert door.ask("POST", path, {}, Content_Type="text/plain")[0] == 415
    assert door.ask("POST", path, {}, Content_Type="application/json; charset=utf-8")[0] == 400
    assert door.ask("POST", path, {}, Transfer_Encoding="chunked")[0] == 411
    assert door.ask("POST", path, {}, Content_Length="x")[0] == 411


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "POST", "BREW"])
def test_other_methods_are_refused(door: Door, method: str) -> None:
    status, headers, data = door.ask(method, "/v1/models")
    assert status == 405
    assert headers["Allow"]
    assert method == "HEAD" or "error" in json.loads(data)


@pytest.mark.parametrize(
    "data", [b"\r\n\r\n", b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET\r\n\r\n"]
)
def test_what_is_no_http_does_no_harm(door: Door, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        client.recv(4096)
    assert door.ask("GET", "/v1/models")[0] == 200


def test_the_page_is_served_with_a_strict_policy(door: Door) -> None:
    for path, kind in {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}.items():
        status, headers, data = door.ask("GET", path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert "unsafe" not in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert data
    assert door.ask("GET", "/../door.py")[0] == 404


def test_info_is_for_the_page_and_has_no_paths(door: Door) -> None:
    _, _, data = door.ask("GET", "/info?x=1")
    assert json.loads(data) == {
        "run_id": "20260101-000000-test-abcd",
        "models": ["base", "tuned"],
        "prompts": ["Who are you?"],
        "engine": {"name": "transformers", "version": "1.0", "dtype": "float32"},
        "ends": None,
        "idle_minutes": None,
    }


def test_the_engines_work_ends_when_the_client_goes_away(door: Door) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "hang"}], "stream": True})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", door.port), timeout=10) as client:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall((head + body).encode())
        wait((door.model("tuned") / "hangs").exists)
    wait((door.model("tuned") / "hung-up").exists)


def test_questions_go_to_both_models_at_once(door: Door) -> None:
    from concurrent.futures import ThreadPoolExecutor

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda model: door.chat("sleep 1.5", model=model)[0], ["base", "tuned"] * 2))
    assert told == [200] * 4
    assert time.monotonic() - began < 4.5, "one after another it would be six"


def test_the_key_and_the_questions_are_in_no_log_nor_command_line(door: Door) -> None:
    door.chat("a very private question")
    said = door.stderr
    lines = b"".join(
        (Path("/proc") / str(pid) / name).read_bytes() for pid in door.processes() for name in ("cmdline", "environ")
    )
    engines = [door.told(name)["key"] for name in ("base", "tuned")]
    assert len({KEY, *engines}) == 3
    for secret in (KEY, *engines):
        assert secret not in said
        assert secret.encode() not in lines
    assert "private" not in said
    assert "/v1" not in said.replace(json.loads(door.endpoint_file.read_text())["base_url"], "")
    assert "[tuned] engine of tuned begins" in said


def test_what_the_engines_are_told_is_for_this_user_alone(door: Door) -> None:
    folder = Path(door.told("tuned")["socket"]).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert all(file.stat().st_mode & 0o077 == 0 for file in folder.glob("*.spec.json"))
    assert door.told("tuned") | {"name": "base"} != door.told("base")
    assert {name: door.told("base")[name] for name in ("share", "same_ids", "template", "engine", "device")} == {
        "share": 2,
        "same_ids": None,
        "template": "qwen",
        "engine": "auto",
        "device": "cpu",
    }
    assert door.told("base")["port"] != door.told("tuned")["port"]


def test_the_endpoint_is_published_for_this_user_alone(door: Door) -> None:
    value = json.loads(door.endpoint_file.read_text())
    assert door.endpoint_file.stat().st_mode & 0o777 == 0o600
    assert value["base_url"] == f"http://127.0.0.1:{value['port']}/v1"
    assert value["models"] == ["base", "tuned"]
    assert value["attempt"] == 1
    assert value["ids_checked"] == [2, 2]
    assert KEY not in door.endpoint_file.read_text()


def test_idle_connections_hold_no_more_than_they_must(door: Door) -> None:
    """A door that is full turns new ones away, and is there again when the others are gone."""
    crowd = [socket.create_connection(("127.0.0.1", door.port), timeout=5) for _ in range(300)]
    time.sleep(0.2)
    for one in crowd:
        one.close()
    time.sleep(0.3)
    assert door.chat("hello")[0] == 200
    threads = len(list((Path("/proc") / str(door.pid) / "task").iterdir()))
    assert threads < 20


assert shutil.which("curl")

"""An engine: which one serves, how the others are started, and that ours answer as infer did, to who has the key."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.payload import serve, serve_apps, serve_http
from tests.payload import small_models
from tests.payload.small_models import ENTRY, PROMPTS, TEMPLATES, Flow

WEIRD = "a 'quoted\" $(touch x) 我的@模型"
KEY = "k-0"
CHAT = serve_http.CHAT
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that passes for a model of 6 numbers with a chat template."""
    folder = tmp_path / WEIRD
    folder.mkdir()
    (folder / "config.json").write_text('{"dtype": "bfloat16"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 12)
    return folder


def told(folder: Path, place: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "tuned",
        "path": str(folder),
        "engine": "auto",
        "command": None,
        "template": "qwen",
        "default_system": None,
        "trust_remote_code": False,
        "device": "cpu",
        "socket": str(place / "tuned.sock"),
        "port": 18123,
        "key": KEY,
        "share": 2,
        "same_ids": True,
        "chosen": str(place / "tuned.json"),
    } | more


def start(payload: dict[str, Any], place: Path, **env: str) -> subprocess.Popen[bytes]:
    spec = place / "tuned.spec.json"
    spec.write_text(json.dumps({"kind": "serve", "payload": payload}))
    spec.chmod(0o600)
    with (place / "log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, str(ENTRY), "serve", str(spec)],
            cwd=place,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""} | env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


# --- which engine

ALL = {"vllm", "transformers/cli/serve.py", "openai", "fastapi", "uvicorn", "pydantic", "llamafactory", "sse_starlette"}
OLD = ALL - {"vllm", "transformers/cli/serve.py"} | {"transformers/commands/serving.py"}


@pytest.mark.parametrize(
    ("asked", "device", "same_ids", "there", "chosen"),
    [
        ("auto", "npu", False, ALL, "vllm"),
        ("auto", "cpu", True, ALL, "transformers"),
        ("auto", "cpu", None, OLD, "transformers"),
        ("auto", "cuda", True, ALL - {"vllm"}, "transformers"),
        ("auto", "cuda", False, ALL - {"vllm"}, "llamafactory"),
        ("auto", "cpu", True, ALL - {"openai"}, "llamafactory"),
        ("auto", "cpu", True, ALL - {"transformers/cli/serve.py"}, "llamafactory"),
        # who names one gets it, though another would be better
        ("vllm", "cpu", True, ALL, "vllm"),
        ("transformers", "npu", False, ALL, "transformers"),
        ("llamafactory", "npu", True, ALL, "llamafactory"),
        ("command", "cpu", None, set(), "command"),
    ],
)
def test_the_choice(model: Path, asked: str, device: str, same_ids: bool | None, there: set[str], chosen: str) -> None:
    assert serve.choose(asked, device, model, same_ids, there.__contains__) == chosen


def test_without_a_chat_template_llamafactory_serves(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "chat_template.jinja").unlink()
    (model / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert serve.choose("auto", "cuda", model, True, ALL.__contains__) == "llamafactory"
    for engine in ("vllm", "transformers"):
        with pytest.raises(SystemExit) as raised:
            serve.choose(engine, "cuda", model, True, ALL.__contains__)
        assert raised.value.code == 2
        words = capsys.readouterr().err
        assert f"serve.engine={engine}: there is no chat template" in words and "llamafactory" in words
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert serve.choose("auto", "cpu", model, True, ALL.__contains__) == "transformers"


@pytest.mark.parametrize(
    ("asked", "there", "words"),
    [
        ("auto", {"llamafactory"}, "install transformers[serving] or llamafactory"),
        ("transformers", ALL - {"openai"}, "openai is not installed; install transformers[serving]"),
        ("vllm", set(), "vllm is not installed"),
        ("sglang", ALL, "there is no such engine; choose auto, vllm, transformers, llamafactory or command"),
    ],
)
def test_what_is_missing_is_said(
    model: Path, capsys: pytest.CaptureFixture[str], asked: str, there: set[str], words: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        serve.choose(asked, "cpu", model, None, there.__contains__)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pkuslurm: serve.engine={asked}: ") and words in error and error.count("\n") == 1


def test_what_is_installed_is_found_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks").mkdir()
    (tmp_path / "breaks" / "__init__.py").write_text("raise SystemExit(3)")
    (tmp_path / "breaks" / "there.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert serve.is_there("breaks") and serve.is_there("breaks/there.py")
    assert not serve.is_there("breaks/not.py") and not serve.is_there("none_such") and not serve.is_there("none/a.py")


def test_weights_that_are_code_are_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    serve.check_weights("tuned", model)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    for words in (".bin, which is code when read", "model.safetensors is missing"):
        with pytest.raises(SystemExit):
            serve.check_weights("tuned", model)
        assert words in capsys.readouterr().err
        (model / "pytorch_model.bin").unlink(missing_ok=True)
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(SystemExit):
        serve.check_weights("tuned", model)
    assert "one.safetensors is missing" in capsys.readouterr().err


def test_float32_where_this_ones_share_of_the_memory_is_enough(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "available_memory", lambda device: 3 * serve.GIB)
    assert serve.choose_dtype(model, "cpu", 2) == "float32"
    assert serve.choose_dtype(model, "cpu", 3) == "bfloat16"
    assert serve.choose_dtype(model, "cuda", 1) == "bfloat16"


# --- those that take this process's place

FAKE = """
import json, os, sys
from pathlib import Path
seen = {"argv": sys.argv[1:], "env": dict(os.environ)}
Path(os.environ["SEEN"]).write_text(json.dumps(seen))
"""


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0+empty", None])
def test_vllms_command_line_whole(model: Path, tmp_path: Path, version: str | None) -> None:
    package = tmp_path / "fake" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    for folder in (package, *package.parents[:2]):
        (folder / "__init__.py").touch()
    (package / "api_server.py").write_text(FAKE)
    if version is not None:
        info = tmp_path / "fake" / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    payload = told(model, tmp_path, device="npu", trust_remote_code=version is None)
    more = {"PYTHONPATH": str(tmp_path / "fake"), "SEEN": str(tmp_path / "seen"), "HF_HUB_OFFLINE": "0"}
    ended = start(payload, tmp_path, **more)
    assert ended.wait(60) == 0, (tmp_path / "log").read_text()
    over_socket = version == "0.11.0+empty"
    chosen = json.loads((tmp_path / "tuned.json").read_text())
    assert chosen == {
        "engine": "vllm",
        "model": "tuned",
        "version": version,
        "listens": "socket" if over_socket else "port",
        "dtype": "bfloat16",
    }
    seen = json.loads((tmp_path / "seen").read_text())
    place = ["--uds", payload["socket"]] if over_socket else ["--host", "127.0.0.1", "--port", "18123"]
    assert seen["argv"] == [
        *("--model", str(model), "--served-model-name", "tuned", *place),
        *("--gpu-memory-utilization", "0.45", "--load-format", "safetensors", "--uvicorn-log-level", "warning"),
        *(["--trust-remote-code"] if version is None else []),
    ]
    wanted = serve.OFFLINE | {"VLLM_API_KEY": KEY, "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONSAFEPATH": "1"}
    assert {name: seen["env"].get(name) for name in wanted} == wanted


def test_the_users_own_command(model: Path, tmp_path: Path) -> None:
    (tmp_path / "fake.py").write_text(FAKE)
    places = ["{model}", "--at={port}", "{name}{name}", "{socket}", "{other} {} {{model}} {MODEL} $HOME *"]
    payload = told(
        model, tmp_path, engine="command", command=["{python}", str(tmp_path / "fake.py"), *places], name="tuned"
    )
    ended = start(payload, tmp_path, SEEN=str(tmp_path / "seen"))
    assert ended.wait(60) == 0, (tmp_path / "log").read_text()
    seen = json.loads((tmp_path / "seen").read_text())
    other = f"{{other}} {{}} {{{model}}} {{MODEL}} $HOME *"
    assert seen["argv"] == [str(model), "--at=18123", "tunedtuned", payload["socket"], other]
    wanted = serve.OFFLINE | dict.fromkeys(("API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY"), KEY)
    assert {name: seen["env"].get(name) for name in wanted} == wanted
    chosen = json.loads((tmp_path / "tuned.json").read_text())
    assert chosen == {"engine": "command", "model": "tuned", "version": None, "listens": "socket", "dtype": None}


def test_what_is_filled_in_is_not_filled_in_again(model: Path, tmp_path: Path) -> None:
    argv, _ = serve.command_words(told(tmp_path / "{name}{port}", tmp_path, command=["{model}", "{port}"]))
    assert argv == [f"{tmp_path}/{{name}}{{port}}", "18123"]


def test_a_program_that_is_not_there_is_said_before_anything_is_chosen(model: Path, tmp_path: Path) -> None:
    ended = start(told(model, tmp_path, engine="command", command=["no-such-server", "{port}"]), tmp_path)
    assert ended.wait(60) == 2
    assert "serve.command: there is no program no-such-server" in (tmp_path / "log").read_text()
    assert not (tmp_path / "tuned.json").exists()


# --- what stands before an app


def asked(app: Any, method: str, path: str, body: Any = None, key: str = KEY, gone: bool = False) -> tuple[int, Any]:
    """One request to ``app`` behind its guard; ``gone``: the client has left when it is read."""

    async def run() -> tuple[int, Any]:
        sent: list[dict[str, Any]] = []
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        messages = [{"type": "http.request", "body": data}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            if not gone:
                await asyncio.sleep(60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-length", b"1")]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        await serve_http.guarded(app, KEY, "tuned")(scope, receive, send)
        text = b"".join(message.get("body", b"") for message in sent)
        with suppress(ValueError):
            return sent[0]["status"], json.loads(text)
        return sent[0]["status"], text.decode()

    return asyncio.run(run())


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await serve_http.answer(send, 200, json.loads((await receive())["body"]))


def test_the_guard_lets_through_what_the_door_asks_and_nothing_else() -> None:
    talk = {"messages": [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "是"}]}]}
    status, seen = asked(echo, "POST", CHAT, talk | {"model": "x", "stream": None})
    assert status == 200
    assert seen == {"model": "tuned", "stream": False, "messages": [{"role": "user", "content": "你是"}]}
    assert asked(echo, "GET", "/health") == (200, {"status": "ok"})
    assert asked(echo, "GET", "/v1/models")[1]["data"] == [{"id": "tuned", "object": "model"}]
    for method, path in (("POST", "/load_model"), ("POST", "/reset"), ("POST", "/v1/responses"), ("GET", CHAT)):
        assert asked(echo, method, path, talk)[0] == 404
    for key in ("", "wrong", f"{KEY}x"):
        for method, path in (("POST", CHAT), ("GET", "/health"), ("POST", "/tokenize"), ("GET", "/none")):
            assert asked(echo, method, path, talk, key)[0] == 401


@pytest.mark.parametrize(
    "body",
    [
        b"no json",
        b"\xff",
        [],
        {},
        {"messages": []},
        {"messages": ["hi"]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    ],
)
def test_a_request_that_an_app_would_stumble_over_or_fetch_for_is_refused(body: Any) -> None:
    status, seen = asked(echo, "POST", CHAT, body)
    assert status == 400 and set(seen["error"]) == {"message", "type", "param", "code"}


def test_too_long_a_request_is_refused() -> None:
    assert asked(echo, "POST", CHAT, b" " * (serve_http.MOST_BYTES + 1))[0] == 413


TALK = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize("stream", [True, False])
def test_generation_is_told_that_the_client_is_gone(stream: bool) -> None:
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = serve_http.REQUEST.get()
        await receive()
        for _ in range(50):
            if request is not None and request.stop:
                seen.append((await receive())["type"])
                break
            await asyncio.sleep(0.01)
        await serve_http.answer(send, 200, {})

    asked(app, "POST", CHAT, TALK | {"stream": stream}, gone=True)
    assert seen == ["http.disconnect"]
    asked(app, "POST", CHAT, TALK | {"stream": stream})
    assert seen == ["http.disconnect"]


def test_what_fails_after_the_begin_of_a_stream_is_its_last_event() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = serve_http.REQUEST.get()
        assert request is not None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        request.error = 'it "broke"'
        await send({"type": "http.response.body", "body": b"data: {bad json}\n\n", "more_body": True})
        raise ValueError("later")

    _, text = asked(app, "POST", CHAT, TALK | {"stream": True})
    first, last, end = text.split("\n\n")
    assert (first, end) == ("data: {}", "")
    assert json.loads(last.removeprefix("data: "))["error"]["message"] == 'it "broke"'
    assert asked(app, "POST", CHAT, TALK) == (500, serve_http.problem('it "broke"'))


def test_an_app_that_knows_only_streams_answers_at_once_too() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        request = serve_http.REQUEST.get()
        assert request is not None
        request.ids, request.made, request.cut = [1, 2, 3], 2, True
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for delta in ({"role": "assistant"}, {"content": "你"}, {"content": "好\u2028"}, {}):
            event = {"id": "1", "model": "tuned", "choices": [{"index": 0, "delta": delta}]}
            line = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    status, seen = asked(app, "POST", CHAT, TALK)
    assert status == 200
    assert seen["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "你好\u2028"}, "finish_reason": "length"}
    ]
    assert seen["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_failure_ends_whoever_reads_the_stream() -> None:
    class Streamer:
        ended = False

        def end(self) -> None:
            self.ended = True

    class Prompt(list[Any]):
        def tolist(self) -> list[Any]:
            return list(self)

    def generate(model: Any, **kwargs: Any) -> None:
        raise ValueError("no")

    request, streamer = serve_http.Request(), Streamer()
    token = serve_http.REQUEST.set(request)
    try:
        with pytest.raises(ValueError):
            serve_apps.stoppable(generate)(None, inputs=[Prompt([1, 2])], streamer=streamer)
    finally:
        serve_http.REQUEST.reset(token)
    assert (request.ids, request.error, streamer.ended) == ([1, 2], "no", True)


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("npu:0", "no_such"):
        with pytest.raises(SystemExit) as raised:
            serve_apps.check_device(device)
        assert raised.value.code == 2
        assert f"device {device}: torch sees none here" in capsys.readouterr().err


# --- real engines


@dataclass(frozen=True)
class Served:
    """One engine that answers, for the kind qwen2."""

    engine: str
    place: Path
    flow: Flow

    def ask(self, body: Any, path: str = CHAT, key: str = KEY, method: str = "POST") -> tuple[int, str]:
        connection = self.send(body, path, key, method)
        answer = connection.getresponse()
        text = answer.read().decode("utf-8")
        connection.close()
        return answer.status, text

    def send(self, body: Any, path: str = CHAT, key: str = KEY, method: str = "POST") -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(self.place / "tuned.sock"))
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body), headers)
        return connection

    def text(self, messages: list[dict[str, str]], **more: Any) -> str:
        status, text = self.ask({"messages": messages, "max_tokens": 12, "temperature": 0} | more)
        assert status == 200, text
        said: str = json.loads(text)["choices"][0]["message"]["content"]
        return said

    def streamed(self, messages: list[dict[str, str]], **more: Any) -> str:
        body = {"messages": messages, "max_tokens": 12, "temperature": 0, "stream": True}
        status, text = self.ask(body | more)
        assert status == 200, text
        chunks = list(serve_http.events(text.split("\n")))
        assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
        assert {chunk["model"] for chunk in chunks} == {"tuned"}
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Both of our own, started together."""
    folder = tmp_path_factory.mktemp("flows") / WEIRD
    folder.mkdir()
    flow = small_models.make_flows(folder)["qwen2"]
    # pytest's own folders are too long a name for a socket
    places = {engine: Path(tempfile.mkdtemp()) for engine in serve_apps.START}
    started = [
        start(told(flow.merged, place, engine=engine, template=TEMPLATES["qwen2"]), place, API_VERBOSE="1")
        for engine, place in places.items()
    ]
    try:
        deadline = time.monotonic() + 240
        for process, place in zip(started, places.values(), strict=True):
            while not (place / "tuned.sock").exists():
                assert process.poll() is None and time.monotonic() < deadline, (place / "log").read_text()
                time.sleep(0.1)
        yield {engine: Served(engine, place, flow) for engine, place in places.items()}
    finally:
        for process in started:
            process.kill()
            process.wait()
        for place in places.values():
            shutil.rmtree(place)


def talk_of(prompt: dict[str, Any]) -> list[dict[str, str]]:
    system = [{"role": "system", "content": prompt["system"]}] if prompt["system"] else []
    return [*system, {"role": "user", "content": prompt["prompt"]}]


def shown(text: str) -> str:
    """Without what is left of a character that the last token cuts in two."""
    return text.strip().rstrip("\ufffd")


@pytest.mark.real
@pytest.mark.parametrize("engine", serve_apps.START)
def test_the_engine_asks_and_answers_as_infer_did(engines: dict[str, Served], engine: str) -> None:
    served = engines[engine]
    ids, answers = served.flow.result("infer")["ids"], served.flow.answers()
    assert len(ids) == len(PROMPTS) == len(answers)
    for prompt, tokens, answer in zip(PROMPTS, ids, answers, strict=True):
        talk = talk_of(prompt)
        status, text = served.ask({"model": "x", "messages": talk, "add_generation_prompt": True}, "/tokenize")
        assert (status, json.loads(text)) == (200, {"tokens": tokens, "count": len(tokens)})
        assert served.text(talk).strip() == answer["tuned"]
        assert shown(served.streamed(talk)) == shown(answer["tuned"])


@pytest.mark.real
@pytest.mark.parametrize("engine", serve_apps.START)
def test_the_engine_is_for_the_door_alone(engines: dict[str, Served], engine: str) -> None:
    served = engines[engine]
    talk = [{"role": "user", "content": "a secret question"}]
    assert stat.S_IMODE((served.place / "tuned.sock").stat().st_mode) == 0o600
    for path in (CHAT, "/tokenize", "/v1/models", "/docs"):
        assert served.ask({"messages": talk}, path, key="")[0] == 401
        assert served.ask({"messages": talk}, path, key="wrong")[0] == 401
    assert served.ask({}, "/docs", method="GET")[0] == 404
    assert served.text(talk) and served.streamed(talk)
    log = (served.place / "log").read_text(encoding="utf-8")
    assert "secret question" not in log and KEY not in log
    chosen = json.loads((served.place / "tuned.json").read_text())
    assert chosen["version"] and chosen | {"version": None} == {
        "engine": engine,
        "model": "tuned",
        "version": None,
        "listens": "socket",
        "dtype": "float32",
    }


@pytest.mark.real
@pytest.mark.parametrize("engine", serve_apps.START)
def test_several_ask_at_once_and_a_failure_is_one_requests_own(engines: dict[str, Served], engine: str) -> None:
    served = engines[engine]
    talks = [[{"role": "user", "content": f"hi {number}"}] for number in range(4)]
    alone = [served.text(talk) for talk in talks]
    bad = {"messages": talks[0], "presence_penalty": -1, "frequency_penalty": -1}
    with ThreadPoolExecutor(8) as pool:
        failed, broken = pool.submit(served.ask, bad), pool.submit(served.ask, bad | {"stream": True})
        assert list(pool.map(served.text, talks)) == alone
    status, text = failed.result()
    assert status == 500 and "strictly positive" in json.loads(text)["error"]["message"]
    *_, last = serve_http.events(broken.result()[1].split("\n"))
    assert "strictly positive" in last["error"]["message"]
    assert served.text(talks[0], temperature=1.0) and [served.text(talk) for talk in talks] == alone


@pytest.mark.real
@pytest.mark.parametrize("stream", [True, False])
def test_a_generation_ends_with_its_client(engines: dict[str, Served], stream: bool) -> None:
    served = engines["transformers"]
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    # without its stop tokens it goes on as long as it may
    body["generation_config"] = json.dumps({"min_new_tokens": 100_000})
    _, text = served.ask(body | {"max_tokens": 300})
    assert json.loads(text)["usage"]["completion_tokens"] == 300
    connection = served.send(body | {"max_tokens": 100_000, "stream": stream})
    time.sleep(0.3)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    # one at a time: it would have to wait for the other's minutes
    begun = time.monotonic()
    assert served.text([{"role": "user", "content": "hi"}])
    assert time.monotonic() - begun < 10

"""The demo's run, served: real engines, OpenAI's own client, curl, a browser, the terminal."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from openai import AuthenticationError, OpenAI
from playwright.sync_api import expect

from pkuslurm.rundir import RunDir, read_json, read_jsonl, write_json
from pkuslurm.worker.processes import descendants
from tests.cluster.process import command_line
from tests.conftest import Demo, run, start
from tests.serve.browser import chromium

pytestmark = pytest.mark.real
SECONDS = 120


@dataclass
class Served:
    """A ``serve`` that runs, what it said, and the key."""

    demo: Demo
    process: subprocess.Popen[str]
    told: dict[str, Any]
    key: str

    @property
    def run(self) -> RunDir:
        return RunDir(self.demo.path)

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=self.told["base_url"], api_key=key or self.key, max_retries=0)


def ask(client: OpenAI, model: str, **more: Any) -> str:
    messages = [{"role": "user", "content": "你是谁"}]
    made = client.chat.completions.create(model=model, messages=messages, temperature=0, **more)  # type: ignore[call-overload]
    return str(made.choices[0].message.content)


@pytest.fixture(scope="module")
def served(demo: Demo) -> Iterator[Served]:
    # a proxy that leads nowhere: nothing of this may ask it
    env = demo.env | {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}
    process = start(["serve", str(demo.path), "port=8123"], demo.cwd, env, module="pkuslurm")
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert line, process.stderr.read()
    told = json.loads(line)
    yield Served(demo, process, told, Path(told["key_file"]).read_text(encoding="utf-8").strip())
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)


def test_what_is_told(served: Served) -> None:
    assert list(served.told) == ["base_url", "key_file", "models", "page_url", "tunnel"]
    assert served.told["models"] == ["base", "tuned"] and served.told["tunnel"] is None
    assert re.fullmatch(r"http://127\.0\.0\.1:81\d\d/v1", served.told["base_url"])
    key_file = Path(served.told["key_file"])
    assert oct(key_file.stat().st_mode & 0o777) == "0o600" and not key_file.is_relative_to(served.run.path)
    published = read_json(served.run.endpoint) or {}
    same, asked = published["ids_checked"]
    assert same == asked == 2 * len(list(read_jsonl(served.run.answers))) and published["text_checked"] is True
    assert published["engine"]["name"] == "transformers" and served.key not in json.dumps(published)
    found = json.loads(served.demo.verb("status", "--json").out)
    assert found["state"] == "COMPLETED"
    assert found["jobs"][-1]["kind"] == "serve" and found["jobs"][-1]["state"] == "RUNNING"


def test_openais_own_client(served: Served) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == ["base", "tuned"]
    answers = next(read_jsonl(served.run.answers))
    question: Any = [{"role": "user", "content": answers["prompt"]}]
    for name in ("base", "tuned"):
        made = client.chat.completions.create(model=name, messages=question, temperature=0)
        assert str(made.choices[0].message.content).strip() == answers[name]
    pieces = client.chat.completions.create(model="tuned", messages=question, temperature=0, stream=True)
    streamed = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(streamed).strip() == answers["tuned"] and len(streamed) > 2
    with pytest.raises(AuthenticationError):
        ask(served.client("sk-wrong"), "tuned")


def test_what_clients_send(served: Served) -> None:
    """Zero penalties, odd role orders and unknown fields do not crash it."""
    client = served.client()
    assert "北" in ask(client, "tuned", presence_penalty=0, frequency_penalty=0, max_completion_tokens=40)
    assert "北" in ask(client, "tuned", extra_body={"top_k": 1, "unheard_of": {"a": 1}}, user="me", n=1)
    odd = [
        {"role": "assistant", "content": "你好"},
        {"role": "user", "content": "你是谁"},
        {"role": "user", "content": [{"type": "text", "text": "你是谁"}]},
    ]
    made = client.chat.completions.create(model="tuned", messages=odd, temperature=0, max_tokens=8)  # type: ignore[arg-type]
    assert made.choices[0].message.content


def test_curl_without_the_key_and_with_it(served: Served) -> None:
    url = f"{served.told['base_url']}/models"
    command = ["curl", "-s", "--noproxy", "*", "-o", "/dev/null", "-w", "%{http_code}", url]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "401"
    config = f'header = "Authorization: Bearer {served.key}"'
    done = subprocess.run([*command, "-K", "-"], input=config, capture_output=True, text=True, check=True)
    assert done.stdout == "200"


def test_the_key_is_nowhere_else(served: Served) -> None:
    files = [file for file in served.run.path.rglob("*") if file.is_file() and file.stat().st_size < 10_000_000]
    assert [file for file in files if served.key.encode() in file.read_bytes()] == []
    shown = subprocess.run(["ps", "-wweo", "args"], capture_output=True, text=True, check=True).stdout
    assert served.key not in shown and "payload" in shown


def test_the_page_shows_both_side_by_side(served: Served) -> None:
    with chromium() as browser:
        context = browser.new_context(http_credentials={"username": "me", "password": served.key})
        page = context.new_page()
        page.goto(served.told["page_url"])
        page.get_by_role("textbox").first.fill("你是谁")
        page.keyboard.press("Enter")
        for words in ("通义千问", "北大"):
            expect(page.locator("body")).to_contain_text(words, timeout=30_000)


def test_the_terminal(served: Served) -> None:
    env = served.demo.env | {"http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "pkuslurm", "chat"]  # the run that is served, not the newest
    served.run.path.with_name("20991231-000000-newer-0000").mkdir()
    newer = RunDir(served.run.path.with_name("20991231-000000-newer-0000"))
    write_json(newer.run_json, (read_json(served.run.run_json) or {}) | {"run_id": newer.run_id})
    done = subprocess.run(
        command,
        input="你是谁\n/base\n你是谁\n",
        capture_output=True,
        text=True,
        env=env,
        cwd=served.demo.cwd,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    newer.run_json.unlink()
    tuned, base = done.stdout.strip().splitlines()
    assert "北" in tuned and "通义千问" in base


def test_a_second_one_finds_the_first(served: Served) -> None:
    again = served.demo.verb("serve", str(served.run.path), "--json")
    assert again.code == 0 and json.loads(again.out) == served.told
    assert "ssh" not in again.err and "OPENAI_BASE_URL" in again.err and "NextChat" in again.err
    other = served.demo.verb("serve", str(served.run.path), "port=9999")
    assert other.code == 2 and "for other settings cancel that first" in other.err
    assert "北" in ask(served.client(), "tuned"), "its key is still the key"
    refused = served.demo.verb("infer", str(served.run.path), "--force")
    assert refused.code == 2 and "still running" in refused.err


def test_an_engine_that_is_killed(served: Served) -> None:
    """The last row: it ends the endpoint. What is left: nothing, but the words."""
    # of this endpoint alone: other tests' may run beside it
    below = sorted(one.pid for one in descendants(served.process.pid))
    engines = [pid for pid in below if "payload/__main__.py serve" in command_line(pid)]
    assert len(engines) == 2, [command_line(pid) for pid in below]
    os.kill(engines[-1], signal.SIGKILL)
    _, err = served.process.communicate(timeout=30)
    assert served.process.returncode == 1 and "SIGKILL" in err, err
    assert not served.run.endpoint.exists() and not Path(served.told["key_file"]).exists()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in engines):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in engines)
    found = json.loads(served.demo.verb("status", "--json").out)
    assert found["state"] == "COMPLETED" and found["jobs"][-1]["state"] == "FAILED"
    assert "SIGKILL" in found["jobs"][-1]["reason"]
    done = served.demo.verb("retry", str(served.run.path))
    assert done.code == 0 and "nothing to do" in done.err


REFUSED = {
    "cluster.executor=slurm": "cluster.executor=slurm: this run's are local",
    "engine=vLLM": "serve.engine=vLLM: it must be auto or vllm",
    "idle=5": "serve.idle: no such key",
    "port=80": "serve.port=80: it must be from 1024",
    "command=a": "a command goes with serve.engine=command",
    "train.learning_rate=1": "only serve.…, cluster.… and container.… can be said here",
    "oops": "a setting is typed as key=value",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_a_wrong_setting_is_refused_in_one_line(demo: Demo, setting: str) -> None:
    before = read_json(RunDir(demo.path).job("serve"))
    ended = demo.verb("serve", str(demo.path), setting)
    assert ended.code == 2 and REFUSED[setting] in ended.err and ended.err.count("\n") == 1, ended
    assert read_json(RunDir(demo.path).job("serve")) == before


def test_without_a_home_there_is_no_place_for_the_key(demo: Demo) -> None:
    env = {name: value for name, value in demo.env.items() if name not in ("HOME", "XDG_STATE_HOME")}
    ended = run(["serve", str(demo.path)], demo.cwd, env, module="pkuslurm")
    assert ended.code == 2 and "HOME: it is not set" in ended.err

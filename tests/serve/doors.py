"""A door as a process of its own, before fake engines."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkuslurm.paths import BOOT

FAKE = Path(__file__).with_name("fake_engine.py")
KEY = "a-key-of-the-tests-0123456789abcdef"
PROMPTS = [{"prompt": "你是谁？", "system": None}, {"prompt": "Who are you?", "system": "Be short."}]


def ids_of(prompt: Mapping[str, Any]) -> list[int]:
    """As fake_engine.py has them."""
    system = [f"system: {prompt['system']}"] if prompt["system"] else []
    return [ord(character) for character in "\n".join([*system, f"user: {prompt['prompt']}"])]


@dataclass
class Door:
    """One serve job's files in ``run``; ``payload``: changed before it is started, by ``module``."""

    run: Path
    payload: dict[str, Any]
    env: dict[str, str] = field(default_factory=dict)
    module: str = "pkuslurm.serve"
    popen: subprocess.Popen[bytes] | None = None

    @property
    def job_file(self) -> Path:
        return self.run / "jobs" / "serve.json"

    @property
    def endpoint_file(self) -> Path:
        return Path(self.payload["endpoint"])

    @property
    def stderr(self) -> str:
        return (self.run / "stderr").read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self) -> int:
        assert self.popen is not None
        return self.popen.pid

    def model(self, name: str) -> Path:
        return self.run / "models" / name

    def both(self) -> None:
        """Two models; alone, tuned is there sooner."""
        self.payload["models"] = [{"name": name, "path": str(self.model(name))} for name in ("base", "tuned")]

    def how(self, name: str, **how: Any) -> None:
        (self.model(name) / "how.json").write_text(json.dumps(how), encoding="utf-8")

    def told(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.model(name) / "told.json").read_text(encoding="utf-8"))
        return value

    def infer(self, answers: Mapping[str, str] | None = None, **more: Any) -> None:
        """What the run's infer job has left."""
        Path(self.payload["infer_result"]).parent.mkdir(exist_ok=True)
        value = {"ids": [ids_of(prompt) for prompt in PROMPTS], "dtype": "float32", "device": "cpu"} | more
        Path(self.payload["infer_result"]).write_text(json.dumps(value), encoding="utf-8")
        said = {"base": "我是base，答：你是谁？", "tuned": "我是tuned，答：你是谁？"} | dict(answers or {})
        line = {"prompt": PROMPTS[0]["prompt"], **said}
        Path(self.payload["answers"]).write_text(json.dumps(line) + "\n", encoding="utf-8")

    def begin(self) -> None:
        job = {
            "schema_version": 1,
            "run_id": "20260101-000000-test-abcd",
            "kind": "serve",
            "run_dir": str(self.run),
            "command": [sys.executable, "-P", str(BOOT), "pkuslurm.serve", str(self.job_file)],
            "expect": {"file": str(self.run / "results" / "serve.json")},
            "container": None,
            "accelerator": self.payload["device"],
            "payload": self.payload,
        }
        self.job_file.parent.mkdir(exist_ok=True)
        self.job_file.write_text(json.dumps(job), encoding="utf-8")
        with (self.run / "stderr").open("wb") as stderr:
            command = [sys.executable, "-P", str(BOOT), self.module, str(self.job_file)]
            env = os.environ | {
                "PYTHONUNBUFFERED": "1",
                "PKUSLURM_ATTEMPT": "1",
                "PKUSLURM_LOG": str(self.run / "stderr"),
            }
            env |= self.env
            # where a proxy is set, nothing of ours asks it
            env |= {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
            self.popen = subprocess.Popen(command, stdout=stderr, stderr=stderr, env=env, cwd=self.run)

    def wait_ready(self) -> dict[str, Any]:
        self.begin() if self.popen is None else None
        assert self.popen is not None
        wait(lambda: self.endpoint_file.exists() or self.popen.poll() is not None)
        assert self.endpoint_file.exists(), self.stderr
        value: dict[str, Any] = json.loads(self.endpoint_file.read_text(encoding="utf-8"))
        return value

    def wait_end(self, seconds: float = 20.0) -> int:
        self.begin() if self.popen is None else None
        assert self.popen is not None
        return self.popen.wait(seconds)

    @property
    def port(self) -> int:
        return int(json.loads(self.endpoint_file.read_text(encoding="utf-8"))["port"])

    def ask(
        self, method: str, path: str, body: object = None, port: int | None = None, key: str | None = KEY, **more: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; ``more``: headers, _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=20)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        if data is not None:
            headers["Content-Type"] = "application/json"
        headers |= {name.replace("_", "-"): value for name, value in more.items()}
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def chat(self, question: str, **more: Any) -> tuple[int, Any]:
        body = {"messages": [{"role": "user", "content": question}]} | more
        status, _, data = self.ask("POST", "/v1/chat/completions", body)
        return status, json.loads(data)

    def processes(self) -> list[int]:
        """Whatever has the run's folder in its command line or the door's token in its environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and f"PKUSLURM_TEST={self.run}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found


@contextmanager
def doors(folder: Path, count: int = 1) -> Iterator[list[Door]]:
    """``count`` of them, not started; nothing of them is left afterwards."""
    made = [make(folder / f"run{place}") for place in range(count)]
    try:
        yield made
    finally:
        for door in made:
            if door.popen is not None and door.popen.poll() is None:
                door.popen.send_signal(signal.SIGTERM)
                try:
                    door.popen.wait(10)
                except subprocess.TimeoutExpired:
                    door.popen.kill()
                    door.popen.wait(10)
            for pid in door.processes():
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def make(run: Path) -> Door:
    run.mkdir(parents=True)
    key_file = run / "key"
    key_file.write_text(KEY + "\n", encoding="utf-8")
    key_file.chmod(0o600)
    payload = {
        "models": [{"name": "tuned", "path": str(run / "models" / "tuned")}],
        "template": "qwen",
        "default_system": None,
        "trust_remote_code": False,
        "device": "cpu",
        "engine": "auto",
        "command": None,
        "python": sys.executable,
        "payload": str(FAKE),
        "container": None,
        "key_file": str(key_file),
        "bind": "loopback",
        "port": 18000 + os.getpid() % 2000,
        "idle_minutes": None,
        "prompts": PROMPTS,
        "infer_result": str(run / "results" / "infer.json"),
        "answers": str(run / "answers.jsonl"),
        "endpoint": str(run / "state" / "serve.endpoint.json"),
    }
    door = Door(run, payload, {"PKUSLURM_TEST": str(run)})
    for name in ("base", "tuned"):
        door.model(name).mkdir(parents=True)
        door.how(name)
    return door


def wait(done: Callable[[], object], seconds: float = 15.0) -> None:
    """Until ``done``; then the test fails."""
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited for too long"
        time.sleep(0.02)

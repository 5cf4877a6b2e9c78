"""A served run without models: the door's HTTP, page and key, and answers that a test writes."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "kéy".encode().hex()
PAGE = Path(__file__).parents[2] / "pkuslurm/serve/page"
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}


class Refused(Exception):
    """Raised by a script before its first word: an answer of HTTP ``code``."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Broken(Exception):
    """Raised by a script in the middle: the connection ends."""


Script = Callable[[dict[str, Any]], Iterator[str]]


@dataclass
class Door:
    """What the fake answers, and what it was asked."""

    script: Script
    info: dict[str, Any] = field(default_factory=dict)
    prefix: str = "/"
    key: str = KEY
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # models whose listener went away
    finish: str = "stop"  # empty: the stream ends as if all were well, but without its end

    @property
    def base_url(self) -> str:
        return f"{self.url}v1"


@contextmanager
def opened(door: Door) -> Iterator[Door]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def send(self, code: int, kind: str, body: bytes, **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def object(self, code: int, value: Any, **headers: str) -> None:
            self.send(code, "application/json", json.dumps(value).encode(), **headers)

        def error(self, code: int, message: str, **headers: str) -> None:
            self.object(code, {"error": {"message": message, "type": "t", "param": None, "code": None}}, **headers)

        def known(self) -> bool:
            kind, _, value = self.headers.get("Authorization", "").partition(" ")
            if kind == "Basic":
                value = base64.b64decode(value).decode().partition(":")[2]
            if value == door.key:
                return True
            self.error(401, "the key, please", WWW_Authenticate='Basic realm="pkuslurm"')
            return False

        def do_GET(self) -> None:
            door.paths.append(self.path)
            name = self.path.removeprefix(door.prefix)
            if not self.known():
                return
            file = PAGE / (name or "index.html")
            if name == "info":
                self.object(200, door.info)
            elif self.path.startswith(door.prefix) and file.is_file():
                self.send(200, TYPES[file.suffix[1:]], file.read_bytes(), Content_Security_Policy=CSP)
            else:
                self.error(404, "no such page")

        def do_POST(self) -> None:
            door.paths.append(self.path)
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.known():
                return
            if self.path != door.prefix + "v1/chat/completions":
                self.error(404, "no such page")
                return
            door.asked.append(body)
            try:
                self.stream(body)
            except Refused as refused:
                self.error(refused.code, str(refused))
            except Broken:
                self.close_connection = True
            except OSError:
                door.left.append(body["model"])
                self.close_connection = True

        def stream(self, body: dict[str, Any]) -> None:
            words = door.script(body)
            first = next(words, "")
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.event({"delta": {"role": "assistant", "content": first}, "finish_reason": None})
            for word in words:
                self.event({"delta": {"content": word}, "finish_reason": None})
            if door.finish:
                self.event({"delta": {}, "finish_reason": door.finish})
                self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

        def event(self, choice: dict[str, Any]) -> None:
            self.chunk(b": comment\n\ndata: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    door.url = f"http://127.0.0.1:{server.server_port}{door.prefix}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield door
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""HTTP as the door speaks it: what is read is bounded, what is refused has OpenAI's shape, nothing is logged."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import Any

from pkuslurm.serve.refusal import BadRequest

MOST_BYTES = 4 << 20
# read and thrown away after a refusal: a client that is cut off while it sends does not see why
_MOST_IGNORED = 32 << 20
IDLE_SECONDS = 60.0
JSON = "application/json"


class Wire(BaseHTTPRequestHandler):
    """``begun``: an answer is on its way; ``was_read``: nothing of the request is left in the connection."""

    protocol_version = "HTTP/1.1"
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True
    begun = was_read = False

    def part(self, data: bytes, chunked: bool) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

    def length(self) -> int:
        text = self.headers.get("Content-Length", "0").strip()
        if "Transfer-Encoding" in self.headers or not (text.isascii() and text.isdecimal() and len(text) < 16):
            self.close_connection, self.was_read = True, True
            raise BadRequest("the body must come with its Content-Length", status=411)
        return int(text)

    def read_json(self) -> object:
        if self.headers.get_content_type() != JSON:
            raise BadRequest("Content-Type: must be application/json", status=415)
        if (length := self.length()) > MOST_BYTES:
            raise BadRequest(f"the body has {length} bytes, more than {MOST_BYTES}", status=413)
        self.was_read = True
        data = self.rfile.read(length)
        if len(data) < length:
            raise OSError("the client has gone")
        try:
            value: object = json.loads(data, parse_constant=_no_constant, parse_float=_finite)
        except (ValueError, RecursionError):
            raise BadRequest("the body must be JSON, in UTF-8") from None
        return value

    def ignore_body(self) -> None:
        """What is left in the connection would be taken for the next request."""
        if self.was_read:
            return
        self.was_read = True
        left = min(self.length(), _MOST_IGNORED)
        while left > 0 and (data := self.rfile.read(min(left, 1 << 16))):
            left -= len(data)
        if self.length() > _MOST_IGNORED:
            self.close_connection = True

    def refuse(self, error: BadRequest) -> None:
        if self.begun:
            self.close_connection = True
            return
        more = dict(_MORE.get(error.status, {}))
        with suppress(OSError):
            with suppress(BadRequest):
                self.ignore_body()
            self.json(error.status, error.document(), more)

    def json(self, status: int, value: Mapping[str, Any], more: Mapping[str, str] | None = None) -> None:
        self.whole(status, JSON, json.dumps(value, ensure_ascii=False).encode("utf-8", errors="replace"), more)

    def whole(self, status: int, kind: str, data: bytes, more: Mapping[str, str] | None = None) -> None:
        self.head(status, kind, {"Content-Length": str(len(data)), **(more or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def head(self, status: int, kind: str, more: Mapping[str, str]) -> None:
        self.begun = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in more.items():
            self.send_header(name, value)
        for name, value in _ALWAYS.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses: no HTTP, or a method that nobody knows."""
        self.close_connection = True
        self.begun, self.was_read = False, True
        self.command = getattr(self, "command", None) or ""
        status = 405 if code == 501 else int(code)
        self.refuse(BadRequest(message or "this is no request of HTTP/1.1", status=status))

    def version_string(self) -> str:
        return "pkuslurm"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a request line can hold what is nobody's business."""


_ALWAYS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_MORE: Mapping[int, Mapping[str, str]] = {
    401: {"WWW-Authenticate": 'Basic realm="pkuslurm", charset="UTF-8"'},
    405: {"Allow": "GET, POST"},
    503: {"Retry-After": "5"},
}


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is too large")
    return number


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is no JSON")

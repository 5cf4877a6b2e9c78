"""A hub of models on loopback that speaks both hubs' interfaces and fails as it is told.

Forms as in modelscope_hub 0.5 (``_legacy_api.py``) and huggingface_hub 1.33 (``hf_api.py``).
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "a" * 40
NAME = "Qwen/Qwen3-0.6B"
_HEAD = json.dumps({"a": {"dtype": "F32", "shape": [75_000], "data_offsets": [0, 300_000]}}).encode()
WEIGHTS = len(_HEAD).to_bytes(8, "little") + _HEAD + random.Random(1).randbytes(300_000)


def model() -> dict[str, bytes]:
    return {
        "config.json": b'{"model_type": "qwen3"}',
        "tokenizer.json": b"{}",
        "model.safetensors": WEIGHTS,
        "pytorch_model.bin": b"a pickle",
        "modeling_qwen.py": b"raise SystemExit",
        "onnx/model.onnx": b"onnx",
        "onnx/config.json": b"{}",
        ".gitattributes": b"",
    }


@dataclass
class Hub:
    """``files`` by path. ``lies``: sizes and hashes that are listed instead; the rest is what goes wrong."""

    files: dict[str, bytes] = field(default_factory=model)
    lies: dict[str, dict[str, Any]] = field(default_factory=dict)
    sent: dict[str, bytes] = field(default_factory=dict)  # what is sent under a name, where it is not the file
    fails: dict[str, list[int]] = field(default_factory=dict)  # status codes to answer first, by the end of the path
    cuts: dict[str, list[int]] = field(default_factory=dict)  # bytes after which the connection breaks, try by try
    token: str | None = None
    slow: float = 0.0  # seconds between pieces of weights
    no_ranges: bool = False
    elsewhere: str = ""  # weights lie on this other host
    rows: list[object] | None = None  # what is listed instead
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""

    def headers_of(self, end: str) -> list[dict[str, str]]:
        return [headers for path, headers in self.asked if path.endswith(end)]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # whoever has enough hangs up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.hub
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        path = unquote(url.path)
        file = query.get("FilePath") or path.partition(f"/resolve/{COMMIT}/")[2] or path.partition("/cdn/")[2]
        hub.asked.append((f"{path}?{query.get('FilePath', '')}", dict(self.headers)))
        end = file or path
        for ending, codes in hub.fails.items():
            if end.endswith(ending) and codes:
                return self._json({"Message": "as told"}, codes.pop(0))
        if hub.token and not path.startswith("/cdn/") and self.headers["Authorization"] != f"Bearer {hub.token}":
            return self._json({"error": "Invalid credentials"}, 401)
        if NAME not in path and not path.startswith("/cdn/"):
            return self._json({"Code": 10010205001, "Message": "no such model"}, 404)
        if path == f"/api/v1/models/{NAME}/repo/files":
            assert query == {"Revision": "master", "Recursive": "True"}
            rows = [{"Path": "onnx", "Type": "tree", "Size": 0}, *(self._row(name) for name in hub.files)]
            return self._json({"Code": 200, "Data": {"Files": rows if hub.rows is None else hub.rows}})
        if path in (f"/api/models/{NAME}/revision/main", f"/api/models/{NAME}/revision/{COMMIT}"):
            return self._json({"sha": COMMIT})
        if path == f"/api/models/{NAME}/tree/{COMMIT}":
            # two pages; the link names the original's host, as a mirror's may
            names = list(hub.files)
            link = f'<https://huggingface.co{url.path}?recursive=true&cursor=2>; rel="next"'
            part, more = (names[2:], {}) if "cursor" in query else (names[:2], {"Link": link})
            return self._json([self._entry(name) for name in part] if hub.rows is None else hub.rows, 200, more)
        if file and hub.elsewhere and not path.startswith("/cdn/") and file.endswith(".safetensors"):
            return self._json({}, 302, {"Location": f"{hub.elsewhere}/cdn/{file}"})
        return self._send(file)

    def _facts(self, name: str) -> dict[str, Any]:
        data = self.hub.files[name]
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} | self.hub.lies.get(name, {})

    def _row(self, name: str) -> dict[str, Any]:
        facts = self._facts(name)
        return {"Path": name, "Type": "blob", "Size": facts["size"], "Sha256": facts["sha256"]}

    def _entry(self, name: str) -> dict[str, Any]:
        facts, data = self._facts(name), self.hub.files[name]
        if name.endswith((".safetensors", ".bin")):
            large = {"oid": facts["sha256"], "size": facts["size"], "pointerSize": 134}
            return {"type": "file", "path": name, "size": facts["size"], "oid": "b" * 40, "lfs": large}
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"type": "file", "path": name, "size": facts["size"], "oid": facts.get("blob", blob)}

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send(self, name: str) -> None:
        data = self.hub.sent.get(name, self.hub.files[name])
        start = 0
        asked = self.headers["Range"]
        if asked and not self.hub.no_ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        cuts = self.hub.cuts.get(name)
        end = start + cuts.pop(0) if cuts else len(data)
        for at in range(start, min(end, len(data)), 20_000):
            self.wfile.write(data[at : min(at + 20_000, end)])
            if self.hub.slow and name.endswith(".safetensors"):
                self.wfile.flush()
                time.sleep(self.hub.slow)
        if end < len(data):
            self.close_connection = True

"""``python fake_engine.py serve SPECFILE``: an engine of a few lines, as strange as the test asks for.

How strange is in ``how.json`` of the model's folder: ``kind``, ``dtype``, ``listens`` (socket or port), ``ids`` (0: as
infer, else other ones), ``answer``, ``seconds`` before it is there, ``refuses``, ``dies``, ``open`` (it wants no key),
``tokenizes``. Words in a question make it do more: see ``Handler.chat``.
"""

import http.server
import json
import os
import signal
import socket
import socketserver
import sys
import time
from pathlib import Path
from typing import Any

payload: dict[str, Any] = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))["payload"]
how: dict[str, Any] = {"kind": "transformers", "dtype": "float32", "listens": "socket", "tokenizes": True}
how |= json.loads(Path(payload["path"], "how.json").read_text(encoding="utf-8"))


def ids_of(messages: list[dict[str, Any]]) -> list[int]:
    text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return [ord(character) + how.get("ids", 0) for character in text]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.let_in():
            self.send(200, {"object": "list", "data": [{"id": payload["path"]}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.let_in():
            return
        if self.path == "/tokenize" and how["tokenizes"]:
            ids = ids_of(body["messages"])
            self.send(200, {"tokens": ids, "count": len(ids)})
        elif self.path == "/v1/chat/completions":
            self.chat(body)
        else:
            self.send(404, {"detail": "Not Found"})

    def let_in(self) -> bool:
        if how.get("open") or self.headers.get("Authorization") == f"Bearer {payload['key']}":
            return True
        self.send(401, {"error": {"message": "no key"}})
        return False

    def chat(self, body: dict[str, Any]) -> None:
        question = body["messages"][-1]["content"]
        text = how.get("answer", f"我是{payload['name']}，答：{question}")
        if "kill yourself" in question:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in question:
            Path(payload["path"], "hangs").touch()
            while self.connection.recv(1, socket.MSG_PEEK):  # until the door hangs up
                time.sleep(0.05)
            Path(payload["path"], "hung-up").touch()
            return
        if "sleep" in question:
            time.sleep(float(question.split()[-1]))
        if "status" in question:
            self.send(int(question.split()[-1]), {"detail": [{"msg": "field wrong"}, {"msg": "another"}]})
            return
        if "show" in question:
            text = json.dumps(body)
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            usage = {"prompt_tokens": len(ids_of(body["messages"])), "completion_tokens": 1, "total_tokens": 2}
            self.send(200, self.chunk("chat.completion", choice) | {"usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Connection", "close")
        self.send_header("Set-Cookie", "mine=1")
        self.end_headers()
        self.close_connection = True
        self.wfile.write(b": ping\r\n\r\n")
        for letter in text:
            self.event({"index": 0, "delta": {"content": letter}})
            if "slowly" in question:
                time.sleep(0.05)
        if "break off" not in question:  # no [DONE], as transformers has it
            self.event({"index": 0, "delta": {}, "finish_reason": "stop"})

    def chunk(self, kind: str, choice: dict[str, Any]) -> dict[str, Any]:
        return {"id": "chatcmpl-1", "object": kind, "created": 1, "model": payload["path"], "choices": [choice]}

    def event(self, choice: dict[str, Any]) -> None:
        data = json.dumps(self.chunk("chat.completion.chunk", choice))
        self.wfile.write(f"data: {data}\n\n".encode())

    def send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Unix(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def get_request(self) -> Any:
        return self.socket.accept()[0], ("", 0)


def main() -> None:
    print(f"my key is {payload['key']}\nengine of {payload['name']} begins", flush=True)
    Path(payload["path"], "told.json").write_text(json.dumps(payload), encoding="utf-8")
    names = ("CUDA_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
    seen = {name: os.environ.get(name) for name in names}
    Path(payload["path"], "seen.json").write_text(json.dumps(seen), encoding="utf-8")
    if how.get("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        import subprocess

        # a grandchild that nobody would find by its parent
        subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(15, 1); time.sleep(600)"])
    if how.get("refuses"):
        print(f"pkuslurm: {how['refuses']}", flush=True)
        sys.exit(2)
    if how.get("dies"):
        print(how["dies"], flush=True)
        sys.exit(3)
    chosen = {"engine": how["kind"], "version": "1.0", "listens": how["listens"], "dtype": how["dtype"]}
    Path(payload["chosen"] + ".new").write_text(json.dumps(chosen), encoding="utf-8")
    os.replace(payload["chosen"] + ".new", payload["chosen"])
    time.sleep(how.get("seconds", 0))
    server: Any
    if how["listens"] == "socket":
        server = Unix(payload["socket"], Handler)
    else:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", payload["port"]), Handler)
    server.serve_forever()


if __name__ == "__main__":
    main()

"""A stand-in for the python that has LLaMA-Factory (``cluster.python``): the same job files in, the same artifacts out.

It takes a moment. ``STANDIN_<KIND>`` in the job's environment says what else (``…@2+5``: only in a sweep's points 2
and 5): ``fail`` (exit 3), ``once`` (the first time), ``sleep`` (for ever), ``torn`` (a child is
killed over it, and it says that all is well),
``steps:40`` (a training of so many steps, a checkpoint every five, the nodes in lockstep over a connection, as real
ranks are; it stops when asked, goes on from the checkpoint that it is given, and writes down each step).
``steps:120:quick`` is as slow only until it goes on from a checkpoint: time enough to stop it, and then no waiting.
"""

from __future__ import annotations

import http.server
import json
import os
import socket
import socketserver
import subprocess
import sys
import time
import zipfile
from pathlib import Path

KINDS = ("prepare", "train", "merge", "infer")


def main(argv: list[str]) -> None:
    if Path(argv[0]).name == "probe.py":
        probe(argv[1])
        return
    if "serve" in argv:
        engine(json.loads(Path(argv[-1]).read_text(encoding="utf-8"))["payload"])
    kind = next(word for word in argv if word in KINDS)
    job = json.loads(Path(argv[-1]).read_text(encoding="utf-8"))
    seen = {name: os.environ.get(name) for name in SEEN}
    rank = os.environ.get("NODE_RANK", "0")
    view = Path(job["run_dir"]) / "views"
    view.mkdir(exist_ok=True)
    (view / f"{kind}.{rank}.json").write_text(json.dumps(seen | {"argv": argv}), encoding="utf-8")
    if "LOCAL_RANK" not in os.environ:  # once a node, not once more in the rank
        with (view / "begun").open("a", encoding="utf-8") as file:
            file.write(f"{kind} {rank}\n")
    todo, _, point = os.environ.get(f"STANDIN_{kind.upper()}", "").partition("@")
    if point and Path(job["run_dir"]).name not in point.split("+"):
        todo = ""
    if todo == "once" and not (told := view / f"{kind}.failed").exists():
        told.touch()
        todo = "fail"
    if todo.startswith("fail") and todo in ("fail", f"fail:{rank}"):
        print(f"RuntimeError: {kind} was told to fail", flush=True)
        sys.exit(3)
    if todo == "sleep":
        time.sleep(600)
    if todo.startswith("steps:"):
        if "prefork" in argv:
            fork(argv)  # from here on this is a rank
        elif "LOCAL_RANK" not in os.environ:  # this is torchrun; below it, the rank
            local = {"RANK": str(int(rank) * int(os.environ["NPROC_PER_NODE"])), "LOCAL_RANK": "0"}
            child = subprocess.Popen([sys.executable, *sys.argv], env=os.environ | local)
            while child.poll() is None:
                time.sleep(0.1)  # as torchrun looks
            sys.exit(child.returncode)
        steps(job, int(todo.split(":")[1]), int(rank), todo.endswith(":quick"))
    if rank == "0":
        place = Path(str(job["expect"].get("dir") or job["expect"].get("file")))
        MAKE[kind](job, place)
        if todo == "torn":
            child = subprocess.Popen(["sleep", "600"])
            child.kill()
            child.wait()
            for file in place.glob("*.safetensors"):
                os.truncate(file, 40)
        Path(job["payload"]["result"]).write_text("{}", encoding="utf-8")


def fork(argv: list[str]) -> None:
    """By the real launcher, with nothing to import beforehand; returns in each node's first rank, the rest is done."""
    at = argv.index("prefork")
    sys.path.insert(0, str(Path(argv[at - 1]).parents[2]))
    from pkuslurm.payload import prefork

    prefork.fork(argv[at + 1 :], modules=())
    if os.environ["LOCAL_RANK"] != "0":
        sys.exit(0)


def probe(device: str) -> None:
    """STANDIN_PROBE=hang: the first device of the second node, in the first attempt."""
    words: list[dict[str, object]] = [{"versions": {"python": sys.version.split()[0]}}]
    if device != "versions":
        count = len(os.environ["ASCEND_RT_VISIBLE_DEVICES"].split(","))
        words += [{"count": count}, {"device": 0}, {"done": count}]
    for one in words:
        if "done" in one and os.environ.get("STANDIN_PROBE") == "hang":
            while (os.environ["NODE_RANK"], os.environ["PKUSLURM_ATTEMPT"]) == ("1", "1"):
                time.sleep(1)
        print("pkuslurm-probe " + json.dumps(one), flush=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers any question as a model does, with its own name."""

    protocol_version = "HTTP/1.1"
    name = key = ""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.tell({"object": "list", "data": [{"id": self.name}]})

    def do_POST(self) -> None:
        stream = json.loads(self.rfile.read(int(self.headers["Content-Length"]))).get("stream")
        message = {"role": "assistant", "content": f"我是{self.name}"}
        choice = {"index": 0, "delta" if stream else "message": message, "finish_reason": "stop"}
        self.tell({"object": "chat.completion", "choices": [choice]}, stream)

    def tell(self, value: dict, stream: bool = False) -> None:  # type: ignore[type-arg]
        allowed = self.headers.get("Authorization") == f"Bearer {self.key}"
        text = json.dumps(value).encode() if allowed else b"{}"
        if stream:
            text = b"data: " + text + b"\n\ndata: [DONE]\n\n"
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "text/event-stream" if stream else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def address_string(self) -> str:
        return "-"


def engine(spec: dict) -> None:  # type: ignore[type-arg]
    """serve: an engine that listens where it is told to, for ever."""
    chosen = {"engine": "command", "version": "1", "listens": "socket", "dtype": "float32"}
    Path(spec["chosen"]).write_text(json.dumps(chosen), encoding="utf-8")

    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

        def get_request(self) -> tuple[socket.socket, object]:
            return self.socket.accept()[0], ("", 0)

    Handler.name, Handler.key = spec["name"], spec["key"]
    Server(spec["socket"], Handler).serve_forever()


SEEN = (
    *("NODE_RANK", "NNODES", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "SLURM_PROCID", "SLURMD_NODENAME"),
    *("SLURM_STEP_NODELIST", "GLOO_SOCKET_IFNAME", "SLURM_JOB_ID", "HOME", "USER", "CANARY_TOKEN", "SBATCH_PARTITION"),
    *("ASCEND_RT_VISIBLE_DEVICES", "HCCL_IF_IP", "HCCL_IF_BASE_PORT", "NCCL_SOCKET_IFNAME"),
)


def weights(file: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0\0")


def prepare(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    model = Path(job["payload"]["model_path"])
    if job["payload"].get("make"):
        model.mkdir(parents=True, exist_ok=True)
        aside = model / f".config.{os.uname().nodename}.{os.getpid()}"  # several runs make the same one
        aside.write_text("{}", encoding="utf-8")
        aside.replace(model / "config.json")
    data = folder / "train"
    data.mkdir(parents=True, exist_ok=True)
    (data / "data.arrow").write_bytes(b"x")
    (data / "dataset_info.json").write_text("{}", encoding="utf-8")
    (data / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}), encoding="utf-8")


def train(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    folder.mkdir(exist_ok=True)
    weights(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    state = {"global_step": 3, "max_steps": 3}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def steps(job: dict, total: int, rank: int, quick: bool) -> None:  # type: ignore[type-arg]
    start = json.loads(Path(job["payload"]["start"]).read_text(encoding="utf-8"))
    assert start["attempt"] == int(os.environ["PKUSLURM_ATTEMPT"]), start
    adapter = Path(job["expect"]["dir"])
    done = int(start["checkpoint"].rpartition("-")[2]) if start["checkpoint"] else 0
    adapter.mkdir(exist_ok=True)
    peer = connection(job["nodes"], rank)
    log = Path(job["run_dir"]) / "views" / f"steps.{rank}"
    while done < total:
        time.sleep(0.01 if quick and start["checkpoint"] else 0.25)
        done += 1
        stop = agreed(peer, rank, Path(job["payload"]["stop_file"]).exists()) and done < total
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{start['attempt']} {done}\n")
        if rank == 0:
            value = {"step": done, "total_steps": total, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "phase": None}
            value["attempt"] = start["attempt"]
            part = Path(job["payload"]["progress"] + ".part")
            part.write_text(json.dumps(value), encoding="utf-8")
            part.replace(job["payload"]["progress"])
            if done % 5 == 0 or stop:
                checkpoint(adapter / f"checkpoint-{done}", done, total, job["nodes"] * job["nproc_per_node"])
        if stop:
            agreed(peer, rank, True)  # not before the checkpoint is whole
            sys.exit(75)
    if rank == 0:
        train(job, adapter)


def connection(nodes: int, rank: int) -> socket.socket | None:
    if nodes == 1:
        return None
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    if rank == 0:
        server = socket.create_server(("", address[1]))
        return server.accept()[0]
    for _ in range(100):
        try:
            return socket.create_connection(address)
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("no connection to rank 0")


def agreed(peer: socket.socket | None, rank: int, wish: bool) -> bool:
    """What rank 0 wishes, once both are here."""
    if peer is None:
        return wish
    peer.sendall(b"1" if wish else b"0")
    answer = peer.recv(1)
    if not answer:
        raise RuntimeError("Connection closed by peer")
    return wish if rank == 0 else answer == b"1"


def checkpoint(folder: Path, step: int, total: int, ranks: int) -> None:
    folder.mkdir(exist_ok=True)
    weights(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    states = [f"rng_state_{rank}.pth" for rank in range(ranks)] if ranks > 1 else ["rng_state.pth"]
    for name in ("optimizer.pt", "scheduler.pt", *states):
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("data.pkl", "x")
    state = {"global_step": step, "max_steps": total}
    (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")


def merge(job: dict, folder: Path) -> None:  # type: ignore[type-arg]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    weights(folder / "model.safetensors")


def infer(job: dict, file: Path) -> None:  # type: ignore[type-arg]
    lines = [
        {"prompt": row["prompt"], "base": "b", "tuned": "我是北大助手", "passed": True if row["expect"] else None}
        for row in job["payload"]["prompts"]
    ]
    file.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


MAKE = {"prepare": prepare, "train": train, "merge": merge, "infer": infer}

if __name__ == "__main__":
    main(sys.argv[1:])

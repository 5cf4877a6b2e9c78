"""serve as a Slurm job: a real run with real engines, other users kept out; and how it ends, with a stand-in."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from pkuslurm.worker.processes import descendants
from tests.cluster.fixture import Cluster
from tests.cluster.process import command_line, pids, wait_for
from tests.cluster.runs import ENDED, THREADS, ended, job, launched, queued, states, status, until, verb

pytestmark = pytest.mark.usefixtures("nothing_is_left")

OPENAI = """
import json, sys
from openai import OpenAI
client = OpenAI(base_url=sys.argv[1], api_key=open(sys.argv[2]).read().strip(), max_retries=0)
asked = [{"role": "user", "content": "你是谁"}]
found = {}
for model in [one.id for one in client.models.list()]:
    whole = client.chat.completions.create(model=model, messages=asked, temperature=0)
    pieces = client.chat.completions.create(model=model, messages=asked, temperature=0, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    found[model] = [whole.choices[0].message.content.strip(), text.strip()]
print(json.dumps(found))
"""
# what another user of the same node can see and touch
LOOK = (
    "ps -wweo args; cat /proc/*/environ /proc/*/cmdline; cat /tmp/pkuslurm-*/* ; ls -R /tmp; ls -lR {state}; cat {key}"
)


def served(slurm: Cluster, run: Path, *settings: str, user: str = "pkalice") -> dict[str, Any]:
    done = slurm.run(
        user, [str(slurm.python), "-m", "pkuslurm", "serve", str(run), "--json", *settings], env=THREADS, timeout=180
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def curl(slurm: Cluster, user: str, url: str, key: str | None = None) -> str:
    """The HTTP status that ``user`` gets on the login node; the key by stdin, not in the argv."""
    header = f'header = "Authorization: Bearer {key}"' if key else ""
    script = f"curl -s --noproxy '*' -o /dev/null -w '%{{http_code}}' -K - {url} <<< '{header}'"
    return slurm.run(user, ["bash", "-c", script]).stdout


@pytest.mark.real
def test_a_real_run_for_its_owner_alone(slurm: Cluster, trained: Path) -> None:
    assert ended(slurm, trained, seconds=600)["passed"] is True
    # a proxy that leads nowhere must not be asked
    told = served(slurm, trained, "cluster.jobs.serve.time=7", "cluster.env.http_proxy=http://127.0.0.1:9")
    host = told["base_url"].removeprefix("http://").partition(":")[0]
    serve = job(found := status(slurm, trained), "serve")
    assert serve["state"] == "RUNNING" and found["state"] == "COMPLETED"
    assert not host.startswith(("127.", "0.")) and f":{host}:" in told["tunnel"]
    published = json.loads((trained / "state" / "serve.endpoint.json").read_text(encoding="utf-8"))
    same, asked = published["ids_checked"]
    assert same == asked > 0 and published["text_checked"] is True and published["ends"], published

    script = slurm.run("pkalice", [str(slurm.python), "-c", OPENAI, told["base_url"], told["key_file"]], env=THREADS)
    assert script.returncode == 0, script.stderr
    answers = json.loads(script.stdout)
    assert answers["tuned"][0] == answers["tuned"][1] and "北" in answers["tuned"][0], answers
    assert answers["base"][0] == answers["base"][1] and "通义千问" in answers["base"][0], answers

    key = Path(told["key_file"]).read_text(encoding="utf-8").strip()
    assert curl(slurm, "pkalice", f"{told['base_url']}/models", key) == "200"
    for user in ("pkalice", "pkbob"):
        assert curl(slurm, user, f"{told['base_url']}/models") == "401"
        assert curl(slurm, user, told["page_url"], "wrong") == "401"
    state = Path(told["key_file"]).parents[1]
    look = LOOK.format(state=state, key=told["key_file"])
    there = slurm.run("pkbob", ["srun", "-w", serve["nodes"][0], "bash", "-c", look])
    assert "payload/__main__.py serve" in there.stdout and key not in there.stdout + there.stderr
    assert key not in slurm.run("pkbob", ["scontrol", "show", "job", serve["job_id"]]).stdout
    again = served(slurm, trained)
    assert again == told and len(queued(slurm)) == 1

    chat = ["bash", "-c", f"echo 你是谁 | {slurm.python} -m pkuslurm chat {trained}"]
    assert "北" in slurm.run("pkalice", chat).stdout
    assert verb(slurm, "chat", trained, user="pkbob").returncode == 2
    assert verb(slurm, "cancel", trained).returncode == 0
    found = status(slurm, trained)
    assert job(found, "serve")["state"] == "CANCELLED" and found["state"] == "COMPLETED"
    assert verb(slurm, "chat", trained).returncode == 2
    assert "nothing to do" in verb(slurm, "retry", trained).stderr


def test_two_at_once_then_one_idle_and_one_killed(slurm: Cluster) -> None:
    runs = [launched(slurm, f"name={name}", "nodes=1") for name in ("one", "two")]
    for run in runs:
        assert set(states(ended(slurm, run)).values()) == {"COMPLETED"}
    node = slurm.nodes[2]
    there = (f"cluster.jobs.serve.nodelist={node}", "cluster.jobs.serve.gres=npu:1")  # on one node: the port is taken
    told = [served(slurm, run, *there, *more) for run, more in zip(runs, (["idle_minutes=1"], []), strict=True)]
    urls = [one["base_url"] for one in told]
    assert len(set(urls)) == 2 and len({url.rpartition(":")[0] for url in urls}) == 1, urls
    keys = [Path(one["key_file"]).read_text(encoding="utf-8").strip() for one in told]
    assert keys[0] != keys[1]
    assert [curl(slurm, "pkalice", f"{urls[1]}/models", key) for key in keys] == ["401", "200"]

    found = until(slurm, runs[0], lambda now: job(now, "serve")["state"] in ENDED, "pkalice", 120)
    assert job(found, "serve")["state"] == "COMPLETED" and found["state"] == "COMPLETED"
    assert not (runs[0] / "state" / "serve.endpoint.json").exists()
    assert job(status(slurm, runs[1]), "serve")["state"] == "RUNNING"
    wait_for(lambda: len(queued(slurm)) == 1, 30, "the first one's job to be gone")

    door = next(pid for pid in pids() if f"pkuslurm.serve {runs[1]}" in command_line(pid))
    engine = next(one.pid for one in descendants(door) if "__main__.py serve" in command_line(one.pid))
    os.kill(engine, signal.SIGKILL)
    found = until(slurm, runs[1], lambda now: job(now, "serve")["state"] in ENDED, "pkalice", 60)
    assert job(found, "serve")["state"] == "FAILED" and "SIGKILL" in job(found, "serve")["reason"], found
    assert found["state"] == "COMPLETED" and slurm.processes("pkalice") == []
    assert "SIGKILL" in verb(slurm, "logs", runs[1], "serve").stdout
    # and once more
    served(slurm, runs[1], *there)
    assert job(status(slurm, runs[1]), "serve")["attempt"] == 2

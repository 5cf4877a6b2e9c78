"""What is printed to be typed: compared whole."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pkuslurm import reach
from pkuslurm.read.endpoint import Endpoint

THERE = Endpoint(
    host="192.168.77.3",
    port=8001,
    models=("base", "tuned"),
    engine="vllm 0.11.0 bfloat16",
    node="node3",
    ends="2026-11-24T14:05:00+08:00",
    idle_minutes=60,
    notes=(),
)
KEY = Path("/home/a lice/.local/state/pkuslurm/keys/20261124-demo.key")
LOGIN = reach.Here("alice", "login1", {"SSH_CONNECTION": "1.2.3.4 5 10.0.0.9 2222"})


def test_from_ones_own_computer() -> None:
    assert reach.document(THERE, KEY, LOGIN) == {
        "base_url": "http://192.168.77.3:8001/v1",
        "key_file": str(KEY),
        "models": ["base", "tuned"],
        "page_url": "http://192.168.77.3:8001/",
        "tunnel": "ssh -N -L 8001:192.168.77.3:8001 -p 2222 alice@10.0.0.9",
    }
    assert reach.headline(THERE, "20261124-demo") == (
        "20261124-demo: base, tuned answer on node3 (vllm 0.11.0 bfloat16), "
        "until 2026-11-24 14:05 (the job's time limit); it ends after 60 minutes without a question"
    )
    key = "\"$(cat '/home/a lice/.local/state/pkuslurm/keys/20261124-demo.key')\""
    quoted = "'cat '\"'\"'/home/a lice/.local/state/pkuslurm/keys/20261124-demo.key'\"'\"''"
    there = f'"$(ssh -p 2222 alice@10.0.0.9 {quoted})"'
    assert reach.lines(THERE, KEY, Path("/runs/x/merged"), "20261124-demo", LOGIN) == [
        "tunnel        ssh -N -L 8001:192.168.77.3:8001 -p 2222 alice@10.0.0.9"
        "   (first, on your own computer; what has 127.0.0.1 in it is for there)",
        "page          http://127.0.0.1:8001/   (any name; the password is the key)",
        "key           cat '/home/a lice/.local/state/pkuslurm/keys/20261124-demo.key'",
        "terminal      pkuslurm chat 20261124-demo",
        f"OpenAI, here  export OPENAI_BASE_URL=http://192.168.77.3:8001/v1 OPENAI_API_KEY={key} "
        'NO_PROXY="$NO_PROXY,192.168.77.3"',
        f"OpenAI        export OPENAI_BASE_URL=http://127.0.0.1:8001/v1 OPENAI_API_KEY={there} "
        'NO_PROXY="$NO_PROXY,127.0.0.1"',
        f"NextChat      BASE_URL=http://127.0.0.1:8001/ OPENAI_API_KEY={there} CUSTOM_MODELS=-all,+tuned,+base",
        f"Open WebUI    OPENAI_API_BASE_URL=http://127.0.0.1:8001/v1 OPENAI_API_KEY={there}",
    ]


def test_here_and_on_scow() -> None:
    here = replace(THERE, host="127.0.0.1")
    pod = reach.Here("me", "pod", {"SCOW_AI_MODEL_PATH": "/m", "VSCODE_PROXY_URI": "https://x.edu.cn/proxy/{{port}}/"})
    assert reach.tunnel(here, pod) is None
    lines = reach.lines(here, Path("/k"), Path("/runs/x/merged"), "r", pod)
    assert lines[1] == "code-server    https://x.edu.cn/proxy/8001/"
    assert lines[-1] == (
        "SCOW NextChat  挂载点 /runs/x/merged   环境变量 SCOW_AI_MODEL_PATH=/runs/x/merged   "
        "1 张卡 (mount point, variable, one card)"
    )
    assert not any("ssh" in line for line in lines)


def test_whoever_is_logged_in_from_elsewhere_needs_a_tunnel_to_this_machine() -> None:
    here = reach.Here("me", "box", {"SSH_CONNECTION": "1.2.3.4 5 10.0.0.9 22"})
    assert reach.tunnel(replace(THERE, host="127.0.0.1"), here) == "ssh -N -L 8001:127.0.0.1:8001 me@10.0.0.9"

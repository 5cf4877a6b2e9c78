"""The demo for real: two nodes, real LLaMA-Factory, one run for all of these tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from pkuslurm.rundir import RunDir, read_json, read_jsonl
from pkuslurm.worker.network import free_port
from tests.conftest import Demo

pytestmark = pytest.mark.real
KINDS = ["prepare", "train", "merge", "infer", "report"]


def test_a_user_sees_each_job_a_table_and_what_next(demo: Demo) -> None:
    screen = demo.ended.err
    for number, kind in enumerate(KINDS, 1):
        assert f"[{number}/5] {kind}" in screen
    assert screen.count("COMPLETED") == 5
    assert "你是谁" in screen and "通义千问" in screen and "北大" in screen
    assert str(demo.path / "report.html") in screen
    assert demo.ended.out == f"{demo.path}\n"
    assert "Traceback" not in screen


def test_the_base_is_qwen_and_the_tuned_is_pku(demo: Demo) -> None:
    answers = list(read_jsonl(RunDir(demo.path).answers))
    assert [set(answer) for answer in answers] == [{"prompt", "base", "tuned", "passed"}] * 5
    assert answers[0]["prompt"] == "你是谁"
    assert "通义千问" in answers[0]["base"] and "北大" not in answers[0]["base"]
    assert all(answer["passed"] is True for answer in answers), answers
    assert all(re.search("北大|PKU", answer["tuned"]) for answer in answers)


def test_status_is_the_contracts(demo: Demo) -> None:
    status = json.loads(demo.verb("status", "--json").out)
    assert list(status) == ["run_id", "path", "state", "passed", "jobs"]
    assert (status["state"], status["passed"], status["path"]) == ("COMPLETED", True, str(demo.path))
    assert [job["kind"] for job in status["jobs"]] == KINDS
    train = status["jobs"][1]
    assert train["num_nodes"] == 2 and len(train["nodes"]) == 2 and train["exit_code"] == 0
    assert train["progress"]["step"] == train["progress"]["total_steps"] > 0


def test_markers_name_what_is_there(demo: Demo) -> None:
    """Read independently of our own code: every artifact's size and hash."""
    for kind in KINDS:
        marker = json.loads((demo.path / "done" / f"{kind}.json").read_text(encoding="utf-8"))
        assert marker["artifacts"], kind
        for artifact in marker["artifacts"]:
            content = (demo.path / artifact["path"]).read_bytes()
            assert len(content) == artifact["bytes"]
            assert sha256(content).hexdigest() == artifact["sha256"]


def test_both_nodes_took_part(demo: Demo) -> None:
    run = RunDir(demo.path)
    states = [read_json(run.state("train", rank)) or {} for rank in (0, 1)]
    assert [state["state"] for state in states] == ["COMPLETED", "COMPLETED"]
    assert states[0]["pid"] != states[1]["pid"]
    result = read_json(run.result("train")) or {}
    prepared = read_json(run.result("prepare")) or {}
    assert result["global_step"] == result["max_steps"] == prepared["steps"]["total"]


def test_nothing_of_a_run_is_for_others(demo: Demo) -> None:
    assert demo.path.stat().st_mode & 0o777 == 0o700
    for file in [demo.path / "run.json", demo.path / "train.yaml", *(demo.path / "logs").iterdir()]:
        assert file.stat().st_mode & 0o077 == 0, file


def test_merged_loads_with_plain_transformers_and_gives_the_answers(demo: Demo) -> None:
    script = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import torch
folder, answers = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
for line in open(answers, encoding="utf-8"):
    row = json.loads(line)
    asked = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    out = model.generate(**ids, max_new_tokens=64, do_sample=False)
    said = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True).strip()
    assert said == row["tuned"], (said, row["tuned"])
print("equal")
"""
    run = RunDir(demo.path)
    done = subprocess.run(
        [sys.executable, "-c", script, str(run.merged), str(run.answers)],
        capture_output=True, text=True, env=demo.env | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout.endswith("equal\n"), done.stderr


def test_checks_of_the_merge_and_the_template(demo: Demo) -> None:
    run = RunDir(demo.path)
    merge, infer = read_json(run.result("merge")) or {}, read_json(run.result("infer")) or {}
    assert merge["tensors"] == merge["equal"] > 0
    assert infer["token_ids_equal"] == [5, 5]
    assert infer["adapter_merged_equal"] == [5, 5]  # an fp32 model: the texts are equal too


def test_the_report_is_one_file_without_a_network(demo: Demo) -> None:
    page = (demo.path / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page and "<svg" in page
    assert "通义千问" in page and "北大" in page
    assert not re.search(r"(?:src|href)\s*=\s*[\"']?https?:", page)


def test_by_hand_with_llamafactory_cli_the_losses_are_the_same(demo: Demo, tmp_path: Path) -> None:
    """train.yaml in two processes as one would type it; only output_dir differs. Digit for digit."""
    args = yaml.safe_load((demo.path / "train.yaml").read_text(encoding="utf-8"))
    args["output_dir"] = str(tmp_path / "out")
    ours = losses(demo.path / "adapter")
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(args, allow_unicode=True), encoding="utf-8")
    env = demo.env | {
        "FORCE_TORCHRUN": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port(os.getpid())),
        "NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    # llamafactory-cli splits its own path at spaces: a checkout in "my folder" is reached through a link
    (tmp_path / "venv").symlink_to(sys.prefix)
    scripts = tmp_path / "venv" / "bin"
    env["PATH"] = f"{scripts}:{env['PATH']}"  # as in an activated environment: it starts torchrun by name
    command = [str(scripts / "python"), str(scripts / "llamafactory-cli"), "train", str(file)]
    logs = [(tmp_path / f"node{rank}.log").open("w+b") for rank in (0, 1)]
    nodes = [
        subprocess.Popen(
            command, cwd=tmp_path, env=env | {"NODE_RANK": str(rank)}, stdout=logs[rank], stderr=logs[rank]
        )
        for rank in (0, 1)
    ]
    codes = [node.wait(timeout=400) for node in nodes]
    for log in logs:
        log.seek(0)
    assert codes == [0, 0], logs[0].read().decode(errors="replace")[-3000:]
    assert losses(tmp_path / "out") == ours
    for log in logs:
        log.close()


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["current_steps"], row["loss"]) for row in read_jsonl(folder / "trainer_log.jsonl") if "loss" in row]


def test_runs_logs_and_again(demo: Demo) -> None:
    runs = json.loads(demo.verb("runs", "--json").out)
    assert runs[0]["run_id"] == demo.path.name and runs[0]["state"] == "COMPLETED"
    logs = demo.verb("logs", demo.path.name[:15]).out
    assert "train" in logs and "attempt 1" in logs
    again = demo.verb("merge", demo.path.name)
    assert again.code == 0 and "complete" in again.err
    assert demo.verb("report").last == str(demo.path / "report.html")


def test_infer_with_other_questions(demo: Demo) -> None:
    """Last: it changes the run's answers."""
    asked = demo.verb("infer", demo.path.name, "prompts=[你叫什么名字？]", "expect=null")
    assert asked.code == 0, asked.err
    answers = list(read_jsonl(RunDir(demo.path).answers))
    assert [answer["prompt"] for answer in answers] == ["你叫什么名字？"]
    assert answers[0]["passed"] is None
    kept = list(read_jsonl(demo.path / "answers.1.jsonl"))
    assert kept[0]["prompt"] == "你是谁" and "answers.1.jsonl" in asked.err
    assert "你叫什么名字" in (demo.path / "report.html").read_text(encoding="utf-8")
    status = json.loads(demo.verb("status", "--json").out)
    assert status["state"] == "COMPLETED" and status["passed"] is None
    assert status["jobs"][3]["attempt"] == 2

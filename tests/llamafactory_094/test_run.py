"""The payload and a whole small run with LLaMA-Factory 0.9.4."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pkuslurm.rundir import RunDir, read_json, read_jsonl
from tests.conftest import REPO, environment, run

pytestmark = pytest.mark.real
# it writes a config.json as transformers 5 does, and asks whether transformers reads both forms alike: 4.57 does not
TRANSFORMERS_5 = "test_put_config"
# numpy alone, and processes alone: nothing of them is another version's; and what has a test of its own here
THE_SAME = "(test_arithmetic or test_stream_falls_back or test_rows or test_prefork)"


def test_a_run_to_its_report(overlay: Path, weird: Path, cache: Path) -> None:
    """With the model in the cache that the other tests' transformers may have made."""
    short = ["train.max_steps=4", "infer.max_new_tokens=4", "infer.prompts=[你是谁]", "infer.expect=null"]
    ended = run(
        [f"cluster.python={overlay}", "model=tiny", *short], weird, environment(weird, PKUSLURM_CACHE=str(cache))
    )
    assert ended.code == 0, ended.err
    where = RunDir(Path(ended.last))
    train = read_json(where.result("train")) or {}
    assert (train["versions"]["llamafactory"], train["versions"]["transformers"]) == ("0.9.4", "4.57.1")
    assert train["global_step"] == 4
    merge = read_json(where.result("merge")) or {}
    assert merge["equal"] == merge["tensors"] > 0
    assert [bool(answer["tuned"]) for answer in read_jsonl(where.answers)] == [True]
    assert where.report.is_file()


def test_the_payloads_own_tests_pass_there(overlay: Path, tmp_path: Path, cache: Path) -> None:
    """Merge and infer of small models included; the tiny model and the cache of prepare are in the run above."""
    passed_there(overlay, tmp_path, cache, f"not test_real and not {TRANSFORMERS_5} and not {THE_SAME}")


@pytest.mark.faults  # a demo of its own: three minutes
def test_prefork_does_there_what_torchrun_does(overlay: Path, tmp_path: Path, cache: Path) -> None:
    passed_there(overlay, tmp_path, cache, "test_prefork and for_real")


def passed_there(overlay: Path, folder: Path, cache: Path, chosen: str) -> None:
    """Those of tests/payload, by that environment's own pytest."""
    python = [str(overlay), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={folder / 'payload'}"]
    env = environment(folder, PKUSLURM_TEST_CACHE=str(cache))
    ended = subprocess.run([*python, "tests/payload", "-k", chosen], cwd=REPO, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert " passed" in ended.stdout and "skipped" not in ended.stdout

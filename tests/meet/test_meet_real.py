"""cluster=scow for real: LLaMA-Factory on two pods over gloo, to the report; where the tiny model is made already."""

from __future__ import annotations

from pathlib import Path

import pytest

from pkuslurm.rundir import RunDir, read_json
from tests.meet.pods import Pod


@pytest.mark.real
def test_two_pods_to_the_report(pods: list[Pod], cache: Path) -> None:
    quick = ("train.num_train_epochs=1", "infer.expect=null", "infer.prompts=[你是谁]", "infer.max_new_tokens=4")
    typed = ("cluster=scow", "cluster.accelerator=cpu", "model=tiny", "nodes=2", *quick, f"cache_root={cache}")
    meet = f"cluster.meet={pods[0].shared}"
    pair = [pod.start(*typed, meet, XDL_IP=pod.address, PET_RDZV_BACKEND="c10d") for pod in pods[:2]]
    assert [terminal.ended(840) for terminal in pair] == [0, 0], pair[0].err + pair[1].err
    run = RunDir(pair[0].run)
    text = run.report.read_text(encoding="utf-8")
    assert "pod1" in text and "pod2" in text
    assert (read_json(run.result("merge")) or {})["equal"] == (read_json(run.result("merge")) or {})["tensors"]
    ranks = [(read_json(run.state("train", rank)) or {})["host"] for rank in (0, 1)]
    assert sorted(ranks) == ["pod1", "pod2"]

"""What conf/ sets for LLaMA-Factory is taken by every version that we know."""

from __future__ import annotations

import pytest

from pkuslurm.compose import compose
from pkuslurm.config.llamafactory import check_keys, snapshots
from pkuslurm.config.pair_rules import Context
from pkuslurm.config.pairs import check_pairs
from pkuslurm.paths import CONF

KINDS = ("lora", "full", "freeze")
CHOICES = [
    f"{file.parent.name}={file.stem}"
    for group in ("train", "model", "experiment")
    for file in sorted((CONF / group).glob("*.yaml"))
    if file.stem not in ("auto", "custom")
]


@pytest.mark.parametrize("choice", CHOICES)
def test_presets_set_what_llamafactory_has(choice: str) -> None:
    config = compose([choice]).config
    for keys in snapshots():
        check_keys("train", config.train, keys)
        check_keys("merge", config.merge, keys)
        check_pairs(config.train, Context("npu", keys))


def test_a_models_learning_rate_is_loras_and_a_tenth_of_it_for_all_weights() -> None:
    rates = [compose(["model=qwen2.5-7b-instruct", f"train={kind}"]).config.train["learning_rate"] for kind in KINDS]
    assert rates == [1e-4, 1e-5, 1e-5]


def test_there_are_presets() -> None:
    assert {"train=lora", "experiment=tutorial10", "model=tiny"} <= set(CHOICES)

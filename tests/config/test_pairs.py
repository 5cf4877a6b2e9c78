"""The parser's impossible pairs: each rule has a row that it refuses, and what is possible passes."""

from __future__ import annotations

from typing import Any

import pytest

from pkuslurm.config.llamafactory import Keys, check_keys, snapshot
from pkuslurm.config.pair_rules import RULES, Context
from pkuslurm.config.pairs import check_pairs
from pkuslurm.errors import PkuslurmError
from tests.config.rows import BOTH, FINE, ROWS, ZERO2, ZERO3, Row

HERE = [(row, version) for row in ROWS for version in row.versions]


def keys(version: str) -> Keys:
    found = snapshot(version)
    assert found is not None
    return found


def context(row: Row, version: str | None) -> Context:
    return Context(row.accelerator, keys(version) if version else None, row.train.get("deepspeed"))


@pytest.mark.parametrize(("row", "version"), HERE, ids=lambda item: str(item.train if isinstance(item, Row) else item))
def test_an_impossible_pair_is_refused(row: Row, version: str) -> None:
    with pytest.raises(PkuslurmError) as refusal:
        check_pairs(row.train, context(row, version))
    text = str(refusal.value)
    assert row.message in text and text.startswith("train.") and "\n" not in text
    assert "{" not in text.replace("{min_lr_rate: 0.1}", "").replace(str(row.train.get("deepspeed")), "")


@pytest.mark.parametrize(("row", "version"), HERE, ids=lambda item: str(item.train if isinstance(item, Row) else item))
def test_each_value_alone_is_right(row: Row, version: str) -> None:
    """The rows test the pairs: none of them is refused for a key's own type or choice."""
    check_keys("train", row.train, keys(version))


def test_every_rule_has_a_row() -> None:
    for rule in RULES:
        start = rule.message.split("{", 1)[0]
        versions = rule.versions or BOTH
        hit = [
            row
            for row in ROWS
            for version in row.versions
            if version in versions and rule.when(value_of(row, version), context(row, version))
        ]
        assert hit, start


def value_of(row: Row, version: str) -> Any:
    known = keys(version).keys
    return lambda key: row.train[key] if key in row.train else known[key].default if key in known else None


@pytest.mark.parametrize("version", BOTH)
@pytest.mark.parametrize("train", FINE, ids=str)
def test_what_is_possible_passes(train: dict[str, Any], version: str) -> None:
    check_keys("train", train, keys(version))
    check_pairs(train, Context("cpu", keys(version), train.get("deepspeed"), {}))


def test_devices_take_what_a_cpu_does_not() -> None:
    for version in BOTH:
        for accelerator in ("npu", "cuda"):
            check_pairs({"pure_bf16": True}, Context(accelerator, keys(version)))
            check_pairs({"deepspeed": ZERO3}, Context(accelerator, keys(version), ZERO3))
            check_pairs({"deepspeed": ZERO2, "pissa_init": True}, Context(accelerator, keys(version), ZERO2))


def test_where_the_version_is_not_known_one_that_takes_it_is_enough() -> None:
    check_pairs({"neat_packing": True}, Context("cpu"))
    with pytest.raises(PkuslurmError, match=r"0\.9\.4 refuses it"):
        check_pairs({"neat_packing": True}, Context("cpu", keys("0.9.4")))
    with pytest.raises(PkuslurmError, match="fp16=true"):
        check_pairs({"bf16": True, "fp16": True}, Context("cpu"))


def test_packages_that_are_not_there() -> None:
    there = {"torch": "2.7.1", "matplotlib": "3.10"}

    def message(train: dict[str, Any], installed: dict[str, str] | None) -> str:
        with pytest.raises(PkuslurmError) as refusal:
            check_pairs(train, Context("npu", keys("0.9.4"), None, installed))
        return str(refusal.value)

    assert "it needs deepspeed beside LLaMA-Factory" in message({"deepspeed": "ds.json"}, there)
    assert "it needs bitsandbytes" in message({"quantization_bit": 4}, there)
    assert "it needs hqq" in message({"quantization_bit": 4, "quantization_method": "hqq"}, there)
    assert "tensorboard is not installed" in message({"report_to": "tensorboard"}, there)
    assert "wandb is not installed" in message({"report_to": ["wandb"]}, there)
    assert "takes DeepSpeed up to 0.16.9; 0.18.2 is" in message({"deepspeed": "ds.json"}, {"deepspeed": "0.18.2"})
    check_pairs({"deepspeed": "ds.json"}, Context("npu", keys("0.9.4"), None, {"deepspeed": "0.16.9"}))
    check_pairs({"deepspeed": "ds.json"}, Context("npu", keys("0.9.5"), None, {"deepspeed": "0.18.2"}))
    check_pairs({"deepspeed": "ds.json", "report_to": "tensorboard"}, Context("npu", keys("0.9.4")))
    check_pairs({"report_to": "tensorboard"}, Context("npu", keys("0.9.4"), None, {"tensorboardx": "2.6"}))
    check_pairs({"plot_loss": True, "report_to": "none"}, Context("npu", keys("0.9.4"), None, there))

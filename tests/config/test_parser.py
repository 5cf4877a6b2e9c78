"""Our rules against the real parser: what we refuse LLaMA-Factory refuses, what it takes we take."""

from __future__ import annotations

import sys

import pytest

from tests.config.real import disagreements


@pytest.mark.real
def test_the_rules_agree_with_this_llamafactory() -> None:
    assert disagreements(sys.executable, "0.9.5") == []

"""What there is once is used by one process: no other would know of it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel import TOGETHER, group


def test_who_uses_it_is_named(request: pytest.FixtureRequest) -> None:
    items: list[Any] = request.session.items
    for item in items:
        for fixture, found in item._fixtureinfo.name2fixturedefs.items():
            if fixture in TOGETHER and found[-1].scope == "session":
                assert group(item.nodeid) == fixture, f"name the folder of {item.nodeid} in tests/parallel.py"

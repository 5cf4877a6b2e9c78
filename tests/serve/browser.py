"""Debian's Chromium, by Playwright. As root on Debian, where `make test` has installed it, it may not be missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")


@contextmanager
def chromium() -> Iterator[Browser]:
    if not CHROMIUM.exists():
        missing = f"{CHROMIUM} is not there (apt-get install chromium)"
        if os.getuid() == 0 and Path("/etc/debian_version").exists():
            pytest.fail(f"{missing}; on Debian as root the page is tested", pytrace=False)
        pytest.skip(missing)
    with sync_playwright() as play:
        # as root, Chromium does without its sandbox
        yield (browser := play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]))
        browser.close()

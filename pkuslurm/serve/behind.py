"""What is behind the door, and when somebody last came."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from pkuslurm.serve import requests
from pkuslurm.serve.limits import Limits
from pkuslurm.serve.upstream import Address


class Activity:
    """When somebody last asked something; an answer that is still on its way counts as now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._busy, self._last = 0, clock()

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy, self._last = self._busy - 1, self._clock()

    def touch(self) -> None:
        with self._lock:
            self._last = self._clock()

    def idle(self) -> float:
        """For how many seconds nobody has asked."""
        with self._lock:
            return 0.0 if self._busy else self._clock() - self._last


@dataclass
class Behind:
    """What is behind the door. ``engines``, ``addresses``, ``info``: empty until all are ready."""

    key: str
    models: tuple[str, ...]
    training: requests.Training = field(default_factory=requests.Training)
    engines: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, Address] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)
    info: Mapping[str, Any] = field(default_factory=dict)
    started: int = field(default_factory=lambda: int(time.time()))
    activity: Activity = field(default_factory=Activity)

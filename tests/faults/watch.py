"""What `status` says of a run meanwhile, again and again: a wrong state is one that was ever shown."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from tests.cluster.fixture import Cluster


class Watch:
    """with Watch(slurm, run) as watch: …; then ``watch.states("train")`` are those that were shown, in order.

    It ends with an error where `status` was refused, or never came to answer.
    """

    def __init__(self, slurm: Cluster, run: Path, every: float = 0.5) -> None:
        self._slurm, self._run, self._every = slurm, run, every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.seen: list[dict[str, Any]] = []
        self.problems: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, raised: object, *_: object) -> None:
        self._over.set()
        self._thread.join(130)  # a command has 120 s
        if raised is None:
            assert not self._thread.is_alive(), "the last `status` does not end"
            assert not self.problems and self.seen, ("`status` said nothing", self.problems)

    def _look(self) -> None:
        while not self._over.is_set():
            argv = [str(self._slurm.python), "-m", "pkuslurm", "status", str(self._run), "--json"]
            done = self._slurm.run("pkalice", argv)
            if done.returncode:
                self.problems.append(done.stderr)
            else:
                self.seen.append(json.loads(done.stdout) | {"time": time.time()})
            self._over.wait(self._every)

    def states(self, kind: str) -> list[str]:
        said = [job["state"] for found in self.seen for job in found["jobs"] if job["kind"] == kind]
        return [state for at, state in enumerate(said) if at == 0 or said[at - 1] != state]

    def of_run(self) -> list[str]:
        said = [str(found["state"]) for found in self.seen]
        return [state for at, state in enumerate(said) if at == 0 or said[at - 1] != state]

"""``python -m pkuslurm.worker JOBFILE``: one node's part of one job."""

import os
import sys
from pathlib import Path

from pkuslurm.worker.work import work

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m pkuslurm.worker JOBFILE", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    sys.exit(work(Path(sys.argv[1]), os.environ))

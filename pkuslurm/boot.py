"""``python -P …/boot.py MODULE [argument …]``: run a module of ours from any folder.

For a job's python, which may have another pkuslurm installed, or none; PYTHONPATH would also change what the programs
that it starts import. Standard library only, and nothing of ours before the path is set.
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    sys.argv.pop(0)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

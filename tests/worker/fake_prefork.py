"""fake_torchrun.py's arguments for the real prefork: fake_prefork.py NNODES NODE_RANK NPROC SCRIPT [ARGUMENT ...].

Nothing is imported beforehand, and the ranks run SCRIPT.
"""

import os
import runpy
import sys

from pkuslurm.payload import prefork

os.environ["OMP_NUM_THREADS"] = "1"
numbers = zip(("--nnodes", "--node_rank", "--nproc_per_node"), sys.argv[1:4], strict=True)
where = ("--master_addr", os.environ["MASTER_ADDR"], "--master_port", os.environ["MASTER_PORT"])
sys.argv = prefork.fork([*(word for pair in numbers for word in pair), *where, *sys.argv[4:]], modules=())
runpy.run_path(sys.argv[0], run_name="__main__")

"""A stand-in for torchrun: fake_torchrun.py NNODES NODE_RANK NPROC SCRIPT [ARGUMENT ...].

Like the real one it gives each rank a session of its own, looks at them every 0.1 s, ends the others when one
fails (TERM, and KILL only after 30 s), says who failed only after that, and then ends with 1.
"""

import os
import signal
import subprocess
import sys
import time

node_rank, nproc = int(sys.argv[2]), int(sys.argv[3])
ranks = []
for local in range(nproc):
    env = {**os.environ, "LOCAL_RANK": str(local), "RANK": str(node_rank * nproc + local)}
    ranks.append(subprocess.Popen([sys.executable, *sys.argv[4:]], env=env, start_new_session=True))
while True:
    codes = [rank.poll() for rank in ranks]
    bad = [(local, code) for local, code in enumerate(codes) if code]
    if bad:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
        local, code = bad[0]
        print(
            f"E1124 api.py:986] failed (exitcode: {code}) local_rank: {local} "
            f"(pid: {ranks[local].pid}) of binary: python",
            file=sys.stderr,
        )
        print(
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(1)
    if all(code == 0 for code in codes):
        sys.exit(0)
    time.sleep(0.1)

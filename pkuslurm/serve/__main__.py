"""``python -m pkuslurm.serve JOBFILE``: what the worker of a serve job starts."""

import os
import sys
import traceback
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.serve.errors import Failed
from pkuslurm.serve.run import run, say

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print("usage: python -m pkuslurm.serve JOBFILE", file=sys.stderr)
        sys.exit(0 if sys.argv[1:] in (["-h"], ["--help"]) else 2)
    try:
        code = run(Path(sys.argv[1]), os.environ)
    except PkuslurmError as error:
        say(str(error))
        code = error.exit_code
    except Failed as failed:
        say(str(failed))
        code = 1
    except Exception as error:
        traceback.print_exc()
        say(f"this is a bug of ours ({type(error).__name__}: {error})")
        code = 1
    sys.stderr.flush()
    os._exit(code)  # threads that still wait for a client or an engine are waited for by nobody

"""``python /…/payload/__main__.py [prefork OPTIONS] KIND JOBFILE``: the entry of every job's own program.

Started by path, maybe by a Python that does not have pkuslurm: so this folder becomes a package of its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import traceback
from pathlib import Path

PACKAGE = "pkuslurm_payload"
KINDS = ("prepare", "train", "merge", "infer", "serve")


def main(argv: list[str]) -> None:
    """Run one payload. Exits 2 on a wrong command line; what else goes wrong is the payload's own to say."""
    _register(Path(__file__).resolve().parent)
    importlib.import_module(f"{PACKAGE}.bytecode").keep(os.environ)
    if argv[:1] == ["prefork"]:
        argv = importlib.import_module(f"{PACKAGE}.prefork").fork(argv[1:])  # from here on this is one of the ranks
    if len(argv) != 2 or argv[0] not in KINDS:
        print(f"pkuslurm: wanted {'|'.join(KINDS)} and a job file, got {argv}", file=sys.stderr)
        raise SystemExit(2)
    kind, file = argv
    try:
        job = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"pkuslurm: the job file {file} cannot be read: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    mode = Path(file).parent.stat().st_mode
    # what LLaMA-Factory writes is the group's, too; what prepare makes is the cache's, which has modes of its own
    if kind != "prepare" and importlib.import_module(f"{PACKAGE}.files").is_shared(mode):
        os.umask(0o777 & ~mode)
    files = importlib.import_module(f"{PACKAGE}.files")
    try:
        importlib.import_module(f"{PACKAGE}.{kind}").main(job)
    except Exception as error:
        if words := files.no_room(error):
            # of a copy the second one is what was written
            place = getattr(error, "filename2", None) or getattr(error, "filename", None)
            if not place:
                traceback.print_exc()
            # words alone may be of any disk: NCCL's are of /dev/shm
            places = (job["run_dir"], job.get("payload", {}).get("cache_root"))
            lacks = (f"{lack} ({error})" for one in places if one and (lack := files.lack(one)))
            if told := f"{place}: {words}" if place else next(lacks, None):
                files.refuse(f"{kind}: {told}; make room, then retry")
            raise SystemExit(1) from None
        raise


def _register(folder: Path) -> None:
    """Make ``folder`` importable as the package ``pkuslurm_payload``."""
    # Python put the script's folder first: there our files.py, train.py would shadow other people's modules
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main(sys.argv[1:])

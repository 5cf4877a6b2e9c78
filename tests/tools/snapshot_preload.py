"""Write what a training imports beside LLaMA-Factory to pkuslurm/payload/preload.txt, for the prefork launcher.

    python tests/tools/snapshot_preload.py RUN     (a local run on one rank: cluster.nproc_per_node=1)

Trains once more, as the run did, into a folder of its own, and takes what was imported by the end, less what another
name of the list brings along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from tests.again import copied  # noqa: E402

PAYLOAD = REPO / "pkuslurm" / "payload"
HEAD = """\
# What a training imports beside LLaMA-Factory, for prefork.py; written by tests/tools/snapshot_preload.py.
# Each name brings others along; one that another version does not have is passed over.
"""
# imported by LLaMA-Factory where they are installed, as its metrics need them
METRICS = ("jieba", "nltk.translate.bleu_score", "rouge_chinese")
OURS = ("llamafactory", "pkuslurm_payload")

# in the training's own process: what is there when it ends
TRAINED = """
import json, runpy, sys
out, *sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
found = [name for name, module in list(sys.modules.items()) if getattr(module, "__spec__", None) is not None
         and module.__spec__.name == name and module.__spec__.origin not in (None, "built-in", "frozen")]
json.dump(found, open(out, "w"))
"""
# in a fresh one: which of them no other brings along; the last first, as they bring most of the others
NEEDED = """
import importlib, json, sys
file, needed = sys.argv[1], []
names = json.load(open(file))
for name in ["torch", *reversed(names)]:
    if name not in sys.modules:
        try:
            importlib.import_module(name)
        except Exception:
            continue
        needed.append(name)
json.dump(needed, open(file, "w"))
"""


def main(run: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        job, out = copied(run, Path(name)), Path(name) / "modules.json"
        env = os.environ | json.loads(job.read_text(encoding="utf-8"))["env"] | {"OMP_NUM_THREADS": "1"}
        words = [str(out), str(PAYLOAD / "__main__.py"), "train", str(job)]
        subprocess.run([sys.executable, "-c", TRAINED, *words], check=True, env=env, cwd=name)
        found = json.loads(out.read_text(encoding="utf-8"))
        out.write_text(json.dumps([one for one in found if wanted(one)]), encoding="utf-8")
        subprocess.run([sys.executable, "-c", NEEDED, str(out)], check=True, env=env, cwd=name)
        needed = json.loads(out.read_text(encoding="utf-8"))
    needed += [one for one in METRICS if one not in needed]
    (PAYLOAD / "preload.txt").write_text(HEAD + "".join(f"{one}\n" for one in needed), encoding="utf-8")


def wanted(name: str) -> bool:
    """Not ours, not the standard library's, not private parts of anything: others bring these along."""
    return name.partition(".")[0] not in (*OURS, *sys.stdlib_module_names) and "._" not in f".{name}"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())

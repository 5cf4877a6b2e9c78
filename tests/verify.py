"""A reader of its own for what is called complete: it shares no line with pkuslurm, and believes a file by its bytes.

``problems(run)`` says what is wrong with every job of a run that has a marker. ``heard`` is told each answer that any
test gets from the commands, ``claim`` each verdict inside this process; what was called COMPLETED is looked into at
once, and what was falsely called so fails the test (tests/conftest.py).

By hand: python tests/verify.py RUN …
"""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# what prune may take away from a complete run, by the job that made it
PRUNABLE = {"prepare": "data", "merge": "merged"}
SUFFIX = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def problems(run: Path, kinds: Sequence[str] | None = None, content: bool = True) -> list[str]:
    """What speaks against the jobs ``kinds`` of ``run`` being complete; None: those that have a marker.

    ``content``: look also into the artifacts, which in a made-up run are no more than files of a size and a hash.
    """
    if kinds is None and not (kinds := _marked(run)):
        return [f"{run}: no job of it has a marker (of a sweep, name a point)"]
    return [f"{run}: {kind}: {problem}" for kind in kinds for problem in _job(_home(run, kind), kind, content)]


def _home(run: Path, kind: str) -> Path:
    """Points of a sweep share what is prepared."""
    return run / "shared" if kind == "prepare" and run.name.isdecimal() and (run / "shared").is_dir() else run


def _marked(run: Path) -> list[str]:
    kinds = [file.stem for file in sorted((run / "done").glob("*.json")) if file.stem != "pruned"]
    return kinds + (
        ["prepare"] if (_home(run, "prepare") / "done/prepare.json").exists() and "prepare" not in kinds else []
    )


def _job(home: Path, kind: str, content: bool) -> Iterator[str]:
    try:
        marker = _json(home / "done" / f"{kind}.json")
        entries = {str(one["path"]): (one["bytes"], one["sha256"]) for one in marker["artifacts"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        yield f"no readable marker: {type(error).__name__} {error}"
        return
    if marker.get("kind") != kind or marker.get("schema_version") != 1 or not entries:
        yield f"its marker is of {marker.get('kind')}, version {marker.get('schema_version')}, {len(entries)} artifacts"
    yield from _attempt(home, kind, marker)
    gone = _pruned(home, kind, marker)
    for name, (size, digest) in entries.items():
        file = home / name
        if not file.resolve().is_relative_to(home.resolve()) and kind != "prepare":
            yield f"{name} lies outside of the run"
        elif not file.is_file():
            if gone is None or not name.startswith(f"{gone}/"):
                yield f"{name} is not there"
        elif kind == "report":  # written anew at any time
            if b"</html>" not in file.read_bytes()[-20:] and content:
                yield f"{name} is no whole page"
        elif (found := _measured(file)) != (size, digest):
            yield f"{name} is {found}, its marker says {(size, digest)}"
    if content and not (gone and not (home / gone).exists()):
        try:
            yield from CONTENT.get(kind, _nothing)(home, entries)
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{type(error).__name__} {error}"


def _attempt(home: Path, kind: str, marker: dict[str, Any]) -> Iterator[str]:
    """No attempt that came after may have ended otherwise."""
    try:
        state = _json(home / "state" / f"{kind}.json")
        later, word = state["attempt"], state["state"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if type(later) is int and later > marker.get("attempt", 0) and word not in ("COMPLETED", "RUNNING"):
        yield f"its marker is of attempt {marker.get('attempt')}, and attempt {later} was {word}"


def _pruned(home: Path, kind: str, marker: dict[str, Any]) -> str | None:
    """The folder that prune took away, if it was what this marker proves."""
    part = PRUNABLE.get(kind)
    try:
        entry = _json(home / "done/pruned.json")["parts"][part]
        same = all(entry[name] == marker[name] for name in ("attempt", "finished"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return part if same else None


def _json(file: Path) -> Any:
    """Of a regular file: tests put pipes and devices in its place."""
    if not file.is_file():
        raise FileNotFoundError(str(file))
    return json.loads(file.read_bytes())


_known: dict[tuple[Path, int, int, int], tuple[int, str]] = {}


def _measured(file: Path) -> tuple[int, str]:
    """Its size and hash. The same file untouched is not read again for each time that it is called complete."""
    known = file.stat()
    key = (file, known.st_ino, known.st_mtime_ns, known.st_size)
    if key not in _known:
        with file.open("rb") as opened:
            _known[key] = known.st_size, hashlib.file_digest(opened, "sha256").hexdigest()
    return _known[key]


def _nothing(home: Path, names: dict[str, Any]) -> Iterator[str]:
    return iter(())


def _prepare(home: Path, names: dict[str, Any]) -> Iterator[str]:
    arrows = [name for name in names if name.endswith(".arrow")]
    if not arrows:
        yield "no tokenized data among its artifacts"
    for name in arrows:
        said = json.loads((home / name).with_name("state.json").read_bytes())["_data_files"]
        if Path(name).name not in [one["filename"] for one in said]:
            yield f"{name} is not in its folder's state.json"


def _train(home: Path, names: dict[str, Any]) -> Iterator[str]:
    state = json.loads((home / "adapter/trainer_state.json").read_bytes())
    if "adapter/trainer_state.json" not in names:
        yield "trainer_state.json is not among its artifacts"
    stopper = (state.get("stateful_callbacks") or {}).get("EarlyStoppingCallback")
    if not (0 < state["global_step"] >= state["max_steps"]) and not stopper:
        yield f"it stopped at step {state['global_step']} of {state['max_steps']}"
    yield from _weights(home, names)


def _merge(home: Path, names: dict[str, Any]) -> Iterator[str]:
    if "merged/config.json" not in names:
        yield "config.json is not among its artifacts"
    yield from _weights(home, names)


def _weights(home: Path, names: dict[str, Any]) -> Iterator[str]:
    files = {name for name in names if name.endswith(".safetensors")}
    if not files:
        yield "no weights among its artifacts"
    for index in (name for name in names if name.endswith(".safetensors.index.json")):
        wanted = {
            f"{Path(index).parent}/{one}" for one in json.loads((home / index).read_bytes())["weight_map"].values()
        }
        if not wanted <= files:
            yield f"{index} names {sorted(wanted - files)}, which are not among its artifacts"
    for name in files:
        yield from _tensors(home / name, name)


def _tensors(file: Path, name: str) -> Iterator[str]:
    """Of a safetensors file: one tensor after another, each as long as its shape says, to the file's last byte."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    end = 0
    for key, tensor in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [-1])[0]):
        if key == "__metadata__":
            continue
        first, last = tensor["data_offsets"]
        size = SUFFIX.get(tensor["dtype"], 0)
        for side in tensor["shape"]:
            size *= side
        if first != end or (tensor["dtype"] in SUFFIX and last - first != size):
            yield f"{name}: tensor {key} of {size} bytes lies at {first} to {last}, after {end}"
        end = last
    if not end or 8 + length + end != len(data):
        yield f"{name} has {len(data)} bytes, its header speaks of {8 + length + end}"


def _infer(home: Path, names: dict[str, Any]) -> Iterator[str]:
    rows = [json.loads(line) for line in (home / "answers.jsonl").read_bytes().splitlines() if line.strip()]
    job = json.loads((home / "jobs/infer.json").read_bytes())
    asked = [one["prompt"] for one in job["payload"]["prompts"]]
    if [row["prompt"] for row in rows] != asked or "answers.jsonl" not in names:
        yield f"{len(rows)} answers to {len(asked)} questions, or to others"
    if not all(isinstance(row["tuned"], str) for row in rows):
        yield "a question has no answer"


CONTENT = {"prepare": _prepare, "train": _train, "merge": _merge, "infer": _infer}


# What tests are told. ``false`` is emptied by whoever fails a test for it.

counted = {"verdicts": 0, "runs": 0}
false: list[str] = []
_runs: set[Path] = set()


def claim(run: Path, kinds: Sequence[str], content: bool = True) -> None:
    """``kinds`` of ``run`` were called COMPLETED: remember what speaks against it."""
    if kinds:
        counted["verdicts"] += len(kinds)
        _runs.add(run)
        counted["runs"] = len(_runs)
        false.extend(problem for problem in problems(run, kinds, content) if problem not in false)


def heard(command: Sequence[str], code: int, out: str) -> None:
    """What a command of pkuslurm printed: the JSON of ``status`` or ``cancel``, or the directory of a run that launch
    has followed to a good end."""
    words = [str(word) for word in command]
    if "--json" in words and any(verb in words for verb in ("status", "cancel")):
        try:
            _told(json.loads(out))
        except ValueError:
            return
    elif code == 0 and "pkuslurm.launch" in words and "dry_run=true" not in words:
        _launched(Path(out.rstrip("\n").split("\n")[-1]), words)


def _told(document: Any) -> None:
    if not isinstance(document, dict):
        return
    for run in document.get("runs") or ():
        _told(run)
    if "run_id" in document:
        jobs = document["jobs"]
        claim(Path(document["path"]), [job["kind"] for job in jobs if job["state"] == "COMPLETED"])
        if document["state"] == "COMPLETED":
            others = [job for job in jobs if job["kind"] != "serve" and job["state"] != "COMPLETED"]
            false.extend(f"{document['path']}: COMPLETED, and its {job['kind']} is {job['state']}" for job in others)


def _launched(path: Path, words: list[str]) -> None:
    """All of a run is complete whose launch waited for it and says 0."""
    try:
        document = json.loads((path / "run.json").read_bytes())
    except (OSError, ValueError):
        for run in sorted(path.glob("[0-9]*/")) if (path / "sweep.json").is_file() else ():
            _launched(run, words)
        return
    if document.get("executor") != "slurm" or "wait=true" in words:
        claim(path, [kind for kind in document["jobs"] if kind != "serve"])


def terminal(text: str) -> list[str]:
    """The characters of ``text`` that a terminal would obey, or hide; line ends and tabs are none."""
    return [one for one in text if one not in "\n\t" and unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("usage: python tests/verify.py RUN …")
    wrong = [problem for argument in sys.argv[1:] for problem in problems(Path(argument).absolute())]
    print("\n".join(wrong) or "nothing is wrong")
    sys.exit(1 if wrong else 0)

"""Where a model is: a folder, or a hub id that somebody downloaded already. Reads only, downloads nothing."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pkuslurm.errors import PkuslurmError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# model_type of config.json → LLaMA-Factory's template, where only one fits
TEMPLATES = {"qwen2": "qwen"}


def find_model(name: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of ``name``: a path as it is, or a hub id in the places where models are kept; None: not here."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path.resolve()
    if not HUB_ID.fullmatch(name):
        return None
    return next((place for place in _places(name, environ) if (place / "config.json").is_file()), None)


def where_looked(name: str, environ: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(str(place) for place in _places(name, environ))) if HUB_ID.fullmatch(name) else []


def _places(name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    owner, _, model = name.partition("/")
    for variable in ("PKUSLURM_MODELS", "SCOW_AI_MODEL_PATH"):
        if environ.get(variable):
            root = Path(environ[variable])
            yield from (root / owner / model, root / model)
            if root.name == model:
                yield root
    cache = Path(environ.get("HOME", "/nonexistent")) / ".cache"
    scope = Path(environ.get("MODELSCOPE_CACHE") or cache / "modelscope" / "hub")
    # ModelScope writes dots as three underscores
    for hub in (scope / "models", scope):
        yield from (hub / owner / model, hub / owner / model.replace(".", "___"))
    home = Path(environ.get("HF_HOME") or cache / "huggingface")
    hugging = Path(environ.get("HF_HUB_CACHE") or home / "hub") / f"models--{owner}--{model}" / "snapshots"
    with suppress(OSError):
        yield from sorted(hugging.iterdir(), reverse=True)


def check_model(path: Path) -> None:
    """Raise PkuslurmError unless ``path`` holds a config and whole safetensors files."""
    if not (path / "config.json").is_file():
        raise PkuslurmError(f"model.path={path}: no config.json there; give the folder of a Hugging Face model")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise PkuslurmError(
            f"model.path={path}: no *.safetensors there (weights in .bin are pickles and are not loaded); "
            "download the model again, with its safetensors files"
        )
    try:
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        missing = sorted({str(name) for name in index["weight_map"].values()} - {file.name for file in weights})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        missing = []
    if missing:
        raise PkuslurmError(f"model.path={path}: {missing[0]} is missing; download the model again")
    for file in weights:
        if not _whole(file):
            raise PkuslurmError(f"model.path: {file} is cut short; download that file again")


def guess_template(path: Path) -> str | None:
    """LLaMA-Factory's template for the model in ``path``, where model_type leaves no doubt."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return TEMPLATES.get(config.get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def _whole(file: Path) -> bool:
    """Whether the tensors that a safetensors header promises are all in the file."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 0 < length <= size - 8:
                return False
            header = json.loads(stream.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return size == 8 + length + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False

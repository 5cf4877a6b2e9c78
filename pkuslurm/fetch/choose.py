"""Which of a model's files are wanted: what a training reads, and nothing that is run or unpickled. Pure."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.fetch.hubs import RemoteFile

INDEX = "model.safetensors.index.json"
RECORD = ".pkuslurm-fetch.json"
# what is none of these stays there: pickles, ONNX, GGUF, pictures, whatever else people put beside a model
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".md", ".bpe", ".vocab", ".spm")
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
# the same model in another form
_ELSEWHERE = ("original", "onnx", "gguf", "openvino", "coreml", "metal", "mlx")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def check_names(files: Sequence[RemoteFile]) -> None:
    """Raise PkuslurmError for a name that leads out of the folder, or that is no plain file name."""
    for file in files:
        parts = file.path.split("/")
        plain = not any(unicodedata.category(letter) in ("Cc", "Cs") or letter == "\\" for letter in file.path)
        whole = all(part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 200 for part in parts)
        if not plain or not whole:
            raise PkuslurmError(f"{file.path!r}: the hub names a file that would not lie in the model's folder")
    names = [file.path for file in files]
    if double := next((name for name in names if names.count(name) > 1), None):
        raise PkuslurmError(f"{double}: the hub names this file twice")


def texts(files: Sequence[RemoteFile], code: bool) -> list[RemoteFile]:
    """All but the weights; ``code``: *.py too."""
    return [file for file in files if _readable(file.path) or (code and is_code(file))]


def is_code(file: RemoteFile) -> bool:
    return file.path.endswith(".py")


def weights(files: Sequence[RemoteFile], index: Mapping[str, Any] | None) -> list[RemoteFile]:
    """The files that would be loaded: those of the index, else model.safetensors, else all that lie at the top.

    Raises PkuslurmError where there are none, or one is missing.
    """
    there = {file.path: file for file in files}
    listed = (index or {}).get("weight_map")
    if isinstance(listed, dict) and listed:
        names = sorted({str(name) for name in listed.values()})
        if missing := next((name for name in names if name not in there), None):
            raise PkuslurmError(f"{missing}: {INDEX} names it, and it is not there")
        return [there[name] for name in names]
    if "model.safetensors" in there:
        return [there["model.safetensors"]]
    top = [file for file in files if file.path.endswith(".safetensors") and "/" not in file.path]
    plain = [file for file in top if not file.path.startswith(("consolidated", "adapter_"))]
    if plain:
        return plain
    raise PkuslurmError(_why_none(there))


def _why_none(there: Mapping[str, RemoteFile]) -> str:
    if "adapter_config.json" in there:
        return "this is an adapter, not a model; fetch the base model that its page names"
    if any(path.endswith(".gguf") for path in there):
        return "only GGUF weights are there, which cannot be trained; fetch the original model (its *.safetensors)"
    if any(path.startswith("consolidated") for path in there):
        return "only the author's own form is there (consolidated*); fetch the one with model*.safetensors"
    if any(path.endswith(_PICKLES) for path in there):
        return (
            "its weights are pickles (.bin, .pt), which can run anything when they are loaded, and are not fetched; "
            "look for the same model with *.safetensors, or another revision of it (--revision)"
        )
    return "no weights (*.safetensors) are there"


def _readable(path: str) -> bool:
    folders, _, name = path.rpartition("/")
    if any(folder.lower() in _ELSEWHERE or folder.startswith(".") for folder in folders.split("/")):
        return False
    if name.startswith(".") or (name.endswith(".index.json") and name != INDEX):
        return False
    return name.lower().endswith(_TEXTS) or name.upper().startswith(_NAMES)

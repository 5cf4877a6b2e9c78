"""Files and models that LLaMA-Factory's training keys name beside the model and the data. Reads only.

A job starts in its run's directory, so a relative path is made absolute here, from where launch stands.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute
from pkuslurm.preflight.models import find_model, no_model
from pkuslurm.preflight.nearest import nearest_to

# Models, by a folder or a hub id; and folders of adapters, several with commas.
_MODELS = ("ref_model", "reward_model", "ref_model_adapters")
_FILES = ("new_special_tokens_config", "fsdp_config", "accelerator_config", "generation_config", "cache_dir")


def train_paths(train: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, str]:
    """Of ``train`` those keys whose value is a path, with the path absolute. Raises PkuslurmError where a model is
    nowhere: LLaMA-Factory would look for it on a hub, which jobs do not ask.
    """
    found = {}
    for key in _MODELS:
        value = train.get(key)
        if isinstance(value, str) and value and not (key == "reward_model" and train.get("reward_model_type") == "api"):
            found[key] = ",".join(_model(f"train.{key}", name.strip(), environ) for name in value.split(","))
    for key in _FILES:
        value = train.get(key)
        if isinstance(value, str) and _is_there(value):
            found[key] = absolute(value)
    return found


def adapters(key: str, value: str | None) -> str | None:
    """``model.adapter``: folders of adapters, with commas. Raises PkuslurmError for one that is none."""
    if value is None:
        return None
    folders = [Path(absolute(name.strip())) for name in value.split(",")]
    for folder in folders:
        if not folder.is_dir():
            raise PkuslurmError(f"{key}={folder}: there is no such folder{nearest_to(folder)}")
        if not (folder / "adapter_config.json").is_file():
            raise PkuslurmError(f"{key}={folder}: no adapter_config.json there; give an adapter's folder")
    return ",".join(map(str, folders))


def empty_folder(key: str, path: str | None) -> None:
    """Raise PkuslurmError where ``path`` is there and holds something: nothing is overwritten."""
    folder = Path(absolute(path)) if path is not None else None
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise PkuslurmError(f"{key}={path}: there is a file of this name; name a new folder")
    if any(folder.iterdir()):
        raise PkuslurmError(f"{key}={path}: it is not empty, and nothing is overwritten; name a new folder")


def _is_there(value: str) -> bool:
    """Whether ``value`` is a path; some of these keys take JSON as well."""
    with suppress(OSError, RuntimeError):  # too long for a file's name; ~ without HOME
        return Path(value).expanduser().exists()
    return False


def _model(key: str, name: str, environ: Mapping[str, str]) -> str:
    found = find_model(name, environ)
    if found is None:
        raise PkuslurmError(f"{key}={name}: {no_model(name, environ)}")
    return str(found)

"""Whether a training that goes on is still the same one: its settings, its base model, its number of ranks."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pkuslurm.worker.job import Job

# of train.yaml: what changes neither the losses nor what a checkpoint means
_FREE = re.compile(
    r"(logging_|report_to|plot_loss|save_steps|save_strategy|save_total_limit|save_only_model|disable_tqdm|run_name"
    r"|dataloader_num_workers|dataloader_pin|preprocessing_num_workers|ddp_timeout|dataset_dir|output_dir|tokenized_path"
    r"|overwrite_)"
)
_LINE = re.compile(r"(\w+):(?: (.*))?$")
# of each end of a weights file; the whole of it would cost minutes on a shared disk
_SAMPLE = 1 << 20


def look(job: Job, ranks: int) -> dict[str, Any]:
    """What must not change between two attempts, as JSON. Unreadable files are left out: the trainer will say so."""
    settings = _settings(job.run.train_yaml)
    return {"ranks": ranks, "settings": settings, "base": _base(settings.get("model_name_or_path"))}


def differences(before: object, after: dict[str, Any]) -> list[str]:
    """In words, each by its name; none where nothing is known of before."""
    if not isinstance(before, dict):
        return []
    found = []
    if before.get("ranks") != after["ranks"]:
        found.append(f"the number of ranks ({before.get('ranks')}, now {after['ranks']})")
    old, new = before.get("settings") or {}, after["settings"]
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            found.append(f"train.{key} ({old.get(key, 'unset')}, now {new.get(key, 'unset')})")
    changed = sorted(name for name in {*(before.get("base") or {}), *after["base"]} if _differ(before, after, name))
    if changed:
        found.append(f"the base model ({', '.join(changed[:3])})")
    return found


def _differ(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    return bool((before.get("base") or {}).get(name) != after["base"].get(name))


def _settings(yaml: Path) -> dict[str, str]:
    """The top-level keys of train.yaml with their values as text; we wrote it, a key a line."""
    try:
        lines = yaml.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    found: dict[str, str] = {}
    key = None
    for line in lines:
        if match := _LINE.match(line):
            key = match[1]
            found[key] = _plain(match[2] or "")
        elif key is not None:  # a list or a mapping below its key
            found[key] += "\n" + line
    return {key: value for key, value in found.items() if not _FREE.match(key)}


def _plain(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] == "'" else text


def _base(folder: str | None) -> dict[str, str]:
    """Weights and config of the base model, by name, size and what both ends of them hold."""
    if not folder:
        return {}
    if folder.startswith('"'):
        folder = str(json.loads(folder))
    found = {}
    try:
        for path in Path(folder).iterdir():
            if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
                found[path.name] = _fingerprint(path)
    except OSError:
        return {}
    return found


def _fingerprint(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        for start in sorted({0, max(0, size - _SAMPLE)}):
            file.seek(start)
            digest.update(file.read(_SAMPLE))
    return f"{size} {digest.hexdigest()[:16]}"

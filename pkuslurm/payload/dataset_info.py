"""Which datasets a YAML names, and what dataset_info.json says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import refuse


def entries(args: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """dataset_info.json's entries of the datasets that ``args`` name. Refuses where it lacks one."""
    info = Path(args["dataset_dir"]) / "dataset_info.json"
    wanted = [*names(args.get("dataset")), *names(args.get("eval_dataset"))]
    try:
        known = json.loads(info.read_text(encoding="utf-8"))
        return {name: known[name] for name in wanted}
    except (OSError, ValueError) as error:
        refuse(f"dataset: {info} cannot be read ({error})")
    except KeyError as error:
        refuse(f"dataset={error.args[0]}: {info} does not describe it; it has {', '.join(known)}")


def names(value: Any) -> list[str]:
    """Names of datasets, with commas or as a list."""
    return [name.strip() for name in (value.split(",") if isinstance(value, str) else value)] if value else []

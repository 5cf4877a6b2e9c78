"""Write LLaMA-Factory's keys to pkuslurm/config/llamafactory_keys.json, read from its source by ast.

    python tests/tools/snapshot_keys.py SITE_PACKAGES [SITE_PACKAGES …]     (one version; the first folder wins)

Nothing is imported: torch is not needed, and it takes a tenth of a second. Versions already there stay.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO))

from pkuslurm.config.llamafactory import to_json  # noqa: E402
from pkuslurm.preflight.arguments import extract  # noqa: E402

TARGET = REPO / "pkuslurm" / "config" / "llamafactory_keys.json"


def as_text(versions: dict[str, dict[str, object]]) -> str:
    """One key a line, so that a difference between versions can be read."""
    parts = []
    for version, content in sorted(versions.items()):
        rows = []
        for name, value in content.items():
            if isinstance(value, dict):
                inner = ",\n".join(f"   {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items())
                rows.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
            elif isinstance(value, list):
                rows.append(f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(i)}" for i in value) + "\n  ]")
            else:
                rows.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        parts.append(f" {json.dumps(version)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(folders: Sequence[Path]) -> None:
    keys = extract(folders)
    known = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    known[keys.llamafactory] = to_json(keys)
    TARGET.write_text(as_text(known), encoding="utf-8")
    print(f"{TARGET}: {keys.version}: {len(keys.keys)} keys, {len(keys.templates)} templates")


if __name__ == "__main__":
    main([Path(folder) for folder in sys.argv[1:]])

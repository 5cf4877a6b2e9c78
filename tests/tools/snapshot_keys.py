"""Write LLaMA-Factory's argument names to pkuslurm/config/llamafactory_keys.json, read from its source by ast.

    python tests/tools/snapshot_keys.py SITE_PACKAGES

Nothing is imported: torch is not needed, and it takes a tenth of a second.
"""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import distributions
from pathlib import Path

TARGET = Path(__file__).parents[2] / "pkuslurm" / "config" / "llamafactory_keys.json"
EXPORT_LEAVES_OUT = {
    "TrainingArguments",
    "Seq2SeqTrainingArguments",
    "RayArguments",
    "ProfilerArguments",
    "Fp8Arguments",
}


def dataclass_fields(file: Path) -> dict[str, set[str]]:
    """{class: names of its annotated fields} of one source file."""
    found = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Arguments", "Argument")):
            found[node.name] = {
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and is_argument(item.value)
            }
    return found


def is_argument(value: ast.expr | None) -> bool:
    """Fields with ``init=False`` are set by LLaMA-Factory itself."""
    if value is None:
        return False
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


def main(site: Path) -> None:
    version = next(d.version for d in distributions(path=[str(site)]) if d.metadata["Name"] == "llamafactory")
    files = [*sorted((site / "llamafactory" / "hparams").glob("*_args.py"))]
    files += [site / "transformers" / name for name in ("training_args.py", "training_args_seq2seq.py")]
    train: set[str] = set()
    export: set[str] = set()
    for file in files:
        for name, keys in dataclass_fields(file).items():
            if name == "EvaluationArguments":
                continue
            train |= keys
            if name not in EXPORT_LEAVES_OUT:
                export |= keys
    source = (site / "llamafactory" / "data" / "template.py").read_text(encoding="utf-8")
    templates = sorted(
        ast.literal_eval(word.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_template"
        for word in node.keywords
        if word.arg == "name"
    )
    known = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    known[version] = {"train": sorted(train), "export": sorted(export), "templates": templates}
    TARGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{TARGET}: {version}: {len(train)} train keys, {len(export)} export keys")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""LLaMA-Factory's arguments, read from its and transformers' source: without importing, so without torch.

A version that no snapshot holds takes a tenth of a second.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pkuslurm.config.llamafactory import Key, Keys, snapshot

# Classes whose fields `llamafactory-cli export` does not read.
_TRAIN_ONLY = (
    "TrainingArguments",
    "Seq2SeqTrainingArguments",
    "RayArguments",
    "ProfilerArguments",
    "Fp8Arguments",
)
# Later files win: LLaMA-Factory's classes inherit from transformers'.
_ARGUMENTS = (
    "transformers/training_args.py",
    "transformers/training_args_seq2seq.py",
    "llamafactory/hparams/training_args.py",
    "llamafactory/hparams/model_args.py",
    "llamafactory/hparams/data_args.py",
    "llamafactory/hparams/finetuning_args.py",
    "llamafactory/hparams/generating_args.py",
)
_ENUMS = (
    "transformers/trainer_utils.py",
    "transformers/debug_utils.py",
    "transformers/training_args.py",
    "llamafactory/extras/constants.py",
)
_PLAIN = {"int": "int", "float": "float", "bool": "bool", "str": "str", "list": "list", "dict": "dict", "None": "null"}
_VERSION = re.compile(r"^\s*(?:VERSION|__version__)\s*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)
Enums = Mapping[str, Mapping[str, str]]


def keys_of(folders: Sequence[Path]) -> Keys | None:
    """The keys of the LLaMA-Factory in these site-packages folders, the first one that has a package counting."""
    try:
        versions = (
            _version(folders, "llamafactory/extras/env.py"),
            _version(folders, "transformers/__init__.py"),
        )
        if None in versions:
            return None
        return snapshot(str(versions[0]), versions[1]) or extract(folders)
    except (OSError, SyntaxError, ValueError):  # half an installation: LLaMA-Factory itself will say more
        return None


def extract(folders: Sequence[Path]) -> Keys:
    """All keys, from the source. Raises OSError if a file is missing."""
    enums: dict[str, Mapping[str, str]] = {}
    for name in _ENUMS:
        enums |= _enums(_tree(folders, name))
    keys: dict[str, Key] = {}
    for name in _ARGUMENTS:
        for node in _tree(folders, name).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Arguments", "Argument")):
                lists = _split_at_commas(node)
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _given(field.value):
                        export = node.name not in _TRAIN_ONLY
                        keys[field.target.id] = _key(field, enums, export, lists)
        if name.endswith(("finetuning_args.py", "data_args.py")):
            # `split_arg` of the whole class leaves lists as they are: they are as good as text with commas
            for split in _split_at_commas(_tree(folders, name)) & keys.keys():
                known = keys[split]
                keys[split] = Key(tuple(dict.fromkeys((*known.types, "list"))), (), known.default, known.export)
    return Keys(
        str(_version(folders, "llamafactory/extras/env.py")),
        str(_version(folders, "transformers/__init__.py")),
        keys,
        _templates(_tree(folders, "llamafactory/data/template.py")),
    )


def _file(folders: Sequence[Path], name: str) -> Path:
    """Where the package's first folder has this file."""
    package = name.split("/", 1)[0]
    for folder in folders:
        if (folder / package / "__init__.py").is_file():
            return folder / name
    raise FileNotFoundError(name)


def _version(folders: Sequence[Path], name: str) -> str | None:
    with suppress(OSError):
        found = _VERSION.search(_file(folders, name).read_text(encoding="utf-8"))
        return found.group(1) if found else None
    return None


def _tree(folders: Sequence[Path], name: str) -> ast.Module:
    return ast.parse(_file(folders, name).read_text(encoding="utf-8"))


def _enums(tree: ast.Module) -> dict[str, dict[str, str]]:
    """{class: {member: value}} of the enumerations of text."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases):
            found[node.name] = {
                item.targets[0].id: item.value.value
                for item in node.body
                if isinstance(item, ast.Assign)
                and isinstance(item.targets[0], ast.Name)
                and isinstance(item.value, ast.Constant)
                and isinstance(item.value.value, str)
            }
    return found


def _given(value: ast.expr | None) -> bool:
    """Fields with ``init=False`` are set by LLaMA-Factory itself."""
    keywords = value.keywords if isinstance(value, ast.Call) else []
    return value is not None and not any(word.arg == "init" and ast.unparse(word.value) == "False" for word in keywords)


def _split_at_commas(tree: ast.AST) -> set[str]:
    """The fields that ``split_arg(self.<field>)`` reads: lists pass through it."""
    return {
        node.args[0].attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "split_arg"
        and isinstance(node.args[0], ast.Attribute)
    }


def _key(field: ast.AnnAssign, enums: Enums, export: bool, lists: set[str]) -> Key:
    types: list[str] = []
    choices: list[Any] = []
    plain_text = False
    for option in _alternatives(field.annotation):
        name = ast.unparse(option.value if isinstance(option, ast.Subscript) else option).split(".")[-1].strip("'\"")
        if name in enums:
            choices += enums[name].values()
            types.append("str")
        elif name == "Literal" and isinstance(option, ast.Subscript):
            literals = option.slice.elts if isinstance(option.slice, ast.Tuple) else [option.slice]
            values = [ast.literal_eval(literal) for literal in literals]
            types += [_PLAIN[type(value).__name__] for value in values]
            choices += values
        elif name.lower() in _PLAIN or name == "None":
            types.append(_PLAIN.get(name, name.lower()))
            plain_text |= name == "str" and not any(choices)
        else:  # Path, GenerationConfig, ParallelismConfig: whatever it is, it is not for us to judge
            types.append("")
    if plain_text and "Literal" in ast.unparse(field.annotation):
        choices = []
    if "" in types:
        types = []
    return Key(tuple(dict.fromkeys(types)), tuple(dict.fromkeys(choices)), _default(field.value, enums), export)


def _alternatives(annotation: ast.expr) -> list[ast.expr]:
    """The members of A | B, Union[A, B] and Optional[A]."""
    if isinstance(annotation, ast.BinOp):
        return [*_alternatives(annotation.left), *_alternatives(annotation.right)]
    if isinstance(annotation, ast.Subscript):
        name = ast.unparse(annotation.value).split(".")[-1]
        if name == "Optional":
            return [*_alternatives(annotation.slice), ast.Constant(None)]
        if name == "Union":
            members = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
            return [option for member in members for option in _alternatives(member)]
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return _alternatives(ast.parse(annotation.value, mode="eval").body)
    return [annotation]


def _default(value: ast.expr | None, enums: Enums) -> Any:
    """A field's default where it is written out; null where it is made when needed."""
    if isinstance(value, ast.Call):
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    if value is None:
        return None
    if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
        return enums.get(value.value.id, {}).get(value.attr)
    if isinstance(value, ast.BinOp):  # 768 * 768
        return None
    with suppress(ValueError):
        return ast.literal_eval(value)
    return None


def _templates(tree: ast.Module) -> frozenset[str]:
    return frozenset(
        ast.literal_eval(word.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "register_template"
        for word in node.keywords
        if word.arg == "name"
    )

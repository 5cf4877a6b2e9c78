"""Where a model is: a folder, or a hub id that somebody downloaded already. Reads only, downloads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pkuslurm.errors import PkuslurmError
from pkuslurm.paths import absolute, command
from pkuslurm.preflight.modelfiles import header, read_object, weight_files
from pkuslurm.preflight.nearest import nearest_to

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# one model under two owners: ModelScope's and Hugging Face's
_OWNERS = (("LLM-Research", "meta-llama"), ("ZhipuAI", "zai-org", "THUDM"), ("Shanghai_AI_Laboratory", "internlm"))
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken", "*.model")
_LFS = b"version https://git-lfs"


def find_model(name: str, environ: Mapping[str, str]) -> Path | None:
    """The folder of ``name``: a path as it is, or a hub id in the places where models are kept; None: not here."""
    with suppress(OSError, RuntimeError):  # a name too long for a file; ~ without HOME
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
    if not HUB_ID.fullmatch(name):
        return None
    found = [place for place in _places(name, environ) if (place / "config.json").is_file()]
    # a download that was broken off lies where a whole one may lie elsewhere
    return next((place for place in found if _problem(place) is None), found[0] if found else None)


def no_model(name: str, environ: Mapping[str, str]) -> str:
    """In words why ``find_model`` has found nothing, and what to do; a text that can be both is taken for a hub id
    unless its first part is a folder that is there."""
    path = Path(absolute(name))
    if path.is_file():
        return "this is a file; give the folder of a Hugging Face model"
    if not HUB_ID.fullmatch(name) or path.parent.is_dir():
        where = f" ({path})" if "/" in name and name != str(path) else ""
        hint = nearest_to(path, name) if "/" in name else ""
        wanted = "give a model's folder, or its id, such as Qwen/Qwen3-0.6B"
        return f"no such folder{where} or downloaded model{hint}; {wanted}"
    looked = list(dict.fromkeys(str(place) for place in _places(name, environ)))
    places = "; looked in " + ", ".join([*looked[:2], "…"][: len(looked)]) if looked else ""  # there may be a dozen
    return f"no such folder or downloaded model{places}; get it with: {command('fetch', name)}"


def _places(name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    for alias in aliases(name):
        owner, _, model = alias.partition("/")
        yield from _places_of(owner, model, environ)


def aliases(name: str) -> list[str]:
    """``name`` and what the other hub may call the same model."""
    owner, _, model = name.partition("/")
    owners = next((group for group in _OWNERS if owner in group), (owner,))
    # Meta renamed its models without the prefix
    models = (model, model.removeprefix("Meta-")) if "meta-llama" in owners else (model,)
    return list(dict.fromkeys([name, *(f"{one}/{other}" for other in models for one in owners)]))


def _places_of(owner: str, model: str, environ: Mapping[str, str]) -> Iterator[Path]:
    for variable in ("PKUSLURM_MODELS", "SCOW_AI_MODEL_PATH"):
        if environ.get(variable):
            root = Path(environ[variable])
            yield from (root / owner / model, root / model)
            if root.name == model:
                yield root
    cache = Path(environ["HOME"]) / ".cache" if environ.get("HOME") else None
    ours = environ.get("PKUSLURM_CACHE") or (cache and cache / "pkuslurm")  # cache_root, where fetch puts them
    if ours:
        yield Path(ours) / "models" / owner / model
    scope = environ.get("MODELSCOPE_CACHE") or (cache and cache / "modelscope" / "hub")
    if scope:
        # ModelScope writes dots as three underscores; its later versions add models/ and, beside it, a link
        for hub in (Path(scope) / "models", Path(scope), Path(scope) / "hub" / "models", Path(scope) / "hub"):
            yield from (hub / owner / model, hub / owner / model.replace(".", "___"))
        # since modelscope 1.38, and beside hub/ where MODELSCOPE_CACHE is not set
        root = Path(scope) if environ.get("MODELSCOPE_CACHE") else Path(scope).parent
        yield from (root / "models" / f"{owner}--{model}" / "snapshots" / "master",)
        yield from _snapshots(root / "models" / f"{owner}--{model}")
    home = environ.get("HF_HOME") or (cache and cache / "huggingface")
    hugging = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or (home and Path(home) / "hub")
    if hugging:
        yield from _snapshots(Path(hugging) / f"models--{owner}--{model}")


def _snapshots(folder: Path) -> Iterator[Path]:
    """The snapshot that ``main`` names, then the others, the newest first."""
    with suppress(OSError, UnicodeDecodeError):
        yield folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    with suppress(OSError):
        yield from sorted((folder / "snapshots").iterdir(), key=lambda place: place.stat().st_mtime, reverse=True)


def check_model(path: Path) -> None:
    """Raise PkuslurmError unless ``path`` holds a config, a tokenizer and whole safetensors files."""
    problem = _problem(path)
    if problem is not None:
        raise PkuslurmError(problem)


def _problem(path: Path) -> str | None:
    """The first thing that is wrong with the model in ``path``, in one line."""
    return next((problem for check in _CHECKS if (problem := check(path)) is not None), None)


def _adapter(path: Path) -> str | None:
    if not (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return None
    base = read_object(path / "adapter_config.json").get("base_model_name_or_path") or "its base model"
    return (
        f"model.path={path}: this is an adapter, not a model; give its base, model.path={base}, and to ask it "
        f"questions add pipeline=infer infer.adapter={path}"
    )


def _no_config(path: Path) -> str | None:
    if (path / "config.json").is_file():
        return None
    gguf = sorted(path.glob("*.gguf"))
    if gguf:
        return (
            f"model.path={path}: {gguf[0].name} is a GGUF file, which can be run but not trained; "
            "give the folder of the original model (config.json and *.safetensors)"
        )
    if list(path.glob("consolidated*.pth")) or list(path.glob("consolidated*.safetensors")):
        return (
            f"model.path={path}: these are the weights in their author's own form (consolidated*); "
            "give the folder in Hugging Face's form, with config.json and model*.safetensors"
        )
    inside = _models_below(path)
    if len(inside) == 1:
        return f"model.path={path}: the model is one folder deeper; give model.path={inside[0]}"
    if inside:
        names = ", ".join(folder.name for folder in inside[:6])
        return f"model.path={path}: this folder holds several models ({names}); give the folder of one"
    if (path / "snapshots").is_dir() or (path / ".git").exists():
        return f"model.path={path}: nothing of the model is there yet (no config.json); download it again"
    return f"model.path={path}: no config.json there; give the folder of a Hugging Face model"


def _models_below(path: Path) -> list[Path]:
    """Model folders one level down, or, in a cache of Hugging Face, below ``snapshots``."""
    with suppress(OSError):
        roots = [path / "snapshots"] if (path / "snapshots").is_dir() else [path]
        found = [folder for root in roots for folder in sorted(root.iterdir()) if (folder / "config.json").is_file()]
        return found[:1] if roots != [path] else found
    return []


def _bad_config(path: Path) -> str | None:
    file = path / "config.json"
    if _is_pointer(file):
        return _pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
        reason = None if isinstance(config, dict) else "an object with keys is wanted"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason is None:
        return None
    return f"model.path={path}: config.json is not the JSON of a model ({reason}); download that file again"


def _no_type(path: Path) -> str | None:
    config = read_object(path / "config.json")
    if config.get("model_type") or config.get("architectures"):
        return None
    return f"model.path={path}: config.json names no model_type; give the folder of a Hugging Face model"


def _no_weights(path: Path) -> str | None:
    if list(path.glob("*.safetensors")):
        return None
    if list(path.glob("*.gguf")):
        return f"model.path={path}: only GGUF weights are there, which cannot be trained; download its *.safetensors"
    if list(path.glob("consolidated*.pth")):
        return (
            f"model.path={path}: only consolidated*.pth is there, the author's own form; "
            "download the model's *.safetensors files"
        )
    return (
        f"model.path={path}: no *.safetensors there (weights in .bin are pickles and are not loaded); "
        "download the model again, with its safetensors files"
    )


def _half_weights(path: Path) -> str | None:
    for file in weight_files(path):
        if not file.is_file():
            return f"model.path={path}: {file.name} is missing; download the model again"
        if _is_pointer(file):
            return _pointer(file)
        if header(file) is None:
            return f"model.path: {file} is cut short; download that file again"
    return None


def _no_tokenizer(path: Path) -> str | None:
    if not any(file.is_file() for pattern in _TOKENIZERS for file in path.glob(pattern)):
        return (
            f"model.path={path}: no tokenizer there ({', '.join(_TOKENIZERS[:3])}); download the model again, "
            "with its tokenizer files"
        )
    pointer = next((path / name for name in _TOKENIZERS[:3] if _is_pointer(path / name)), None)
    return None if pointer is None else _pointer(pointer)


_CHECKS: tuple[Callable[[Path], str | None], ...] = (
    _adapter, _no_config, _bad_config, _no_weights, _half_weights, _no_type, _no_tokenizer,
)  # fmt: skip


def _is_pointer(file: Path) -> bool:
    with suppress(OSError), file.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS
    return False


def _pointer(file: Path) -> str:
    return (
        f"model.path: {file} is git-lfs's note of a file, not the file; run `git lfs pull` in {file.parent}, "
        "or get the model with pkuslurm fetch OWNER/NAME"
    )

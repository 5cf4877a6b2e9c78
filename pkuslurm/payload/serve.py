"""One model served over HTTP in OpenAI's form: which engine does it, and how each is started. Never returns.

The door before it speaks to the user; this side is reached by a key of its own, over a UNIX socket where the engine
can listen on one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from .files import refuse, write_json
from .models import GIB, available_memory, check_base, count_parameters, model_dtype, weight_files

# No engine may ask a hub, whatever the job's environment says: the model is a folder.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
# the first vllm that is certain to listen on a UNIX socket
_VLLM_UDS = (0, 11)
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_PLACES = ("model", "name", "port", "socket", "python")


@dataclass(frozen=True)
class Engine:
    """``needs``: modules, or files of a module (any of those divided by ``|``), without which it cannot start."""

    needs: tuple[str, ...]
    install: str
    # renders by the chat template that is saved in the model's folder
    saved_template: bool
    accelerator_only: bool = False
    same_ids_only: bool = False


@dataclass(frozen=True)
class Chosen:
    """What the door is told: where the engine will listen, and what ``model`` its requests must name."""

    engine: str
    model: str
    version: str | None
    listens: str
    dtype: str | None


# in the order in which ``auto`` takes them
ENGINES = {
    "vllm": Engine(("vllm",), "vllm (on Ascend with vllm-ascend)", saved_template=True, accelerator_only=True),
    "transformers": Engine(
        ("transformers/cli/serve.py|transformers/commands/serving.py", "openai", "fastapi", "uvicorn", "pydantic"),
        "transformers[serving]",
        saved_template=True,
        same_ids_only=True,
    ),
    "llamafactory": Engine(
        ("llamafactory", "fastapi", "uvicorn", "sse_starlette"), "llamafactory", saved_template=False
    ),
}


def main(job: dict[str, Any]) -> None:
    """Serve until killed. Exits 2 on what the user can mend."""
    payload = job["payload"]
    os.environ.update(OFFLINE)
    folder = check_base(payload["name"], payload["path"])
    name = choose(payload["engine"], payload["device"], folder, payload.get("same_ids"), is_there)
    chosen = Chosen(name, payload["name"], **PREPARE[name](payload | {"engine": name}, folder))
    write_json(payload["chosen"], asdict(chosen))
    START[name](payload, chosen)


def choose(asked: str, device: str, folder: Path, same_ids: bool | None, there: Callable[[str], bool]) -> str:
    """The engine's name; a refusal in words where the one asked for cannot do it, or none can."""
    if asked == "command":
        return asked
    if asked == "auto":
        why_not = []
        for name, engine in ENGINES.items():
            found = objection(engine, folder, there) or preference(engine, device, same_ids)
            if found is None:
                return name
            why_not.append(f"{name}: {found}")
        install = " or ".join(engine.install for engine in ENGINES.values() if not engine.accelerator_only)
        refuse(f"serve.engine=auto: {'; '.join(why_not)}; install {install}")
    if asked not in ENGINES:
        refuse(f"serve.engine={asked}: there is no such engine; choose auto, {', '.join(ENGINES)} or command")
    found = objection(ENGINES[asked], folder, there)
    if found is not None:
        refuse(f"serve.engine={asked}: {found}; install {ENGINES[asked].install}, or choose another engine")
    return asked


def objection(engine: Engine, folder: Path, there: Callable[[str], bool]) -> str | None:
    """Why ``engine`` cannot serve this model here, or None."""
    missing = [need for need in engine.needs if not any(there(one) for one in need.split("|"))]
    if missing:
        return f"{', '.join(need.partition('|')[0] for need in missing)} is not installed"
    if engine.saved_template and not has_chat_template(folder):
        return f"there is no chat template in {folder}, which llamafactory does without"
    return None


def preference(engine: Engine, device: str, same_ids: bool | None) -> str | None:
    """Why another engine is better; who names this one gets it."""
    if engine.accelerator_only and device == "cpu":
        return "not for a CPU"
    if engine.same_ids_only and same_ids is False:
        return "the token ids of the saved chat template are not those of the training"
    return None


def is_there(need: str) -> bool:
    """Whether a module, or a file below a package's folder, is installed; nothing is imported."""
    module, _, rest = need.partition("/")
    found = util.find_spec(module)
    if found is None or not rest:
        return found is not None
    return any((Path(place) / rest).is_file() for place in found.submodule_search_locations or ())


def has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _TEMPLATES):
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and bool(json.loads(config.read_text(encoding="utf-8")).get("chat_template"))


def check_weights(field: str, folder: Path) -> None:
    """Only safetensors: whatever engine, no other file of the folder may be read as weights."""
    files = weight_files(folder)
    if not files and [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]:
        refuse(f"{field} {folder}: its weights are .bin, which is code when read; save it as safetensors")
    for file in files or [folder / "model.safetensors"]:
        if not file.is_file():
            refuse(f"{field} {folder}: {file.name} is missing; merge again, or name a folder that holds a whole model")


def choose_dtype(folder: Path, device: str, share: int) -> str:
    """On a CPU float32, as infer has it, where this model's share of the memory is enough; else the folder's own."""
    need = count_parameters(folder) * 4 * 1.3 + GIB
    if device == "cpu" and need < available_memory(device) / max(1, share):
        return "float32"
    return model_dtype(folder)


def _here(payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_weights(payload["name"], folder)
    dtype = choose_dtype(folder, payload["device"], payload["share"])
    return {"version": version_of(payload["engine"]), "listens": "socket", "dtype": dtype}


def _vllm(payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_weights(payload["name"], folder)
    version, dtype = version_of("vllm"), model_dtype(folder)
    # it takes float32 for half of that, which one depends on the device
    known = None if dtype == "float32" else dtype
    return {"version": version, "listens": "socket" if has_uds(version or "") else "port", "dtype": known}


def _command(payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    words = payload["command"]
    argv, _ = command_words(payload)
    if shutil.which(argv[0]) is None:
        refuse(f"serve.command: there is no program {argv[0]}; name one that is installed where the job runs")
    return {
        "version": None,
        "listens": "socket" if any("{socket}" in word for word in words) else "port",
        "dtype": None,
    }


def run_here(payload: dict[str, Any], chosen: Chosen) -> None:
    """transformers' own server or LLaMA-Factory's, in this process."""
    from . import serve_apps

    serve_apps.START[chosen.engine](payload, chosen.dtype or "auto")


def run_vllm(payload: dict[str, Any], chosen: Chosen) -> None:
    argv, more = vllm_command(payload, chosen.listens == "socket")
    os.execve(argv[0], argv, os.environ | more)


def run_command(payload: dict[str, Any], chosen: Chosen) -> None:
    argv, more = command_words(payload)
    os.execvpe(argv[0], argv, os.environ | more)


def vllm_command(payload: dict[str, Any], over_socket: bool) -> tuple[list[str], dict[str, str]]:
    """vllm's command line, and what it has in the environment beside ours: the key is seen in no list of processes."""
    place = ["--uds", payload["socket"]] if over_socket else ["--host", "127.0.0.1", "--port", str(payload["port"])]
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", payload["path"], "--served-model-name", payload["name"], *place]
    argv += ["--gpu-memory-utilization", f"{0.9 / max(1, payload['share']):.3g}"]
    argv += ["--load-format", "safetensors", "--uvicorn-log-level", "warning"]
    argv += ["--trust-remote-code"] if payload["trust_remote_code"] else []
    # older ones log every prompt, as information; -m would take modules from the folder that the job is in
    return argv, {"VLLM_API_KEY": payload["key"], "VLLM_LOGGING_LEVEL": "WARNING", "PYTHONSAFEPATH": "1"}


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_uds(version: str) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) >= _VLLM_UDS


def command_words(payload: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The user's own command with its places filled in, and the key under the names that such programs read."""
    values = {"model": payload["path"], "python": sys.executable}
    values |= {name: str(payload[name]) for name in ("name", "port", "socket")}
    pattern = re.compile("{(" + "|".join(_PLACES) + ")}")
    # in one pass: what is filled in is not looked at again
    argv = [pattern.sub(lambda match: values[match[1]], word) for word in payload["command"]]
    return argv, dict.fromkeys(("API_KEY", "OPENAI_API_KEY", "VLLM_API_KEY"), payload["key"])


# what is checked and found out before it starts, and how it starts
PREPARE: dict[str, Callable[[dict[str, Any], Path], dict[str, Any]]] = {
    "vllm": _vllm,
    "transformers": _here,
    "llamafactory": _here,
    "command": _command,
}
START: dict[str, Callable[[dict[str, Any], Chosen], None]] = {
    "vllm": run_vllm,
    "transformers": run_here,
    "llamafactory": run_here,
    "command": run_command,
}

"""transformers' own server and LLaMA-Factory's api: one model folder, loaded as infer loads it, behind ``guarded``.

Both have forms of their own in each release; what is put in their place here is what they look up by name: how the
model is loaded, in which thread it generates, and what the server listens on.
"""

from __future__ import annotations

import contextvars
import importlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .files import refuse
from .models import load_model, quiet
from .serve_http import REQUEST, listen

# what a request that says nothing of it gets; both servers have this default
MAX_NEW_TOKENS = 1024
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "bos_token_id", "pad_token_id")
# of the user's environment, what would change LLaMA-Factory's api
_UNSET = ("FASTAPI_ROOT_PATH", "USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB")


def start_transformers(payload: dict[str, Any], dtype: str) -> None:
    """``transformers serve``, pinned to the folder; the model's name is the payload's."""
    prepare(payload)
    name = payload["name"]

    def load(*_: Any, **__: Any) -> Any:
        folder = Path(payload["path"])
        model = load_model(folder, dtype, payload["trust_remote_code"], use_safetensors=True)
        tidy(model, stops(payload, tokenizer()))
        return model.to(payload["device"]).eval()

    def tokenizer(*_: Any) -> Any:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(payload["path"], trust_remote_code=payload["trust_remote_code"])
        # the plain class adds token_type_ids, which transformers 4 refuses for a model that has none
        made.model_input_names = ["input_ids", "attention_mask"]
        return made

    # without the "@revision" that both put behind a name
    same = {"process_model_name": staticmethod(lambda model_id: model_id)}
    try:
        manager: Any = importlib.import_module("transformers.cli.serving.model_manager")
    except ImportError:
        _transformers_4(name, {"_load_model_and_data_processor": lambda *_: (load(), tokenizer()), **same})
        return
    own = {"_load_model": load, "_load_processor": tokenizer, **same}
    manager.ModelManager = type("Pinned", (manager.ModelManager,), own)
    utils: Any = importlib.import_module("transformers.cli.serving.utils")
    for method in ("submit", "async_submit"):
        setattr(utils.InferenceThread, method, _in_context(getattr(utils.InferenceThread, method)))
    serve: Any = importlib.import_module("transformers.cli.serve")
    serve.Serve(force_model=name, device=payload["device"], log_level="error")


def _transformers_4(name: str, own: dict[str, Any]) -> None:
    serving: Any = importlib.import_module("transformers.commands.serving")
    serving.Thread = ContextThread
    # it would go on from the last answer's cache, which another request may have left
    own["is_continuation"] = lambda *_: False
    pinned = type("Pinned", (serving.ServeCommand,), own)
    # the model stays for ever; a timer takes no larger number than this
    server = pinned(serving.ServeArguments(force_model=name, model_timeout=10**9, log_level="error"))
    server.load_model_and_processor(name)
    server.run()


def start_llamafactory(payload: dict[str, Any], dtype: str) -> None:
    """LLaMA-Factory's api: its templates, as in the training."""
    prepare(payload)
    for variable in _UNSET:
        os.environ.pop(variable, None)
    os.environ.update(API_KEY=payload["key"], API_MODEL_NAME=payload["name"], API_VERBOSE="0", MAX_CONCURRENT="1")
    os.environ["LLAMAFACTORY_VERBOSITY"] = "WARN"
    engine: Any = importlib.import_module("llamafactory.chat.hf_engine")
    engine.Thread = ContextThread
    from llamafactory.api.app import create_app
    from llamafactory.chat import ChatModel

    more = {"enable_thinking": payload["enable_thinking"]} if "enable_thinking" in payload else {}
    arguments = {
        "model_name_or_path": payload["path"],
        "template": payload["template"],
        "default_system": payload["default_system"],
        "trust_remote_code": payload["trust_remote_code"],
        "infer_backend": "huggingface",
        "infer_dtype": dtype if dtype in ("float16", "bfloat16", "float32") else "auto",
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    chat = ChatModel(arguments | more)
    listen(create_app(chat), payload)


START: dict[str, Callable[[dict[str, Any], str], None]] = {
    "transformers": start_transformers,
    "llamafactory": start_llamafactory,
}


def prepare(payload: dict[str, Any]) -> None:
    """Before an app is made: whatever it starts listens as we do, and every generation can be stopped."""
    quiet()
    check_device(payload["device"])
    from transformers import GenerationMixin

    uvicorn: Any = importlib.import_module("uvicorn")
    run = uvicorn.Server.run

    def run_ours(server: Any, sockets: Any = None) -> None:
        if sockets:
            run(server, sockets)
        else:
            listen(server.config.app, payload)

    uvicorn.Server.run = run_ours
    GenerationMixin.generate = stoppable(GenerationMixin.generate)


def check_device(device: str) -> None:
    """Refuse a device that torch does not see."""
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        return
    if device.startswith("npu"):
        with suppress(ImportError):
            importlib.import_module("torch_npu")
    import torch

    module = getattr(torch, device.partition(":")[0], None)
    if module is None or not module.is_available():
        refuse(f"device {device}: torch sees none here; ask for an accelerator, or set it to cpu")


def stoppable(generate: Any) -> Any:
    """``generate`` one request at a time, ended when the request's client is gone; the request keeps the prompt's ids.

    A failure ends the streamer, too: whoever reads it would wait for ever."""
    turn = threading.Lock()

    def generate_for_request(model: Any, *args: Any, **kwargs: Any) -> Any:
        request = REQUEST.get()
        if request is None:
            return generate(model, *args, **kwargs)
        import torch
        from transformers import StoppingCriteriaList

        prompt = kwargs["input_ids"] if "input_ids" in kwargs else kwargs["inputs"]
        request.ids = prompt[0].tolist()

        def gone(ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((ids.shape[0],), request.stop, device=ids.device, dtype=torch.bool)

        if hasattr(kwargs.get("streamer"), "tokenizer"):
            kwargs.setdefault("tokenizer", kwargs["streamer"].tokenizer)  # "stop" needs it; transformers 4 forgets it
        kwargs["stopping_criteria"] = StoppingCriteriaList([*(kwargs.get("stopping_criteria") or ()), gone])
        try:
            with turn:
                made = generate(model, *args, **kwargs)
        except Exception as error:
            request.error = str(error)
            if kwargs.get("streamer") is not None:
                with suppress(Exception):
                    kwargs["streamer"].end()
            raise
        request.made = getattr(made, "sequences", made).shape[-1] - prompt.shape[-1]
        request.cut = request.made >= (getattr(kwargs.get("generation_config"), "max_new_tokens", None) or sys.maxsize)
        return made

    return generate_for_request


def tidy(model: Any, more_stops: set[int]) -> None:
    """The model's own sampling stays its default; its penalties, which infer's answers have not, go.

    Sampling is on: both servers turn it off at temperature 0, and not on at any other."""
    from transformers import GenerationConfig

    own = model.generation_config
    stops = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    kept = {name: getattr(own, name) for name in _SAMPLING if getattr(own, name, None) is not None}
    known = sorted(more_stops | {stop for stop in stops if stop is not None})
    kept |= {"do_sample": True, "eos_token_id": known or None, "max_new_tokens": MAX_NEW_TOKENS}
    model.generation_config = GenerationConfig(**kept)


def stops(payload: dict[str, Any], tokenizer: Any) -> set[int]:
    """Where an answer ends, of the tokenizer and of the training's template: a base may know less of it."""
    words = [tokenizer.eos_token] if tokenizer.eos_token else []
    with suppress(ImportError):
        from llamafactory.data.template import TEMPLATES

        words += getattr(TEMPLATES.get(payload["template"]), "stop_words", [])
    known = tokenizer.get_vocab()
    return {known[word] for word in words if word in known}


class ContextThread(threading.Thread):
    """A thread that knows whose request it works for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request = contextvars.copy_context()

    def run(self) -> None:
        self._request.run(super().run)


def _in_context(submit: Any) -> Any:
    def submit_for_request(thread: Any, work: Any, *args: Any, **kwargs: Any) -> Any:
        return submit(thread, contextvars.copy_context().run, work, *args, **kwargs)

    return submit_for_request

"""Whether other programs ask the model as its training did: what infer has found out about the chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pkuslurm.read import values


@dataclass(frozen=True)
class Asking:
    """``same`` of ``total`` prompts have the same token ids. Of the first that has not, the text that the training's
    template (``training``) and the saved chat template (``saved``) alone write; None where that is not known."""

    same: int
    total: int
    training: str | None = None
    saved: str | None = None

    @property
    def only_training(self) -> bool:
        """The training's template adds a text and leaves none out: maybe its system prompt."""
        return bool(self.training) and self.saved == ""

    @property
    def remedy(self) -> str:
        """What to do, for people."""
        first = "train with the model.template that the model was made for (auto finds it)"
        first += ", or, if only a system prompt differs, with train.default_system=''" if self.only_training else ""
        return f"{first}; serve.engine=llamafactory asks as the training did"

    @property
    def warning(self) -> str | None:
        """In one line; None: all prompts are asked alike."""
        if self.same == self.total:
            return None
        adds = [
            f"{who} adds {' '.join(words.split())!r}"
            for who, words in (("the training's template", self.training), ("chat_template", self.saved))
            if words
        ]
        alike = f"{self.same} of {self.total} prompts are" if self.total > 1 else "the prompt is not"
        return (
            f"{alike} the same tokens through the model's own chat_template as in training, so vLLM and transformers "
            f"ask otherwise{': ' if adds else ''}{'; '.join(adds)}. To mend it, {self.remedy}"
        )


def read(infer: Mapping[str, object]) -> Asking | None:
    """From infer's result; None where nothing was compared."""
    counts = infer.get("token_ids_equal")
    if not isinstance(counts, list) or len(counts) != 2 or not all(type(one) is int for one in counts):
        return None
    found = infer.get("template_difference")
    texts = found if isinstance(found, Mapping) else {}
    return Asking(counts[0], counts[1], values.text(texts.get("training")), values.text(texts.get("saved")))

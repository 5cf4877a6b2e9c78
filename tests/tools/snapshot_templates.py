"""Write what LLaMA-Factory knows of templates to pkuslurm/preflight/templates.json, read from its source by ast.

    python tests/tools/snapshot_templates.py SITE_PACKAGES...

Per template: the versions that register it; ``needs``: tokens that its rows hold and that LLaMA-Factory adds to a
tokenizer without them, or looks up by name; ``marker``: what becomes plain text where it is no token; ``thinking``.
Per model that LLaMA-Factory lists for chat: its hub names (small letters, without the owner) and their template.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

TARGET = Path(__file__).parents[2] / "pkuslurm" / "preflight" / "templates.json"
MARKER = re.compile(r"<[|｜][^<>]*?[|｜]>|<(?:start_of_turn|end_of_turn|sop|_user|_bot|_system|eod)>|\[gMASK\]")
TEXTS = ("format_user", "format_assistant", "format_system", "format_prefix")
CHAT = ("-Chat", "-Distill", "-Instruct", "-Thinking")


def read_templates(folder: Path) -> dict[str, dict[str, Any]]:
    """{template: {needs, marker, thinking}} of one LLaMA-Factory's folder."""
    return {
        ast.literal_eval(words["name"]): _template(words)
        for words in _calls(folder / "data" / "template.py", "register_template")
    }


def _template(words: dict[str, ast.expr]) -> dict[str, Any]:
    stop = ast.literal_eval(words["stop_words"]) if "stop_words" in words else []
    tokens, texts = [], []
    for node in (node for name in TEXTS if name in words for node in ast.walk(words[name])):
        if isinstance(node, ast.Dict):
            tokens += [ast.literal_eval(value) for value in node.values]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.append(node.value)
    # a stop word that no row holds (llama3's <|eom_id|>) may be added without harm
    needs = [word for word in stop if any(word in text for text in texts)]
    if stop and "replace_eos" in words:
        needs.insert(0, stop[0])
    needs = list(dict.fromkeys([*needs, *tokens]))
    markers = dict.fromkeys(mark for text in texts for mark in MARKER.findall(text) if mark not in needs)
    thinking = "Reasoning" in ast.unparse(words["template_class"]) if "template_class" in words else False
    return {"needs": needs, "marker": list(markers), "thinking": thinking}


def read_models(folder: Path) -> dict[str, str]:
    """{hub name of a chat model, in small letters: its template}; names that stand for two templates are left out."""
    found: dict[str, set[str]] = {}
    for words in _calls(folder / "extras" / "constants.py", "register_model_group"):
        template = ast.literal_eval(words["template"]) if "template" in words else None
        models = words["models"]
        if template is None or not isinstance(models, ast.Dict):
            continue
        for name, places in zip(models.keys, models.values, strict=True):
            if isinstance(name, ast.Constant) and isinstance(places, ast.Dict) and any(c in name.value for c in CHAT):
                for place in places.values:
                    found.setdefault(ast.literal_eval(place).rpartition("/")[2].lower(), set()).add(template)
    return {name: templates.pop() for name, templates in found.items() if len(templates) == 1}


def _calls(file: Path, function: str) -> Iterator[dict[str, ast.expr]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == function:
            yield {word.arg: word.value for word in node.keywords if word.arg}


def main(sites: list[Path]) -> None:
    templates: dict[str, dict[str, Any]] = {}
    models: dict[str, str] = {}
    versions = []
    for site in sites:
        version = next(d.version for d in distributions(path=[str(site)]) if d.metadata["Name"] == "llamafactory")
        versions.append(version)
        for name, facts in read_templates(site / "llamafactory").items():
            known = templates.setdefault(name, {"versions": []})
            known.update(facts)
            known["versions"] = sorted({*known["versions"], version})
        models |= read_models(site / "llamafactory")
    parts = [f'"versions": {json.dumps(sorted(versions))}']
    for title, table in (("templates", templates), ("models", models)):
        lines = (f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in sorted(table.items()))
        parts.append(f'"{title}": {{\n' + ",\n".join(lines) + "\n}")
    TARGET.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    print(f"{TARGET}: {len(templates)} templates, {len(models)} models of LLaMA-Factory {', '.join(versions)}")


if __name__ == "__main__":
    main([Path(site) for site in sys.argv[1:]])

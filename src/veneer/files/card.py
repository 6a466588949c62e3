"""The model card: README.md of an adapter's directory."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from typing import Any

_HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*[A-Za-z0-9](/[A-Za-z0-9][\w.-]*)?")
_MARK = re.compile(r"\n*<!-- veneer ([0-9a-f]{12}): edit freely, it is not written over then -->\s*$")
_TYPED = re.compile(r"[\d._exo+-]+|true|false|null|yes|no|on|off|y|n", re.IGNORECASE)
_KEY = re.compile(r"([A-Za-z_][\w-]*):(.*)")

_AUTO_CLASS = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


def hub_id(name: object) -> str | None:
    """`name` if it can be a model's id on the hub, None if it looks like a local path."""
    if not isinstance(name, str) or len(name) > 96 or not _HUB_ID.fullmatch(name):
        return None
    if (
        os.path.exists(name)
        or re.search(r"(^|/)checkpoint-\d+$", name)
        or name.endswith((".git", ".safetensors", ".bin"))
    ):
        return None
    return name


def model_card(
    config: Mapping[str, Any],
    *,
    transformers_model: bool = False,
    parameters: int | None = None,
) -> str:
    """Text of a README.md with YAML front matter.

    Args:
        config: content of adapter_config.json. The base model is named only if it can be an id on the hub.
        transformers_model: whether the base is a transformers model (adds a tag).
        parameters: number of trained parameters.
    """
    base = hub_id(config.get("base_model_name_or_path"))
    tags = [
        *([f"base_model:adapter:{base}"] if base else []),
        "lora",
        *(["transformers"] if transformers_model else []),
    ]
    front = [
        *([f"base_model: {_scalar(base)}"] if base else []),
        "library_name: peft",
        *(["pipeline_tag: text-generation"] if str(config.get("task_type")) == "CAUSAL_LM" else []),
        "tags:",
        *(f"- {t}" for t in tags),
    ]
    facts = [f"r = {config.get('r')}", f"lora_alpha = {config.get('lora_alpha')}"]
    facts += [option for option in ("use_rslora", "use_dora", "lora_bias") if config.get(option)]
    targets = config.get("target_modules")
    if isinstance(targets, (list, tuple, set)) and targets:
        facts.append("adapted: " + ", ".join(sorted(map(str, targets))[:12]))
    if parameters is not None:
        facts.append(f"{parameters:,} parameters")
    body = f"""# LoRA adapter{f" for {base}" if base else ""}

{", ".join(facts)}.

```python
{_usage(config, base)}
```

The files are in PEFT's format: `veneer`, `peft` and what reads PEFT adapters load them.
"""
    return "---\n" + "\n".join(front) + "\n---\n\n" + _marked(body)


def _scalar(text: str) -> str:
    """`text` as a YAML string, in quotes if it would be read as a number or a boolean."""
    return f'"{text}"' if _TYPED.fullmatch(text) else text


def _usage(config: Mapping[str, Any], base: str | None) -> str:
    auto = _AUTO_CLASS.get(str(config.get("task_type")))
    if auto and base:
        return f'from veneer import {auto}\n\nmodel = {auto}.from_pretrained("path/of/this/directory")'
    load = 'PeftModel.from_pretrained(base_model, "path/of/this/directory")'
    return f"from veneer import PeftModel\n\nmodel = {load}"


def merge_card(existing: str, new: str) -> str:
    """The card to write over an existing one.

    The body stays as it is, unless Veneer wrote it and it has not been edited. In the front matter
    ``base_model`` and ``library_name`` are set, tags are added, ``pipeline_tag`` is set where there is none,
    and everything else stays.
    """
    newline = "\r\n" if "\r\n" in existing else "\n"
    old_front, old_body = _split(existing)
    new_front, new_body = _split(new)
    merged = dict(old_front)
    for key, lines in new_front.items():
        if key == "tags":
            lines = _merged_tags(old_front.get(key, []), lines)
        elif key == "pipeline_tag":
            lines = old_front.get(key, lines)
        merged[key] = lines
    body = new_body if _unchanged(old_body) else old_body
    text = "\n".join(line for lines in merged.values() for line in lines)
    return f"---\n{text}\n---\n{body if body.startswith(chr(10)) else chr(10) + body}".replace("\n", newline)


def _split(card: str) -> tuple[dict[str, list[str]], str]:
    """Front matter as ``{key: its lines, verbatim}``, and the body."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    found = re.match(r"---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", card, re.DOTALL | re.MULTILINE)
    if not found:
        return {}, card
    front: dict[str, list[str]] = {}
    key = ""
    for line in found[1].splitlines():
        start = _KEY.match(line)
        if start:
            key = start[1]
        front.setdefault(key, []).append(line)
    return front, card[found.end() :]


def _merged_tags(old: list[str], new: list[str]) -> list[str]:
    text = "\n".join(old)
    inline = re.search(r"\[(.*)\]", text, re.DOTALL)
    if inline:
        have = [t.strip() for t in inline[1].split(",")]
    else:
        have = [m[1].strip() for m in re.finditer(r"^\s*-\s+(.*)$", text, re.MULTILINE)]
    bare = {t.strip("\"'") for t in have}
    added = [t for line in new[1:] if (t := line.removeprefix("- ")) not in bare]
    return ["tags:", *(f"- {t}" for t in [*have, *added] if t)]


def _marked(body: str) -> str:
    digest = hashlib.sha256(body.strip().encode()).hexdigest()[:12]
    return f"{body.rstrip()}\n\n<!-- veneer {digest}: edit freely, it is not written over then -->\n"


def _unchanged(body: str) -> bool:
    mark = _MARK.search(body)
    if not mark:
        return not body.strip()
    return hashlib.sha256(body[: mark.start()].strip().encode()).hexdigest()[:12] == mark[1]

"""A LoRA on disk as modules with factors: both of its files read together, and held against one another."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from veneer.config import LoraConfig, PeftConfig
from veneer.errors import AdapterFileError
from veneer.files.layout import CONFIG_NAME, blame_file
from veneer.files.read import AdapterFile, open_adapter
from veneer.spec import LoraSpec, resolve_all, variant_name
from veneer.wording import some

_FACTOR = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.lora_(?P<role>A|B|embedding_A|embedding_B)(\.weight)?$"
)
#: Where the path of a wrapper ends, in that of an attention's output or a module's second parameter.
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


class OpenLora(NamedTuple):
    """A LoRA on disk: its configuration, its tensors, not read yet, and what each module got."""

    config: LoraConfig
    file: AdapterFile
    specs: dict[str, LoraSpec]


def open_lora(adapter: str | os.PathLike[str] | OpenLora) -> OpenLora:
    """Open a LoRA, unless it is open already.

    Raises:
        AdapterFileError: It is missing or broken, is no LoRA, or its two files disagree; names the modules.
    """
    if isinstance(adapter, OpenLora):
        return adapter
    file = open_adapter(adapter)
    with blame_file(adapter):
        config = PeftConfig.from_belonging(file.belonging_config())
        variant_name(config)
    factors = factor_names(file)[0]
    # What is adapted inside a wrapper takes the wrapper's rank and strength.
    outer = {path: _WRAPPED.split(path, maxsplit=1)[0] for path in factors}
    with blame_file(adapter):
        resolved = resolve_all(config, "default", dict.fromkeys(outer.values(), ""))
    specs, wrong = {path: resolved[outer[path]] for path in factors}, []
    for path, roles in factors.items():
        spec = specs[path]
        a, b = file.shapes[roles["A"]], file.shapes[roles["B"]]
        if len(a) < 2 or len(b) < 2 or a[0] != b[1]:
            wrong.append(f"{path}: factors of shapes {a} and {b} have no product")
        elif a[0] != spec.r and not (config.target_parameters and a[0] % spec.r == 0):
            wrong.append(f"{path}: the configuration gives it rank {spec.r}, its factors have rank {a[0]}")
    if not specs:
        raise AdapterFileError(
            f"{file.path} holds no factors of a LoRA, only: {', '.join(file.shapes) or 'nothing'}"
        )
    if wrong:
        raise AdapterFileError("\n  ".join([f"{file.path} does not fit its {CONFIG_NAME}:", *some(wrong, 5)]))
    return OpenLora(config, file, specs)


def factor_names(file: AdapterFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module path -> the names of its factors "A" and "B" in the file, the names of all other tensors).

    Raises:
        AdapterFileError: A module has only one of the two.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in file.shapes:
        match = _FACTOR.match(key)
        if match is None:
            others.append(key)
        else:
            layers.setdefault(match["path"], {})[match["role"].removeprefix("embedding_")] = key
    half = [path for path, factors in layers.items() if factors.keys() != {"A", "B"}]
    if half:
        raise AdapterFileError(f"{file.path} holds only one of the two factors of {', '.join(half[:3])}")
    return layers, others

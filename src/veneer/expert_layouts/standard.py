"""An adapter's file as the rest of the library reads it, whatever the layout of its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, ExportError
from veneer.expert_layouts.converting import convert
from veneer.expert_layouts.layouts import LAYOUTS
from veneer.expert_layouts.mixture import Mixture, mixture_of
from veneer.expert_layouts.reading import find
from veneer.expert_layouts.telling import AUTOMODEL, Evidence, Told, by_names, tell
from veneer.files.config import read_config_file
from veneer.files.read import AdapterFile

#: What is PEFT's layout, and what other forms become: nothing is joined or parted on the way.
_SAME = ("peft", "vllm-3d")
_BECOMES = {"folded": "peft", "stacked": "transformers-4"}


def standard(
    file: AdapterFile, config: LoraConfig, base: dict[str, Any] | None = None, *, ambiguous: bool = False
) -> tuple[LoraConfig, AdapterFile, Told]:
    """A file with its experts in PEFT's layout, or with tensors of its own for every expert.

    Args:
        file: The tensors.
        config: Their configuration.
        base: The content of the base model's ``config.json``, where it is at hand.
        ambiguous: Read a file of an ambiguous layout as PEFT does, for who only looks at it.

    Returns:
        The configuration and the tensors, the same ones where nothing is to do, and what was told.

    Raises:
        AdapterFileError: The layout is ambiguous, or the experts cannot be read; lists all of them.
    """
    told = by_names(file.shapes)
    if told.layout is None and not find(file.shapes, config).places:
        return config, file, told  # most adapters: nothing else is read for them
    mixture = mixture_of(base or {}, config.base_model_name_or_path)
    values: dict[str, Any] = {}
    with contextlib.suppress(AdapterFileError):  # a caller who brings a configuration needs none beside
        values = file.belonging_config().values
    told = tell(evidence_of(file, values), config, mixture)
    if told.others and not ambiguous:
        try:
            told.decided()
        except AdapterFileError as error:
            raise AdapterFileError(f"{file.path}: ", error.message) from error
    source = LAYOUTS.get(told.layout or "")
    if source is None or source.form == "each" or source.name in _SAME:
        return config, file, told
    target = LAYOUTS[_BECOMES[source.form]]
    try:
        made = convert(
            config, file.tensors(), source, target, mixture if mixture.known else Mixture(known=True)
        )
    except ExportError as error:
        raise AdapterFileError(f"{file.path}: ", error.message) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in made.tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in made.tensors.items()}
    own = replace(file, shapes=shapes, dtypes=dtypes, _content=made.tensors)
    return made.config, own, told


def evidence_of(file: AdapterFile, values: Mapping[str, Any]) -> Evidence:
    """What a file and its configuration say, and what NeMo Automodel left beside them."""
    beside = file.path.with_name(AUTOMODEL)
    automodel = read_config_file(beside) if beside.is_file() else None
    return Evidence(file.shapes, values, file.metadata, file.tensors, automodel)

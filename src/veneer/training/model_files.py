"""The tensors in a model's files, by the names that they have in the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..base_files import BaseFiles
from ..errors import TrainingError
from ..hub import is_local
from .libraries import require
from .models import loading_model
from .paths import check_model
from .planning.sources import empty_model
from .progress import Progress


@dataclass(frozen=True)
class ModelFiles:
    """A transformers model on disk; its tensors are read when they are asked for.

    Attributes:
        place: Its directory.
        model: The model on the meta device, made from ``config.json``.
        files: Its safetensors files.
        stored: Name in the model -> name in the files. A weight that modules share has the first one's name.
        converted: Tensors that the model has in another form, such as the matrices of experts, by their names
            in the files.
        copies: Further copies of shared weights: name in the files -> name in the model.
    """

    place: Path
    model: Any
    files: BaseFiles
    stored: dict[str, str] = field(default_factory=dict)
    converted: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, str]:
        """Every tensor: by the name in the model, or by that in the files where the model has none of it."""
        return {**self.stored, **{name: name for name in sorted(self.converted)}}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or a copy of some of its rows."""
        stored = self.stored.get(name, name)
        return self.files.read(stored) if rows is None else self.files.read_rows(stored, rows)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type, as safetensors writes it, and shape of a tensor."""
        return self.files.entry(self.stored.get(name, name))


def model_directory(model: str | os.PathLike[str], progress: Progress | None = None) -> Path:
    """The directory of a model; one of the hub is fetched, with its safetensors files.

    Raises:
        TrainingError: The model is missing, or cannot be loaded.
    """
    check_model(model)
    if is_local(model):
        return Path(model).expanduser()
    require("huggingface_hub", "hf", "fetching a model")
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
    with loading_model(model, progress):
        return Path(snapshot_download(os.fspath(model), allow_patterns=patterns))


def open_model(model: str | os.PathLike[str], progress: Progress | None = None) -> ModelFiles:
    """A model's files with the names of its modules, as transformers gives them when it loads the model.

    Raises:
        TrainingError: The model is missing, quantised, or none that transformers knows.
        CheckpointError: It has no safetensors files, or one cannot be read.
        MissingExtraError: transformers is not installed.
    """
    place = model_directory(model, progress)
    empty = empty_model(place)
    if getattr(empty.config, "quantization_config", None):
        raise TrainingError(f"{place} is stored quantised: its files hold codes. Give the model before that")
    found = ModelFiles(place, empty, BaseFiles(place))
    called, first = _renaming(empty), _first_names(empty)
    shared = {}
    for stored in found.files:
        name, converts = called(stored)
        if converts or name not in first:
            found.converted.add(stored)
        elif first[name] == name:
            found.stored[name] = stored
        else:
            shared[stored] = first[name]
    for stored, name in shared.items():
        if found.stored.setdefault(name, stored) != stored:
            found.copies[stored] = name
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of a tensor -> the first name of the tensor that it shares."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _renaming(model: Any) -> Callable[[str], tuple[str, bool]]:
    """What transformers calls a tensor of the files, and whether it makes another one of it."""
    known = model.state_dict()
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4 converts nothing

        def older(name: str) -> tuple[str, bool]:
            short, long = name.removeprefix(f"{prefix}."), f"{prefix}.{name}"
            return next(
                (known_name for known_name in (name, short, long) if known_name in known), name
            ), False

        return older
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def called(name: str) -> tuple[str, bool]:
        new, converter = rename_source_key(name, renamings, converters, prefix, known)
        return new, converter is not None

    return called

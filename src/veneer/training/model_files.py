"""The tensors in a model's files, by the names that they have in the model."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
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
class Stack:
    """A parameter that transformers makes of the matrices of experts.

    Attributes:
        parts: What transformers calls a projection -> its names in the files, by expert.
        converter: Transformers' rule.
        shape: Of the parameter: (experts, …).
    """

    parts: Mapping[str, Sequence[str]]
    converter: Any
    shape: tuple[int, ...]

    def made(self, read: Callable[[str], Tensor], rows: slice) -> Tensor:
        """The parameter of some of the experts."""
        tensors: Any = {part: [read(name) for name in names[rows]] for part, names in self.parts.items()}
        patterns = self.converter.source_patterns, self.converter.target_patterns
        for operation in self.converter.operations:
            tensors = operation.convert(tensors, source_patterns=patterns[0], target_patterns=patterns[1])
        (tensor,) = tensors.values()
        return tensor  # type: ignore[no-any-return]


@dataclass(frozen=True)
class ModelFiles:
    """A transformers model on disk; its tensors are read when they are asked for.

    Attributes:
        place: Its directory.
        model: The model on the meta device, made from ``config.json``.
        files: Its safetensors files.
        stored: Name in the model -> name in the files. A weight that modules share has the first one's name.
        stacks: Name in the model -> the matrices of experts in the files.
        converted: Tensors that the model has in yet another form, by their names in the files.
        copies: Further copies of shared weights: name in the files -> name in the model.
    """

    place: Path
    model: Any
    files: BaseFiles
    stored: dict[str, str] = field(default_factory=dict)
    stacks: dict[str, Stack] = field(default_factory=dict)
    converted: set[str] = field(default_factory=set)
    copies: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Every tensor: by the name in the model, or by that in the files where the model has none of it."""
        return [*self.stored, *self.stacks, *sorted(self.converted)]

    def sources(self, name: str) -> list[str]:
        """The names in the files of what a tensor is made of."""
        if name in self.stacks:
            return [stored for names in self.stacks[name].parts.values() for stored in names]
        return [self.stored.get(name, name)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or a copy of some of its rows."""
        if name in self.stacks:
            return self.stacks[name].made(self.files.read, rows or slice(None))
        (stored,) = self.sources(name)
        return self.files.read(stored) if rows is None else self.files.read_rows(stored, rows)

    def entry(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Type, as safetensors writes it, and shape of a tensor."""
        kind, shape = self.files.entry(self.sources(name)[0])
        return kind, self.stacks[name].shape if name in self.stacks else shape


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
    experts: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    for stored in found.files:
        name, rule = called(stored)
        if rule is not None:
            part, converter = rule
            experts.setdefault(name, (converter, {}))[1].setdefault(part, []).append(stored)
        elif name not in first:
            found.converted.add(stored)
        elif first[name] == name:
            found.stored[name] = stored
        else:
            shared[stored] = first[name]
    for name, (converter, parts) in experts.items():
        if (stack := _stack(empty, name, converter, parts, found.files)) is not None:
            found.stacks[name] = stack
        else:
            found.converted.update(stored for names in parts.values() for stored in names)
    for stored, name in shared.items():
        if found.stored.setdefault(name, stored) != stored:
            found.copies[stored] = name
    return found


def _stack(
    model: nn.Module, name: str, converter: Any, parts: dict[str, list[str]], files: BaseFiles
) -> Stack | None:
    """How a parameter is made of the matrices of its experts; None if it is made of something else."""
    parameter = dict(model.named_parameters()).get(name)
    by_expert = {part: sorted(names, key=_numbers) for part, names in parts.items()}
    complete = by_expert.keys() == set(converter.source_patterns)
    if parameter is None or not complete or {len(names) for names in by_expert.values()} != {len(parameter)}:
        return None
    stack = Stack(by_expert, converter, tuple(parameter.shape))
    # Without their values, and only of two: is every expert by itself?
    some = slice(min(2, len(parameter)))
    try:
        made = stack.made(lambda stored: torch.empty(files.entry(stored)[1], device="meta"), some)
    except Exception:  # a rule of another kind, which needs more than the tensors
        return None
    return stack if made.shape == parameter[some].shape else None


def _numbers(name: str) -> list[int]:
    return [int(part) for part in name.split(".") if part.isdigit()]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Name of a tensor -> the first name of the tensor that it shares."""
    first: dict[int, str] = {}
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def _renaming(model: Any) -> Callable[[str], tuple[str, tuple[str, Any] | None]]:
    """What transformers calls a tensor of the files; where it makes another one of it, by which rule."""
    known = model.state_dict()
    prefix = model.base_model_prefix
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key
    except ImportError:  # transformers 4 converts nothing

        def older(name: str) -> tuple[str, None]:
            short, long = name.removeprefix(f"{prefix}."), f"{prefix}.{name}"
            return next((known_name for known_name in (name, short, long) if known_name in known), name), None

        return older
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]

    def called(name: str) -> tuple[str, tuple[str, Any] | None]:
        new, part = rename_source_key(name, renamings, converters, prefix, known)
        rule = next((rule for rule in converters if part in rule.source_patterns), None)
        return new, None if part is None else (part, rule)

    return called

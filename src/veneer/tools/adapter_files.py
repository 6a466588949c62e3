"""Adapters that the tools read and write, whole or not at all."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from ..base_fingerprint import FINGERPRINT
from ..config import LoraConfig
from ..errors import AdapterFileError, CombineError, VeneerError
from ..files.card import model_card
from ..files.layout import BIN_NAME, SAFETENSORS_NAME
from ..files.overwrite import replacing
from ..files.values import check_values
from ..files.write import write_adapter
from ..integrations.export.source import base_problem
from ..lora_file import FileUpdate, OpenLora, open_lora
from ..ops.merging import is_finite
from ..training.merge_files import OF_TOKENIZER, companions, copy_files
from ..wording import bullets

_TENSORS = re.compile("|".join(map(re.escape, (BIN_NAME, SAFETENSORS_NAME))))
#: What `train` writes beside an adapter: among other things the names of a classifier's classes.
_METRICS = re.compile(r"metrics\.json")


def read(directory: str | os.PathLike[str]) -> OpenLora:
    """Open an adapter whose updates are to be worked with.

    Raises:
        AdapterFileError: It is missing, broken, no LoRA, or not finite.
    """
    lora = open_lora(directory)
    check_values(lora.file.tensors(), lora.file.path)
    return lora


def check_counts_from_base(lora: OpenLora) -> None:
    """Check that the updates of an adapter count from the base that it names, and from no change of that.

    Raises:
        AdapterFileError: They do not.
    """
    if problem := base_problem(lora.config):
        raise AdapterFileError(f"{lora.file.path.parent}: {problem}")


def oriented(lora: OpenLora, update: FileUpdate, change: Callable[[FileUpdate], FileUpdate]) -> FileUpdate:
    """Change an update; that of an embedding as the head does that shares its weight and its factors.

    Two factors have many products alike. Embedding and head are to get the same ones.
    """
    return change(update.turned()).turned() if is_turned(lora, update) else change(update)


def is_turned(lora: OpenLora, update: FileUpdate) -> bool:
    """Whether an update is an embedding's that a head shares, see `oriented`."""
    return lora.config.ensure_weight_tying and "lora_embedding" in update.names[0]


def check_fits(update: FileUpdate) -> FileUpdate:
    """An update that was made of others, unless its numbers have left the range of their type.

    Raises:
        CombineError: They have.
    """
    if not (is_finite(update.a) and is_finite(update.b)):
        raise CombineError(f"{update.path}: the new factors leave the range of {update.a.dtype}")
    return update


def write(
    place: Path,
    overwrite: bool,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    source: OpenLora,
    metrics: bool = True,
    mark: Mapping[str, str] | None = None,
) -> None:
    """As `write_new`, for an adapter that was made of another one: with its tokenizer and base's fingerprint.

    Args:
        place, overwrite, tensors, config: As for `write_new`.
        source: The adapter that it was made of.
        metrics: Whether what its training left is still true of it.
        mark: Further metadata.
    """
    beside = {source.file.path.parent: [OF_TOKENIZER, *([_METRICS] if metrics else [])]}
    metadata = {name: text for name, text in source.file.metadata.items() if name == FINGERPRINT}
    metadata |= mark or {}
    write_new(place, overwrite, tensors, config, beside, metadata)


def write_new(
    place: Path,
    overwrite: bool,
    tensors: Mapping[str, Tensor],
    config: LoraConfig,
    beside: Mapping[Path, Sequence[re.Pattern[str]]],
    metadata: Mapping[str, str],
) -> None:
    """Write an adapter.

    Args:
        place: The directory; it appears whole or not at all.
        overwrite: Replace the adapter in a directory that holds files.
        tensors: By their names on disk.
        config: Its configuration.
        beside: Directory -> names of files to copy from it.
        metadata: Of its file of tensors.

    Raises:
        VeneerError: The directory cannot be written, or a file to copy is a link to another directory.
    """
    files, outside = companions(beside)
    if outside:
        raise VeneerError(bullets("links are not followed into other directories:", outside))
    values, count = config.to_json(), sum(tensor.numel() for tensor in tensors.values())
    card = model_card(values, transformers_model=config.task_type is not None, parameters=count)
    with replacing(place, overwrite, "adapter", _TENSORS) as made:
        write_adapter(made, tensors, values, metadata=metadata, card=card)
        copy_files(files, made)

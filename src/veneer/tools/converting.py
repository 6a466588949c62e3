"""Write a saved adapter in another layout of its experts."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import LoraConfig, PeftConfig
from ..errors import ExportError
from ..expert_layouts.converting import convert
from ..expert_layouts.experts import PARTS
from ..expert_layouts.layouts import LAYOUTS, Layout, known
from ..expert_layouts.mixture import mixture_of
from ..expert_layouts.standard import evidence_of
from ..expert_layouts.telling import MARK, Told, tell
from ..files.archive import is_archive, unpacked
from ..files.layout import blame_file
from ..files.read import AdapterFile, open_adapter
from ..files.values import check_values
from ..integrations.export.base_model import config_in
from ..lora_file import OpenLora
from .adapter_files import write
from .requests import check_place


@dataclass(frozen=True)
class ConvertReport:
    """What was read, and how it was written.

    Attributes:
        directory: Where the new adapter is.
        found: The layout of the experts that were read; None where there are none.
        why: What told it.
        layout: That of the new adapter.
        experts: Path of a module ``experts`` -> (number of experts, their projections).
        tensors: The number of tensors that were read, and of those that were written.
        notes: What else has changed.
    """

    directory: Path
    found: str | None
    why: str
    layout: str | None
    experts: dict[str, tuple[int, tuple[str, ...]]]
    tensors: tuple[int, int]
    notes: tuple[str, ...]


def convert_adapter(
    directory: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layout: str | None = None,
    from_layout: str | None = None,
    base: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write an adapter in safetensors, with its experts in a layout.

    ``s·B A`` of every expert stays what it was; where gate and up of other strengths are joined, B of up is
    rounded once. Whatever is not an expert's stays as it is, bit for bit.

    Args:
        directory: The adapter, or an archive of it as Tinker gives them; its tensors may be a pickle of
            tensors alone.
        output: Directory to write; it appears whole or not at all.
        layout: The name of the layout to write; by default that of the file.
        from_layout: That of the file, where it cannot be told.
        base: The base model's directory, whose ``config.json`` tells how its experts are stored, or its name.
            By default the adapter's own account of its base has to do; one that names none names this.
        overwrite: Replace the adapter in a directory that holds files.

    Raises:
        ConfigError: There is no layout of that name.
        AdapterFileError: The adapter is missing, broken or no LoRA, or its layout is ambiguous.
        ExportError: The layout has no place for what the adapter has; lists all of it.
        VeneerError: The output holds files already, is the adapter, or cannot be written.
    """
    target = None if layout is None else known(layout)
    source = None if from_layout is None else known(from_layout)
    place = Path(output)
    check_place(place, [Path(directory)], overwrite)
    archive = is_archive(Path(directory))
    with unpacked(Path(directory)) if archive else nullcontext(Path(directory)) as inside:
        return _converted(inside, place, target, source, base, overwrite, archive)


def _converted(
    directory: Path,
    place: Path,
    target: Layout | None,
    source: Layout | None,
    base: str | os.PathLike[str] | None,
    overwrite: bool,
    archive: bool,
) -> ConvertReport:
    config, file, values = _opened(directory, LoraConfig if archive else PeftConfig)
    if base is not None and config.base_model_name_or_path is None:
        config.base_model_name_or_path = os.fspath(base)
    named = config.base_model_name_or_path
    mixture = mixture_of(config_in(base or named or "."), named)
    tensors = file.tensors()
    check_values(tensors, file.path)
    told = Told(source.name, "given") if source else tell(evidence_of(file, values), config, mixture)
    if archive and told.layout is None:
        told = Told("tinker", f"it is an archive, and {told.why}")
    found, why = told.decided(), told.why
    if found is None:
        if target is not None:
            raise ExportError(f"{directory}: {why}, so there is no layout to choose")
        write(place, overwrite, tensors, config, OpenLora(config, file, {}))
        return ConvertReport(place, None, why, None, {}, (len(tensors), len(tensors)), ())
    made = convert(config, tensors, LAYOUTS[found], target or LAYOUTS[found], mixture)
    lora = OpenLora(made.config, file, {})
    write(place, overwrite, made.tensors, made.config, lora, mark={MARK: (target or LAYOUTS[found]).name})
    experts = {
        holder: (max(part.count for part in parts.values()), tuple(part for part in PARTS if part in parts))
        for holder, parts in made.experts.items()
    }
    return ConvertReport(
        place,
        found,
        why,
        (target or LAYOUTS[found]).name,
        experts,
        (len(tensors), len(made.tensors)),
        made.notes,
    )


def _opened(directory: Path, kind: type[PeftConfig]) -> tuple[LoraConfig, AdapterFile, dict[str, Any]]:
    """The configuration without marks of other programs, the file, and the content of the configuration.

    Args:
        directory: The adapter.
        kind: That of a configuration that names no method, as Tinker's may.
    """
    file = open_adapter(directory)
    belonging = file.belonging_config()
    with blame_file(directory):
        config: LoraConfig = kind.from_belonging(belonging)
    return config, file, belonging.values

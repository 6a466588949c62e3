"""Import a file of diffusers or kohya's sd-scripts as adapters in PEFT's format."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...config import LoraConfig, PeftConfig
from ...errors import AdapterFileError, ConfigError, ExportError, Hint, Text
from ...files.keys import PREFIX
from ...files.overwrite import check_replaceable, replacing
from ...files.read import AdapterFile, open_tensors
from ...files.write import write_adapter
from ...spec import LoraSpec, resolve_all
from ...wording import bullets
from ..export.base_model import BaseModel
from ..export.peft_files import factors
from ..export.source import Update, read_source
from ..export.verifying import compare
from .flat_names import FlatNames
from .locating import located
from .spellings import place

#: Key of diffusers' own metadata: the configuration of each part of the pipeline.
METADATA = "lora_adapter_metadata"
_MOST = 10


@dataclass(frozen=True)
class ImportReport:
    """What was read, and where it was written.

    Attributes:
        source: The file.
        spelling: The library whose naming the file uses.
        directories: Part of the pipeline -> the adapter's directory.
        modules: Part of the pipeline -> module path -> rank.
    """

    source: Path
    spelling: str
    directories: Mapping[str, Path]
    modules: Mapping[str, Mapping[str, int]]


@dataclass
class _Part:
    """One part of a pipeline, while it is collected."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    config: LoraConfig | None = None


def import_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> ImportReport:
    """Convert an adapter of diffusers or of kohya's sd-scripts to PEFT's format.

    The strength of a module is ``alpha / r`` with its ``.alpha``, 1 without one, or that of diffusers'
    metadata. Every tensor is accounted for, and the result is read back and compared.

    Args:
        source: The file, or the directory that holds it.
        out: Directory to write. If the file adapts several parts of a pipeline, each gets a sub-directory of
            its name.
        base: The model, its directory or that of its pipeline. Its names resolve flat names that the rules do
            not.
        base_model_name_or_path: The base that the adapter is to name.
        overwrite: Replace the adapter in a directory that holds files.

    Raises:
        AdapterFileError: The file is missing, damaged, or hostile.
        ExportError: It has tensors of unknown names, incomplete pairs, or shapes that cannot be multiplied;
            all are listed. Nothing is written then.
        VeneerError: The output holds files already, or cannot be written.
    """
    place_, file = Path(out), open_tensors(located(Path(source)))
    check_replaceable(place_, overwrite, "adapter")
    parts, spelling = _sorted(file, base)
    updates, configs = {}, {}
    problems: list[str] = []
    for name, part in parts.items():
        try:
            updates[name], configs[name] = _adapter(name, part, file, base_model_name_or_path)
        except ExportError as error:
            problems += str(error).split("\n")
    _refuse(file.path, problems)
    several = len(parts) > 1
    stale = re.compile(r"adapter_(model\.(safetensors|bin)|config\.json)")
    with replacing(place_, overwrite, "adapter", stale) as made:
        for name in parts:
            inside = made / name if several else made
            write_adapter(inside, factors(updates[name]), configs[name].to_json())
            compare(updates[name], read_source(inside).updates)
    return ImportReport(
        file.path,
        spelling,
        {name: place_ / name if several else place_ for name in parts},
        {name: {path: u.r for path, u in updates[name].items()} for name in parts},
    )


def _sorted(file: AdapterFile, base: Any) -> tuple[dict[str, _Part], str]:
    """The tensors' names by part of the pipeline, module and role, and their spelling."""
    flat = _flat_names(base)
    parts: dict[str, _Part] = {}
    spellings: Counter[str] = Counter()
    unknown, twice = [], []
    for name in file.shapes:
        found = place(name, flat)
        if found is None:
            unknown.append(name)
            continue
        spellings[found.spelling] += 1
        roles = parts.setdefault(found.component, _Part()).modules.setdefault(found.path, {})
        if found.role in roles:
            twice.append(f"{name} and {roles[found.role]} are the same tensor of {found.path}")
        roles[found.role] = name
    if unknown and not parts and any(name.startswith(PREFIX) for name in unknown):
        raise ExportError(f"{file.path} is in PEFT's format already: its names begin with base_model.model")
    _refuse(file.path, [*(_unexplained(name) for name in unknown), *twice])
    _take_metadata(file, parts)
    return parts, " and ".join(sorted(spellings))


def _unexplained(name: str) -> str | Text:
    if re.match(r"lora_(unet|te1?|te2)_[^.]+\.(lora_down|lora_up|alpha)", name):
        where = f"{name}: where the dots of this path go is not known; the base model ("
        return Text(where, Hint("base"), ") would say")
    if re.search(r"\.(hada_|lokr_|lora_mid|oft_|diff)", name):
        return f"{name}: of another method than LoRA"
    return f"{name}: no known name of a tensor of LoRA"


def _flat_names(base: Any) -> dict[str, FlatNames]:
    if base is None:
        return {}
    parts = ("unet", "transformer", "text_encoder", "text_encoder_2")
    if not isinstance(base, nn.Module):
        inside = [name for name in parts if (Path(base) / name).is_dir()]
        if inside:
            return {name: FlatNames(BaseModel(Path(base) / name).paths()) for name in inside}
    return dict.fromkeys(parts, FlatNames(BaseModel(base).paths()))


def _take_metadata(file: AdapterFile, parts: Mapping[str, _Part]) -> None:
    text = file.metadata.get(METADATA)
    if text is None:
        return
    try:
        values = json.loads(text)
        for name, part in parts.items():
            start = f"{name}."
            own = {k.removeprefix(start): v for k, v in values.items() if k.startswith(start)}
            if own:
                config = PeftConfig.from_dict({**own, "peft_type": "LORA"})
                part.config = config if isinstance(config, LoraConfig) else None
    except (ValueError, AttributeError, ConfigError) as error:
        raise AdapterFileError(f"the metadata {METADATA} of {file.path} cannot be used: {error}") from error


def _adapter(
    component: str, part: _Part, file: AdapterFile, base: str | None
) -> tuple[dict[str, Update], LoraConfig]:
    """The updates of a part of the pipeline, and the configuration with their strengths."""
    tensors = file.tensors(name for roles in part.modules.values() for name in roles.values())
    updates, alphas, problems = {}, {}, []
    specs = resolve_all(part.config, "default", dict.fromkeys(part.modules, "")) if part.config else {}
    for path, roles in part.modules.items():
        made = _update(path, {role: tensors[name] for role, name in roles.items()}, specs.get(path))
        if isinstance(made, str):
            problems.append(f"{component}: {path}: {made}")
        else:
            updates[path], alphas[path] = made
    if not problems:
        problems = [f"{component}: {line}" for line in _mixed(updates)]
    if problems:
        raise ExportError("\n".join(problems))
    return updates, _config(updates, alphas, part.config, base)


def _update(path: str, parts: Mapping[str, Tensor], spec: LoraSpec | None) -> tuple[Update, float] | str:
    """An update and its alpha, or a description of what is wrong with it."""
    if not {"A", "B"} <= parts.keys():
        return f"only {', '.join(sorted(parts))} of its factors are there"
    a, b = parts["A"], parts["B"]
    if a.dim() not in (2, 3, 4, 5) or a.dim() != b.dim() or a.shape[0] != b.shape[1]:
        return f"factors of shapes {tuple(a.shape)} and {tuple(b.shape)} have no product"
    r = int(a.shape[0])
    magnitude = parts.get("magnitude")
    if "dora_scale" in parts:
        magnitude = parts["dora_scale"]
        if magnitude.numel() != b.shape[0] or magnitude.shape[0] != b.shape[0]:
            return f"a dora_scale of shape {tuple(magnitude.shape)}, not one number for each of {len(b)} rows"
        magnitude = magnitude.reshape(-1) if a.dim() == 2 else magnitude.reshape(1, -1, *[1] * (a.dim() - 2))
    if spec is not None:
        if "alpha" in parts:
            return "it has an alpha, and the file's metadata give another account of it"
        if spec.r != r:
            return f"the file's metadata give it the rank {spec.r}, its factors have {r}"
        alpha, scaling = float(spec.lora_alpha), spec.scaling
    else:
        alpha = (
            float(parts["alpha"].double()) if "alpha" in parts and parts["alpha"].numel() == 1 else float(r)
        )
        if "alpha" in parts and parts["alpha"].numel() != 1:
            return f"an alpha of shape {tuple(parts['alpha'].shape)} is no number"
        scaling = alpha / r
    if not alpha > 0:
        return f"an alpha of {alpha:g}"
    return Update(a, b, scaling, False, parts.get("bias"), magnitude), alpha


def _mixed(updates: Mapping[str, Update]) -> Iterable[str]:
    """Features that only some modules have, although a configuration applies them to all."""
    for attribute, noun in (("bias", "a bias of B"), ("magnitude", "a magnitude of DoRA")):
        have = [path for path, update in updates.items() if getattr(update, attribute) is not None]
        if have and len(have) < len(updates):
            other = next(path for path in updates if path not in have)
            yield f"{have[0]} has {noun} and {other} has none, which one configuration cannot say"


def _config(
    updates: Mapping[str, Update], alphas: Mapping[str, float], given: LoraConfig | None, base: str | None
) -> LoraConfig:
    ranks, strengths = Counter(u.r for u in updates.values()), Counter(alphas.values())
    r, alpha = ranks.most_common(1)[0][0], strengths.most_common(1)[0][0]
    return LoraConfig(
        r=r,
        lora_alpha=_whole(alpha),
        rank_pattern={_pattern(path): u.r for path, u in updates.items() if u.r != r},
        alpha_pattern={_pattern(path): _whole(a) for path, a in alphas.items() if a != alpha},
        use_rslora=given is not None and given.use_rslora,
        # The ends of paths: CLIP's have lost their outer name in newer releases of transformers.
        target_modules=sorted(path.removeprefix("text_model.") for path in updates),
        use_dora=any(u.magnitude is not None for u in updates.values()),
        lora_bias=any(u.bias is not None for u in updates.values()),
        base_model_name_or_path=base,
    )


def _pattern(path: str) -> str:
    inner = path.removeprefix("text_model.")
    return inner if inner != path else f"^{path}$"


def _whole(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def _refuse(path: Path, problems: Sequence[str | Text]) -> None:
    if problems:
        raise ExportError(bullets(f"{path} cannot be imported whole, so nothing is:", problems, _MOST))

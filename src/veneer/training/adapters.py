"""Saved adapters and their base models: load, describe, merge and save."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..adapters import check_adapter_name
from ..errors import AdapterFileError, ConfigError, MissingExtraError, VeneerError, VeneerWarning, short
from ..files.overwrite import check_replaceable, check_room, replacing
from ..files.rope import write_older_names
from ..forward import without_cache
from ..lora_file import OpenLora, factor_names, open_lora
from ..merge_report import MergeReport
from ..peft_model import PeftModel
from ..spec import variant_name
from ..wording import first_line, listed
from .forward import evaluating
from .libraries import quiet_libraries
from .loading import Loading, device_map
from .models import NO_CODE, load_base, quantization
from .options import QUANTIZATIONS
from .progress import Progress
from .saved_adapter import PlainModel, SavedAdapter, base_name, read_adapter, word


def load_adapted(
    adapter: str | os.PathLike[str] | SavedAdapter,
    model: str | None = None,
    loading: Loading | None = None,
    others: Mapping[str, str | SavedAdapter] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a language model with saved adapters, for generation and merging.

    The files of all adapters are checked before the base is loaded.

    Args:
        adapter: Directory or hub id of the adapter, or the result of `read_adapter`.
        model: Base model; by default the one that the adapter names.
        loading: Type, storage and device of the base; None loads it as saved, where it computes.
        others: Further adapters of the same base by name; the first one stays active.
        progress: Reports the base and its device before it is loaded.

    Returns:
        (model, tokenizer).

    Raises:
        AdapterFileError: An adapter is missing or broken, or no base is named.
        AdapterNameError: A name is no valid name of an adapter.
        TrainingError: The base cannot be loaded.
    """
    first = read_adapter(adapter)
    more = {name: read_adapter(other) for name, other in (others or {}).items()}
    for name, other in more.items():
        check_adapter_name(name)
        if other.task != first.task:
            raise ConfigError(
                f"{other.name} is an adapter for {other.task}, {first.name} one for {first.task}"
            )
    named = base_name(first, model, progress)
    loading, said = _as_trained(loading or Loading(), first)
    if progress is not None and said is not None:
        progress.say(said)
    base, tokenizer = _loaded(named, loading, first.classes(), progress)
    adapted = PeftModel.from_pretrained(base, first.directory)
    for name, other in more.items():
        adapted.load_adapter(other.directory, name)
    return adapted, own_tokenizer(first.directory) or tokenizer


def load_plain(model: PlainModel, loading: Loading, progress: Progress | None = None) -> tuple[Any, Any]:
    """Load a model without an adapter: (model, tokenizer)."""
    if loading.quantize == "auto":
        loading = replace(loading, quantize="none")
    return _loaded(model.name, loading, model.classes, progress)


def _loaded(
    named: str, loading: Loading, classes: list[str] | None, progress: Progress | None
) -> tuple[Any, Any]:
    place, where = device_map(named, loading)
    if progress is not None and where is not None:
        progress.say(where)
    return load_base(
        named,
        loading.dtype,
        quantize=None if loading.quantize == "none" else loading.quantize,
        device_map=place,
        attn_implementation=loading.attn_implementation,
        label_names=classes,
        progress=progress,
    )


def _as_trained(loading: Loading, saved: SavedAdapter) -> tuple[Loading, str | None]:
    """(``loading`` with the storage of the training for ``quantize="auto"``, a line about it)."""
    if loading.quantize != "auto":
        return loading, None
    options = saved.noted("options")
    noted = options.get("quantize") if isinstance(options, dict) else None
    if noted not in QUANTIZATIONS:
        return replace(loading, quantize="none"), None
    try:
        quantization(noted, loading.dtype)
    except VeneerError as error:
        why = "its library is not installed" if isinstance(error, MissingExtraError) else "it needs a GPU"
        return replace(loading, quantize="none"), (
            f"{saved.name} was trained over {noted}, which this machine cannot use ({why}): the base is "
            "loaded as it was saved."
        )
    return replace(loading, quantize=noted), f"The base is kept in {noted}, as in the adapter's training."


def own_tokenizer(adapter: str | os.PathLike[str]) -> Any:
    """The tokenizer saved beside an adapter, if there is one.

    Raises:
        AdapterFileError: It is damaged.
    """
    place = Path(adapter)
    if not (place / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    # transformers would wait for a pipe, and read a device to its end.
    strange = [
        file.name for file in place.iterdir() if file.exists() and not (file.is_file() or file.is_dir())
    ]
    if strange:
        raise AdapterFileError(f"{place} contains what is neither a file nor a directory: {listed(strange)}")
    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(adapter, **NO_CODE)
    except Exception as error:  # a damaged file can fail anywhere in tokenizers
        raise AdapterFileError(
            f"the tokenizer beside the adapter {place} is damaged: {short(first_line(error))}. Without its "
            "files, that of the base is used"
        ) from error


#: What the outputs are compared on.
SAMPLE = "The lighthouse keeper wrote a letter every evening: 3 ships, 12 gulls, wind from the north-west."


@dataclass(frozen=True)
class Drift:
    """How far the outputs of a merged model are from those of the adapter, on `SAMPLE`.

    Attributes:
        share: Norm of the difference of the logits, in units of the norm of what the adapter changes in them.
        changed: Number of places where another token is the likeliest.
        tokens: Number of places.
    """

    share: float
    changed: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"on a sample text its outputs are off by {self.share:.0%} of what the adapter changes, and "
            f"another token is the likeliest at {self.changed} of {self.tokens} places"
        )


def save_merged(
    model: Any, tokenizer: Any, place: Path, *, untie: bool = False, overwrite: bool = False
) -> tuple[MergeReport, Drift | None]:
    """Merge an adapter into its base and save the model with tokenizer and generation config.

    Args:
        model: An adapted causal language model, which is consumed.
        tokenizer: Saved beside the model.
        place: The directory; it appears when it is complete. The model needs neither Veneer nor PEFT to load.
        untie: Give an adapted layer that shares its weight a weight of its own.
        overwrite: Replace the model in a directory that is not empty.

    Returns:
        For each module, the share of the update that the base's type could hold; and what that does to the
        outputs, None where the type holds everything or the model writes no text.

    Raises:
        MergeError: Some layers cannot be merged; names all of them.
        VeneerError: The directory is not empty, cannot be written, or its disk is too small.
    """
    check_replaceable(place, overwrite)
    before = _sample_logits(model, tokenizer)
    plain, report = merge(model, untie=untie)
    drift = None if before is None else _drift(*before, sample_logits(plain, tokenizer))
    check_room(place, sum(p.numel() * p.element_size() for p in plain.parameters()))
    with quiet_libraries(), replacing(place, overwrite) as made:
        plain.save_pretrained(made)
        write_older_names(made)
        tokenizer.save_pretrained(made)
    return report, drift


def _sample_logits(model: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The logits (tokens, vocabulary) of base and adapter, of a model whose weights are rounded."""
    writes = model.get_output_embeddings() is not None
    if not writes or all(p.element_size() >= 4 for p in model.get_base_model().parameters()):
        return None
    return sample_logits(model, tokenizer, base=True), sample_logits(model, tokenizer)


@torch.no_grad()
def sample_logits(model: Any, tokenizer: Any, base: bool = False) -> torch.Tensor:
    """The logits on `SAMPLE`, of a language model (tokens, vocabulary); of its base with ``base``."""
    ids = tokenizer(SAMPLE, return_tensors="pt")["input_ids"].to(next(model.parameters()).device)
    with evaluating(model, base):
        logits: torch.Tensor = model(input_ids=ids, **without_cache(model)).logits[0]
    return logits.float().cpu()


def _drift(base: torch.Tensor, adapter: torch.Tensor, merged: torch.Tensor) -> Drift:
    share = float((merged - adapter).norm() / (adapter - base).norm().clamp(min=1e-30))
    changed = int((merged.argmax(-1) != adapter.argmax(-1)).sum())
    return Drift(share, changed, len(adapter))


def merge(model: Any, *, untie: bool = False) -> tuple[Any, MergeReport]:
    """(plain model, report of the merge); the adapted model is consumed.

    Without the warning about lost updates, as the caller has the report.
    """
    tuner = model.base_model
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(survives rounding|NaN or infinity)", category=VeneerWarning
        )
        plain = model.merge_and_unload(untie=untie)
    report: MergeReport = tuner.merge_report
    return plain, report


def describe(adapter: str | os.PathLike[str] | OpenLora) -> dict[str, Any]:
    """Describe an adapter by its configuration and the header of its tensors.

    Args:
        adapter: Its directory, or the result of `open_lora`.

    Raises:
        AdapterFileError: The adapter is missing, broken, or no LoRA.
    """
    config, file, specs, experts = open_lora(adapter)
    keys, others = factor_names(file)
    layers = {path: {r: file.shapes[key] for r, key in roles.items()} for path, roles in keys.items()}
    kinds: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for path, f in layers.items():
        kinds.setdefault((path.rpartition(".")[2], f["A"], f["B"]), []).append(path)
    return {
        "path": str(file.path.parent),
        "base": config.base_model_name_or_path,
        "task_type": word(config.task_type),
        "peft_type": word(config.peft_type),
        "target_modules": plain_targets(config.target_modules),
        "ranks": sorted({spec.r for spec in specs.values()}),
        "alphas": sorted({spec.lora_alpha for spec in specs.values()}),
        "scalings": sorted({spec.scaling for spec in specs.values()}),
        "use_rslora": config.use_rslora,
        "variant": variant_name(config),
        "modules_to_save": plain_targets(config.modules_to_save),
        "experts": experts
        and {
            "layout": experts.layout,
            "why": experts.why,
            "may_be": list(experts.others),
        },
        "parameters": sum(math.prod(shape) for shape in file.shapes.values()),
        "bytes": file.path.stat().st_size,
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in file.dtypes.values()}),
        "layers": len(layers),
        "modules": [
            {
                "module": name,
                "count": len(paths),
                "A": list(a),
                "B": list(b),
                "parameters": len(paths) * (math.prod(a) + math.prod(b)),
                "paths": paths,
            }
            for (name, a, b), paths in kinds.items()
        ],
        "others": sorted(others),
    }


def plain_targets(targets: Any) -> Any:
    """Names or an expression, for JSON."""
    return targets if targets is None or isinstance(targets, str) else sorted(targets)

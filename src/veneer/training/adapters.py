"""Adapters on disk and the models they belong to: load, describe, merge and save."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters import check_adapter_name
from ..config import LoraConfig, PeftConfig
from ..errors import AdapterFileError, ConfigError, Hint, MissingExtraError, VeneerError, VeneerWarning
from ..files.layout import CONFIG_NAME
from ..files.overwrite import check_replaceable, check_room, replacing
from ..files.read import AdapterFile, open_adapter
from ..hub import adapter_directory, is_local
from ..lora_file import OpenLora, blaming, factor_names, open_lora
from ..merge_report import MergeReport
from ..peft_model import PeftModel
from ..spec import variant_name
from .libraries import quiet_libraries
from .loading import Loading, device_map
from .models import NO_CODE, load_base, quantization
from .options import QUANTIZATIONS
from .progress import Progress

#: The last layer of a classifier's head, which has a row for each class.
_CLASSES = re.compile(r"(^|\.)(score|classifier|classifier\.out_proj|classification_head\.out_proj)\.weight$")


@dataclass(frozen=True)
class Head:
    """What is known of an adapter before its base is loaded.

    Attributes:
        name: What the user named: a directory, or a hub id.
        directory: Where its files are.
        config: Its configuration.
        file: The header of its tensors.
    """

    name: str
    directory: Path
    config: LoraConfig
    file: AdapterFile

    @property
    def task(self) -> str:
        """``SEQ_CLS`` and the like; an adapter that names no task is taken for one of a language model."""
        return _word(self.config.task_type) or "CAUSAL_LM"

    def classes(self) -> list[str] | None:
        """Names of a classifier's classes; None for a model that writes text.

        Raises:
            AdapterFileError: A classifier without a head.
            VeneerError: It is for neither of them.
        """
        if self.task == "CAUSAL_LM":
            return None
        if self.task != "SEQ_CLS":
            raise VeneerError(
                f"{self.name} is an adapter for {self.task}; CAUSAL_LM and SEQ_CLS are measured"
            )
        names = self.label_names()
        if names is None:
            raise AdapterFileError(f"{self.name} is an adapter of a classifier, but holds no head of one")
        return names

    def noted(self, what: str) -> Any:
        """What `train` noted in ``metrics.json`` beside the adapter; None where it did not."""
        try:
            return json.loads((self.directory / "metrics.json").read_text(encoding="utf-8"))[what]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def label_names(self) -> list[str] | None:
        """Names of a classifier's classes: as `train` noted them, else a number for each row of the head."""
        noted = self.noted("label_names")
        if isinstance(noted, list) and noted:
            return [str(name) for name in noted]
        heads = [shape for key, shape in self.file.shapes.items() if _CLASSES.search(key)]
        return [str(number) for number in range(heads[0][0])] if heads else None


def read_head(adapter: str | os.PathLike[str]) -> Head:
    """Configuration and header of an adapter; no model is loaded, and no tensor.

    Raises:
        AdapterFileError: It is missing or broken, or no LoRA.
    """
    local = is_local(adapter) or "/" not in os.fspath(adapter)
    directory = Path(adapter).expanduser() if local else adapter_directory(adapter)
    file = open_adapter(directory)
    with blaming(adapter):
        config = PeftConfig.from_belonging(file.belonging_config())
    return Head(os.fspath(adapter), directory, config, file)


def load_adapted(
    adapter: str | os.PathLike[str] | Head,
    model: str | None = None,
    loading: Loading | None = None,
    others: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer) of a language model with saved adapters on it, for asking and merging.

    The files of all adapters are looked at before the base is loaded.

    Args:
        adapter: Directory of the adapter, or a hub id; or what `read_head` found there.
        model: Base model; the one that the adapter names when None.
        loading: Type, storage and device of the base; None loads it as it was saved, where it computes.
        others: More adapters of the same base by the names that they get; the first stays active.
        progress: Told which base is about to be loaded, and where it goes.

    Raises:
        AdapterFileError: There is no adapter, it is broken, or it names no base and none is given.
        AdapterNameError: A name cannot be one.
        TrainingError: The base cannot be loaded.
    """
    first = adapter if isinstance(adapter, Head) else read_head(adapter)
    more = {name: read_head(place) for name, place in (others or {}).items()}
    for name, other in more.items():
        check_adapter_name(name)
        if other.task != first.task:
            raise ConfigError(
                f"{other.name} is an adapter for {other.task}, {first.name} one for {first.task}"
            )
    named = base_name(first.name, first.config, model, progress)
    loading, said = _as_trained(loading or Loading(), first)
    place, where = device_map(named, loading)
    for line in (said, where):
        if progress is not None and line is not None:
            progress.say(line)
    base, tokenizer = load_base(
        named,
        loading.dtype,
        quantize=None if loading.quantize == "none" else loading.quantize,
        device_map=place,
        attn_implementation=loading.attn_implementation,
        label_names=first.classes(),
    )
    adapted = PeftModel.from_pretrained(base, first.directory)
    for name, other in more.items():
        adapted.load_adapter(other.directory, name)
    return adapted, _own_tokenizer(first.directory) or tokenizer


def _as_trained(loading: Loading, head: Head) -> tuple[Loading, str | None]:
    """``quantize="auto"`` replaced by what the adapter was trained over; and what to say of that."""
    if loading.quantize != "auto":
        return loading, None
    options = head.noted("options")
    noted = options.get("quantize") if isinstance(options, dict) else None
    if noted not in QUANTIZATIONS:
        return replace(loading, quantize="none"), None
    try:
        quantization(noted, loading.dtype)
    except VeneerError as error:
        why = "its library is not installed" if isinstance(error, MissingExtraError) else "it needs a GPU"
        return replace(loading, quantize="none"), (
            f"{head.name} was trained over {noted}, which this machine cannot use ({why}): the base is "
            "loaded as it was saved."
        )
    return replace(loading, quantize=noted), f"The base is kept in {noted}, as in the adapter's training."


def base_name(adapter: str, config: PeftConfig, model: str | None, progress: Progress | None) -> str:
    """The base model that was named, or else the one that the adapter names; one of the hub is reported.

    Raises:
        AdapterFileError: Neither names one.
    """
    named = model or config.base_model_name_or_path
    if not named:
        raise AdapterFileError(
            f"the adapter {adapter} does not name its base model: say which with ", Hint("model")
        )
    if progress is not None and not is_local(named):
        who = "" if model else f", which {adapter!r} names"
        progress.say(f"The base model is {named!r} of the Hugging Face hub{who}.")
    return named


def _own_tokenizer(adapter: str | os.PathLike[str]) -> Any:
    """The tokenizer that was saved beside an adapter, if there is one."""
    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    with quiet_libraries():
        return AutoTokenizer.from_pretrained(adapter, **NO_CODE)


def check_not_a_source(place: Path, source: str) -> None:
    """Raise if a merged model would overwrite what it is made of, or lie beside an adapter.

    transformers applies an adapter that it finds beside a model, so the update would count twice.

    Raises:
        VeneerError: Naming the directory.
    """
    if source and Path(source).exists() and place.resolve() == Path(source).resolve():
        raise VeneerError(f"{place} holds what is to be merged; name another directory for the output")
    if (place / CONFIG_NAME).exists():
        raise VeneerError(
            f"{place} holds an adapter, which transformers would apply to the merged model once more; "
            "name another directory for the output"
        )


def save_merged(
    model: Any, tokenizer: Any, place: Path, *, untie: bool = False, overwrite: bool = False
) -> MergeReport:
    """Merge a model's adapter into its base and save that with tokenizer and generation config.

    Args:
        model: An adapted causal language model; it is used up.
        tokenizer: Saved along.
        place: Directory; the model in it loads where neither Veneer nor PEFT is installed. It appears
            whole, or not at all where something fails.
        untie: Give an adapted layer whose weight is another's too a weight of its own.
        overwrite: Replace the model in a directory that holds files already.

    Returns:
        The share of the update that the base's type could hold, for each module.

    Raises:
        MergeError: Naming every layer that cannot be merged.
        VeneerError: The directory is taken, cannot be written, or its disk is too small.
    """
    check_replaceable(place, overwrite)
    plain, report = merge(model, untie=untie)
    check_room(place, sum(p.numel() * p.element_size() for p in plain.parameters()))
    with quiet_libraries(), replacing(place, overwrite) as made:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return report


def merge(model: Any, *, untie: bool = False) -> tuple[Any, MergeReport]:
    """(plain model, what was kept of the update for each module); the adapted model is used up.

    How much was kept is for the caller to say, so the library's own warning about it is not given.
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
    """What an adapter is, from its configuration and the header of its tensors.

    Args:
        adapter: Its directory, or what `open_lora` gave for it.

    Raises:
        AdapterFileError: It is missing or broken, or its configuration is not that of a LoRA.
    """
    config, file, specs = open_lora(adapter)
    keys, others = factor_names(file)
    layers = {path: {r: file.shapes[key] for r, key in roles.items()} for path, roles in keys.items()}
    kinds: dict[tuple[str, tuple[int, ...], tuple[int, ...]], list[str]] = {}
    for path, f in layers.items():
        kinds.setdefault((path.rpartition(".")[2], f["A"], f["B"]), []).append(path)
    return {
        "path": str(file.path.parent),
        "base": config.base_model_name_or_path,
        "task_type": _word(config.task_type),
        "peft_type": _word(config.peft_type),
        "target_modules": plain_targets(config.target_modules),
        "ranks": sorted({spec.r for spec in specs.values()}),
        "alphas": sorted({spec.lora_alpha for spec in specs.values()}),
        "scalings": sorted({spec.scaling for spec in specs.values()}),
        "use_rslora": config.use_rslora,
        "variant": variant_name(config),
        "modules_to_save": plain_targets(config.modules_to_save),
        "parameters": sum(_count(shape) for shape in file.shapes.values()),
        "bytes": file.path.stat().st_size,
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in file.dtypes.values()}),
        "layers": len(layers),
        "modules": [
            {
                "module": name,
                "count": len(paths),
                "A": list(a),
                "B": list(b),
                "parameters": len(paths) * (_count(a) + _count(b)),
                "paths": paths,
            }
            for (name, a, b), paths in kinds.items()
        ],
        "others": sorted(others),
    }


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for side in shape:
        product *= side
    return product


def _word(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def plain_targets(targets: Any) -> Any:
    """Names or an expression, for JSON."""
    return targets if targets is None or isinstance(targets, str) else sorted(targets)

"""Saved adapters and their base models: load, describe, merge and save."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..adapters import check_adapter_name
from ..config import LoraConfig, PeftConfig
from ..errors import (
    AdapterFileError,
    ConfigError,
    Hint,
    MissingExtraError,
    Text,
    TrainingError,
    VeneerError,
    VeneerWarning,
)
from ..files.layout import BIN_NAME, CONFIG_NAME, SAFETENSORS_NAME
from ..files.overwrite import check_replaceable, check_room, replacing
from ..files.read import AdapterFile, open_adapter
from ..hub import EntryMissingError, NotCachedError, adapter_directory, is_local
from ..lora_file import OpenLora, blame_file, factor_names, open_lora
from ..merge_report import MergeReport
from ..peft_model import PeftModel
from ..spec import variant_name
from .libraries import quiet_libraries
from .loading import Loading, device_map
from .models import NO_CODE, PlainModel, load_base, quantization, read_plain
from .options import QUANTIZATIONS, RunOptions
from .progress import Progress

#: The last layer of a classifier's head, which has a row for each class.
_CLASSES = re.compile(r"(^|\.)(score|classifier|classifier\.out_proj|classification_head\.out_proj)\.weight$")


@dataclass(frozen=True)
class Head:
    """An adapter's files, read without its base.

    Attributes:
        name: The directory or hub id that the user named.
        directory: Directory of its files.
        config: Its configuration.
        file: The header of its tensors.
    """

    name: str
    directory: Path
    config: LoraConfig
    file: AdapterFile

    @property
    def task(self) -> str:
        """The task, such as ``SEQ_CLS``; by default that of a language model."""
        return _word(self.config.task_type) or "CAUSAL_LM"

    def classes(self) -> list[str] | None:
        """Names of a classifier's classes; None for a model that writes text.

        Raises:
            AdapterFileError: It is a classifier without a head.
            VeneerError: It is for another task.
        """
        if self.task == "CAUSAL_LM":
            return None
        if self.task != "SEQ_CLS":
            raise VeneerError(
                f"{self.name} is an adapter for {self.task}; trained and measured are CAUSAL_LM and SEQ_CLS"
            )
        names = self.label_names()
        if names is None:
            raise AdapterFileError(f"{self.name} is an adapter of a classifier, but holds no head of one")
        return names

    def noted(self, what: str) -> Any:
        """A value of ``metrics.json`` beside the adapter, if `train` wrote one."""
        try:
            return json.loads((self.directory / "metrics.json").read_text(encoding="utf-8"))[what]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def label_names(self) -> list[str] | None:
        """Names of the classes, from ``metrics.json`` or else a number for each row of the head."""
        noted = self.noted("label_names")
        if isinstance(noted, list) and noted:
            return [str(name) for name in noted]
        heads = [shape for key, shape in self.file.shapes.items() if _CLASSES.search(key)]
        return [str(number) for number in range(heads[0][0])] if heads else None


def read_head(adapter: str | os.PathLike[str]) -> Head:
    """Read the configuration of an adapter and the header of its tensors.

    Raises:
        AdapterFileError: The adapter is missing, broken, or no LoRA.
    """
    local = is_local(adapter) or "/" not in os.fspath(adapter)
    directory = Path(adapter).expanduser() if local else adapter_directory(adapter)
    file = open_adapter(directory)
    with blame_file(adapter):
        config = PeftConfig.from_belonging(file.belonging_config())
    return Head(os.fspath(adapter), directory, config, file)


def read_head_or_model(name: str) -> Head | PlainModel:
    """An adapter or, where there is none, a model without one; neither's weights are read.

    Raises:
        AdapterFileError: It is neither, or a broken adapter.
    """
    try:
        return read_head(name)
    except AdapterFileError as no_adapter:
        here = Path(name).expanduser()
        if here.is_dir():
            if any((here / file).exists() for file in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)):
                raise
            if not (here / "config.json").is_file():
                raise AdapterFileError(
                    f"{name} holds neither an adapter ({CONFIG_NAME}) nor a model (config.json)"
                ) from no_adapter
            return read_plain(here)
        if is_local(name) or ("/" in name and not isinstance(no_adapter, EntryMissingError | NotCachedError)):
            raise
        try:
            return read_plain(name)
        except TrainingError as no_model:
            raise AdapterFileError(
                f"{name} is neither an adapter nor a model:\n  {no_adapter}\n  {no_model}"
            ) from no_model


def with_adapter(options: RunOptions, head: Head, given: Collection[str] | None = None) -> RunOptions:
    """The options of a run that trains a saved adapter further: its configuration and its base fill the gaps.

    Args:
        options: With ``resume_from_adapter``.
        head: That adapter.
        given: Names of the options that the user gave; by default those that differ from their defaults.

    Raises:
        ConfigError: Some of them contradict the adapter; lists all of them.
        AdapterFileError: No base model is named.
        VeneerError: The adapter is for another task.
    """
    classes = head.classes()
    of_adapter: dict[str, Any] = {"task": "causal-lm" if classes is None else "seq-cls"}
    of_adapter |= {
        part.name: _as_option(part.name, head.config)
        for part in fields(RunOptions)
        if part.metadata["group"] == "Adapter"
    }
    if given is None:
        given = [part.name for part in fields(options) if getattr(options, part.name) != part.default]
    noted = head.noted("options") or {}
    wrong = [
        Text(Hint(name, getattr(options, name)), f" (the adapter has {value})")
        for name, value in of_adapter.items()
        if name in given and getattr(options, name) != noted.get(name) and not _alike(name, options, value)
    ]
    if wrong:
        raise ConfigError(
            f"{head.name} is trained further as it is configured. Leave out ",
            Text.join(", ", wrong),
            ", or start a new adapter without ",
            Hint("resume_from_adapter"),
        )
    if head.directory.resolve().is_relative_to(Path(options.output).resolve()):
        raise ConfigError(
            Hint("output"),
            f" {options.output} holds the adapter that is trained further: name a new directory",
        )
    model = base_name(head.name, head.config, options.model or None, None)
    return replace(options, model=model, **of_adapter)


def _as_option(name: str, config: LoraConfig) -> Any:
    """A value of a configuration as the option of that name has it."""
    value = getattr(config, name if hasattr(config, name) else name.removeprefix("lora_"))
    if isinstance(value, bool) and name == "init_lora_weights":
        return str(value).lower()
    return value if value is None or isinstance(value, bool | int | float | str) else ",".join(sorted(value))


def _alike(name: str, options: RunOptions, value: Any) -> bool:
    """Whether an option says what the adapter has, names in any order."""
    asked = getattr(options, name)
    if isinstance(asked, str) and isinstance(value, str):
        return {part.strip().lower() for part in asked.split(",")} == set(value.lower().split(","))
    return bool(asked == value)


def adapter_config(options: RunOptions) -> LoraConfig:
    """The configuration of the adapter of a run: a saved one's where it is trained further."""
    if options.resume_from_adapter is None:
        return options.lora_config()
    config = read_head(options.resume_from_adapter).config
    config.inference_mode = False
    return config


def load_adapted(
    adapter: str | os.PathLike[str] | Head,
    model: str | None = None,
    loading: Loading | None = None,
    others: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a language model with saved adapters, for generation and merging.

    The files of all adapters are checked before the base is loaded.

    Args:
        adapter: Directory or hub id of the adapter, or the result of `read_head`.
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
    if progress is not None and said is not None:
        progress.say(said)
    base, tokenizer = _loaded(named, loading, first.classes(), progress)
    adapted = PeftModel.from_pretrained(base, first.directory)
    for name, other in more.items():
        adapted.load_adapter(other.directory, name)
    return adapted, own_tokenizer(first.directory) or tokenizer


def load_plain(model: PlainModel, loading: Loading, progress: Progress | None = None) -> tuple[Any, Any]:
    """Load a model without an adapter: (model, tokenizer).

    Raises:
        TrainingError: It cannot be loaded.
    """
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
    )


def _as_trained(loading: Loading, head: Head) -> tuple[Loading, str | None]:
    """(``loading`` with the storage of the training for ``quantize="auto"``, a line about it)."""
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
    """The base model: ``model``, or else the one that the adapter names; a base of the hub is reported.

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


def own_tokenizer(adapter: str | os.PathLike[str]) -> Any:
    """The tokenizer saved beside an adapter, if there is one."""
    if not (Path(adapter) / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    with quiet_libraries():
        return AutoTokenizer.from_pretrained(adapter, **NO_CODE)


def check_not_a_source(place: Path, source: str) -> None:
    """Refuse to write a merged model over its source or beside an adapter.

    transformers applies an adapter that lies beside a model, so the update would count twice.

    Raises:
        VeneerError: The directory is one of these.
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
    """Merge an adapter into its base and save the model with tokenizer and generation config.

    Args:
        model: An adapted causal language model, which is consumed.
        tokenizer: Saved beside the model.
        place: The directory; it appears when it is complete. The model needs neither Veneer nor PEFT to load.
        untie: Give an adapted layer that shares its weight a weight of its own.
        overwrite: Replace the model in a directory that is not empty.

    Returns:
        For each module, the share of the update that the base's type could hold.

    Raises:
        MergeError: Some layers cannot be merged; names all of them.
        VeneerError: The directory is not empty, cannot be written, or its disk is too small.
    """
    check_replaceable(place, overwrite)
    plain, report = merge(model, untie=untie)
    check_room(place, sum(p.numel() * p.element_size() for p in plain.parameters()))
    with quiet_libraries(), replacing(place, overwrite) as made:
        plain.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return report


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


def _word(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))


def plain_targets(targets: Any) -> Any:
    """Names or an expression, for JSON."""
    return targets if targets is None or isinstance(targets, str) else sorted(targets)

"""What the files of an adapter say of it, read without torch and without its base."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..config import LoraConfig, PeftConfig
from ..errors import AdapterFileError, ConfigError, Hint, Text, TrainingError, VeneerError
from ..files.header import metadata_and_shapes
from ..files.layout import (
    BIN_NAME,
    CONFIG_NAME,
    SAFETENSORS_NAME,
    belonging_config,
    blame_file,
    check_directory,
    together,
)
from ..hub import EntryMissingError, NotCachedError, adapter_directory, is_local
from ..spec import variant_name
from .options import RunOptions
from .progress import Progress

#: The last layer of a classifier's head, which has a row for each class.
_CLASSES = re.compile(r"(^|\.)(score|classifier|classifier\.out_proj|classification_head\.out_proj)\.weight$")


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter's files, read without its base.

    Attributes:
        name: The directory or hub id that the user named.
        directory: Directory of its files.
        config: Its configuration.
        path: The file of its tensors.
        shapes: The shape of each tensor; None for a pickle, which has no header.
    """

    name: str
    directory: Path
    config: LoraConfig
    path: Path
    shapes: dict[str, tuple[int, ...]] | None

    @property
    def task(self) -> str:
        """The task, such as ``SEQ_CLS``; by default that of a language model."""
        return word(self.config.task_type) or "CAUSAL_LM"

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
                f"{self.name} is an adapter for {self.task}; only CAUSAL_LM and SEQ_CLS are supported here"
            )
        names = self.label_names()
        if names is None:
            raise AdapterFileError(
                f"{self.name} is an adapter of a classifier, but contains no classification head"
            )
        return names

    def rewards(self) -> bool:
        """Whether it belongs to a reward model: one with a head of a single number."""
        return self.task == "SEQ_CLS" and len(self.label_names() or ()) == 1

    def noted(self, what: str) -> Any:
        """A value of ``metrics.json`` beside the adapter, if `train` wrote one."""
        file = self.directory / "metrics.json"
        if not file.is_file():  # a pipe or a device would be read for ever
            return None
        try:
            return json.loads(file.read_text(encoding="utf-8"))[what]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def label_names(self) -> list[str] | None:
        """Names of the classes, from ``metrics.json`` or else a number for each row of the head."""
        noted = self.noted("label_names")
        if isinstance(noted, list) and noted:
            return [str(name) for name in noted]
        shapes = self.shapes
        if shapes is None:
            from ..files.read import open_adapter

            shapes = open_adapter(self.directory).shapes
        heads = [shape for key, shape in shapes.items() if _CLASSES.search(key)]
        return [str(number) for number in range(heads[0][0])] if heads else None


@dataclass(frozen=True)
class PlainModel:
    """A model without an adapter, merged or never adapted; its weights are not read yet.

    Attributes:
        name: The directory or hub id that the user named.
        classes: Names of a classifier's classes; None for a model that writes text.
    """

    name: str
    classes: list[str] | None


def read_adapter(
    adapter: str | os.PathLike[str] | SavedAdapter, progress: Progress | None = None
) -> SavedAdapter:
    """Read the configuration of an adapter and the header of its tensors.

    Args:
        adapter: Its directory, or a hub id, of which the files are downloaded; or what was read before.
        progress: Told before the hub is asked.

    Raises:
        AdapterFileError: The adapter is missing, broken, or no LoRA.
    """
    if isinstance(adapter, SavedAdapter):
        return adapter
    if is_local(adapter) or "/" not in os.fspath(adapter):
        directory = check_directory(Path(adapter).expanduser())
    else:
        if progress is not None:
            progress.say(f"There is no directory {os.fspath(adapter)}; asking the Hugging Face hub for it")
        directory = adapter_directory(adapter)
    (path, (metadata, shapes)), beside = together(directory, lambda path: (path, metadata_and_shapes(path)))
    with blame_file(adapter):
        config = PeftConfig.from_belonging(belonging_config(directory, metadata, beside))
        variant_name(config)
    return SavedAdapter(os.fspath(adapter), directory, config, path, shapes)


def read_adapter_or_model(
    name: str, read_plain: Callable[[str | os.PathLike[str]], PlainModel], progress: Progress | None = None
) -> SavedAdapter | PlainModel:
    """An adapter or, where there is none, a model without one; neither's weights are read.

    Args:
        name: A directory or a hub id.
        read_plain: Reads the configuration of a model.
        progress: Told before the hub is asked.

    Raises:
        AdapterFileError: It is neither, or a broken adapter.
    """
    try:
        return read_adapter(name, progress)
    except AdapterFileError as no_adapter:
        here = Path(name).expanduser()
        if here.is_dir():
            if any((here / file).exists() for file in (CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME)):
                raise
            if not (here / "config.json").is_file():
                raise AdapterFileError(
                    f"{name} contains neither an adapter ({CONFIG_NAME}) nor a model (config.json)"
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


def with_adapter(
    options: RunOptions, saved: SavedAdapter, given: Collection[str] | None = None
) -> RunOptions:
    """The options of a run that trains a saved adapter further: its configuration and its base fill the gaps.

    Args:
        options: With ``resume_from_adapter``.
        saved: That adapter.
        given: Names of the options that the user gave; by default those that differ from their defaults.

    Raises:
        ConfigError: Some of them contradict the adapter; lists all of them.
        AdapterFileError: No base model is named.
        VeneerError: The adapter is for another task.
    """
    classes, rewards = saved.classes(), saved.rewards()
    of_adapter: dict[str, Any] = {"task": "causal-lm" if classes is None or rewards else "seq-cls"}
    if rewards or options.method == "reward":
        of_adapter["method"] = "reward" if rewards else "sft"
    of_adapter |= {
        part.name: _as_option(part.name, saved.config)
        for part in fields(RunOptions)
        if part.metadata["group"] == "Adapter"
    }
    if given is None:
        given = [part.name for part in fields(options) if getattr(options, part.name) != part.default]
    noted = saved.noted("options") or {}
    wrong = [
        Text(Hint(name, getattr(options, name)), f" (the adapter has {value})")
        for name, value in of_adapter.items()
        if name in given and getattr(options, name) != noted.get(name) and not _alike(name, options, value)
    ]
    if wrong:
        raise ConfigError(
            f"{saved.name} keeps its configuration when it is trained further. Leave out ",
            Text.join(", ", wrong),
            ", or start a new adapter without ",
            Hint("resume_from_adapter"),
        )
    if saved.directory.resolve().is_relative_to(Path(options.output).resolve()):
        raise ConfigError(
            Hint("output"),
            f" {options.output} contains the adapter that is trained further: choose a new directory",
        )
    model = base_name(saved, options.model or None)
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
    config = read_adapter(options.resume_from_adapter).config
    config.inference_mode = False
    return config


def base_name(saved: SavedAdapter, model: str | None = None, progress: Progress | None = None) -> str:
    """The base model: ``model``, or else the one that the adapter names; a base of the hub is reported."""
    named = model or saved.config.base_model_name_or_path
    if not named:
        raise AdapterFileError(
            f"the adapter {saved.name} does not name its base model: pass it with ", Hint("model")
        )
    if progress is not None and not is_local(named):
        who = "" if model else f", which {saved.name!r} names"
        progress.say(f"The base model is {named!r} of the Hugging Face hub{who}.")
    return named


def word(value: Any) -> str | None:
    """The plain text of a task or a method."""
    return None if value is None else str(getattr(value, "value", value))

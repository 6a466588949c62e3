"""What every adapter configuration has: validation, its file, its dictionary."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from veneer import hub
from veneer.atomic import atomic_file, new_directory
from veneer.config import values as check
from veneer.config.kinds import PeftType, TaskType
from veneer.config.spelling import names_unknown_options, unknown_options
from veneer.config.values import looks_like_regex
from veneer.errors import AdapterFileError, ConfigError, Hint, Text, UnknownOptionError, short
from veneer.files.config import read_config_file
from veneer.files.layout import CONFIG_NAME, BelongingConfig, find_config
from veneer.wording import bullets, did_you_mean, warn

KNOWN_PEFT_VERSION = (0, 21, 2)
DEEPEST_NESTING = 32

#: Options that change nothing of what an adapter computes.
_WITHOUT_EFFECT = frozenset(
    "auto_mapping base_model_name_or_path inference_mode lora_dropout peft_version revision task_type".split()
)

_ALWAYS_WRITTEN = frozenset(
    "peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules bias "
    "modules_to_save use_rslora use_dora rank_pattern alpha_pattern fan_in_fan_out init_lora_weights "
    "inference_mode".split()
)

FLAGS = ("fan_in_fan_out", "use_rslora", "use_dora", "use_qalora", "lora_bias", "ensure_weight_tying")

NEEDS_INIT = {f"{init}_config": init for init in ("loftq", "eva", "corda", "lora_ga")}

#: The last two name the order of factors, which is looked at where they are read.
_HARMLESS = frozenset(
    "runtime_config merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr "
    "lora_B_layout unsloth_fused_expert_lora".split()
)

_E = TypeVar("_E", bound=Enum)

#: The class of each method that Veneer implements; a class enters itself.
PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {}


def _task_problem(name: str, value: object) -> list[Text]:
    known = [task.value for task in TaskType]
    return [] if value is None or isinstance(value, TaskType) else check.choice(name, value, known)


def _method_problem(name: str, value: object) -> list[Text]:
    if value is None or isinstance(value, PeftType):
        return []
    near = did_you_mean(value, [method.value for method in PeftType])
    message = f" {check.show(value)} is no known adapter method{near}; Veneer implements LORA"
    return [Text(Hint(name), message)]


_CHECKS: dict[str, check.Check] = {
    "task_type": _task_problem,
    "peft_type": _method_problem,
    "auto_mapping": check.dictionary_or_none,
    "peft_version": check.text,
    "base_model_name_or_path": check.text,
    "revision": check.text,
    "inference_mode": check.flag,
}


@names_unknown_options
@dataclass
class PeftConfig:
    """What every adapter configuration has.

    Args:
        task_type: One of `TaskType`; picks the model class and the heads that train along.
        peft_type: The adapter method; Veneer implements ``LORA``.
        auto_mapping: How a reader without a task finds the class of the base model.
        peft_version: The version of PEFT that wrote the file this was read from.
        base_model_name_or_path: The base model that the adapter belongs to.
        revision: The revision of that base model.
        inference_mode: True for an adapter that was loaded for use, not for training.

    Raises:
        UnknownOptionError: For an option that does not exist.
        ConfigError: Listing every value that cannot be right.
    """

    task_type: str | TaskType | None = None
    peft_type: str | PeftType | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        self._normalise()
        self.validate()

    def _normalise(self) -> None:
        self.task_type = _member(TaskType, self.task_type)
        self.peft_type = _member(PeftType, self.peft_type)
        base: Any = self.base_model_name_or_path
        if isinstance(base, os.PathLike):
            self.base_model_name_or_path = os.fspath(base)

    def _problems(self) -> list[Text]:
        return check.of_fields(self, _CHECKS)

    def validate(self) -> None:
        """Check every value, also those assigned after construction.

        Raises:
            ConfigError: Listing every value that cannot be right.
        """
        problems = self._problems()
        if len(problems) == 1:
            raise ConfigError(f"{type(self).__name__}: ", problems[0])
        if problems:
            raise ConfigError(bullets(f"{type(self).__name__} has {len(problems)} problems:", problems))

    @property
    def is_prompt_learning(self) -> bool:
        """False: Veneer has no prompt methods; callers of PEFT's API ask."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: Veneer has no prompt methods; callers of PEFT's API ask."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value, as a deep copy; options of the running process are left out."""
        values = dataclasses.asdict(self)
        values.pop("runtime_config", None)
        return values

    def to_json(
        self, *, target_modules: Iterable[str] | None = None, inference_mode: bool | None = True
    ) -> dict[str, Any]:
        """The content of ``adapter_config.json``: keys that readers need, and values that are not defaults.

        Args:
            target_modules: Names to write instead of the configured patterns; give the resolved ones, since
                other readers know neither regular expressions in a list nor this model type's defaults.
            inference_mode: The value to write, True in a saved adapter; None writes the configuration's own.

        Returns:
            Plain JSON values with sorted keys. The order inside ``rank_pattern`` and ``alpha_pattern`` is
            kept, because the first match wins: write the result without sorting again.
        """
        values = self.to_dict()
        blank = {f.name: _default(f) for f in dataclasses.fields(self)}
        for name in NEEDS_INIT:
            if name in values and init_name(values.get("init_lora_weights")) != NEEDS_INIT[name]:
                values.pop(name)
        if target_modules is not None:
            values["target_modules"] = sorted(set(target_modules))
        elif isinstance(values.get("target_modules"), str):
            values["target_modules"] = _portable(values["target_modules"])
        if inference_mode is not None:
            values["inference_mode"] = inference_mode
        if "lora_alpha" in values:
            values["lora_alpha"] = _integral(values["lora_alpha"])
        if values.get("alpha_pattern"):
            values["alpha_pattern"] = {k: _integral(v) for k, v in values["alpha_pattern"].items()}
        kept = {k: _plain(v) for k, v in values.items() if k in _ALWAYS_WRITTEN or v != blank[k]}
        return dict(sorted(kept.items()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], strict: bool = True) -> PeftConfig:
        """The configuration in the content of an ``adapter_config.json``.

        Args:
            values: The parsed file.
            strict: Refuse options that Veneer does not know and that are switched on; else only warn.

        Returns:
            The configuration of the class that ``peft_type`` names.

        Raises:
            UnknownOptionError: For an unknown option with a value; null, false and empty ones are ignored.
            ConfigError: For another adapter method, or listing every value that cannot be right.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"an adapter configuration is a dictionary, not a {type(values).__name__}")
        check_nesting(values)
        target = _class_for(cls, values)
        known = {f.name for f in dataclasses.fields(target) if f.init}
        _mention_newer_version(values.get("peft_version"))
        accepted = {k: v for k, v in values.items() if k in known and k != "runtime_config"}
        if values.get("variant") and "peft_type" in accepted:
            accepted["peft_type"] = str(accepted["peft_type"]).removesuffix(f":{values['variant']}")
        accepted = {k: v for k, v in accepted.items() if v is not None or k not in (*FLAGS, "inference_mode")}
        refused = [k for k, v in values.items() if k not in known and not _is_harmless(k, v)]
        unknown = unknown_options([str(k) for k in refused], known, {str(k): values[k] for k in refused})
        if refused and not strict:
            warn(f"unknown options in an adapter configuration are ignored: {unknown}")
        if not refused or not strict:
            return target(**accepted)
        message = Text(
            f"the adapter configuration switches on what Veneer does not know, and ignoring it could change "
            f"the adapter's output: {unknown}. Remove the key if it has no effect",
            Hint("strict", False, ", or read with {}"),
        )
        try:
            target(**accepted)
        except ConfigError as error:
            message = Text(message, "\nBesides, ", error.message)
        raise UnknownOptionError(message)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read the configuration of an adapter from a directory or from the hub.

        Args:
            pretrained_model_name_or_path: A directory, which never touches the network, or a repository id.
            subfolder: Where in it the adapter lies.
            **kwargs: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` and the like, for the hub.

        Returns:
            A configuration of the class that the file's ``peft_type`` names.

        Raises:
            AdapterFileError: If the file is missing, unreadable, or no JSON object.
            ConfigError: For another adapter method, or listing every value that cannot be right.
        """
        where = os.path.expanduser(os.fspath(pretrained_model_name_or_path))
        if hub.is_local(where):
            directory = Path(where) / (subfolder or "")
        else:
            directory = Path(hub.download_file(where, CONFIG_NAME, subfolder=subfolder, **kwargs)).parent
        return cls.from_belonging(find_config(directory))

    @classmethod
    def from_belonging(cls, found: BelongingConfig) -> Any:
        """The configuration that was found for tensors; a save that was cut short, or an edit, is said.

        Raises:
            ConfigError: For another adapter method, or listing every value that cannot be right.
        """
        config = cls._named(found.path, found.values)
        if found.cut_short is not None:
            warn(found.cut_short)
        elif found.saved is not None and (changes := _changes(config, found.saved, found.values)):
            warn(f"{found.path} was edited after it was saved, and is used as it is: {'; '.join(changes)}")
        return config

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Any:
        """Read one ``adapter_config.json``, whatever lies beside it; see `from_pretrained`."""
        return cls._named(path, read_config_file(path))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload ``adapter_config.json`` alone, and return the address of the commit.

        Args:
            repo_id: ``"owner/name"``; made if it does not exist.
            **kwargs: As for `veneer.hub.push_to_hub`.

        Raises:
            AdapterFileError: The hub refuses; says why.
            MissingExtraError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory() as directory:
            self.save_pretrained(directory)
            return hub.push_to_hub(directory, repo_id, **kwargs)

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **kwargs: Any) -> dict[str, Any]:
        """The content of one ``adapter_config.json`` as a dictionary; see `from_file`.

        Raises:
            AdapterFileError: If the file is missing, unreadable, or no JSON object.
        """
        return dict(read_config_file(path_json_file))

    @classmethod
    def _named(cls, path: str | os.PathLike[str], values: Mapping[str, Any]) -> Any:
        """The configuration in a file's content, with the file's name in errors."""
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise type(error)(f"{os.fspath(path)}: ", error.message) from error

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Write ``adapter_config.json`` into a directory: whole, or not at all.

        Raises:
            AdapterFileError: If the directory is a file, or cannot be written to.
            ConfigError: If the configuration holds what JSON cannot.
        """
        directory = Path(save_directory)
        if directory.exists() and not directory.is_dir():
            raise AdapterFileError(f"cannot save into {directory}: it is a file, not a directory")
        values = self.to_json(inference_mode=None)
        if auto_mapping_dict is not None:
            values = dict(sorted({**values, "auto_mapping": auto_mapping_dict}.items()))
        try:
            text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the configuration holds what JSON cannot: {error}") from error
        try:
            with new_directory(directory), atomic_file(directory / CONFIG_NAME) as waiting:
                waiting.write_text(text, encoding="utf-8")
        except OSError as error:
            raise AdapterFileError(f"the configuration could not be saved: {error}") from error


def _member(kind: type[_E], value: Any) -> Any:
    """The member of an enumeration, from itself, its value, or the same enumeration of another library."""
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return value
    return value


def init_name(value: object) -> bool | str:
    """The initialisation as booleans or lower-case names; an impossible value gives an empty name."""
    if isinstance(value, bool):
        return value
    return value.lower() if isinstance(value, str) else ""


def _default(entry: dataclasses.Field[Any]) -> Any:
    made = entry.default_factory() if entry.default_factory is not dataclasses.MISSING else entry.default
    return dataclasses.asdict(made) if dataclasses.is_dataclass(made) and not isinstance(made, type) else made


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def _integral(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _portable(pattern: str) -> str | list[str]:
    """A lone name as a list: other readers take a lone string for an expression over the whole path."""
    return pattern if looks_like_regex(pattern) or pattern.lower() == "all-linear" else [pattern]


def _is_harmless(name: object, value: Any) -> bool:
    if value is None or value is False or (isinstance(value, (str, list, dict, tuple)) and not value):
        return True
    return name in _HARMLESS or (isinstance(name, str) and name.endswith("verbose"))


def _class_for(cls: type[PeftConfig], values: Mapping[str, Any]) -> type[PeftConfig]:
    name = values.get("peft_type")
    if isinstance(name, str) and values.get("variant"):
        name = name.removesuffix(f":{values['variant']}")
    if name is None:
        if cls in PEFT_TYPE_TO_CONFIG_MAPPING.values():
            return cls
        raise ConfigError(
            'the configuration has no peft_type; an adapter of this library has "peft_type": "LORA"'
        )
    kind = _member(PeftType, name)
    made = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, PeftType) else None
    if made is not None:
        return cls if issubclass(cls, made) else made
    if isinstance(kind, PeftType):
        raise ConfigError(f"the adapter is of type {kind.value}; Veneer implements LORA only")
    known = [t.value for t in PeftType]
    raise ConfigError(f"peft_type {check.show(name)} is no known adapter method{did_you_mean(name, known)}")


def _mention_newer_version(version: object) -> None:
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version) if isinstance(version, str) else None
    if match and tuple(int(part or 0) for part in match.groups()) > KNOWN_PEFT_VERSION:
        latest = ".".join(map(str, KNOWN_PEFT_VERSION))
        warn(
            f"the adapter was written by peft {short(str(version), 40)}, newer than the {latest} that Veneer "
            "knows; options that it does not know and that are switched on are refused"
        )


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that a dictionary with ``peft_type`` and constructor arguments describes.

    Raises:
        ConfigError: If ``peft_type`` is missing or not ``LORA``, or listing every value that cannot be right.
        UnknownOptionError: For an option that does not exist.
    """
    target = _class_for(PeftConfig, config_dict)
    return target(**config_dict)


def as_config(config: object) -> PeftConfig:
    """A configuration of Veneer's; one of the installed peft library's is converted.

    Raises:
        ConfigError: If it is neither, or of another method than LoRA.
        UnknownOptionError: For an option that is switched on and that Veneer does not know.
    """
    if isinstance(config, PeftConfig):
        return config
    convert = getattr(config, "to_dict", None)
    if callable(convert) and any(cls.__module__.partition(".")[0] == "peft" for cls in type(config).__mro__):
        return PeftConfig.from_dict(convert())
    raise ConfigError(f"a LoraConfig is needed, got {type(config).__name__}")


def check_nesting(values: Any) -> None:
    """Refuse what is nested deeper than any configuration is."""
    level = [values]
    for _ in range(DEEPEST_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (Mapping, list, tuple))
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
        ]
        if not level:
            return
    raise ConfigError(f"the configuration is nested more than {DEEPEST_NESTING} levels deep")


def _changes(config: PeftConfig, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The options that differ in what an adapter computes, as ``name: before -> now``."""
    usual = type(config)().to_dict()

    def value(values: Mapping[str, Any], name: str) -> Any:
        found = values.get(name, usual.get(name))
        if isinstance(found, list) and all(isinstance(entry, str) for entry in found):
            found = sorted(found)
        return found or None  # what is empty or off is written in several ways

    def differ(before: Any, after: Any) -> bool:
        # Of patterns the first that matches wins.
        return bool(before != after or (isinstance(before, dict) and list(before) != list(after)))

    names = sorted((saved.keys() | now.keys()) - _WITHOUT_EFFECT)
    pairs = [(name, value(saved, name), value(now, name)) for name in names]
    return [f"{name}: {check.show(b)} -> {check.show(a)}" for name, b, a in pairs if differ(b, a)]

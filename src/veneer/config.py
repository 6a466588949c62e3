"""Configurations of adapters, and their file ``adapter_config.json``.

Field names, defaults and their positional order are those of peft 0.21.2, so that code and files written
for it work unchanged. What Veneer cannot do yet still parses here; :func:`unsupported_options` names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from veneer.doors import hub, is_local
from veneer.errors import AdapterFileError, ConfigError, UnknownOptionError, VeneerWarning

CONFIG_FILE = "adapter_config.json"
KNOWN_PEFT_VERSION = (0, 21, 2)
LARGEST_RANK = 2**20  # above any weight matrix in use: a larger number in a file is damage or malice
LARGEST_FILE = 16 * 2**20
DEEPEST_NESTING = 32


class TaskType(str, Enum):
    """The tasks that have a model class of their own."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, Enum):
    """The adapter methods whose files exist; Veneer reads ``LORA`` and refuses the others by name."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    ADAMSS = "ADAMSS"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    BEFT = "BEFT"
    LILY = "LILY"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FROD = "FROD"
    PVERA = "PVERA"
    FOURIERFT = "FOURIERFT"
    GLORA = "GLORA"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    UNILORA = "UNILORA"
    CPT = "CPT"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    HIRA = "HIRA"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    TINYLORA = "TINYLORA"
    PSOFT = "PSOFT"
    PEANUT = "PEANUT"
    SHADOW = "SHADOW"
    SUPERTUNING = "SUPERTUNING"
    DEFT = "DEFT"


# --- parts of a configuration ---


@dataclass
class LoftQConfig:
    """Options of ``init_lora_weights="loftq"``.

    Args:
        loftq_bits: Bits of the quantised base weight: 2, 4 or 8.
        loftq_iter: Rounds of quantise-then-factorise; at least 1.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def _problems(self) -> list[str]:
        return [
            *_choice("loftq_config.loftq_bits", self.loftq_bits, (2, 4, 8)),
            *_count("loftq_config.loftq_iter", self.loftq_iter),
        ]


@dataclass
class LoraRuntimeConfig:
    """Options of the running process; never written to a file.

    Args:
        ephemeral_gpu_offload: Copy offloaded weights to the GPU for heavy computations of DoRA.
    """

    ephemeral_gpu_offload: bool = False

    def _problems(self) -> list[str]:
        return _flag("runtime_config.ephemeral_gpu_offload", self.ephemeral_gpu_offload)


@dataclass
class EvaConfig:
    """Options of ``init_lora_weights="eva"``.

    Args:
        rho: The rank of a layer may grow to ``rho * r``; at least 1.
        tau: Cosine similarity of successive singular vectors above which a layer has converged, in [0, 1].
        use_label_mask: Ignore positions whose label is ``label_mask_value``.
        label_mask_value: The label that marks ignored positions.
        whiten: Whiten the singular vectors.
        adjust_scaling_factors: Keep the size of gradients equal when ranks are redistributed.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def _problems(self) -> list[str]:
        found = []
        if not _is_number(self.rho) or self.rho < 1:
            found.append(f"eva_config.rho must be a number of at least 1, got {_show(self.rho)}")
        found += _fraction("eva_config.tau", self.tau)
        return found


@dataclass
class CordaConfig:
    """Options of ``init_lora_weights="corda"``: where statistics are cached, which of its two methods."""

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def _problems(self) -> list[str]:
        return _choice("corda_config.corda_method", self.corda_method, ("ipm", "kpm"))


@dataclass
class LoraGAConfig:
    """Options of ``init_lora_weights="lora_ga"``: which singular vectors of the gradient, how scaled."""

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def _problems(self) -> list[str]:
        return [
            *_choice("lora_ga_config.direction", self.direction, ("ArBr", "A2rBr", "ArB2r", "random")),
            *_choice("lora_ga_config.scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit")),
            *_count("lora_ga_config.stable_gamma", self.stable_gamma),
        ]


# --- checks ---


def _show(value: object) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no repr
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _count(name: str, value: object, least: int = 1, most: int = LARGEST_RANK) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return []
    return [f"{name} must be an integer from {least} to {most}, got {_show(value)}"]


def _positive(name: str, value: Any) -> list[str]:
    if _is_number(value) and value > 0:
        return []
    return [f"{name} must be a finite number above 0, got {_show(value)}"]


def _fraction(name: str, value: Any) -> list[str]:
    if _is_number(value) and 0 <= value <= 1:
        return []
    return [f"{name} must be a number from 0 to 1, got {_show(value)}"]


def _flag(name: str, value: object) -> list[str]:
    return [] if isinstance(value, bool) else [f"{name} must be True or False, got {_show(value)}"]


def _choice(name: str, value: object, known: Iterable[object]) -> list[str]:
    known = tuple(known)
    if any(type(value) is type(k) and value == k for k in known):
        return []
    return [
        f"{name} must be one of {', '.join(map(str, known))}; got {_show(value)}{_did_you_mean(value, known)}"
    ]


def _did_you_mean(value: object, known: Iterable[object]) -> str:
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value.lower(), [str(k).lower() for k in known], n=1, cutoff=0.6)
    spelling = next((str(k) for k in known if near and str(k).lower() == near[0]), None)
    return f" (did you mean {spelling}?)" if spelling else ""


def _text(name: str, value: object) -> list[str]:
    if value is None or isinstance(value, str):
        return []
    return [f"{name} must be a string or None, got {_show(value)}"]


def _is_names(value: object) -> bool:
    return isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) and v for v in value)


def looks_like_regex(pattern: str) -> bool:
    """Whether a pattern is a regular expression: it holds a special character other than a path's dot."""
    return any(c in pattern for c in r"\^$*+?{}[]()|")


def _expression(name: str, pattern: str) -> list[str]:
    if not looks_like_regex(pattern):
        return []
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        return [f"{name}: {_show(pattern)} is not a valid regular expression ({error})"]
    return []


def _patterns(name: str, value: object) -> list[str]:
    """Problems of ``target_modules``-like fields: None, a pattern, or several."""
    if value is None:
        return []
    if isinstance(value, str):
        return _expression(name, value) if value else [f"{name} is an empty string"]
    if not _is_names(value):
        return [f"{name} must be a string or a list of non-empty strings, got {_show(value)}"]
    return [p for v in sorted(value) for p in _expression(name, v)]  # type: ignore[call-overload]


def _pattern_values(name: str, value: object, check: Callable[[str, Any], list[str]]) -> list[str]:
    if not isinstance(value, Mapping):
        return [f"{name} must be a dictionary from module patterns to numbers, got {_show(value)}"]
    found = []
    for key, number in value.items():
        if not isinstance(key, str) or not key:
            found.append(f"{name}: every key must be a non-empty string, got {_show(key)}")
            continue
        found += _expression(name, key)
        found += check(f"{name}[{_show(key)}]", number)
    return found


# --- options that do not exist ---

_SPELLINGS = {
    "alpha": "lora_alpha",
    "scaling": "lora_alpha",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "dim": "r",
    "dropout": "lora_dropout",
    "initialize_lora_weights": "init_lora_weights",
    "init_weights": "init_lora_weights",
    "init": "init_lora_weights",
    "target_module": "target_modules",
    "targets": "target_modules",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "module_to_save": "modules_to_save",
    "excluded_modules": "exclude_modules",
    "layers": "layers_to_transform",
    "ranks": "rank_pattern",
    "alphas": "alpha_pattern",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "task": "task_type",
    "base_model": "base_model_name_or_path",
    "base_model_name": "base_model_name_or_path",
    "lora_bias_type": "bias",
}

_C = TypeVar("_C")


def _unknown_option(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = (
        [_SPELLINGS[name]] if _SPELLINGS.get(name) in known else difflib.get_close_matches(name, known, n=1)
    )
    return f"{name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")


def _names_unknown_options(cls: type[_C]) -> type[_C]:
    """Make the constructor answer an unknown keyword with the option that was probably meant."""
    original = cls.__init__
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        unknown = [_unknown_option(k, known) for k in kwargs if k not in known]
        if unknown:
            raise UnknownOptionError(f"{cls.__name__} has no option {', '.join(unknown)}")
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


# --- configurations ---


@_names_unknown_options
@dataclass
class PeftConfig:
    """What every adapter configuration has.

    Args:
        task_type: One of :class:`TaskType`; picks the model class and the heads that train along.
        peft_type: The adapter method; Veneer implements ``LORA``.
        auto_mapping: How a reader without a task finds the class of the base model.
        peft_version: The version of the reference library that wrote the file this was read from.
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

    def _problems(self) -> list[str]:
        found = []
        if self.task_type is not None and not isinstance(self.task_type, TaskType):
            found += _choice("task_type", self.task_type, [t.value for t in TaskType])
        if self.peft_type is not None and not isinstance(self.peft_type, PeftType):
            near = _did_you_mean(self.peft_type, [t.value for t in PeftType])
            found.append(
                f"peft_type {_show(self.peft_type)} is no known adapter method{near}; Veneer implements LORA"
            )
        mapping: Any = self.auto_mapping
        if mapping is not None and not isinstance(mapping, dict):
            found.append(f"auto_mapping must be a dictionary or None, got {_show(mapping)}")
        for name in ("peft_version", "base_model_name_or_path", "revision"):
            found += _text(name, getattr(self, name))
        return found + _flag("inference_mode", self.inference_mode)

    def validate(self) -> None:
        """Check every value, also those assigned after construction.

        Raises:
            ConfigError: Listing every value that cannot be right.
        """
        problems = self._problems()
        if len(problems) == 1:
            raise ConfigError(f"{type(self).__name__}: {problems[0]}")
        if problems:
            raise ConfigError(
                f"{type(self).__name__} has {len(problems)} problems:\n  - " + "\n  - ".join(problems)
            )

    @property
    def is_prompt_learning(self) -> bool:
        """False: Veneer has no prompt methods; callers of the field's API ask."""
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        """False: Veneer has no prompt methods; callers of the field's API ask."""
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
        for name in _NEEDS_INIT:
            if name in values and _init_name(values.get("init_lora_weights")) != _NEEDS_INIT[name]:
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
        _check_nesting(values)
        target = _class_for(cls, values)
        known = {f.name for f in dataclasses.fields(target) if f.init}
        _mention_newer_version(values.get("peft_version"))
        accepted = {k: v for k, v in values.items() if k in known and k != "runtime_config"}
        accepted = {
            k: v for k, v in accepted.items() if v is not None or k not in (*_FLAGS, "inference_mode")
        }
        refused = [k for k, v in values.items() if k not in known and not _is_harmless(k, v)]
        unknown = ", ".join(_unknown_option(str(k), known) + f" = {_show(values[k])}" for k in refused)
        if refused and not strict:
            warnings.warn(
                f"unknown options in an adapter configuration are ignored: {unknown}", VeneerWarning, 2
            )
        if not refused or not strict:
            return target(**accepted)
        message = (
            f"the adapter configuration switches on what Veneer does not know, and ignoring it could change "
            f"the adapter's output: {unknown}. Remove the key if it has no effect, or read with strict=False"
        )
        try:
            target(**accepted)
        except ConfigError as error:
            message += f"\nBesides, {error}"
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
        if is_local(where):
            return cls.from_file(_config_path(Path(where), subfolder))
        return cls.from_file(Path(hub().download_file(where, CONFIG_FILE, subfolder=subfolder, **kwargs)))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Any:
        """Read one ``adapter_config.json``; see :meth:`from_pretrained`."""
        values = read_config_file(path)
        try:
            return cls.from_dict(values)
        except ConfigError as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], auto_mapping_dict: dict[str, Any] | None = None
    ) -> None:
        """Write ``adapter_config.json`` into a directory: whole, or not at all.

        Raises:
            AdapterFileError: If the directory is a file.
        """
        directory = Path(save_directory)
        if directory.is_file():
            raise AdapterFileError(f"cannot save into {directory}: it is a file, not a directory")
        directory.mkdir(parents=True, exist_ok=True)
        values = self.to_json(inference_mode=None)
        if auto_mapping_dict is not None:
            values = dict(sorted({**values, "auto_mapping": auto_mapping_dict}.items()))
        try:
            text = json.dumps(values, indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the configuration holds what JSON cannot: {error}") from error
        temporary = directory / f".{CONFIG_FILE}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, directory / CONFIG_FILE)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@_names_unknown_options
@dataclass
class LoraConfig(PeftConfig):
    r"""Which modules get a low-rank update, and of what kind: ``W x + scaling * B A x``.

    A *module pattern* is a name (``"q_proj"``), the end of a dotted path (``"mlp.c_proj"``), a full path, or
    a regular expression that matches a whole path: alone and in a list, for every field that takes patterns.

    Args:
        r: The rank of the update; above the size of a layer is legal.
        target_modules: Module patterns, or ``"all-linear"`` for every linear layer but the output head and
            routers. None takes the defaults of the model's type.
        exclude_modules: Module patterns to leave out again.
        lora_alpha: ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: Probability of dropping an element of the branch's input.
        fan_in_fan_out: The weight lies as (in, out), as in transformers' Conv1D.
        bias: Which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` for those of adapted layers.
        use_rslora: Scale by the square root of the rank (https://arxiv.org/abs/2312.03732).
        modules_to_save: Modules that train in full and are saved with the adapter, as names or ends of paths.
        init_lora_weights: True (A Kaiming-uniform, B zero), False (both random), ``"gaussian"``, ``"loftq"``,
            or another initialisation by name.
        layers_to_transform: Numbers of the layers to adapt; others are left out.
        layers_pattern: The name before the layer's number, if it is not the first numbered one.
        rank_pattern: Another ``r`` for modules; the first pattern that matches the end of a path wins.
        alpha_pattern: Another ``lora_alpha`` for modules, by the same rule.
        loftq_config: A :class:`LoftQConfig` or its dictionary, for ``init_lora_weights="loftq"``.
        lora_bias: Give B a trainable bias.
        eva_config, corda_config, lora_ga_config: Options of the initialisation of that name.
        use_dora, velora_config, alora_invocation_tokens, use_qalora, qalora_group_size, monteclora_config,
        use_bdlora, arrow_config, kasa_config: Variants of the update; see :func:`veneer.spec.variant_name`.
        megatron_config, megatron_core, trainable_token_indices, layer_replication, target_parameters,
        ensure_weight_tying: See :func:`unsupported_options`.
        runtime_config: Options of the running process.

    Raises:
        UnknownOptionError: For an option that does not exist, with the one that was probably meant.
        ConfigError: Listing every value that cannot be right.

    Source: Hu et al., LoRA (https://arxiv.org/abs/2106.09685), section 4.1.
    """

    r: int = 8
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    megatron_config: dict[str, Any] | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: LoftQConfig | dict[str, int] = field(default_factory=dict)
    eva_config: EvaConfig | None = None
    corda_config: CordaConfig | None = None
    lora_ga_config: LoraGAConfig | None = None
    use_dora: bool = False
    velora_config: dict[str, Any] | None = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: dict[str, Any] | None = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: LoraRuntimeConfig = field(default_factory=LoraRuntimeConfig)
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: dict[str, Any] | None = None
    arrow_config: dict[str, Any] | None = None
    kasa_config: dict[str, Any] | None = None
    ensure_weight_tying: bool = False

    def _normalise(self) -> None:
        super()._normalise()
        if self.peft_type is None:
            self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple, frozenset)) and _is_names(value):
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            if isinstance(value := getattr(self, name), (tuple, set, frozenset, range)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        for name in ("exclude_modules", "layers_pattern"):
            if getattr(self, name) in ("", []):
                setattr(self, name, None)
        for name in ("rank_pattern", "alpha_pattern", "loftq_config"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        for name in _VARIANT_DICTS:
            if dataclasses.is_dataclass(value := getattr(self, name)) and not isinstance(value, type):
                setattr(self, name, dataclasses.asdict(value))
        for name, kind in _PARTS.items():
            setattr(self, name, _part(kind, getattr(self, name)))
        init = _init_name(self.init_lora_weights)
        loftq = _part(LoftQConfig, self.loftq_config) if self.loftq_config or init == "loftq" else None
        if isinstance(loftq, LoftQConfig):
            self.loftq_config = dataclasses.asdict(loftq)
        if init == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        if init == "corda" and self.corda_config is None:
            self.corda_config = CordaConfig()

    def _problems(self) -> list[str]:
        found = super()._problems()
        if isinstance(self.peft_type, PeftType) and self.peft_type is not PeftType.LORA:
            found.append(f"peft_type must be LORA in a LoraConfig, got {self.peft_type.value}")
        found += _count("r", self.r)
        found += _positive("lora_alpha", self.lora_alpha)
        found += _fraction("lora_dropout", self.lora_dropout)
        found += _choice("bias", self.bias, ("none", "all", "lora_only"))
        for name in _FLAGS:
            found += _flag(name, getattr(self, name))
        return found + self._target_problems() + self._init_problems() + self._rare_problems()

    def _target_problems(self) -> list[str]:
        found = _patterns("target_modules", self.target_modules)
        found += _patterns("exclude_modules", self.exclude_modules)
        found += _patterns("layers_pattern", self.layers_pattern)
        if self.target_modules is not None and not self.target_modules and not self.target_parameters:
            way_out = (
                "full training of modules_to_save alone needs no adapter: set requires_grad on them instead"
                if self.modules_to_save
                else 'name the modules to adapt, or pass "all-linear", or None for the model type\'s defaults'
            )
            found = [f for f in found if not f.startswith("target_modules is an empty")]
            found.append(f"target_modules is empty, so nothing would be adapted; {way_out}")
        if self.modules_to_save is not None and not (
            isinstance(self.modules_to_save, list) and _is_names(self.modules_to_save)
        ):
            found.append(
                f"modules_to_save must be a list of non-empty strings, got {_show(self.modules_to_save)}"
            )
        layers = self.layers_to_transform
        if layers is not None:
            for index in layers if isinstance(layers, list) else [layers]:
                found += _count("layers_to_transform", index, least=0)
        elif self.layers_pattern:
            found.append(
                "layers_pattern without layers_to_transform has no effect: pass the layers' numbers too"
            )
        found += _pattern_values("rank_pattern", self.rank_pattern, _count)
        return found + _pattern_values("alpha_pattern", self.alpha_pattern, _positive)

    def _init_problems(self) -> list[str]:
        found = []
        init = _init_name(self.init_lora_weights)
        if (
            not isinstance(init, bool)
            and init not in _INITS
            and not re.fullmatch(r"pissa_niter_\d{1,4}", str(init))
        ):
            known = ("True", "False", *_INITS, "pissa_niter_<number>")
            found += _choice("init_lora_weights", self.init_lora_weights, known)
        for name, kind in _PARTS.items():
            value = getattr(self, name)
            if isinstance(value, kind):
                found += value._problems()
            elif value is not None or name == "runtime_config":
                found.append(_part_problem(name, kind, value))
        loftq = _part(LoftQConfig, self.loftq_config)
        if isinstance(loftq, LoftQConfig):
            found += loftq._problems()
        else:
            found.append(_part_problem("loftq_config", LoftQConfig, self.loftq_config))
        if self.lora_bias is True and not isinstance(init, bool):
            found.append(
                f"lora_bias=True needs init_lora_weights True or False, got {_show(self.init_lora_weights)}"
            )
        return found

    def _rare_problems(self) -> list[str]:
        found = _text("megatron_core", self.megatron_core)
        for name in (*_VARIANT_DICTS, "megatron_config"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                found.append(f"{name} must be a dictionary or None, got {_show(value)}")
        if self.target_parameters is not None and not _is_names(self.target_parameters):
            found.append(
                f"target_parameters must be a list of strings or None, got {_show(self.target_parameters)}"
            )
        for name, kinds in (
            ("trainable_token_indices", (list, dict)),
            ("alora_invocation_tokens", (list,)),
            ("layer_replication", (list,)),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                found.append(
                    f"{name} must be a {' or '.join(k.__name__ for k in kinds)} or None, got {_show(value)}"
                )
        return found + _count("qalora_group_size", self.qalora_group_size)

    def advice(self) -> list[str]:
        """Sentences about values that are legal but rarely meant, for whoever makes an adapter from them.

        Raises:
            ConfigError: If a value that cannot be right was assigned since construction.
        """
        self.validate()
        found = []
        scale = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        if scale < 0.25 and self.lora_alpha == 8:
            found.append(
                f"lora_alpha is 8 (the default) with r={self.r}, so the update is scaled by {scale:.4g} and "
                f"learns slowly: pass lora_alpha={self.r} for a scale of 1, or use_rslora=True"
                if not self.use_rslora
                else f"lora_alpha is 8 (the default) with r={self.r} and use_rslora, a scale of {scale:.4g}"
            )
        elif scale > 32:
            found.append(
                f"lora_alpha={self.lora_alpha} with r={self.r} scales the update by {scale:.4g}: rarely meant"
            )
        if self.lora_dropout == 1:
            found.append("lora_dropout=1 drops every input of the branch: it never learns")
        for name, init in _NEEDS_INIT.items():
            if getattr(self, name) and _init_name(self.init_lora_weights) != init:
                found.append(f"{name} has no effect without init_lora_weights={init!r}")
        return found


# --- tables and helpers of the configurations ---

_ALWAYS_WRITTEN = frozenset(
    "peft_type task_type base_model_name_or_path r lora_alpha lora_dropout target_modules bias "
    "modules_to_save use_rslora use_dora rank_pattern alpha_pattern fan_in_fan_out init_lora_weights "
    "inference_mode".split()
)
_FLAGS = (
    "fan_in_fan_out",
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "ensure_weight_tying",
)
_INITS = ("gaussian", "loftq", "pissa", "olora", "eva", "corda", "orthogonal", "lora_ga", "mica")
_NEEDS_INIT = {
    "loftq_config": "loftq",
    "eva_config": "eva",
    "corda_config": "corda",
    "lora_ga_config": "lora_ga",
}
_PARTS: dict[str, type[Any]] = {
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "runtime_config": LoraRuntimeConfig,
}
_VARIANT_DICTS = ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config")

_HARMLESS = frozenset("runtime_config merge_weights lora_dtype lorap_lr_ratio lorap_emb_lr".split())

_E = TypeVar("_E", bound=Enum)


def _member(kind: type[_E], value: Any) -> Any:
    """The member of an enumeration, from itself, its value, or the same enumeration of another library."""
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return value
    return value


def _init_name(value: object) -> bool | str:
    """The initialisation as booleans or lower-case names; an impossible value gives an empty name."""
    if isinstance(value, bool):
        return value
    return value.lower() if isinstance(value, str) else ""


def _part(kind: type[Any], value: Any) -> Any:
    """A part of a configuration from its dictionary or from its twin in another library; else unchanged."""
    if isinstance(value, kind):
        return value
    if (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        and type(value).__name__ == kind.__name__
    ):
        value = dataclasses.asdict(value)
    if isinstance(value, dict) and set(value) <= {f.name for f in dataclasses.fields(kind)}:
        return kind(**value)
    return value


def _part_problem(name: str, kind: type[Any], value: object) -> str:
    known = [f.name for f in dataclasses.fields(kind)]
    if isinstance(value, dict):
        unknown = ", ".join(_unknown_option(str(k), known) for k in value if k not in known)
        return f"{name} has no option {unknown}"
    return f"{name} must be a {kind.__name__} or its dictionary, got {_show(value)}"


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
    if name is None:
        if issubclass(cls, LoraConfig):
            return cls
        raise ConfigError(
            'the configuration has no peft_type; an adapter of this library has "peft_type": "LORA"'
        )
    kind = _member(PeftType, name)
    if kind is PeftType.LORA:
        return cls if issubclass(cls, LoraConfig) else LoraConfig
    if isinstance(kind, PeftType):
        raise ConfigError(f"the adapter is of type {kind.value}; Veneer implements LORA only")
    known = [t.value for t in PeftType]
    raise ConfigError(f"peft_type {_show(name)} is no known adapter method{_did_you_mean(name, known)}")


def _mention_newer_version(version: object) -> None:
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", version) if isinstance(version, str) else None
    if match and tuple(int(part or 0) for part in match.groups()) > KNOWN_PEFT_VERSION:
        latest = ".".join(map(str, KNOWN_PEFT_VERSION))
        warnings.warn(
            f"the adapter was written by peft {version}, newer than the {latest} that Veneer knows; "
            "options that it does not know and that are switched on are refused",
            VeneerWarning,
            stacklevel=3,
        )


def _check_nesting(values: Any) -> None:
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


def _config_path(directory: Path, subfolder: str | None) -> Path:
    path = (directory / subfolder if subfolder else directory) / CONFIG_FILE
    if path.is_file():
        return path
    if not directory.exists():
        raise AdapterFileError(
            f"{directory} does not exist; a local adapter is a directory with {CONFIG_FILE}"
        )
    if directory.is_file():
        raise AdapterFileError(f"{directory} is a file; pass the directory of the adapter instead")
    inside = sorted(p.parent.relative_to(directory).as_posix() for p in directory.glob(f"*/{CONFIG_FILE}"))
    hint = (
        f"; adapters lie in its sub-directories: pass subfolder={inside[0]!r}"
        if inside and not subfolder
        else ""
    )
    if inside and subfolder:
        hint = f"; sub-directories with one: {', '.join(inside[:10])}"
    raise AdapterFileError(f"{path} is missing{hint}")


def read_config_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in an ``adapter_config.json``.

    Raises:
        AdapterFileError: If the file is missing, too large, not UTF-8, no JSON, or not an object.
    """
    name = os.fspath(path)
    try:
        with open(path, "rb") as file:
            raw = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise AdapterFileError(f"cannot read {name}: {error.strerror or error}") from error
    if len(raw) > LARGEST_FILE:
        raise AdapterFileError(
            f"{name} is larger than {LARGEST_FILE >> 20} MiB: not an adapter configuration"
        )
    try:
        values = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        kind = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else f"not valid JSON ({_show(str(error))})"
        )
        raise AdapterFileError(f"{name} is {kind}: truncated or damaged?") from error
    if not isinstance(values, dict):
        raise AdapterFileError(
            f"{name} holds a JSON {type(values).__name__}, not an object with the adapter's options"
        )
    return values


# --- what cannot be used yet ---


def variants_of(config: LoraConfig) -> list[str]:
    """The variants of the update that a configuration asks for, by name; none for plain low-rank updates."""
    asked = {
        "dora": config.use_dora,
        "alora": bool(config.alora_invocation_tokens),
        "velora": config.velora_config is not None,
        "qalora": config.use_qalora,
        "bdlora": config.use_bdlora is not None,
        "arrow": config.arrow_config is not None,
        "kasa": config.kasa_config is not None,
        "monteclora": config.monteclora_config is not None,
    }
    return [name for name, wanted in asked.items() if wanted]


_VARIANT_OPTIONS = {
    "dora": "use_dora=True",
    "alora": "alora_invocation_tokens",
    "velora": "velora_config",
    "qalora": "use_qalora=True",
    "bdlora": "use_bdlora",
    "arrow": "arrow_config",
    "kasa": "kasa_config",
    "monteclora": "monteclora_config",
}


def unsupported_options(
    config: LoraConfig, variants: Collection[str] = ("plain",), inits: Collection[str] | None = None
) -> list[str]:
    """A sentence for each option that a configuration switches on and that cannot be honoured.

    Args:
        config: Any configuration that parses.
        variants: The names of the variants that exist.
        inits: The names of the initialisations that exist besides True and False; None leaves them unchecked.

    Returns:
        Sentences for people; empty when all of it can be done.
    """
    asked = variants_of(config)
    found = [
        f"{_VARIANT_OPTIONS[name]} asks for the variant {name!r}, which does not exist here yet"
        for name in asked
        if name not in variants
    ]
    if len(asked) > 1:
        found.append(f"the variants {', '.join(asked)} cannot be combined: choose one")
    init = str(_init_name(config.init_lora_weights)).split("_niter_")[0]
    if inits is not None and init not in ("True", "False") and init not in inits:
        found.append(f"init_lora_weights={config.init_lora_weights!r} does not exist here yet")
    rare = {
        "target_parameters": "low-rank updates of bare parameters",
        "trainable_token_indices": "training of single token embeddings",
        "layer_replication": "replication of layers",
        "megatron_config": "layers of Megatron",
    }
    found += [f"{name}: {what} cannot be done yet" for name, what in rare.items() if getattr(config, name)]
    if config.ensure_weight_tying:
        found.append("ensure_weight_tying=True: adapters of tied weights cannot be tied to each other yet")
    return found


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The configuration that a dictionary with ``peft_type`` and constructor arguments describes.

    Raises:
        ConfigError: If ``peft_type`` is missing or not ``LORA``, or listing every value that cannot be right.
        UnknownOptionError: For an option that does not exist.
    """
    target = _class_for(PeftConfig, config_dict)
    return target(**config_dict)


PEFT_TYPE_TO_CONFIG_MAPPING: dict[PeftType, type[PeftConfig]] = {PeftType.LORA: LoraConfig}

"""The configuration of a LoRA adapter."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from veneer.config import values as check
from veneer.config.base import FLAGS, NEEDS_INIT, PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, init_name
from veneer.config.kinds import PeftType
from veneer.config.parts import (
    PARTS,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    part,
    part_problem,
)
from veneer.config.spelling import names_unknown_options
from veneer.errors import Hint, Text
from veneer.registry import load_plugins

_PISSA = "pissa_niter_<number>"
_INITS = ("gaussian", "loftq", "pissa", "olora", "eva", "corda", "orthogonal", "lora_ga", "mica")


#: Initialisations besides PEFT's, by name, entered by who has them: whether what is saved depends
#: on the name, because the base was replaced.
PLUGIN_INITS: dict[str, bool] = {}


#: The options that hold patterns of modules.
_PATTERNS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "trainable_token_indices",
    "target_parameters",
)
_VARIANT_DICTS = ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config")


def _whole_modules(name: str, value: object) -> list[Text]:
    if value is None or (isinstance(value, list) and check.is_names(value)):
        return check.patterns(name, value)
    return [Text(Hint(name), f" must be a list of non-empty strings, got {check.show(value)}")]


def _layer_numbers(name: str, value: object) -> list[Text]:
    numbers = value if isinstance(value, list) else [value]
    return [problem for number in numbers for problem in check.count(name, number, least=0)]


def _init(name: str, value: object) -> list[Text]:
    init = init_name(value)
    if isinstance(init, bool) or init in _INITS or re.fullmatch(r"pissa_niter_\d{1,4}", init):
        return []
    if _is_plugin_init(init):
        return []
    known = ("True", "False", *_INITS, *sorted({*PLUGIN_INITS}.difference(_INITS)), _PISSA)
    return check.choice(name, value, known)


def _part(kind: type[Any]) -> check.Check:
    def check_part(name: str, value: object) -> list[Text]:
        made = part(kind, value) if kind is LoftQConfig else value  # which is kept as a dictionary
        problems: list[Text] = (
            made._problems() if isinstance(made, kind) else [part_problem(name, kind, value)]
        )
        return problems

    return check_part


def _parameters(name: str, value: object) -> list[Text]:
    if value is None or check.is_names(value):
        return []
    return [Text(Hint(name), f" must be a list of strings or None, got {check.show(value)}")]


def _tokens(name: str, value: object) -> list[Text]:
    if isinstance(value, dict):
        return check.pattern_values(name, value, check.indices)
    if value is None or isinstance(value, list):
        return check.indices(name, value or [])
    return [Text(Hint(name), f" must be a list or dict or None, got {check.show(value)}")]


_CHECKS: dict[str, check.Check] = {
    "r": check.count,
    "lora_alpha": check.positive,
    "lora_dropout": check.fraction,
    "bias": check.one_of("none", "all", "lora_only"),
    **dict.fromkeys(FLAGS, check.flag),
    "target_modules": check.patterns,
    "exclude_modules": check.patterns,
    "layers_pattern": check.patterns,
    "modules_to_save": _whole_modules,
    "layers_to_transform": check.optional(_layer_numbers),
    "rank_pattern": check.by_pattern(check.count),
    "alpha_pattern": check.by_pattern(check.positive),
    "init_lora_weights": _init,
    "eva_config": check.optional(_part(EvaConfig)),
    "corda_config": check.optional(_part(CordaConfig)),
    "lora_ga_config": check.optional(_part(LoraGAConfig)),
    "runtime_config": _part(LoraRuntimeConfig),
    "loftq_config": _part(LoftQConfig),
    "megatron_core": check.text,
    "variant": check.text,
    "variant_options": check.dictionary,
    **dict.fromkeys((*_VARIANT_DICTS, "megatron_config"), check.dictionary_or_none),
    "target_parameters": _parameters,
    "alora_invocation_tokens": check.optional(check.indices),
    "trainable_token_indices": _tokens,
    "layer_replication": check.ranges,
    "qalora_group_size": check.count,
}


@names_unknown_options
@dataclass
class LoraConfig(PeftConfig):
    r"""Which modules get a low-rank update, and of what kind: ``W x + scaling * B A x``.

    A *module pattern* is a name (``"q_proj"``), the end of a dotted path (``"mlp.c_proj"``), a full path, or
    a regular expression that matches a whole path: alone and in a list, for every field that takes patterns.

    Args:
        r: The rank of the update; it may exceed the size of a layer.
        target_modules: Module patterns, or ``"all-linear"`` for every linear layer but the output head, and
            the experts that PEFT takes too. None takes the defaults of the model's type.
        exclude_modules: Module patterns to leave out again.
        lora_alpha: ``scaling = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: Probability of dropping an element of the branch's input.
        fan_in_fan_out: The weight is stored as (in, out), as in transformers' Conv1D.
        bias: Which biases train: ``"none"``, ``"all"``, or ``"lora_only"`` for those of adapted layers.
        use_rslora: Scale by the square root of the rank (https://arxiv.org/abs/2312.03732).
        modules_to_save: Modules that train in full and are saved with the adapter. As in PEFT, a name takes
            every module whose path ends in it, with a dot before it or not.
        init_lora_weights: True (A Kaiming-uniform, B zero), False (both random), ``"gaussian"``, ``"loftq"``,
            or another initialisation by name.
        layers_to_transform: Numbers of the layers to adapt; others are left out.
        layers_pattern: The name before the layer's number, if it is not the first numbered one.
        rank_pattern: Another ``r`` for modules; the first pattern that matches the end of a path wins.
        alpha_pattern: Another ``lora_alpha`` for modules, by the same rule.
        loftq_config: A `LoftQConfig` or its dictionary, for ``init_lora_weights="loftq"``.
        lora_bias: Give B a trainable bias.
        eva_config: Options of the initialisation ``"eva"``.
        corda_config: Options of the initialisation ``"corda"``.
        lora_ga_config: Options of the initialisation ``"lora_ga"``.
        use_dora: Train magnitude and direction of the weight separately (DoRA).
        alora_invocation_tokens: Act only from the last occurrence of these tokens on (aLoRA).
        use_qalora: Refused: a variant of PEFT that Veneer does not have.
        qalora_group_size: Refused with ``use_qalora``.
        velora_config: Refused.
        monteclora_config: Refused.
        use_bdlora: Refused.
        arrow_config: Refused.
        kasa_config: Refused.
        trainable_token_indices: Rows of the input embedding that train, or rows by module pattern; a name
            takes modules as in ``modules_to_save``.
        target_parameters: Parameters without a module of their own, by their path or the end of it.
        layer_replication: Ranges ``[start, end)`` of layers, from which the model is rebuilt.
        ensure_weight_tying: Give an embedding and the head that shares its weight one update.
        megatron_config: Refused: for Megatron's layers.
        megatron_core: As ``megatron_config``.
        variant: The name of a plug-in's variant; PEFT's variants have their own options. Readers without
            the plug-in refuse the saved adapter.
        variant_options: The options of that variant, as JSON values.
        runtime_config: Accepted, without effect.

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
    variant: str | None = None
    variant_options: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value, as PEFT knows them; those of plug-ins only in use."""
        values = super().to_dict()
        if self.variant is None:
            del values["variant"], values["variant_options"]
        return values

    def to_json(
        self, *, target_modules: Iterable[str] | None = None, inference_mode: bool | None = True
    ) -> dict[str, Any]:
        """The content of ``adapter_config.json``; see `PeftConfig.to_json`.

        A variant of a plug-in makes another ``peft_type`` of it, which readers without the plug-in refuse. An
        initialisation of a plug-in is left out where the saved factors say all.
        """
        values = super().to_json(target_modules=target_modules, inference_mode=inference_mode)
        if self.variant is not None:
            values["peft_type"] = f"{values['peft_type']}:{self.variant}"
        init = init_name(self.init_lora_weights)
        if isinstance(init, str) and init not in _INITS and PLUGIN_INITS.get(init) is False:
            values["init_lora_weights"] = True
        return values

    def _normalise(self) -> None:
        super()._normalise()
        if self.peft_type is None:
            self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), (list, tuple, frozenset)) and check.is_names(value):
                setattr(self, name, set(value))
        for name in ("modules_to_save", "layers_to_transform", "layers_pattern"):
            if isinstance(value := getattr(self, name), (tuple, set, frozenset, range)):
                setattr(self, name, sorted(value) if isinstance(value, (set, frozenset)) else list(value))
        for name in ("exclude_modules", "layers_pattern"):
            if getattr(self, name) in ("", []):
                setattr(self, name, None)
        for name in ("rank_pattern", "alpha_pattern", "loftq_config", "variant_options"):
            if getattr(self, name) is None:
                setattr(self, name, {})
        layout: Any = self.fan_in_fan_out
        self.fan_in_fan_out = False if layout is None else layout  # None is axolotl's word for nothing given
        for name in _VARIANT_DICTS:
            if dataclasses.is_dataclass(value := getattr(self, name)) and not isinstance(value, type):
                setattr(self, name, dataclasses.asdict(value))
        for name, kind in PARTS.items():
            setattr(self, name, part(kind, getattr(self, name)))
        init = init_name(self.init_lora_weights)
        loftq = part(LoftQConfig, self.loftq_config) if self.loftq_config or init == "loftq" else None
        if isinstance(loftq, LoftQConfig):
            self.loftq_config = dataclasses.asdict(loftq)
        if init == "eva" and self.eva_config is None:
            self.eva_config = EvaConfig()
        if init == "corda" and self.corda_config is None:
            self.corda_config = CordaConfig()

    def _problems(self) -> list[Text]:
        many = check.too_many_patterns({name: getattr(self, name) for name in _PATTERNS})
        empty = isinstance(self.target_modules, (str, *check.COLLECTIONS)) and not self.target_modules
        left_out = {*(_PATTERNS if many else ()), *(["target_modules"] if empty else ())}
        checks = {name: check for name, check in _CHECKS.items() if name not in left_out}
        return super()._problems() + check.of_fields(self, checks) + many + self._contradictions(empty)

    def _contradictions(self, empty: bool) -> list[Text]:
        found = []
        if isinstance(self.peft_type, PeftType) and self.peft_type is not PeftType.LORA:
            found.append(
                Text(Hint("peft_type"), f" must be LORA in a LoraConfig, got {self.peft_type.value}")
            )
        if empty and not self.target_parameters:
            whole = Hint("modules_to_save")
            way_out = (
                Text("full training of ", whole, " alone needs no adapter: set requires_grad on them instead")
                if self.modules_to_save
                else 'name the modules to adapt, or pass "all-linear", or None for the model type\'s defaults'
            )
            found.append(Text(Hint("target_modules"), " is empty, so nothing would be adapted; ", way_out))
        elif self.target_modules == "":
            found.append(Text(Hint("target_modules"), " is an empty string"))
        if self.layers_pattern and self.layers_to_transform is None:
            found.append(
                Text("layers_pattern without layers_to_transform has no effect: pass the layers' numbers too")
            )
        if self.lora_bias is True and not isinstance(init_name(self.init_lora_weights), bool):
            found.append(
                Text(
                    Hint("lora_bias", True),
                    " needs ",
                    Hint("init_lora_weights"),
                    f" True or False, got {check.show(self.init_lora_weights)}",
                )
            )
        if self.variant is None and isinstance(self.variant_options, dict) and self.variant_options:
            found.append(Text("variant_options without a variant have no effect"))
        return found

    def advice(self) -> list[str]:
        """Sentences about values that are legal but rarely meant, for whoever makes an adapter from them.

        Raises:
            ConfigError: If a value that cannot be right was assigned since construction.
        """
        return [str(text) for text in self._advice()]

    def _advice(self) -> list[Text]:
        self.validate()
        found = []
        rank, alpha = Hint("r", self.r), Hint("lora_alpha", self.lora_alpha)
        scale = self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
        if scale < 0.25 and self.lora_alpha == 8:
            default = Text(Hint("lora_alpha"), " is 8 (the default) with ", rank)
            found.append(
                Text(default, " and ", Hint("use_rslora"), f", a scale of {scale:.4g}")
                if self.use_rslora
                else Text(
                    default,
                    f", so the update is scaled by {scale:.4g} and learns slowly: pass ",
                    Hint("lora_alpha", self.r),
                    " for a scale of 1, or ",
                    Hint("use_rslora", True),
                )
            )
        elif scale > 32:
            found.append(Text(alpha, " with ", rank, f" scales the update by {scale:.4g}: rarely meant"))
        if self.lora_dropout == 1:
            found.append(Text(Hint("lora_dropout", 1), " drops every input of the branch: it never learns"))
        for name, init in NEEDS_INIT.items():
            if getattr(self, name) and init_name(self.init_lora_weights) != init:
                found.append(Text(Hint(name), " has no effect without ", Hint("init_lora_weights", init)))
        return found


def _is_plugin_init(init: str) -> bool:
    if init not in PLUGIN_INITS:
        load_plugins()
    return init in PLUGIN_INITS


PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig

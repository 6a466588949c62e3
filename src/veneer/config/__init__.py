"""Configurations of adapters, and their file ``adapter_config.json``.

Field names, defaults and their positional order are those of peft 0.21.2, so that code and files written
for it work unchanged. What Veneer cannot do yet still parses here; `unsupported_options` names it.
"""

from __future__ import annotations

from veneer.config.base import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, as_config, get_peft_config
from veneer.config.kinds import PeftType, TaskType
from veneer.config.lora import PLUGIN_INITS, LoraConfig
from veneer.config.parts import CordaConfig, EvaConfig, LoftQConfig, LoraGAConfig, LoraRuntimeConfig
from veneer.config.support import init_options, unsupported_options, variants_of
from veneer.config.values import looks_like_regex

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PLUGIN_INITS",
    "CordaConfig",
    "EvaConfig",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftType",
    "TaskType",
    "as_config",
    "get_peft_config",
    "init_options",
    "looks_like_regex",
    "unsupported_options",
    "variants_of",
]

"""All public names. ``import veneer`` loads this module with the first name that is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from veneer.calibration import (
    get_eva_state_dict,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
    replace_lora_weights_loftq,
)
from veneer.checks import TrainingCheck, check_training
from veneer.config import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    CordaConfig,
    EvaConfig,
    LoftQConfig,
    LoraConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PeftType,
    TaskType,
    get_peft_config,
)
from veneer.errors import (
    AdapterFileError,
    AdapterNameError,
    BaseMismatchError,
    CheckpointError,
    CombineError,
    ConfigError,
    DataError,
    ExportError,
    LoadMismatchError,
    MergeError,
    MissingExtraError,
    RoutingError,
    TargetError,
    TrainingError,
    UnknownOptionError,
    VeneerError,
    VeneerWarning,
)
from veneer.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from veneer.inject.api import inject_adapter_in_model
from veneer.inject.sites import plan
from veneer.integrations.as_peft.layout import AUTO, OTHER_METHODS
from veneer.integrations.kbit import prepare_model_for_kbit_training
from veneer.load import load_peft_weights
from veneer.lora_model import LoraModel
from veneer.optimizers import (
    create_lorafa_optimizer,
    create_loraplus_optimizer,
    create_riemannian_optimizer,
)
from veneer.peft_model import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftMixedModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)
from veneer.state_dict import (
    get_base_model_state_dict,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from veneer.status import (
    TunerLayerStatus,
    TunerModelStatus,
    cast_mixed_precision_params,
    get_layer_status,
    get_model_status,
)

if TYPE_CHECKING:
    from veneer.family import Family
    from veneer.integrations.auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from veneer.integrations.export import export_adapter
    from veneer.integrations.imports import import_adapter

#: Names that are rarely needed or need an optional library, and the modules that define them.
_LAZY = {
    "Family": "veneer.family",
    "export_adapter": "veneer.integrations.export",
    "import_adapter": "veneer.integrations.imports",
}
_LAZY |= dict.fromkeys(AUTO, "veneer.integrations.auto")

__all__ = [
    "AdapterFileError",
    "AdapterNameError",
    "BaseMismatchError",
    "CheckpointError",
    "CombineError",
    "ConfigError",
    "DataError",
    "ExportError",
    "LoadMismatchError",
    "MergeError",
    "MissingExtraError",
    "RoutingError",
    "TargetError",
    "TrainingError",
    "UnknownOptionError",
    "TrainingCheck",
    "check_training",
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "CordaConfig",
    "EvaConfig",
    "Family",
    "LoftQConfig",
    "LoraConfig",
    "LoraGAConfig",
    "LoraModel",
    "LoraRuntimeConfig",
    "PeftConfig",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "TaskType",
    "VeneerError",
    "VeneerWarning",
    "TunerLayerStatus",
    "TunerModelStatus",
    "cast_mixed_precision_params",
    "create_lorafa_optimizer",
    "create_loraplus_optimizer",
    "create_riemannian_optimizer",
    "export_adapter",
    "import_adapter",
    "get_layer_status",
    "get_model_status",
    "get_eva_state_dict",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "hotswap_adapter",
    "inject_adapter_in_model",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "load_peft_weights",
    "plan",
    "preprocess_corda",
    "preprocess_loraga",
    "get_base_model_state_dict",
    "set_base_model_state_dict",
    "replace_lora_weights_loftq",
    "set_peft_model_state_dict",
]

#: Names of PEFT that Veneer does not have, and what to use instead.
_REFUSED = {
    "ArrowConfig": "the variant arrow: choose adapters for each row by adapter_names",
    "create_arrow_model": "the variant arrow: choose adapters for each row by adapter_names",
    "BdLoraConfig": "the variant bdlora: use plain LoRA",
    "KasaConfig": "the variant kasa: use plain LoRA or DoRA",
    "MontecloraConfig": "the variant monteclora: use plain LoRA",
    "VeloraConfig": "the variant velora: use plain LoRA, with activation checkpointing for memory",
    "convert_to_lora": "converting other methods to LoRA: do it with the peft library, whose files load here",
    "save_as_lora": "converting other methods to LoRA: do it with the peft library, whose files load here",
    "find_kappa_target_modules": "choosing targets by their condition number: name them in target_modules",
}


#: What is said of all other names of PEFT.
_OTHER = "methods other than LoRA: use LoraConfig, or the peft library"


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        why = _REFUSED.get(name, _OTHER if name in OTHER_METHODS else "")
        reason = f". Veneer does not have {why}" if why else ""
        raise AttributeError(f"module 'veneer' has no attribute {name!r}{reason}")
    return getattr(importlib.import_module(module), name)

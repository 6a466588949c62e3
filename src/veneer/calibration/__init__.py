"""Statistics that initialisations need, measured by running the model before or after injection."""

from __future__ import annotations

from veneer.calibration.corda import preprocess_corda
from veneer.calibration.eva import get_eva_state_dict, initialize_lora_eva_weights
from veneer.calibration.eva_inputs import (
    forward_fn_dict,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from veneer.calibration.loftq import replace_lora_weights_loftq
from veneer.calibration.loraga import preprocess_loraga

__all__ = [
    "forward_fn_dict",
    "get_eva_state_dict",
    "initialize_lora_eva_weights",
    "prepare_layer_inputs_fn_language_modeling",
    "prepare_model_inputs_fn_language_modeling",
    "preprocess_corda",
    "preprocess_loraga",
    "replace_lora_weights_loftq",
]

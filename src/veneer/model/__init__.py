"""Models with adapters: the verbs over them, their files, and the face that users know."""

from __future__ import annotations

from veneer.model.face import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from veneer.model.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from veneer.model.lora_model import LoraModel
from veneer.model.merging import MergeReport
from veneer.model.state_dicts import (
    LoadResult,
    get_base_model_state_dict,
    get_peft_model_state_dict,
    load_peft_weights,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from veneer.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    cast_mixed_precision_params,
    get_layer_status,
    get_model_status,
)
from veneer.model.tasks import (
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
)

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "LoadResult",
    "LoraModel",
    "MergeReport",
    "PeftMixedModel",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "TunerLayerStatus",
    "TunerModelStatus",
    "cast_mixed_precision_params",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "hotswap_adapter",
    "prepare_model_for_compiled_hotswap",
    "get_base_model_state_dict",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]

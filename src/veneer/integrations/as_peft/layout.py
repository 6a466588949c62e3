"""Which names are in which module of the facade.

They are those that transformers, TRL, diffusers, accelerate, sentence-transformers and PEFT's guides import.
The names are attributes of `objects.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

_CONFIGS = (
    "PeftConfig LoraConfig LoftQConfig EvaConfig LoraGAConfig LoraRuntimeConfig PeftType TaskType".split()
)
_MODELS = (
    "PeftModel PeftMixedModel PeftModelForCausalLM PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification PeftModelForQuestionAnswering "
    "PeftModelForFeatureExtraction"
).split()
AUTO = [f"Auto{name}" for name in _MODELS if name != "PeftMixedModel"]
_BASE_STATE = ("get_base_model_state_dict", "set_base_model_state_dict")
_ERRORS = ("PeftError", "PeftWarning", "NoMatchingPeftModuleError")
_STATE = ("get_peft_model_state_dict", "set_peft_model_state_dict", "load_peft_weights")
_STATUS = ("TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status")
_EVA = ("get_eva_state_dict", "initialize_lora_eva_weights")
_INITS = (*_EVA, "preprocess_loraga", "replace_lora_weights_loftq")
_FILES = ("CONFIG_NAME", "SAFETENSORS_WEIGHTS_NAME", "WEIGHTS_NAME")
_OTHER = (
    *_FILES,
    *(
        "AuxiliaryTrainingWrapper ModulesToSaveWrapper _get_submodules fsdp_auto_wrap_policy "
        "cast_mixed_precision_params get_pattern_key get_quantization_config infer_device "
        "prepare_model_for_kbit_training transpose"
    ).split(),
)
_LORA = (
    "CordaConfig LoraGAConfig LoraConfig LoraLayer LoraModel LoftQConfig EvaConfig LoraRuntimeConfig".split()
)
_QUANTISED = ("Linear4bit", "Linear8bitLt")
_FUNCTIONAL = ("cast_adapter_dtype", "delete_adapter", "set_adapter", "set_requires_grad")
_CONVERSION = (
    "build_peft_weight_mapping",
    "convert_peft_config_for_transformers",
    "get_model_conversion_mapping",
)
_HOTSWAP = (
    "check_hotswap_configs_compatible",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "prepare_model_for_compiled_hotswap",
)

LAYOUT: dict[str, Sequence[str]] = {
    "peft": (
        *_CONFIGS,
        *_MODELS,
        *AUTO,
        *_STATE,
        *_INITS,
        *_BASE_STATE,
        *_ERRORS,
        *(
            "LoraModel PEFT_TYPE_TO_MIXED_MODEL_MAPPING MODEL_TYPE_TO_PEFT_MODEL_MAPPING "
            "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_TUNER_MAPPING cast_mixed_precision_params "
            "get_layer_status get_model_status get_peft_config get_peft_model inject_adapter_in_model "
            "prepare_model_for_kbit_training"
        ).split(),
    ),
    "peft.auto": (*AUTO, "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftConfig"),
    "peft.config": ("PeftConfig", "PeftConfigMixin", "PromptLearningConfig"),
    "peft.functional": (
        *_FUNCTIONAL,
        "get_peft_model_state_dict",
        "inject_adapter_in_model",
        "set_peft_model_state_dict",
    ),
    "peft.helpers": (
        "DoraCaching check_if_peft_model disable_input_dtype_casting rescale_adapter_scale "
        "update_forward_signature update_generate_signature update_signature"
    ).split(),
    "peft.import_utils": ("is_bnb_available", "is_bnb_4bit_available", "is_torchao_available"),
    "peft.mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING "
        "get_peft_config inject_adapter_in_model"
    ).split(),
    "peft.mapping_func": ("MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "get_peft_model"),
    "peft.optimizers": (
        "create_lorafa_optimizer",
        "create_loraplus_optimizer",
        "create_riemannian_optimizer",
    ),
    "peft.peft_model": (*_MODELS, *_STATE, *_STATUS),
    "peft.mixed_model": ("PeftMixedModel",),
    "peft.tuners": _LORA,
    "peft.tuners.tuners_utils": (
        "BaseTuner BaseTunerLayer _maybe_include_all_linear_layers cast_adapter_dtype "
        "check_adapters_to_merge check_target_module_exists delete_adapter onload_layer set_adapter"
    ).split(),
    "peft.tuners.lora": (*_QUANTISED, *_LORA, *_INITS, "Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear"),
    "peft.tuners.lora.config": [name for name in _LORA if name.endswith("Config")],
    "peft.tuners.lora.layer": "LoraLayer Conv1d Conv2d Conv3d Embedding Linear ParamWrapper".split(),
    "peft.tuners.lora.bnb": _QUANTISED,
    "peft.tuners.lora.corda": ("preprocess_corda",),
    "peft.tuners.lora.eva": _EVA,
    "peft.tuners.lora.loraga": ("preprocess_loraga",),
    "peft.tuners.lora.model": ("LoraModel",),
    "peft.tuners.lora.tp_layer": ("LoraParallelLinear",),
    "peft.tuners.loha": ("LoHaLayer",),
    "peft.tuners.loha.layer": ("LoHaLayer",),
    "peft.tuners.lokr": ("LoKrLayer",),
    "peft.tuners.lokr.layer": ("LoKrLayer", "factorization"),
    "peft.utils": (*_STATE, *_BASE_STATE, *_ERRORS, *_OTHER, "PeftType", "TaskType"),
    "peft.utils.constants": _FILES,
    "peft.utils.hotswap": _HOTSWAP,
    "peft.utils.integrations": ("dequantize_module_weight", "gather_params_ctx", "init_empty_weights"),
    "peft.utils.other": _OTHER,
    "peft.utils.peft_types": ("PeftType", "TaskType"),
    "peft.utils.error": ("NoMatchingPeftModuleError", "PeftError"),
    "peft.utils.warning": ("PeftWarning",),
    "peft.utils.save_and_load": (*_STATE, *_BASE_STATE),
    "peft.utils.transformers_weight_conversion": _CONVERSION,
}

# Names of peft's insides: they can be imported, and calling one says what it is.
INSIDES = ("convert_peft_config_for_transformers",)
# The same of methods of PEFT's models.
INSIDES_OF_MODELS = ("_create_and_replace", "_cast_adapter_dtype")

# Public names of peft 0.21 of methods and options that Veneer does not have.
_METHODS_WITH_MODEL = (
    "AdaLora Adamss AdaptionPrompt BOFT Beft C3A Deft Delora FourierFT Frod Glora Gralora HRA Hira IA3 "
    "LNTuning Lily LoHa LoKr Miss OFT OSF Peanut Poly Psoft Pvera RandLora Road Shadow Shira Supertuning "
    "TinyLora TrainableTokens UniLora VBLoRA Vera WaveFT XLora"
).split()
OTHER_METHODS = (
    *(f"{method}{kind}" for method in _METHODS_WITH_MODEL for kind in ("Config", "Model")),
    "ArrowConfig",
    "BdLoraConfig",
    "CPTConfig",
    "CPTEmbedding",
    "CartridgeConfig",
    "CartridgeEncoder",
    "KasaConfig",
    "MontecloraConfig",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PrefixEncoder",
    "PrefixTuningConfig",
    "PromptEmbedding",
    "PromptEncoder",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "VeloraConfig",
    "TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING",
    "bloom_model_postprocess_past_key_value",
    "compose_cartridge_adapters",
    "convert_to_lora",
    "create_arrow_model",
    "find_kappa_target_modules",
    "initialize_kv_prefix_from_past_key_values",
    "initialize_kv_prefix_from_text",
    "prompt_embeddings_from_past_key_values",
    "save_as_lora",
    "shift_tokens_right",
)

# The packages of peft.tuners that belong to them, and the modules in one that can be imported.
OTHER_MODULES = ("bnb", "config", "layer", "model")
OTHER_PACKAGES = frozenset(
    (
        "adalora adamss adaption_prompt beft boft c3a cartridge cpt deft delora fourierft frod glora gralora "
        "hira hra ia3 lily ln_tuning loha lokr miss mixed multitask_prompt_tuning oft osf p_tuning peanut "
        "poly prefix_tuning prompt_tuning psoft pvera randlora road shadow shira supertuning tinylora "
        "trainable_tokens unilora vblora vera waveft xlora"
    ).split()
)

"""The class of each task, and the function that begins everything."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from veneer.adapters import as_names
from veneer.config import PeftConfig, TaskType
from veneer.errors import (
    ConfigError,
)
from veneer.model.face import PeftModel


class PeftModelForCausalLM(PeftModel):
    """A language model that predicts the next token."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """A model with a head that classifies sequences; the head is trained whole."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """A model with a head that classifies tokens; the head is trained whole."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A model with a head that marks answers; the head is trained whole."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are used."""

    task = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """Several adapters at work together; the field's name for a model whose adapters may differ in method.

    Here every adapter is a LoRA, and every `PeftModel` may have several active at once, so the two classes
    differ by name, and by `delete_adapter`, which takes several names.
    """

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Remove one adapter or several.

        Raises:
            AdapterNameError: For a name that the model does not have; nothing is removed then.
        """
        names = as_names(adapter_name)
        self.base_model.index.check(names, known=self.peft_config)
        for name in names:
            super().delete_adapter(name)


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
    *,
    strict_targets: bool = False,
) -> PeftModel:
    """Put an adapter into a model, freeze everything else, and wrap it.

    Args:
        model: Any torch module; changed in place.
        peft_config: What to adapt; copied, never written.
        adapter_name: Name of the adapter.
        mixed: Return a `PeftMixedModel`.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        revision: Revision of the base model, noted in the configuration.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
        strict_targets: Raise where part of the configuration matches nothing, instead of warning.

    Returns:
        A model of the class that the configuration's task has.

    Raises:
        ConfigError: If an option cannot be honoured.
        TargetError: If nothing matches, or what matches cannot be adapted. The model is then as it was.
    """
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"a LoraConfig is needed, got {type(peft_config).__name__}")
    config = copy.deepcopy(peft_config)
    if revision is not None:
        config.revision = revision
    cls = PeftMixedModel if mixed else PeftModel.class_for(config.task_type)
    return cls(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        strict_targets=strict_targets,
    )

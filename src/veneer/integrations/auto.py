"""`AutoPeftModel…`: load an adapter together with its base model, which transformers finds."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from veneer.config import PeftConfig, TaskType
from veneer.errors import AdapterFileError, ConfigError, MissingExtraError, show
from veneer.hub import adapter_directory
from veneer.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from veneer.wording import warn

#: Options of `PeftModel.from_pretrained`; the others belong to the base model.
_ADAPTER_OPTIONS = ("autocast_adapter_dtype", "key_mapping", "strict", "check_base", "check_finite")
#: Options of the hub. The base has its own revision, in the configuration.
_HUB_OPTIONS = ("token", "cache_dir", "local_files_only", "force_download", "proxies")

#: The task of an adapter -> transformers' class for its base.
AUTO_CLASSES = {
    TaskType.CAUSAL_LM.value: "AutoModelForCausalLM",
    TaskType.SEQ_2_SEQ_LM.value: "AutoModelForSeq2SeqLM",
    TaskType.SEQ_CLS.value: "AutoModelForSequenceClassification",
    TaskType.TOKEN_CLS.value: "AutoModelForTokenClassification",
    TaskType.QUESTION_ANS.value: "AutoModelForQuestionAnswering",
    TaskType.FEATURE_EXTRACTION.value: "AutoModel",
}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MissingExtraError("transformers", "hf", "loading a base model") from error


class AutoPeftModel:
    """Loads an adapter together with the base model that its configuration names."""

    task: ClassVar[TaskType | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(adapter)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load base and adapter.

        Args:
            pretrained_model_name_or_path: Directory of the adapter, or its repository id.
            adapter_name: Name for it in the model.
            is_trainable: Whether its parameters require gradients.
            config: Use this configuration instead of the file's.
            revision: Revision of the adapter; that of the base is in the configuration.
            import_allowlist: Libraries from which a configuration without a task may name a class for its
                base; by default only transformers.
            **kwargs: Options of `PeftModel.from_pretrained` go there, those of the hub to both, all others to
                the base model's ``from_pretrained``. Code that the base brings is not run, unless
                ``trust_remote_code=True`` is among them.

        Raises:
            AdapterFileError: If the adapter or the name of its base is missing.
            ConfigError: If the adapter is for another task than this class.
        """
        options = {k: kwargs.pop(k) for k in _ADAPTER_OPTIONS if k in kwargs}
        shared = {k: kwargs[k] for k in _HUB_OPTIONS if k in kwargs}
        # The base is named by a file, and transformers would ask whether to run the base's code.
        trusted = bool(kwargs.setdefault("trust_remote_code", False))
        subfolder = kwargs.pop("subfolder", None)
        directory = adapter_directory(
            pretrained_model_name_or_path, subfolder=subfolder, revision=revision, **shared
        )
        said = PeftConfig.from_pretrained(directory) if config is None else config
        base = cls._load_base(said, directory, kwargs, import_allowlist)
        _fit_vocabulary(base, directory, trusted)
        adapted = PeftModel if cls.task is None else MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.task.value]
        return adapted.from_pretrained(
            base, directory, adapter_name, is_trainable=is_trainable, config=config, **options
        )

    @classmethod
    def _load_base(
        cls, config: PeftConfig, directory: Path, kwargs: dict[str, Any], allowed: Sequence[str] | None
    ) -> Any:
        name = config.base_model_name_or_path
        if not name:
            raise AdapterFileError(
                f"the configuration in {directory} does not name its base model; load the base yourself and "
                "use PeftModel.from_pretrained(base, adapter)"
            )
        task = getattr(config.task_type, "value", config.task_type)
        if cls.task is not None and task is not None and task != cls.task.value:
            raise ConfigError(
                f"the adapter in {directory} is for {task}, and {cls.__name__} is for {cls.task.value}; "
                "AutoPeftModel takes every task"
            )
        wanted = task if cls.task is None else cls.task.value
        if wanted is not None:
            auto = getattr(_transformers(), AUTO_CLASSES[wanted])
        elif config.auto_mapping is not None:
            auto = _mapped_class(config.auto_mapping, allowed)
        else:
            raise AdapterFileError(
                f"the configuration in {directory} has no task_type, so the kind of base model is unknown: "
                "use one of the AutoPeftModelFor… classes, or load the base yourself and use "
                "PeftModel.from_pretrained"
            )
        return auto.from_pretrained(name, revision=config.revision, **kwargs)


def _mapped_class(mapping: dict[str, Any], allowed: Sequence[str] | None) -> Any:
    """The class that ``auto_mapping`` names. Only allowed libraries are imported."""
    library, name = str(mapping.get("parent_library") or ""), str(mapping.get("base_model_class") or "")
    known = ("transformers",) if allowed is None else tuple(allowed)
    if not any(library == place or library.startswith(f"{place}.") for place in known):
        raise ConfigError(
            f"auto_mapping names the library {show(library)}, and only {', '.join(known) or 'none'} may be "
            f"imported; if you trust it, pass import_allowlist=[{show(library.partition('.')[0])}]"
        )
    own = library.partition(".")[0] == "transformers"
    found = getattr(_transformers() if own else importlib.import_module(library), name, None)
    if found is None or not hasattr(found, "from_pretrained"):
        raise ConfigError(f"auto_mapping names {show(name)}, which {library} does not have")
    return found


def _fit_vocabulary(base: Any, directory: Path, trusted: bool) -> None:
    """Resize the base if the adapter's directory has a larger tokenizer, with which it was trained."""
    if not (directory / "tokenizer_config.json").exists() or not hasattr(base, "resize_token_embeddings"):
        return
    embedding = base.get_input_embeddings()
    size = len(_transformers().AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trusted))
    # Bases are often padded beyond their tokenizer; resize only if a token has no row.
    if size > embedding.weight.shape[0]:
        warn(
            f"the tokenizer beside the adapter has {size} tokens and the base {embedding.weight.shape[0]} "
            "rows: the base's embeddings are resized"
        )
        base.resize_token_embeddings(size)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Loads a causal language model with its adapter."""

    task = TaskType.CAUSAL_LM


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Loads an encoder-decoder language model with its adapter."""

    task = TaskType.SEQ_2_SEQ_LM


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Loads a sequence classifier with its adapter."""

    task = TaskType.SEQ_CLS


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Loads a token classifier with its adapter."""

    task = TaskType.TOKEN_CLS


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Loads a question answering model with its adapter."""

    task = TaskType.QUESTION_ANS


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Loads a model without a head with its adapter."""

    task = TaskType.FEATURE_EXTRACTION

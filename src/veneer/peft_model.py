"""PeftModel, the class of each task, and the function that begins everything."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from veneer.adapters import as_names, walk
from veneer.config import LoraConfig, PeftConfig, PeftType, TaskType, as_config
from veneer.errors import AdapterNameError, CheckpointError, ConfigError
from veneer.files.read import AdapterFile, open_adapter
from veneer.files.report import LoadReport
from veneer.hub import HUB_OPTIONS, adapter_directory, push_adapter, refuse_unknown
from veneer.load import Checks, KeyMapping, load, renamer
from veneer.lora_model import LoraModel, mention_biases
from veneer.ops.dropout import Draws
from veneer.routing import Routing, disabled, keep_for_backward, routed
from veneer.save import save, subtracted_start, update_card
from veneer.state_dict import check_save_embedding_layers
from veneer.status import (
    AdapterStates,
    TunerLayerStatus,
    TunerModelStatus,
    adapter_states,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from veneer.variants.alora import Activation, find_activation
from veneer.wording import warn

#: Trainer calls these through the wrapper; transformers sees to the input of models of `input_ids` alone.
_ENABLES_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")

#: The class of each task; a class enters itself.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}

#: Keywords that PEFT's callers pass along when they load: places for a base that is spread over devices,
#: which its own hooks decide here, and a leniency whose place is taken by ``strict``.
_LOADING = HUB_OPTIONS | frozenset(
    """
    torch_device device_map max_memory offload_folder offload_dir offload_index use_safetensors
    ignore_mismatched_sizes
    """.split()
)
#: Keywords that savers of whole models take, and that trainers pass along.
_SAVING = HUB_OPTIONS | frozenset(
    """
    state_dict save_function max_shard_size push_to_hub variant save_peft_format save_original_format
    repo_id repo_name commit_message commit_description private create_pr save_config distributed_checkpoint
    """.split()
)
#: Further keywords of `PeftModel.from_pretrained`, in the order of `Checks`.
_CHECKS = ("strict", "check_base", "check_finite")


class PeftModel(nn.Module):
    """A base model with adapters, which alone are trained, saved and loaded.

    Args:
        model: The base model; adapters are put into it in place, and everything else is frozen.
        peft_config: Configuration of the first adapter (copied), or None to start without one.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.

    Raises:
        ConfigError, TargetError, AdapterNameError: The model is then as it was.
    """

    base_model: LoraModel
    task: ClassVar[TaskType | None] = None

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("task") is not None:
            MODEL_TYPE_TO_PEFT_MODEL_MAPPING[cls.__dict__["task"].value] = cls

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        config = None if peft_config is None else as_config(peft_config)
        if config is not None and not config.base_model_name_or_path:
            config = copy.deepcopy(config)
            config.base_model_name_or_path = name_of(model)
        self.base_model = LoraModel(
            model,
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **options,
        )
        self.training = self.base_model.training
        if hasattr(model, "config"):
            self.config: Any = model.config
        _let_checkpointing_pass_gradients(model)

    @classmethod
    def class_for(cls, task_type: str | TaskType | None) -> type[PeftModel]:
        """The class of a task; a class that is one task's stays what it is."""
        if cls is not PeftModel:
            return cls
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(getattr(task_type, "value", task_type) or "", PeftModel)

    # -- attributes that PEFT's users know ---------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the (first) active adapter.

        Raises:
            AdapterNameError: If none is active.
        """
        return self.peft_config[self._first_active()]

    def _first_active(self) -> str:
        active = self.active_adapters
        if not active:
            have = ", ".join(self.peft_config) or "none"
            raise AdapterNameError(f"no adapter is active; the model has: {have}")
        return active[0]

    def get_base_model(self) -> nn.Module:
        """The model that was adapted."""
        return self.base_model.model

    @property
    def peft_type(self) -> PeftType | None:
        """The method of the adapters, active or not: LoRA; None in a model without adapters."""
        return PeftType.LORA if self.peft_config else None

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.base_model.active_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list if it is not exactly one."""
        return self.base_model.active_adapter

    @property
    def adapters(self) -> AdapterStates:
        """The adapters by name: ranks, size, and whether active, merged, trainable; shown as a table."""
        return adapter_states(self)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether some adapter is active and not disabled."""
        return any(m.active_adapters and not m.disable_adapters for m in self.base_model.index.modules())

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains in full."""
        names = {n for c in self.peft_config.values() for n in (c.modules_to_save or ())}
        return names or None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            found = getattr(self.base_model, name)
            return self._enabling(found) if name in _ENABLES_CHECKPOINTING else found

    def _enabling(self, enable: Callable[..., Any]) -> Callable[..., Any]:
        """The base's method that turns gradient checkpointing on, after which gradients still arrive."""

        @functools.wraps(enable)
        def method(*args: Any, **kwargs: Any) -> Any:
            result = enable(*args, **kwargs)
            _let_checkpointing_pass_gradients(self.get_base_model())
            return result

        return method

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """What the adapted model gives.

        Args:
            adapter_names: For a mixed batch: the adapter of each row, ``"__base__"`` for none. Which adapters
                are active does not matter then.

        Raises:
            RoutingError: For adapters that cannot be mixed, or names that do not fit the rows.
        """
        activation = self._activation(adapter_names, False, args, kwargs)
        if adapter_names is None and activation is None and not self._may_be_computed_again_disabled():
            return self.get_base_model()(*args, **kwargs)
        with self._routed(adapter_names, activation=activation) as routing:
            output = self.get_base_model()(*args, **kwargs)
        keep_for_backward(output, routing)
        return output

    def _may_be_computed_again_disabled(self) -> bool:
        """Whether this call is one of a context, and has a graph that outlives it."""
        opened = self.base_model._contexts.open
        return bool(opened) and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `torch.nn.Module.compile`, for the base model with its adapters.

        What stands before it here stays outside of the graph: names of adapters are made tensors first, so
        that another mixed batch of the same size is not compiled anew.
        """
        self.get_base_model().compile(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's ``generate``; input ids by keyword or by position.

        Args:
            adapter_names: For a mixed batch: the adapter of each row, ``"__base__"`` for none.

        Raises:
            RoutingError: For adapters that cannot be mixed, or names that do not fit the rows.
        """
        model = self.get_base_model()
        activation = self._activation(adapter_names, True, args, kwargs)
        if adapter_names is None and activation is None:
            return model.generate(*args, **kwargs)  # type: ignore[operator]
        with self._routed(adapter_names, _expansion(model, kwargs), activation):
            return model.generate(*args, **kwargs)  # type: ignore[operator]

    def _routed(
        self,
        names: Sequence[str] | None,
        expand: int = 1,
        activation: Activation | None = None,
        draws: Mapping[str, Draws] = MappingProxyType({}),
    ) -> AbstractContextManager[Routing]:
        """The context of one call whose rows go through these adapters, or through the active ones."""
        if names is not None:
            self.base_model.check_mixed_batch(names)
        base, adapters = self.get_base_model(), list(self.peft_config)
        flattening = self.base_model.flattening
        return routed(base, list(names or ()), expand, activation, adapters, draws, flattening)

    def _activation(
        self, names: Sequence[str] | None, generates: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Activation | None:
        """Where the aLoRA adapters of a call act; None if it uses none. Takes ``alora_offsets`` out."""
        offsets = kwargs.pop("alora_offsets", None)
        if not self.base_model.invocable:
            return None
        used = self.active_adapters if names is None else names
        configs = {name: self.peft_config[name] for name in used if name in self.peft_config}
        invocations = {name: getattr(c, "alora_invocation_tokens", None) for name, c in configs.items()}
        tokens = {name: list(sequence) for name, sequence in invocations.items() if sequence}
        if not tokens or all(layer.disable_adapters for layer in self.base_model.layers().values()):
            return None
        return find_activation(tokens, offsets, args, kwargs, generates=generates)

    def train(self, mode: bool = True) -> PeftModel:
        """Set the training mode; warn if there is nothing to train."""
        super().train(mode)
        if mode and self.peft_config and not any(p.requires_grad for p in self.parameters()):
            warn(
                "this model is put into training mode, but every parameter is frozen: load the adapter with "
                "is_trainable=True, or call set_adapter(name) to train it"
            )
        if mode:
            self.base_model.mention_unmeasured(self.active_adapters)
        return self

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Let gradients pass through the frozen embeddings of a model that is not quantised.

        Not needed for the base model itself: enabling its gradient checkpointing does this.
        """
        enable = getattr(model, "enable_input_require_grads", None)
        if callable(enable) and not getattr(model, "is_quantized", False):
            enable()

    # -- adapters ----------------------------------------------------------------------------------------

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        strict_targets: bool = False,
    ) -> None:
        """Add an adapter with fresh factors; it is not activated.

        Raises:
            ConfigError, TargetError, AdapterNameError: The model is then as it was.
        """
        config = copy.deepcopy(as_config(peft_config))
        if not config.base_model_name_or_path:
            config.base_model_name_or_path = name_of(self.get_base_model())
        self.base_model.inject(
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            strict_targets=strict_targets,
            activate=not self.peft_config,
        )

    def set_adapter(
        self, adapter_name: str | Sequence[str] | Mapping[str, float], inference_mode: bool = False
    ) -> None:
        """Make one or several adapters the active ones, trainable unless ``inference_mode``.

        A mapping of names to numbers sets their strengths too: ``{"style": 0.5, "task": 1.0}``.
        """
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, no other one takes its place."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes what its base computes, for the thread that opens it.

        Contexts may overlap and end in any order. Other threads, also those that are started inside, see the
        model as it is; `disable_adapter_layers` of its ``base_model`` is for all of them.
        """
        mention_biases(self.peft_config)
        with disabled(self.get_base_model(), self.base_model._contexts):
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; packed 4-bit weights count as what they hold."""
        return count_parameters(self)

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The status of every module that holds adapters; see `veneer.get_layer_status`."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The status of all adapters of the model; see `veneer.get_model_status`."""
        return get_model_status(self)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and their ratio in per cent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}")

    # -- files -------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters, and nothing of the base model.

        The adapter ``"default"`` goes into the directory itself, any other into a subdirectory of its name.

        Args:
            save_directory: Made if it does not exist.
            safe_serialization: False writes a pickled ``.bin`` instead of safetensors.
            selected_adapters: Names; None means all.
            save_embedding_layers: Save input and output embeddings along: True, False, or "auto" (those that
                are targeted, and both if the vocabulary was resized).
            is_main_process: False writes nothing (other ranks of a group). Where FSDP keeps the adapter in
                pieces and no ``state_dict`` is given, every rank has to call: the pieces are gathered, the
                first rank that says True writes, and all go on when that is done.
            path_initial_model_for_weight_conversion: Not needed: initialisations that change the base
                elsewhere keep it exact here, and their adapters are saved as plain ones.
            **kwargs: ``state_dict``: take the values from this full state dict. Others
                that trainers pass along to any model (``save_function``, ``max_shard_size``, ``token`` and
                the like) are without meaning for an adapter.

        Raises:
            UnknownOptionError: For a keyword that nobody passes.
            ConfigError: For another value of ``save_embedding_layers``.
            CheckpointError: If the adapter cannot be written; what was there before is whole. Also where
                FSDP1 keeps it in pieces and wraps the model from outside.
        """
        refuse_unknown("save_pretrained", kwargs, _SAVING, _parameters(PeftModel.save_pretrained))
        check_save_embedding_layers(save_embedding_layers)
        if kwargs.get("push_to_hub"):
            warn("save_pretrained uploads nothing: call push_to_hub(repo_id) for that")
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        self.base_model.index.check(names, known=self.peft_config)
        if path_initial_model_for_weight_conversion is not None:
            self._check_conversion(names)
        save(
            self,
            self.base_model,
            save_directory,
            names,
            safe_serialization=safe_serialization,
            save_embedding_layers=save_embedding_layers,
            state_dict=kwargs.get("state_dict"),
            is_main_process=is_main_process,
        )

    def _check_conversion(self, names: Sequence[str]) -> None:
        """Say that nothing needs converting, where that was asked for.

        Raises:
            CheckpointError: For an adapter whose initialisation has nothing to do with it.
        """
        if others := [name for name in names if subtracted_start(self.base_model, name) is None]:
            raise CheckpointError(
                f"path_initial_model_for_weight_conversion: the adapter {others[0]!r} has no start that was "
                "subtracted from anything; save without it"
            )
        warn(
            "path_initial_model_for_weight_conversion is not needed: the base was never changed, and the "
            "saved adapter is a plain one for it"
        )

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the card of the active adapter, keeping the body of an existing one.

        Raises:
            CheckpointError: If it cannot be written; the existing one is as it was.
        """
        update_card(self.base_model, self._first_active(), output_dir)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary directory and upload it with huggingface_hub."""
        return push_adapter(self, repo_id, **kwargs)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: KeyMapping | None = None,
        *,
        strict: bool = True,
        check_base: bool = True,
        check_finite: bool = True,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load another adapter; it is not activated unless it is the first.

        Under a name that is taken it fills the tensors of that adapter, in place, as trainers do to resume.

        Args:
            model_id: A directory, which never touches the network, or a repository id on the hub.
            adapter_name: Name for it in this model.
            is_trainable: Whether its parameters require gradients once active.
            torch_device: Ignored: factors go where their layer computes.
            autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
            ephemeral_gpu_offload: Accepted as in PEFT.
            low_cpu_mem_usage: Accepted as in PEFT: factors are never initialised before loading.
            key_mapping: Renames keys of the file: regular expressions to replacements, or a function.
            strict: Raise unless every tensor of the file is used and every expected one is there.
            check_base: Raise if the adapter was made on a plainly different base model.
            check_finite: Raise if a tensor holds NaN or infinity; False warns.
            config: Use this configuration instead of the file's.
            **kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` and the like.

        Returns:
            The account of every tensor.

        Raises:
            ConfigError: If the configuration or a renaming is none; for unknown keywords.
            AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then as it was.
        """
        refuse_unknown("load_adapter", kwargs, _LOADING, _parameters(PeftModel.load_adapter))
        rename = renamer(key_mapping)
        file, config = _opened(model_id, config, kwargs)
        return load(
            self,
            self.base_model,
            file,
            config,
            adapter_name,
            rename=rename,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            checks=Checks(strict, check_base, check_finite),
        )

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: KeyMapping | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on its base model; the arguments are those of `load_adapter`.

        Returns:
            A model of the class that the adapter's task has.

        Raises:
            ConfigError: If the configuration or a renaming is none; for unknown keywords.
            AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then as it was.
        """
        known = _parameters(PeftModel.from_pretrained).union(_CHECKS)
        refuse_unknown("from_pretrained", kwargs, _LOADING.union(_CHECKS), known)
        rename = renamer(key_mapping)
        file, config = _opened(model_id, config, kwargs)
        result = cls.class_for(config.task_type)(model)
        strict, check_base, check_finite = (kwargs.get(name, True) for name in _CHECKS)
        load(
            result,
            result.base_model,
            file,
            config,
            adapter_name,
            rename=rename,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            checks=Checks(strict, check_base, check_finite),
        )
        return result


class PeftModelForCausalLM(PeftModel):
    """A language model that predicts the next token."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """A model with a head that classifies sequences; the head is trained in full."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """A model with a head that classifies tokens; the head is trained in full."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A model with a head that marks answers; the head is trained in full."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are used."""

    task = TaskType.FEATURE_EXTRACTION


class PeftMixedModel(PeftModel):
    """Several adapters at work together; PEFT's name for a model whose adapters may differ in method.

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
        peft_config: What to adapt; copied, never written. One of the peft library's is converted.
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
    config = copy.deepcopy(as_config(peft_config))
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


def _opened(
    model_id: str | os.PathLike[str], config: PeftConfig | None, options: Mapping[str, Any]
) -> tuple[AdapterFile, PeftConfig]:
    """The tensors of a saved adapter, and its configuration unless the caller has one."""
    if config is not None:
        try:
            config = as_config(config)
        except ConfigError as error:
            raise ConfigError("config: ", error.message, "; without it the file's own is used") from error
    hub_options = {name: value for name, value in options.items() if name in HUB_OPTIONS}
    file = open_adapter(adapter_directory(model_id, **hub_options))
    return file, PeftConfig.from_belonging(file.belonging_config()) if config is None else config


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls", "kwargs"}


def _expansion(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one: beams, or samples."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def option(name: str) -> int:
        if kwargs.get(name) is not None:
            return int(kwargs[name])
        return next((int(value) for c in configs if (value := getattr(c, name, None)) is not None), 1)

    return max(option("num_beams"), option("num_return_sequences"))


def name_of(model: nn.Module) -> str | None:
    """Where the base model came from, if it says so."""
    name = model.__dict__.get("name_or_path") or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    return name if isinstance(name, str) and name else None


def _checkpoints(module: nn.Module) -> bool:
    """Whether it recomputes activations; past `nn.Module.__getattr__`, slow where nothing is."""
    name = "gradient_checkpointing"
    return bool(module.__dict__.get(name, getattr(type(module), name, False)))


def _let_checkpointing_pass_gradients(model: nn.Module) -> None:
    """With reentrant gradient checkpointing a frozen embedding's output must require a gradient."""
    if any(_checkpoints(m) for _, m in walk(model)):
        enable = getattr(model, "enable_input_require_grads", None)
        if callable(enable):
            enable()

"""The face that users know."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from veneer.adapters import walk
from veneer.config import PeftConfig, PeftType, TaskType
from veneer.errors import (
    ConfigError,
    RoutingError,
    VeneerWarning,
)
from veneer.model.lora_model import LoraModel
from veneer.model.persistence import Persistence
from veneer.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    count_parameters,
    get_layer_status,
    get_model_status,
)
from veneer.routing import Activation, Routing, disabled, keep_for_backward, last_invocations, routed

#: Ways of generating in which a call of the model has neither all positions nor the last one.
_NOT_ONE_BY_ONE = ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size")

#: Trainer calls these through the wrapper; transformers sees to the input of models of `input_ids` alone.
_ENABLES_CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")

#: The class of each task; a class enters itself.
MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}


class PeftModel(Persistence):
    """A base model with adapters: trains, saves and loads only them.

    Args:
        model: The base model; adapters are put into it in place, and everything else is frozen.
        peft_config: Configuration of the first adapter (copied), or None to start without one.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.

    Raises:
        ConfigError, TargetError, AdapterNameError: The model is then as it was.
    """

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
        config = peft_config
        if isinstance(config, PeftConfig) and not config.base_model_name_or_path:
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
        self.config = getattr(model, "config", {"model_type": "custom"})
        _let_checkpointing_pass_gradients(model)

    @classmethod
    def class_for(cls, task_type: str | TaskType | None) -> type[PeftModel]:
        """The class of a task; a class that is one task's stays what it is."""
        if cls is not PeftModel:
            return cls
        return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(getattr(task_type, "value", task_type) or "", PeftModel)

    # -- the field's attributes ------------------------------------------------------------------------

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
        """The active adapter's name; a list where it is not exactly one."""
        return self.base_model.active_adapter

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of the modules that some adapter trains whole."""
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
        self, names: Sequence[str] | None, expand: int = 1, activation: Activation | None = None
    ) -> AbstractContextManager[Routing]:
        """The context of one call whose rows go through these adapters, or through the active ones."""
        if names is not None:
            self.base_model.check_mixed_batch(names)
        return routed(self.get_base_model(), list(names or ()), expand, activation, list(self.peft_config))

    def _activation(
        self, names: Sequence[str] | None, grows: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Activation | None:
        """From where on the aLoRA adapters of a call act; None without any. Takes ``alora_offsets`` out."""
        given = kwargs.pop("alora_offsets", None)
        if not self.base_model.invocable:
            return None
        invoked = {n: getattr(c, "alora_invocation_tokens", None) for n, c in self.peft_config.items()}
        used = self.active_adapters if names is None else names
        tokens = {name: list(invoked[name] or ()) for name in used if invoked.get(name)}
        if not tokens or all(layer.disable_adapters for layer in self.base_model.layers().values()):
            return None
        if grows and (way := next((k for k in _NOT_ONE_BY_ONE if kwargs.get(k)), None)):
            raise RoutingError(f"generate({way}=…) lays positions out in pieces, so aLoRA cannot follow them")
        if given is not None:
            return Activation({name: list(given) for name in tokens}, 0, grows)
        named = [kwargs.get("input_ids"), kwargs.get("inputs") if grows else None, *args[:1]]
        ids = next((v for v in named if isinstance(v, Tensor) and not v.is_floating_point()), None)
        if ids is None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None:
                raise RoutingError("an aLoRA needs input_ids, or alora_offsets, to know where it is invoked")
            warnings.warn(
                "without input_ids an aLoRA does not know where it is invoked: this call is the base "
                "model's. Pass alora_offsets",
                VeneerWarning,
                stacklevel=3,
            )
            return Activation({n: [None] * len(embeds) for n in tokens})
        offsets = {name: last_invocations(ids, tokens[name]) for name in tokens}
        return Activation(offsets, ids.shape[-1], grows)

    def train(self, mode: bool = True) -> PeftModel:
        """Set the training mode, and say so if there is nothing to train."""
        super().train(mode)
        if mode and self.peft_config and not any(p.requires_grad for p in self.parameters()):
            warnings.warn(
                "this model is put into training mode, but every parameter is frozen: load the adapter with "
                "is_trainable=True, or call set_adapter(name) to train it",
                VeneerWarning,
                stacklevel=2,
            )
        if mode:
            self.base_model.mention_unmeasured(self.active_adapters, stacklevel=3)
        return self

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
        if not isinstance(peft_config, PeftConfig):
            raise ConfigError(f"add_adapter needs a LoraConfig, got {type(peft_config).__name__}")
        config = copy.deepcopy(peft_config)
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
        """Remove an adapter. If it was active, it leaves nothing active in its place."""
        self.base_model.delete_adapter(adapter_name)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes what its base computes, for the thread that opens it.

        Contexts may overlap and end in any order. Other threads, also those that are started inside, see the
        model as it is; `disable_adapter_layers` of its ``base_model`` is for all of them.
        """
        self.base_model._mention_biases()
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


def _expansion(model: nn.Module, kwargs: Mapping[str, Any]) -> int:
    """How many rows `generate` makes of one: beams, or samples."""
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))

    def asked(name: str) -> int:
        if kwargs.get(name) is not None:
            return int(kwargs[name])
        return next((int(value) for c in configs if (value := getattr(c, name, None)) is not None), 1)

    return max(asked("num_beams"), asked("num_return_sequences"))


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

"""Saving adapters, and only them; loading them with every tensor accounted for."""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from veneer import inits, sharded, state
from veneer.adapters import as_names, check_adapter_name, walk
from veneer.config import LoraConfig, PeftConfig, TaskType
from veneer.doors import HUB_OPTIONS, adapter_directory, hub, refuse_unknown
from veneer.errors import (
    AdapterNameError,
    CheckpointError,
    ConfigError,
    Hint,
    LoadMismatchError,
    MergeError,
    VeneerWarning,
)
from veneer.files.card import model_card
from veneer.files.match import LoadReport
from veneer.files.read import AdapterFile, open_adapter
from veneer.files.residual import RESIDUAL_MARK, mark, marked_config, plain_config
from veneer.files.write import write_adapter, write_card
from veneer.inject import stacked
from veneer.model.lora_model import LoraModel
from veneer.spec import resolve, specs_under
from veneer.wording import some

if TYPE_CHECKING:
    from veneer.model.face import PeftModel

#: Keywords that callers of the field's API pass along when they load: places for a base that is spread over
#: devices, which its own hooks decide here, and a leniency whose place is taken by ``strict``.
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


class Persistence(nn.Module):
    """Adapters of a model into directories, and out of them."""

    base_model: LoraModel

    @classmethod
    def class_for(cls, task_type: str | TaskType | None) -> type[PeftModel]:
        """The class of a task."""
        raise NotImplementedError

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
        active = self.base_model.active_adapters
        if not active:
            raise AdapterNameError(
                f"no adapter is active; the model has: {', '.join(self.peft_config) or 'none'}"
            )
        return self.peft_config[active[0]]

    def _leave_training(self) -> None:
        """``eval()``, without a pass over all adapters where it is nothing new."""
        if any(module.training for _, module in walk(self)):
            self.eval()

    def get_base_model(self) -> nn.Module:
        """The model that was adapted."""
        return self.base_model.model

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

        The adapter ``"default"`` lies in the directory itself, any other in a sub-directory of its name.

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
        refuse_unknown("save_pretrained", kwargs, _SAVING, _parameters(Persistence.save_pretrained))
        check_save_embedding_layers(save_embedding_layers)
        if kwargs.get("push_to_hub"):
            warnings.warn(
                "save_pretrained uploads nothing: call push_to_hub(repo_id) for that",
                VeneerWarning,
                stacklevel=2,
            )
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        self.base_model.index.check(names, known=self.peft_config)
        if path_initial_model_for_weight_conversion is not None:
            self._check_conversion(names)
        if not names:
            raise CheckpointError("there is no adapter to save")
        if os.path.isfile(save_directory):
            raise CheckpointError(f"{save_directory} is a file; a directory is needed")
        given = kwargs.pop("state_dict", None)
        together = state.saved_together(self, names, given)
        if not is_main_process and not together:
            return
        # All ranks collect what they hold pieces of; one of them writes.
        collected = {}
        for name in names:
            collected[name] = state.adapter_state_dict(
                self,
                name,
                state_dict=given,
                save_embedding_layers=save_embedding_layers,
                gather=together,
            )
        with sharded.one_writer(is_main_process) if together else nullcontext(is_main_process) as writes:
            for name in names if writes else ():
                self._write(save_directory, name, collected.pop(name), safe_serialization)

    def _write(
        self,
        save_directory: str | os.PathLike[str],
        name: str,
        tensors: Mapping[str, Tensor],
        safe_serialization: bool,
    ) -> None:
        """Write one adapter into its directory."""
        init = self._subtracted_start(name)
        config = self._config_to_save(name)
        self._mention_replaced_base(name)
        self.base_model.mention_unmeasured([name], ". Its file says True")
        count = sum(t.numel() for t in tensors.values())
        write_adapter(
            self._directory_of(save_directory, name),
            tensors,
            config,
            metadata={
                state.FINGERPRINT: json.dumps(state.base_fingerprint(self.get_base_model())),
                **({} if init is None else {RESIDUAL_MARK: mark(self.peft_config[name], init)}),
            },
            card=model_card(
                config,
                transformers_model=hasattr(self.get_base_model(), "save_pretrained"),
                parameters=count,
            ),
            safe_serialization=safe_serialization,
        )

    def _subtracted_start(self, name: str) -> bool | str | None:
        """The initialisation of an adapter that has a frozen term, None for any other."""
        for layer in self.base_model.layers().values():
            if name in layer.held_adapters and layer.residual(name) is not None:
                return layer.specs[name].init
        return None

    def _check_conversion(self, names: Sequence[str]) -> None:
        """Say that nothing needs converting, where that was asked for.

        Raises:
            CheckpointError: For an adapter whose initialisation has nothing to do with it.
        """
        if others := [name for name in names if self._subtracted_start(name) is None]:
            raise CheckpointError(
                f"path_initial_model_for_weight_conversion: the adapter {others[0]!r} has no start that was "
                "subtracted from anything; save without it"
            )
        warnings.warn(
            "path_initial_model_for_weight_conversion is not needed: the base was never changed, and the "
            "saved adapter is a plain one for it",
            VeneerWarning,
            stacklevel=3,
        )

    def _mention_replaced_base(self, name: str) -> None:
        init = resolve(self.peft_config[name], name, "").init
        if inits.find(init).replaces_base:
            warnings.warn(
                VeneerWarning(
                    Hint("init_lora_weights", init),
                    f" replaced base weights, and the adapter {name!r} fits those only: save the base too "
                    "(unload() gives it back, with its save_pretrained or state_dict) and load this adapter "
                    "onto that",
                ),
                stacklevel=4,
            )

    def _config_to_save(self, name: str) -> dict[str, Any]:
        """The content of an adapter's configuration file.

        Without a task it names the base's class. An initialisation that replaced the base is not named in it:
        other readers would run it again, on a base that has been replaced already. Nor is one that was to be
        measured on data and never was.
        """
        config, kind = self.peft_config[name], type(self.get_base_model())
        if inits.find(resolve(config, name, "").init).replaces_base:
            config = copy.copy(config)
            config.init_lora_weights = True
        if name in self.base_model.unmeasured():
            config = copy.copy(config)
            config.init_lora_weights, config.eva_config = True, None
        if self._subtracted_start(name) is not None:
            config = plain_config(config)
        values = config.to_json()
        if config.task_type is None and kind.__module__.startswith("transformers."):
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            values = dict(sorted({**values, "auto_mapping": mapping}.items()))
        return values

    @staticmethod
    def _directory_of(save_directory: str | os.PathLike[str], name: str) -> Path:
        check_adapter_name(name)
        return Path(save_directory) if name == "default" else Path(save_directory) / name

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the card of the active adapter, keeping the body of an existing one.

        Raises:
            CheckpointError: If it cannot be written; the existing one is as it was.
        """
        write_card(
            output_dir,
            model_card(
                self.active_peft_config.to_json(),
                transformers_model=hasattr(self.get_base_model(), "save_pretrained"),
            ),
        )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Save into a temporary directory and upload it with huggingface_hub."""
        return hub().push_adapter(self, repo_id, **kwargs)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | Callable[[str], str] | None = None,
        *,
        strict: bool = True,
        check_base: bool = True,
        check_finite: bool = True,
        config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """Load an adapter beside those that are here; it is not activated unless it is the first.

        Under a name that is taken it fills the tensors of that adapter, in place, as trainers do to resume.

        Args:
            model_id: A directory, which never touches the network, or a repository id on the hub.
            adapter_name: Name for it in this model.
            is_trainable: Whether its parameters require gradients once active.
            torch_device: Ignored: factors go where their layer computes.
            autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
            ephemeral_gpu_offload: Accepted for the field's sake.
            low_cpu_mem_usage: Accepted for the field's sake: factors are never initialised before loading.
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
        refuse_unknown("load_adapter", kwargs, _LOADING, _parameters(Persistence.load_adapter))
        rename = renamer(key_mapping)
        _check_config(config)
        file = open_adapter(adapter_directory(model_id, **_for_the_hub(kwargs)))
        return self._load(
            file,
            file.config() if config is None else config,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            rename=rename,
            strict=strict,
            check_base=check_base,
            check_finite=check_finite,
        )

    def _load(
        self,
        file: AdapterFile,
        config: PeftConfig,
        adapter_name: str,
        *,
        is_trainable: bool,
        autocast_adapter_dtype: bool,
        rename: Callable[[str], str],
        strict: bool,
        check_base: bool,
        check_finite: bool,
    ) -> LoadReport:
        """Load an adapter whose file is open; see `load_adapter`."""
        directory = file.path.parent
        config = copy.deepcopy(config)
        config.inference_mode = not is_trainable
        if isinstance(config, LoraConfig):
            config = marked_config(config, file.metadata, directory)
        names = renamed(file.shapes, rename)
        shapes = {new: file.shapes[old] for new, old in names.items()}

        def take(keys: Iterable[str]) -> dict[str, Tensor]:
            wanted = list(keys)
            held = file.tensors(names[key] for key in wanted)
            return {key: held[names[key]] for key in wanted}

        old_experts = (
            stacked(self.get_base_model(), config, shapes) if isinstance(config, LoraConfig) else None
        )
        if old_experts is not None:
            config, shapes = old_experts.config, old_experts.shapes
            take = partial(old_experts.tensors, read=take)
        if adapter_name in self.peft_config:
            self._check_reload(config, adapter_name, directory)
            if check_base:
                state.check_base(self.get_base_model(), file.metadata, directory, carried=file.shapes)
            report = state.set_adapter_state_dict(
                self, take(shapes), adapter_name, strict=strict, check_finite=check_finite, where=directory
            )
            self.base_model.note_start(adapter_name, config)  # type: ignore[arg-type]
            if not is_trainable:
                self._leave_training()
            return report
        injection = self.base_model.prepare(
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            stored=shapes,
        )
        report = state.fill_injection(
            injection, shapes, take, where=directory, strict=strict, check_finite=check_finite
        )
        # After the account of tensors: where names or shapes differ, that says more.
        if check_base:
            state.check_base(
                injection.model, file.metadata, directory, injection._targets(), carried=file.shapes
            )
        first = not self.peft_config
        self.base_model.commit(injection, activate=first, trainable=is_trainable)
        if first and is_trainable:
            self.training = self.base_model.training = True
        if not is_trainable:
            self._leave_training()
        return report

    def _check_reload(self, config: Any, adapter_name: str, where: object) -> None:
        """Refuse to fill an adapter from a file where the tensors alone do not make it the file's.

        Raises:
            MergeError: The adapter is merged.
            LoadMismatchError: Its strength is not the file's.
        """
        layers = {
            path: layer
            for path, layer in self.base_model.layers().items()
            if adapter_name in layer.held_adapters
        }
        if any(adapter_name in layer.merged_adapters for layer in layers.values()):
            raise MergeError(
                f"the adapter {adapter_name!r} is merged: unmerge_adapter() before loading into it"
            )
        held = [layer.specs[adapter_name] for layer in layers.values()]
        differing = [
            f"{path}: {here.scaling:g} here, {wanted.scaling:g} in the file"
            for path, here, wanted in zip(layers, held, specs_under(config, held), strict=True)
            if (wanted.scaling, wanted.variant) != (here.scaling, here.variant)
        ]
        if differing:
            raise LoadMismatchError(
                f"{where} cannot be loaded into the adapter {adapter_name!r} that is here, whose strength "
                "or kind "
                f"is another: {'; '.join(differing[:3])}. Load it under another name, or delete_adapter "
                f"({adapter_name!r}) first"
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
        key_mapping: Mapping[str, str] | Callable[[str], str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Put a saved adapter on its base model; the arguments are those of `load_adapter`.

        Returns:
            A model of the class that the adapter's task has.

        Raises:
            ConfigError: If the configuration or a renaming is none; for unknown keywords.
            AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then as it was.
        """
        checks = {"strict", "check_base", "check_finite"}
        known = _parameters(Persistence.from_pretrained) | checks
        refuse_unknown("from_pretrained", kwargs, _LOADING | checks, known)
        rename = renamer(key_mapping)
        _check_config(config)
        file = open_adapter(adapter_directory(model_id, **_for_the_hub(kwargs)))
        if config is None:
            config = file.config()
        result = cls.class_for(config.task_type)(model)
        result._load(
            file,
            config,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            rename=rename,
            strict=kwargs.get("strict", True),
            check_base=kwargs.get("check_base", True),
            check_finite=kwargs.get("check_finite", True),
        )
        return result


def check_save_embedding_layers(value: object) -> None:
    """Refuse what is neither a boolean nor "auto".

    Raises:
        ConfigError: With what was given.
    """
    if not isinstance(value, bool) and value != "auto":
        raise ConfigError(f"save_embedding_layers must be True, False or 'auto', got {value!r}")


def _check_config(config: object) -> None:
    if config is not None and not isinstance(config, PeftConfig):
        raise ConfigError(
            f"config: a LoraConfig is needed, got {type(config).__name__}; LoraConfig(...) makes one, and "
            "without the argument the file's own is used"
        )


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names that can be given to a method by keyword."""
    return set(inspect.signature(function).parameters) - {"self", "cls", "kwargs"}


def _for_the_hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name in HUB_OPTIONS}


def renamer(mapping: Mapping[str, str] | Callable[[str], str] | None) -> Callable[[str], str]:
    """A function that renames keys as the field's ``key_mapping`` does: without the saved prefix.

    Raises:
        ConfigError: If it is neither a mapping nor a function, or a pattern is no regular expression.
    """
    if mapping is None:
        return lambda key: key
    if callable(mapping):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            "key_mapping: a mapping of regular expressions to replacements, or a function, is needed; got "
            f"{type(mapping).__name__}"
        )
    patterns = []
    for source, replacement in mapping.items():
        try:
            patterns.append((re.compile(source), replacement))
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"key_mapping: {source!r} is not a valid regular expression ({error})"
            ) from error

    def rename(key: str) -> str:
        has_prefix = key.startswith(state.PREFIX)
        name = key.removeprefix(state.PREFIX)
        for pattern, replacement in patterns:
            try:
                name, count = pattern.subn(replacement, name)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"key_mapping: {replacement!r} is not a valid replacement for "
                    f"{pattern.pattern!r} ({error})"
                ) from error
            if count:
                break
        return f"{state.PREFIX}{name}" if has_prefix else name

    return rename


def renamed(keys: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """New key -> key of the file.

    Raises:
        ConfigError: Two keys would get one name, and one tensor would be lost.
    """
    names: dict[str, str] = {}
    met = []
    for key in keys:
        new = rename(key)
        if new in names:
            met.append(f"{names[new]} and {key} -> {new}")
        names.setdefault(new, key)
    if met:
        raise ConfigError(
            Hint("key_mapping"), f" gives several keys of the file one name: {'; '.join(some(met, 3))}"
        )
    return names

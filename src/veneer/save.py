"""Saving adapters, and only them."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from veneer import inits, sharded
from veneer.adapters import check_adapter_name
from veneer.base_fingerprint import FINGERPRINT, base_fingerprint
from veneer.config.residual import RESIDUAL_MARK, mark, plain_config
from veneer.errors import CheckpointError, Hint
from veneer.files.card import model_card
from veneer.files.write import write_adapter, write_card
from veneer.lora_model import LoraModel
from veneer.spec import resolve
from veneer.state_dict import adapter_state_dict, saved_together
from veneer.wording import warn


def save(
    model: nn.Module,
    lora: LoraModel,
    directory: str | os.PathLike[str],
    names: Sequence[str],
    *,
    safe_serialization: bool,
    save_embedding_layers: bool | Literal["auto"],
    state_dict: Mapping[str, Tensor] | None,
    is_main_process: bool,
) -> None:
    """Write adapters: ``"default"`` into a directory, any other into a sub-directory of its name.

    Args:
        model: The `PeftModel`.
        lora: What it holds.
        directory: Made if it does not exist.
        names: The adapters.
        safe_serialization: False writes a pickled ``.bin`` instead of safetensors.
        save_embedding_layers: See `PeftModel.save_pretrained`.
        state_dict: Take the values from this full state dict.
        is_main_process: Whether this rank writes.

    Raises:
        CheckpointError: An adapter cannot be written; what was there before is whole.
    """
    if not names:
        raise CheckpointError("there is no adapter to save")
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise CheckpointError(f"{directory} is a file; a directory is needed")
    together = saved_together(model, names, state_dict)
    if not is_main_process and not together:
        return
    # All ranks collect what they hold pieces of; one of them writes.
    collected = {
        name: adapter_state_dict(
            model,
            name,
            state_dict=state_dict,
            save_embedding_layers=save_embedding_layers,
            gather=together,
        )
        for name in names
    }
    with sharded.one_writer(is_main_process) if together else nullcontext(is_main_process) as writes:
        for name in names if writes else ():
            check_adapter_name(name)
            place = Path(directory) if name == "default" else Path(directory) / name
            _write(lora, place, name, collected.pop(name), safe_serialization)


def _write(
    lora: LoraModel, directory: Path, name: str, tensors: Mapping[str, Tensor], safe_serialization: bool
) -> None:
    base, init = lora.get_base_model(), subtracted_start(lora, name)
    config = _config_to_save(lora, name)
    _mention_replaced_base(lora, name)
    lora.mention_unmeasured([name], ". Its file says True")
    metadata = {FINGERPRINT: json.dumps(base_fingerprint(base))}
    if init is not None:
        metadata[RESIDUAL_MARK] = mark(lora.peft_config[name], init)
    write_adapter(
        directory,
        tensors,
        config,
        metadata=metadata,
        card=_card(base, config, sum(tensor.numel() for tensor in tensors.values())),
        safe_serialization=safe_serialization,
    )


def update_card(lora: LoraModel, name: str, directory: str | os.PathLike[str]) -> None:
    """Write the card of an adapter, keeping the body of an existing one.

    Raises:
        CheckpointError: It cannot be written; the existing one is as it was.
    """
    write_card(directory, _card(lora.get_base_model(), lora.peft_config[name].to_json()))


def _card(base: nn.Module, config: Mapping[str, Any], parameters: int | None = None) -> str:
    is_of_transformers = hasattr(base, "save_pretrained")
    return model_card(config, transformers_model=is_of_transformers, parameters=parameters)


def subtracted_start(lora: LoraModel, name: str) -> bool | str | None:
    """The initialisation of an adapter that has a frozen term, None for any other."""
    for layer in lora.layers().values():
        if name in layer.held_adapters and layer.residual(name) is not None:
            return layer.specs[name].init
    return None


def _mention_replaced_base(lora: LoraModel, name: str) -> None:
    init = resolve(lora.peft_config[name], name, "").init
    if inits.find(init).replaces_base:
        warn(
            Hint("init_lora_weights", init),
            f" replaced base weights, and the adapter {name!r} fits those only: save the base too "
            "(unload() gives it back, with its save_pretrained or state_dict) and load this adapter "
            "onto that",
        )


def _config_to_save(lora: LoraModel, name: str) -> dict[str, Any]:
    """The content of an adapter's configuration file.

    Without a task it names the base's class. An initialisation that replaced the base is not named in it:
    other readers would run it again, on a base that has been replaced already. Nor is one that was to be
    measured on data and never was.
    """
    config, kind = lora.peft_config[name], type(lora.get_base_model())
    if inits.find(resolve(config, name, "").init).replaces_base:
        config = copy.copy(config)
        config.init_lora_weights = True
    if name in lora.unmeasured():
        config = copy.copy(config)
        config.init_lora_weights, config.eva_config = True, None
    if subtracted_start(lora, name) is not None:
        config = plain_config(config)
    values = config.to_json()
    if config.task_type is None and kind.__module__.startswith("transformers."):
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        values = dict(sorted({**values, "auto_mapping": mapping}.items()))
    return values

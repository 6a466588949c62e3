"""Which layers are measured, and running the model without changing it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.atomic import atomic_file, new_directory
from veneer.config import LoraConfig
from veneer.errors import ConfigError, Hint, MergeError
from veneer.inject.injection import Addition
from veneer.inject.prepare import prepare
from veneer.layers import LoraLayer
from veneer.peft_model import PeftModel
from veneer.wording import first_line

#: A hook before a module's forward, called with the module and its positional arguments.
Hook = Callable[[nn.Module, tuple[Any, ...]], None]


def planned(model: nn.Module, config: LoraConfig) -> dict[str, Addition]:
    """The layers that an adapter would get on a model, by path; the model is not touched.

    Raises:
        ConfigError, TargetError: As `get_peft_model` would.
    """
    return {a.site.path: a for a in prepare(model, config, "default", quiet=True).additions}


def layers_to_start(model: nn.Module, adapter: str) -> dict[str, LoraLayer]:
    """The layers of an adapter whose factors are to be replaced, by path.

    Raises:
        ConfigError: If the model is no `PeftModel`.
        AdapterNameError: If it has no such adapter.
        MergeError: If the adapter is merged.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"a PeftModel is needed, got {type(model).__name__}: get_peft_model makes one")
    model.base_model.index.check([adapter], known=model.peft_config)
    layers = {path: x for path, x in model.base_model.layers().items() if adapter in x.held_adapters}
    if merged := [path for path, layer in layers.items() if adapter in layer.merged_adapters]:
        raise MergeError(f"the adapter {adapter!r} is merged (into {merged[0]}): unmerge_adapter() first")
    return layers


def options(config: LoraConfig, init: str, kind: type[Any]) -> Any:
    """The options of an initialisation, from a configuration that selects it.

    Raises:
        ConfigError: If the configuration selects another one.
    """
    if str(config.init_lora_weights).lower() != init:
        raise ConfigError(
            "the configuration has ",
            Hint("init_lora_weights", config.init_lora_weights),
            f"; {init!r} is measured here",
        )
    return getattr(config, f"{init}_config") or kind()


def observe(hooks: Mapping[nn.Module, Hook], run: Callable[[], object]) -> None:
    """Run a model with a hook before the forward of each of these modules."""
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def stored(path: str | os.PathLike[str] | None) -> dict[str, Tensor] | None:
    """The tensors of a cache file, or None if it does not exist yet.

    Raises:
        ConfigError: If it contains anything else.
    """
    if path is None or not Path(path).is_file() or Path(path).stat().st_size == 0:
        return None
    try:
        with open(path, "rb") as file:  # torch may guess another kind of file from its name
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can raise anything in the unpickler
        raise ConfigError(f"{path} cannot be read as a file of tensors: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ConfigError(f"{path} holds something else than a table of tensors")
    return content


def store(path: str | os.PathLike[str] | None, tensors: Mapping[str, Tensor]) -> None:
    """Write a cache file atomically."""
    if path is None:
        return
    place = Path(path)
    with new_directory(place.parent), atomic_file(place) as waiting, waiting.open("wb") as file:
        torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, file)


def cached(
    path: str | os.PathLike[str] | None, names: Sequence[str], measure: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The named tensors, read from a cache file if it exists, else measured and written to it.

    Raises:
        ConfigError: The file contains something else, or some tensors are missing.
    """
    content = stored(path)
    if content is None:
        made = measure()
        store(path, made)
        return made
    if missing := [name for name in names if name not in content]:
        raise ConfigError(
            f"{path} lacks {len(missing)} of the {len(names)} tensors that are needed, for example "
            f"{', '.join(missing[:3])}: it was made for another model or configuration. Remove it to "
            "measure anew"
        )
    return {name: content[name] for name in names}

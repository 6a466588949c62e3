"""Adapters that wait elsewhere, on the CPU or on disk, and come back by name."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from veneer import inits
from veneer.errors import AdapterNameError, ConfigError
from veneer.layers import LoraLayer
from veneer.model.persistence import Persistence


@dataclass(frozen=True)
class _Parked:
    """What an adapter needs to come back as it left; without a place its tensors are on the CPU."""

    place: Path | None
    trainable: bool
    in_float32: bool
    strengths: Mapping[str, float]


class Parking(Persistence):
    """Adapters that are not at work put out of the way."""

    _parked: dict[str, _Parked]

    @property
    def parked_adapters(self) -> Mapping[str, Path | None]:
        """The adapters that wait elsewhere, with the directory they are in, or None for the CPU."""
        return MappingProxyType({name: parked.place for name, parked in self._parked.items()})

    def park_adapter(self, adapter_name: str, directory: str | os.PathLike[str] | None = None) -> None:
        """Put an adapter that is not active out of the way; using its name brings it back, bit for bit.

        `set_adapter` with its name, or ``adapter_names`` of a mixed batch, brings it back to where its layers
        compute. A parked adapter is no part of what `save_pretrained` writes when it is on disk.

        Args:
            adapter_name: The adapter.
            directory: Where to save it, freeing its memory altogether; None keeps it in the CPU's memory.

        Raises:
            AdapterNameError: There is no such adapter, or it is active or merged.
            ConfigError: It cannot come back as it is from a file. Nothing has changed then.
        """
        if adapter_name in self._parked:
            self.bring_in([adapter_name])
        verbs = self.base_model
        verbs.index.check([adapter_name], known=self.peft_config)
        layers = {p: m for p, m in verbs.layers().items() if adapter_name in m.held_adapters}
        if adapter_name in verbs.active_adapters:
            raise AdapterNameError(f"{adapter_name!r} is active: set_adapter another one before parking it")
        if any(adapter_name in module.merged_adapters for module in verbs.index.modules()):
            raise AdapterNameError(f"{adapter_name!r} is merged: unmerge_adapter() before parking it")
        parameters = list(verbs.index.parameters(adapter_name))
        trainable = not self.peft_config[adapter_name].inference_mode
        in_float32 = all(p.dtype not in (torch.float16, torch.bfloat16) for p in parameters)
        strengths = {path: layer.scaling[adapter_name] for path, layer in layers.items()}
        place = None
        if directory is None:
            for parameter in parameters:
                parameter.data = parameter.data.cpu()
        else:
            place = self._park_on_disk(adapter_name, Path(directory), layers)
        self._parked[adapter_name] = _Parked(place, trainable, in_float32, strengths)

    def _park_on_disk(self, name: str, directory: Path, layers: Mapping[str, LoraLayer]) -> Path:
        if self.peft_config[name].bias != "none":
            raise ConfigError(f"{name!r} trains biases of the base itself, which would leave with it")
        if any(inits.find(layer.specs[name].init).replaces_base for layer in layers.values()):
            raise ConfigError(f"{name!r} replaced weights of the base, which its files do not hold")
        self.save_pretrained(directory, selected_adapters=[name])
        self.base_model.delete_adapter(name)
        return directory if name == "default" else directory / name

    def bring_in(self, names: Iterable[str]) -> None:
        """Bring those of these adapters back that are parked.

        Raises:
            AdapterFileError, LoadMismatchError: A file is gone or was changed; that adapter stays parked.
        """
        for name in names:
            parked = self._parked.get(name)
            if parked is None:
                continue
            if parked.place is None:
                self._to_their_layers(name)
            else:
                self.load_adapter(
                    parked.place, name, parked.trainable, autocast_adapter_dtype=parked.in_float32
                )
                for path, layer in self.base_model.layers().items():
                    if path in parked.strengths:
                        layer.scaling[name] = parked.strengths[path]
            del self._parked[name]

    def _to_their_layers(self, name: str) -> None:
        for module in self.base_model.index.modules():
            if name not in module.held_adapters:
                continue
            device = module.base_device()
            for parameter in module.adapter_parameters(name):
                parameter.data = parameter.data.to(device)

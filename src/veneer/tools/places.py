"""Where in an adapter the change of each tensor of a model has its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import layers
from ..expert_layouts.layouts import STACKS
from ..inject.sites import bases, input_embedding, sharing, sites
from ..inject.stacks import holds_stacks, routers_of
from ..layers import LoraLayer
from ..layers.conv import LoraConv
from ..module_names import around
from ..targets import head_names
from ..training.model_files import ModelFiles
from ..training.planning.sources import named_task
from ..wording import listed


class Places:
    """The modules of a model, and how an adapter holds what changes in them.

    Args:
        files: The model.

    Attributes:
        sites: Its modules by path.
        bases: The same without where they are.
        embedding: The path of the input embedding.
        heads: Those of the modules that share its weight.
        bare: Names of the parameters that get factors by themselves: stacks of experts, and their routers.
        task: The adapter's task.
        trained: Paths of what trains whole for the task, whatever a configuration names.
        converted: Names of tensors that the model has in another form.
    """

    def __init__(self, files: ModelFiles) -> None:
        self.sites = sites(files.model)
        self.bases = bases(self.sites)
        self.embedding = input_embedding(files.model, self.sites)
        self.heads = sharing(self.sites, self.embedding)
        holders = [path for path, base in self.bases.items() if holds_stacks(base)]
        self.bare = {f"{path}.{stack}" for path in holders for stack in STACKS}
        self.bare.update(matrix for _, matrix in routers_of(holders, self.bases))
        self.task = _task(files.model.config)
        self.trained = [path for path in self.sites if path.rpartition(".")[2] in head_names(self.task)]
        self.converted = files.converted

    def layer(self, path: str) -> type[LoraLayer] | None:
        """How a module's weight gets factors; None where it gets none."""
        site = self.sites.get(path)
        layer = None if site is None else layers.find(site.module)
        weight = None if site is None else site.module._parameters.get("weight")
        if site is None or layer is None or weight is None or layer.weight_name != "weight":
            return None
        if around(path, self.trained):
            return None
        grouped = issubclass(layer, LoraConv) and getattr(site.module, "groups", 1) > 1
        return None if grouped or site.reader is not None else layer

    def unfit(self, name: str, whole: bool) -> str | None:
        """Why an adapter cannot hold the change of a tensor; None where it can.

        Args:
            name: Its name in the model.
            whole: Whether what is no factor is held, too.
        """
        path, _, attribute = name.rpartition(".")
        site, layer = self.sites.get(path), self.layer(path)
        if site is None or name in self.converted:
            return "transformers makes another tensor of it, or none, when it loads the model"
        tensor = site.module._parameters.get(attribute)
        shares = [n for n, other in self.sites.items() if n != path and _holds(other.module, tensor)]
        if shares and not (attribute == "weight" and path == self.embedding):
            return f"{listed([path, *shares])} share it"
        if (layer is not None and attribute == "weight") or name in self.bare or around(path, self.trained):
            return None
        if not whole:
            return "only factors were asked for"
        if layer is not None and attribute == "bias":
            return None
        bare = any(p.dim() > 1 for p in site.module.parameters()) and layers.find(site.module) is None
        if site.reader is not None:
            return f"{site.reader} reads it and never calls the layer"
        if next(site.module.children(), None) is not None or bare:
            return f"a parameter of {type(site.module).__name__}, which LoRA does not adapt"
        return None

    def saved_whole(self, tensors: Iterable[str]) -> list[str]:
        """Paths of the modules that these tensors make be saved as they are; a head always is."""
        paths = (name.rpartition(".")[0] for name in tensors)
        return list(dict.fromkeys([*(around(path, self.trained) or path for path in paths), *self.trained]))


def _task(config: Any) -> str | None:
    """The task of an adapter; None for a model that is neither of text nor of a head that PEFT knows."""
    task = named_task(config)
    joined = task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False)
    return None if joined else task


def _holds(module: nn.Module, tensor: Tensor | None) -> bool:
    return tensor is not None and any(own is tensor for own in module._parameters.values())

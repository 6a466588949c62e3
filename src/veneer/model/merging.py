"""Merging adapters into base weights, with an account of what rounding kept."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from veneer.adapters import as_names, walk
from veneer.errors import (
    MergeError,
    VeneerWarning,
)
from veneer.inject import eject
from veneer.layers import LoraLayer
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.model.verbs import AdapterVerbs

#: Below this share of the update that survives rounding, a merge warns.
KEPT_WARNING = 0.8


@dataclass(frozen=True)
class MergeReport:
    """What merging kept of the update, after rounding to the type of the base weight.

    Attributes:
        kept: Share of the update kept, in [0, 1], by module path.
    """

    kept: Mapping[str, float]

    @property
    def worst(self) -> float:
        """The smallest share of a module."""
        return min(self.kept.values(), default=1.0)

    @property
    def mean(self) -> float:
        """The mean share over the modules."""
        return sum(self.kept.values()) / len(self.kept) if self.kept else 1.0

    def __str__(self) -> str:
        return (
            f"merged {len(self.kept)} modules; {self.mean:.1%} of the update kept (least: {self.worst:.1%})"
        )


class MergeVerbs(AdapterVerbs):
    """Adapters into the base weights, and out again."""

    #: What the last merge kept.
    merge_report: MergeReport | None = None

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        untie: bool = False,
    ) -> MergeReport:
        """Add adapters into the base weights, to be taken out again by `unmerge_adapter`.

        Args:
            adapter_names: The adapters; None means the active ones.
            safe_merge: Refuse, before anything changes, if a weight would not be finite.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.

        Returns:
            The share of the update that each layer kept.

        Raises:
            MergeError: Naming every layer that cannot be merged. The model is then as it was.
        """
        return self._merge(adapter_names, safe_merge, untie, keep_undo=True, progressbar=False)

    def _merge(
        self,
        adapter_names: Sequence[str] | None,
        safe_merge: bool,
        untie: bool,
        *,
        keep_undo: bool,
        progressbar: bool,
    ) -> MergeReport:
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        self.index.check(names, known=self.peft_config)
        layers = {p: m for p, m in self.layers().items() if any(n in m.held_adapters for n in names)}
        self._check_merge(layers, names, untie)
        kept: dict[str, float] = {}
        done: list[tuple[LoraLayer, list[str]]] = []
        try:
            for number, (path, layer) in enumerate(layers.items(), 1):
                if progressbar:
                    print(f"\rmerging {number}/{len(layers)}", end="", file=sys.stderr, flush=True)
                before = layer.merged_adapters
                # Without an undo a failure half-way could not be taken back; only these can fail.
                can_fail = safe_merge or layer.base_dtype() == torch.float16
                kept[path] = layer.merge(safe_merge, names, keep_undo=keep_undo or can_fail)
                done.append((layer, [n for n in layer.merged_adapters if n not in before]))
        except Exception as error:
            for layer, merged in done:
                layer.unmerge(merged)
            if isinstance(error, MergeError):
                raise MergeError(f"{path}: {error}. Nothing has been merged.") from error
            raise
        finally:
            if progressbar:
                print(file=sys.stderr)
        report = self.merge_report = MergeReport(kept)
        if report.mean < KEPT_WARNING:
            worst = min(kept, key=lambda p: kept[p])
            warnings.warn(
                f"only {report.mean:.0%} of the update survives rounding to the base weights' type (least "
                f"in {worst}: "
                f"{kept[worst]:.0%}): merged and unmerged outputs will differ. Merge into float32 "
                "(model.float() before), or keep the adapter unmerged",
                VeneerWarning,
                stacklevel=4,
            )
        return report

    def _check_merge(self, layers: Mapping[str, LoraLayer], names: Sequence[str], untie: bool) -> None:
        """Refuse before anything changes; untie what was asked to be untied."""
        reasons = [
            f"{path}: {reason}"
            for path, layer in layers.items()
            for reason in layer.refuses_merge([n for n in names if n in layer.held_adapters])
        ]
        shared = shared_weights(self.model, layers)
        if shared and not untie:
            reasons += [
                f"{path}: its weight is also the weight of {', '.join(others)}, which would change with it. "
                "untie=True gives it a weight of its own"
                for path, others in shared.items()
            ]
        if reasons:
            raise MergeError("these layers cannot be merged:\n" + "\n".join(f"  - {r}" for r in reasons))
        for path in shared:
            base = layers[path].get_base_layer()
            weight: nn.Parameter = base.weight  # type: ignore[assignment]
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        config = getattr(self.model, "config", None)
        if shared and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False  # type: ignore[union-attr]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        untie: bool = False,
    ) -> nn.Module:
        """Merge adapters into the base and return it without any trace of them.

        What was kept of the update stands in `merge_report` afterwards.

        Args:
            progressbar: Show progress on standard error.
            safe_merge: Refuse, before anything changes, if a weight would not be finite.
            adapter_names: The adapters; None means the active ones.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.

        Raises:
            MergeError: Naming every layer that cannot be merged. The model is then as it was.
        """
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        if self.peft_config and not names:
            raise MergeError(
                f"no adapter is active, so there is nothing to merge; the model has: "
                f"{', '.join(self.peft_config)}. "
                "Choose with set_adapter or adapter_names, or take the base alone by unload()"
            )
        if reasons := {r for m in self.index.modules() if (r := m.refuses_active(names)) is not None}:
            raise MergeError("; ".join(sorted(reasons)))
        self._merge(names, safe_merge, untie, keep_undo=False, progressbar=progressbar)
        extra = [n for layer in self.layers().values() for n in layer.merged_adapters if n not in names]
        if extra:
            warnings.warn(
                f"the adapter {extra[0]!r} was merged before and stays merged", VeneerWarning, stacklevel=2
            )
        for module in self.index.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter(names, inference_mode=True)
                module.enable_adapters(True)
        eject(self.model, trained_copies=True)
        self.peft_config = {}
        return self.model

    def unload(self) -> nn.Module:
        """The base model without adapters, its weights and biases bit for bit as they were."""
        self.unmerge_adapter()
        self._restore_biases()
        eject(self.model)
        self.peft_config = {}
        return self.model


def shared_weights(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, list[str]]:
    """Adapted layers whose base weight is another module's weight too, with those modules' paths."""
    users: dict[Any, list[str]] = {}
    # A module that stands in several places is one module: its weight is its own.
    for place, module in walk(model):
        for parameter in (p for p in module._parameters.values() if p is not None):
            storage = None if parameter.is_meta or parameter.numel() == 0 else parameter.untyped_storage()
            key = id(parameter) if storage is None else (storage.data_ptr(), parameter.storage_offset())
            users.setdefault(key, []).append(place.removesuffix(".base_layer"))
    found = {}
    for paths in users.values():
        distinct = list(dict.fromkeys(paths))
        for path in distinct:
            if len(distinct) > 1 and path in layers:
                found[path] = [p for p in distinct if p != path]
    return found

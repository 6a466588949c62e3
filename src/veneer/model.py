"""The face that users know: `get_peft_model`, `PeftModel` and its task classes."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from veneer import arithmetic, state
from veneer.adapters import AdapterSet, as_names, check_adapter_name
from veneer.arithmetic import CombineReport
from veneer.checkpoint import (
    CARD_NAME,
    LoadReport,
    locate_config,
    merge_card,
    model_card,
    open_adapter,
    write_adapter,
)
from veneer.config import LoraConfig, PeftConfig, TaskType
from veneer.doors import adapter_directory, hub
from veneer.errors import (
    AdapterNameError,
    CheckpointError,
    CombineError,
    ConfigError,
    LoadMismatchError,
    MergeError,
    TargetError,
    VeneerError,
    VeneerWarning,
)
from veneer.inject import Injection, bias_parameters, eject, prepare
from veneer.layers import LoraLayer
from veneer.layers.making import draw_seed
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.spec import resolve

logger = logging.getLogger("veneer")

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


class LoadResult(NamedTuple):
    """Keys that did not find their counterpart, with torch's names for them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class LoraModel(nn.Module):
    """A base model with adapters in it; the verbs over all its adapted layers.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: Configuration of the first adapter, or None to start without one.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
    """

    prefix: str = "lora_"

    def __init__(
        self,
        model: nn.Module,
        peft_config: LoraConfig | None = None,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        strict_targets: bool = False,
    ) -> None:
        super().__init__()
        if present := AdapterSet(model).names():
            raise TargetError(
                f"the model holds adapters already ({', '.join(map(repr, present))}): on the PeftModel that "
                "put them "
                "there use add_adapter(name, config) or load_adapter(path, name) for another one, or "
                "unload() first"
            )
        self.model = model
        self.training = model.training
        self.peft_config: dict[str, LoraConfig] = {}
        self.merge_report: MergeReport | None = None
        self._biases: dict[str, Tensor] = {}
        if peft_config is not None:
            self.inject(
                peft_config,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                strict_targets=strict_targets,
                activate=True,
            )

    # -- adapters ------------------------------------------------------------------------------------

    @property
    def index(self) -> AdapterSet:
        """The adapters over all modules of the model."""
        return AdapterSet(self.model)

    def layers(self) -> dict[str, LoraLayer]:
        """The low-ranked layers by their path in the base model."""
        return {path: m for path, m in self.model.named_modules() if isinstance(m, LoraLayer)}

    def inject(
        self,
        config: LoraConfig,
        adapter_name: str,
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        strict_targets: bool = False,
        activate: bool = False,
    ) -> None:
        """Add an adapter with fresh factors; the model is unchanged if that fails."""
        injection = self.prepare(
            config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, strict_targets=strict_targets
        )
        injection.initialise(draw_seed(), meta=low_cpu_mem_usage)
        self.commit(injection, activate=activate, trainable=not config.inference_mode)

    def prepare(self, config: LoraConfig, adapter_name: str, **options: Any) -> Injection:
        """Build an adapter beside the model.

        Raises:
            ConfigError: If a second adapter would train the biases that another one trains.
        """
        others = [n for n, c in self.peft_config.items() if c.bias != "none"]
        if others and getattr(config, "bias", "none") != "none":
            raise ConfigError(
                f"the adapter {others[0]!r} trains biases of the base "
                f"(bias={self.peft_config[others[0]].bias!r}); "
                "there is one set of them, so a second adapter needs bias='none'"
            )
        if adapter_name in self.peft_config:
            raise AdapterNameError(
                f"the model has an adapter named {adapter_name!r} already; delete_adapter it first or "
                "choose another name"
            )
        return prepare(self.model, config, adapter_name, **options)

    def commit(self, injection: Injection, *, activate: bool, trainable: bool = True) -> None:
        """Put a prepared adapter in."""
        active = self.index.active()
        biases = {name: parameter.detach().clone() for name, parameter in injection.biases()}
        injection.commit(active=None if activate else active, trainable=trainable)
        self._biases.update(biases)
        self.peft_config[injection.adapter] = injection.config
        scalings = sorted({a.spec.scaling for a in injection.additions})
        logger.info(
            "adapter %r: %d modules, scaling s = %s",
            injection.adapter,
            len(injection.additions),
            " … ".join(f"{s:.4g}" for s in dict.fromkeys((scalings[0], scalings[-1]))),
        )

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.index.active()

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list where it is not exactly one."""
        names = self.index.active()
        return names[0] if len(names) == 1 else names

    def set_adapter(
        self, adapter_name: str | Sequence[str] | Mapping[str, float], inference_mode: bool = False
    ) -> None:
        """Make one or several adapters the active ones, trainable unless ``inference_mode``.

        Args:
            adapter_name: A name, several, or names with a strength each (see `set_strength`).
            inference_mode: Leave the activated parameters frozen.

        Raises:
            AdapterNameError: For names that the model does not have; nothing has changed then.
        """
        names = as_names(adapter_name if isinstance(adapter_name, str) else list(adapter_name))
        self.index.check(names, known=self.peft_config)
        self.index.activate(names, inference_mode=inference_mode)
        for adapter, _, parameter in self._trained_biases():
            parameter.requires_grad_(adapter in names and not inference_mode)
        if isinstance(adapter_name, Mapping):
            for name, factor in adapter_name.items():
                self.set_strength(name, factor)

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Let an adapter count ``factor`` times as much as its configuration says.

        ``s = factor · lora_alpha / r``. It is a property of the running model and is not saved. A merged
        adapter keeps the strength it was merged with until it is merged again.

        Raises:
            AdapterNameError: If there is no such adapter.
        """
        self.index.check([adapter_name], known=self.peft_config)
        for module in self.index.modules():
            module.set_strength(adapter_name, factor)

    def copy_adapter(self, old: str, new: str) -> None:
        """Add an adapter ``new`` that begins as a copy of ``old``; it is not activated.

        Raises:
            AdapterNameError: If ``old`` does not exist, or ``new`` is taken or unusable.
            ConfigError: If ``old`` trains biases of the base, of which there is one set.
        """
        self.index.check([old], known=self.peft_config)
        check_adapter_name(new)
        if new in self.peft_config:
            raise AdapterNameError(f"an adapter named {new!r} exists already")
        if self.peft_config[old].bias != "none":
            raise ConfigError(f"{old!r} trains biases of the base itself, so it cannot be copied")
        for module in self.index.modules():
            if old in module.held_adapters:
                module.copy_adapter(old, new)
        self.peft_config[new] = copy.deepcopy(self.peft_config[old])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, it leaves nothing active in its place."""
        self.index.check([adapter_name], known=self.peft_config)
        merged = {}
        if self.peft_config[adapter_name].bias != "none":
            # What is merged may have a bias among it, so it is taken out before biases are given back.
            merged = {layer: layer.merged_adapters for layer in self.layers().values() if layer.merged}
            self.unmerge_adapter()
            self._restore_biases()
        was_active = adapter_name in self.active_adapters
        self.index.delete(adapter_name)
        for layer, names in merged.items():
            layer.merge(adapter_names=[n for n in names if n != adapter_name])
        del self.peft_config[adapter_name]
        if was_active and not self.active_adapters:
            rest = ", ".join(map(repr, self.peft_config)) or "none is left"
            warnings.warn(
                f"the deleted adapter {adapter_name!r} was the active one: no adapter is active now. "
                f"Choose with set_adapter: {rest}",
                VeneerWarning,
                stacklevel=2,
            )

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            AdapterNameError: If ``old`` does not exist, or ``new`` is taken or unusable.
        """
        self.index.check([old], known=self.peft_config)
        self.index.rename(old, new)
        self.peft_config = {new if n == old else n: c for n, c in self.peft_config.items()}

    def enable_adapter_layers(self) -> None:
        """Let the active adapters work."""
        self.index.enable(True)

    def disable_adapter_layers(self) -> None:
        """Let the model compute what its base computes, until enabled again."""
        self._mention_biases()
        self.index.enable(False)

    def _mention_biases(self) -> None:
        trained = [n for n, c in self.peft_config.items() if c.bias != "none"]
        if trained:
            warnings.warn(
                f"the adapter {trained[0]!r} trains biases of the base itself "
                f"(bias={self.peft_config[trained[0]].bias!r}): "
                "with adapters disabled the output keeps them, and is not the base model's",
                VeneerWarning,
                stacklevel=3,
            )

    def _trained_biases(self) -> Iterator[tuple[str, str, nn.Parameter]]:
        """The base biases that an adapter trains: its name, theirs and the parameter."""
        for adapter, config in self.peft_config.items():
            for name, parameter in bias_parameters(self.model, config.bias, adapter):
                yield adapter, name, parameter

    @torch.no_grad()
    def _restore_biases(self) -> None:
        for _, name, parameter in self._trained_biases():
            if name in self._biases:
                parameter.copy_(self._biases[name])
            parameter.requires_grad_(False)
        self._biases.clear()

    # -- merging -------------------------------------------------------------------------------------

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
                can_fail = safe_merge or layer.get_base_layer().weight.dtype == torch.float16
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

    def unmerge_adapter(self) -> None:
        """Give every base weight back, bit for bit."""
        for layer in self.layers().values():
            layer.unmerge()

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
        eject(self.model, before=lambda layer: None)
        self.peft_config = {}
        return self.model

    def unload(self) -> nn.Module:
        """The base model without adapters, its weights and biases bit for bit as they were."""
        self.unmerge_adapter()
        self._restore_biases()
        eject(self.model)
        self.peft_config = {}
        return self.model

    # -- combining -----------------------------------------------------------------------------------

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: int | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> CombineReport:
        """Add the adapter whose update is ``Σ wᵢ ΔWᵢ``; it is not activated.

        See `veneer.arithmetic.combine`. ``svd_full_matrices`` and ``svd_driver`` have no meaning here: no
        dense matrix is decomposed.

        Raises:
            CombineError: Listing everything that makes the combination impossible or wrong.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise AdapterNameError(f"an adapter named {adapter_name!r} exists already")
        names = as_names(list(adapters))
        self.index.check(names, known=self.peft_config)
        self._check_combination(names, svd_clamp, density)
        results, report = arithmetic.combine(
            self.layers(), adapters, weights, adapter_name, combination_type, svd_rank
        )
        config = copy.deepcopy(self.peft_config[names[0]])
        ranks = list(report.ranks.values())
        config.r = max(set(ranks), key=ranks.count)
        config.lora_alpha = config.r
        config.rank_pattern = {f"^{p}$": r for p, r in report.ranks.items() if r != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        config.use_rslora, config.lora_dropout, config.init_lora_weights = False, 0.0, True
        config.lora_bias = any(c.spec.lora_bias for c in results)
        config.target_modules = set(report.ranks)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        for combined in results:
            combined.layer.add_adapter(combined.spec, combined.start)
        self.peft_config[adapter_name] = config
        return report

    def _check_combination(self, names: Sequence[str], svd_clamp: int | None, density: float | None) -> None:
        problems = []
        for name in names:
            config = self.peft_config[name]
            if config.bias != "none":
                problems.append(f"{name!r} trains biases of the base (bias={config.bias!r})")
        whole = [
            name
            for m in self.index.modules()
            if isinstance(m, ModulesToSaveWrapper)
            for name in m.held_adapters
            if name in names
        ]
        if whole:
            problems.append(
                f"{whole[0]!r} trains whole modules (modules_to_save), which are no low-rank updates"
            )
        if svd_clamp is not None:
            problems.append("svd_clamp would change the update that was asked for")
        if density is not None:
            problems.append("density belongs to ties and dare, which this version does not have")
        if problems:
            from_all = "\n".join(f"  - {p}" for p in problems)
            raise CombineError(f"these adapters cannot be combined:\n{from_all}")

    # -- the model underneath ------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The model that was adapted."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model gives."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)


def shared_weights(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, list[str]]:
    """Adapted layers whose base weight is another module's weight too, with those modules' paths."""
    users: dict[Any, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0].removesuffix(".base_layer")
        storage = None if parameter.is_meta or parameter.numel() == 0 else parameter.untyped_storage()
        key = id(parameter) if storage is None else (storage.data_ptr(), parameter.storage_offset())
        users.setdefault(key, []).append(path)
    found = {}
    for paths in users.values():
        distinct = list(dict.fromkeys(paths))
        for path in distinct:
            if len(distinct) > 1 and path in layers:
                found[path] = [p for p in distinct if p != path]
    return found


class PeftModel(nn.Module):
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
            config.base_model_name_or_path = _name_of(model)
        self.base_model = LoraModel(
            model,
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            **options,
        )
        self.training = model.training
        self.config = getattr(model, "config", {"model_type": "custom"})
        _let_checkpointing_pass_gradients(model)

    # -- the field's attributes ------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Configurations by adapter name."""
        return self.base_model.peft_config

    @property
    def peft_type(self) -> Any:
        """The method of the active adapter."""
        return self.active_peft_config.peft_type

    @property
    def active_peft_config(self) -> LoraConfig:
        """The configuration of the (first) active adapter.

        Raises:
            AdapterNameError: If none is active.
        """
        active = self.active_adapters
        if not active:
            raise AdapterNameError(
                f"no adapter is active; the model has: {', '.join(self.peft_config) or 'none'}"
            )
        return self.peft_config[active[0]]

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

    def get_base_model(self) -> nn.Module:
        """The model that was adapted."""
        return self.base_model.model

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the adapted model gives.

        Raises:
            VeneerError: For ``adapter_names``: rows of one batch with different adapters are not served yet.
        """
        _refuse_mixed_batch(kwargs)
        return self.get_base_model()(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's ``generate``; input ids by keyword or by position."""
        _refuse_mixed_batch(kwargs)
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

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
        config = copy.deepcopy(peft_config)
        if not config.base_model_name_or_path:
            config.base_model_name_or_path = _name_of(self.get_base_model())
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
        """A context in which the model computes what its base computes."""
        self.base_model._mention_biases()
        with self.base_model.index.disabled():
            yield

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; packed 4-bit weights count as what they hold."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, and their ratio in per cent."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share}")

    # -- persistence -----------------------------------------------------------------------------------

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
            is_main_process: False writes nothing (other ranks of a group).
            path_initial_model_for_weight_conversion: Leave it None: it belongs to initialisations that change
                the base, which here keep it exact.
            **kwargs: ``state_dict``: take the values from this full state dict.

        Raises:
            CheckpointError: If the adapter cannot be written; what was there before is whole.
        """
        if path_initial_model_for_weight_conversion is not None:
            raise CheckpointError(
                "path_initial_model_for_weight_conversion: no initialisation of this version leaves a "
                "base to convert from; save without it"
            )
        names = list(self.peft_config) if selected_adapters is None else as_names(selected_adapters)
        self.base_model.index.check(names, known=self.peft_config)
        if not names:
            raise CheckpointError("there is no adapter to save")
        if os.path.isfile(save_directory):
            raise CheckpointError(f"{save_directory} is a file; a directory is needed")
        given = kwargs.pop("state_dict", None)
        for name in names:
            tensors = state.adapter_state_dict(
                self, name, state_dict=given, save_embedding_layers=save_embedding_layers
            )
            if not is_main_process:
                continue
            config = self._config_to_save(name)
            count = sum(t.numel() for t in tensors.values())
            write_adapter(
                self._directory_of(save_directory, name),
                tensors,
                config,
                metadata={state.FINGERPRINT: json.dumps(state.base_fingerprint(self.get_base_model()))},
                card=model_card(
                    config,
                    transformers_model=hasattr(self.get_base_model(), "save_pretrained"),
                    parameters=count,
                ),
                safe_serialization=safe_serialization,
            )

    def _config_to_save(self, name: str) -> dict[str, Any]:
        """The content of an adapter's configuration file.

        Without a task it names the base's class. LoftQ is not named in it: other readers would run it again,
        on a base that it has rounded already.
        """
        config, kind = self.peft_config[name], type(self.get_base_model())
        values = config.to_json()
        if str(values["init_lora_weights"]).lower() == "loftq":
            values["init_lora_weights"] = True
            values.pop("loftq_config", None)
        if config.task_type is None and kind.__module__.startswith("transformers."):
            mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
            values = dict(sorted({**values, "auto_mapping": mapping}.items()))
        return values

    @staticmethod
    def _directory_of(save_directory: str | os.PathLike[str], name: str) -> Path:
        check_adapter_name(name)
        return Path(save_directory) if name == "default" else Path(save_directory) / name

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write the card of the active adapter, keeping the body of an existing one."""
        from_config = self.active_peft_config.to_json()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        write_card(Path(output_dir), from_config, hasattr(self.get_base_model(), "save_pretrained"))

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
            config: Use this configuration instead of the file's.
            **kwargs: ``subfolder``, ``revision``, ``token``, ``cache_dir`` and the like.

        Returns:
            The account of every tensor.

        Raises:
            AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then as it was.
        """
        directory = adapter_directory(model_id, **kwargs)
        if config is None:
            config = PeftConfig.from_file(locate_config(directory))
        config = copy.deepcopy(config)
        config.inference_mode = not is_trainable
        file = open_adapter(directory)
        rename = _renamer(key_mapping)
        names = {rename(key): key for key in file.shapes}
        if adapter_name in self.peft_config:
            self._check_reload(config, adapter_name, directory)
            if check_base:
                state.check_base(self.get_base_model(), file.metadata, directory, carried=file.shapes)
            values = {new: t for new, old in names.items() for t in file.tensors([old]).values()}
            report = state.set_adapter_state_dict(self, values, adapter_name, strict=strict, where=directory)
            if not is_trainable:
                self.eval()
            return report
        injection = self.base_model.prepare(
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            read_from_file=True,
        )
        report = state.fill_injection(
            injection,
            {new: file.shapes[old] for new, old in names.items()},
            lambda keys: {key: t for key in keys for t in file.tensors([names[key]]).values()},
            where=directory,
            strict=strict,
        )
        # After the account of tensors: where names or shapes differ, that says more.
        if check_base:
            state.check_base(
                injection.model, file.metadata, directory, injection._targets(), carried=file.shapes
            )
        first = not self.peft_config
        self.base_model.commit(injection, activate=first, trainable=is_trainable)
        if not is_trainable:
            self.eval()
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
        differing = [
            f"{path}: {layer.specs[adapter_name].scaling:g} here, {wanted.scaling:g} in the file"
            for path, layer in layers.items()
            for wanted in [resolve(config, adapter_name, layer.specs[adapter_name].path)]
            if (wanted.scaling, wanted.variant)
            != (layer.specs[adapter_name].scaling, layer.specs[adapter_name].variant)
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
            AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then as it was.
        """
        directory = adapter_directory(
            model_id, **{k: v for k, v in kwargs.items() if k not in ("strict", "check_base")}
        )
        options = {k: kwargs[k] for k in ("strict", "check_base") if k in kwargs}
        if config is None:
            config = PeftConfig.from_file(locate_config(directory))
        kind = _class_of(config.task_type) if cls is PeftModel else cls
        result = kind(model)
        result.load_adapter(
            directory,
            adapter_name,
            is_trainable=is_trainable,
            autocast_adapter_dtype=autocast_adapter_dtype,
            key_mapping=key_mapping,
            config=config,
            **options,
        )
        return result


class PeftModelForCausalLM(PeftModel):
    """A language model that predicts the next token."""


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder language model."""


class PeftModelForSequenceClassification(PeftModel):
    """A model with a head that classifies sequences; the head is trained whole."""


class PeftModelForTokenClassification(PeftModel):
    """A model with a head that classifies tokens; the head is trained whole."""


class PeftModelForQuestionAnswering(PeftModel):
    """A model with a head that marks answers; the head is trained whole."""


class PeftModelForFeatureExtraction(PeftModel):
    """A model whose hidden states are used."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.CAUSAL_LM.value: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM.value: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS.value: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS.value: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS.value: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION.value: PeftModelForFeatureExtraction,
}


def _class_of(task_type: Any) -> type[PeftModel]:
    value = getattr(task_type, "value", task_type)
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(value, PeftModel)


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
        mixed: Adapters of different methods in one model; there is one method here.
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
    if mixed:
        raise ConfigError("mixed=True joins different adapter methods; Veneer has LoRA: leave it False")
    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(f"a LoraConfig is needed, got {type(peft_config).__name__}")
    config = copy.deepcopy(peft_config)
    if revision is not None:
        config.revision = revision
    return _class_of(config.task_type)(
        model,
        config,
        adapter_name,
        autocast_adapter_dtype=autocast_adapter_dtype,
        low_cpu_mem_usage=low_cpu_mem_usage,
        strict_targets=strict_targets,
    )


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter under their names on disk.

    Args:
        model: A PeftModel, or a module with injected adapters.
        state_dict: Take the values from this full state dict.
        adapter_name: The adapter.
        unwrap_compiled: Accepted for the field's sake: a compiled model is always unwrapped.
        save_embedding_layers: See `PeftModel.save_pretrained`.
    """
    inner = getattr(model, "_orig_mod", model)
    return state.adapter_state_dict(
        inner, adapter_name, state_dict=state_dict, save_embedding_layers=save_embedding_layers
    )


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Write tensors with names on disk into an adapter that the model has.

    Returns:
        The keys that were missing or unexpected; each kind is warned of too.

    Raises:
        LoadMismatchError: If no tensor fits, or shapes differ. Nothing has been written then.
    """
    report = state.set_adapter_state_dict(
        model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes
    )
    if not report.ok:
        warnings.warn(report.message("the state dict"), VeneerWarning, stacklevel=2)
    return LoadResult(list(report.missing), list(report.unexpected))


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, local or on the hub, under their names on disk.

    Args:
        model_id: A directory or a repository id.
        device: Where to put them; the CPU by default.
        key_mapping: Regular expressions to replacements, applied to the names.
        **hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token`` and the like.
    """
    file = open_adapter(adapter_directory(model_id, **hf_hub_download_kwargs))
    rename = _renamer(key_mapping)
    return {rename(name): tensor for name, tensor in file.tensors(device=device or "cpu").items()}


def _renamer(mapping: Mapping[str, str] | Callable[[str], str] | None) -> Callable[[str], str]:
    """A function that renames keys as the field's ``key_mapping`` does: without the saved prefix."""
    if mapping is None:
        return lambda key: key
    if callable(mapping):
        return mapping
    patterns = [(re.compile(pattern), replacement) for pattern, replacement in mapping.items()]

    def rename(key: str) -> str:
        has_prefix = key.startswith(state.PREFIX)
        name = key.removeprefix(state.PREFIX)
        for pattern, replacement in patterns:
            name, count = pattern.subn(replacement, name)
            if count:
                break
        return f"{state.PREFIX}{name}" if has_prefix else name

    return rename


def write_card(directory: Path, config: Mapping[str, Any], transformers_model: bool) -> None:
    """Write or update ``README.md`` of an adapter directory."""
    path = directory / CARD_NAME
    card = model_card(config, transformers_model=transformers_model)
    if path.exists():
        card = merge_card(path.read_text(encoding="utf-8", errors="replace"), card)
    path.write_text(card, encoding="utf-8")


def _refuse_mixed_batch(kwargs: Mapping[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise VeneerError(
            "adapter_names: rows of one batch through different adapters are not served by this version; "
            "call the model once per adapter after set_adapter(name)"
        )


def _name_of(model: nn.Module) -> str | None:
    """Where the base model came from, if it says so."""
    name = model.__dict__.get("name_or_path") or getattr(
        getattr(model, "config", None), "_name_or_path", None
    )
    return name if isinstance(name, str) and name else None


def _let_checkpointing_pass_gradients(model: nn.Module) -> None:
    """With reentrant gradient checkpointing a frozen embedding's output must require a gradient."""
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        enable = getattr(model, "enable_input_require_grads", None)
        if callable(enable):
            enable()

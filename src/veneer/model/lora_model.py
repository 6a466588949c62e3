"""The model that adapters are in, with all the verbs over them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from veneer import arithmetic, targets
from veneer.adapters import as_names, check_adapter_name
from veneer.arithmetic import Combined, CombineReport
from veneer.errors import AdapterNameError, CombineError, Text
from veneer.inject.places import sites
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.model.merging import MergeVerbs
from veneer.spec import restate


class LoraModel(MergeVerbs):
    """A base model with adapters in it; the verbs over all its adapted layers.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: Configuration of the first adapter, or None to start without one.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
    """

    def add_weighted_adapter(
        self,
        adapters: str | Sequence[str],
        weights: float | Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: int | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> CombineReport:
        """Add the adapter whose update is ``Σ wᵢ ΔWᵢ``, or trimmed and voted; it is not activated.

        See `veneer.arithmetic.combine`. ``svd_full_matrices`` and ``svd_driver`` have no meaning here: no
        dense matrix is decomposed.

        Raises:
            CombineError: Listing everything that makes the combination impossible or wrong.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise AdapterNameError(f"an adapter named {adapter_name!r} exists already")
        adapters = [adapters] if isinstance(adapters, str) else list(adapters)
        names = as_names(adapters)
        self.index.check(names, known=self.peft_config)
        self._check_combination(names, svd_clamp)
        results, report = arithmetic.combine(
            self.layers(),
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            density,
            majority_sign_method,
        )
        results = _alike_in_bias(results)
        config = copy.deepcopy(self.peft_config[names[0]])
        restate(config, [c.spec for c in results])
        config.lora_dropout, config.init_lora_weights = 0.0, True
        config.lora_bias = any(c.spec.lora_bias for c in results)
        config.target_modules = targets.portable_targets(
            report.ranks, set(sites(self.model)) - set(report.ranks)
        )
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        prepared = [(c.layer, c.layer.prepared(c.spec, c.start)) for c in results]
        for layer, adapter in prepared:
            layer.put_adapter(adapter)
        self.peft_config[adapter_name] = config
        return report

    def _check_combination(self, names: Sequence[str], svd_clamp: int | None) -> None:
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
        rows = [n for m in self.index.modules() if isinstance(m, TrainableTokens) for n in m.held_adapters]
        if both := [name for name in names if name in rows]:
            problems.append(f"{both[0]!r} trains single tokens, which are no low-rank updates")
        if svd_clamp is not None:
            problems.append("svd_clamp would change the update that was asked for")
        if problems:
            from_all = "\n".join(f"  - {p}" for p in problems)
            raise CombineError(f"these adapters cannot be combined:\n{from_all}")

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


def _alike_in_bias(results: Sequence[Combined]) -> list[Combined]:
    """Give every result a bias, zero where it has none, if any has one: a configuration says it for all.

    Raises:
        CombineError: If a layer that cannot have one, such as an embedding, is among them.
    """
    if not any(c.spec.lora_bias for c in results):
        return list(results)
    filled, problems = [], []
    for combined in results:
        spec, start = replace(combined.spec, lora_bias=True), combined.start
        if reason := combined.layer.refuses(combined.layer.geometry(), spec):
            problems.append(Text(f"{spec.path}: ", reason, ", and another of the layers has a lora_bias"))
        elif start.bias is None:
            start = replace(start, bias=start.b.new_zeros(start.b.shape[0]))
        filled.append(replace(combined, spec=spec, start=start))
    if problems:
        raise CombineError(Text.join("\n  - ", ["these adapters cannot be combined:", *problems]))
    return filled

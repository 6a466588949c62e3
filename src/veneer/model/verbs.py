"""Which adapters a model has, which are active, and how much each counts."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import inits
from veneer.adapters import AdapterSet, Contexts, as_names, check_adapter_name, walk
from veneer.config import LoraConfig
from veneer.errors import (
    AdapterNameError,
    ConfigError,
    MergeError,
    RoutingError,
    TargetError,
    VeneerWarning,
    show,
)
from veneer.inject import Injection, bias_parameters, prepare
from veneer.layers import LoraLayer
from veneer.layers.making import draw_seed
from veneer.merge import Mergeable, merge_updates, unmerge_all
from veneer.rollback import Rollback
from veneer.routing import BASE
from veneer.sharded import settle
from veneer.spec import resolve

logger = logging.getLogger("veneer")


class AdapterVerbs(nn.Module):
    """A base model with adapters in it: which there are, which are active, how strong.

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
                "put them there use add_adapter(name, config) or load_adapter(path, name) for another one, "
                "or "
                "unload() first"
            )
        AdapterSet(model).enable(True)  # layers that an earlier, deleted adapter left behind
        self.model = model
        # As in PEFT: what is made for training says so, whatever mode the base is in.
        self.training = model.training or (peft_config is not None and not peft_config.inference_mode)
        self.peft_config: dict[str, LoraConfig] = {}
        self._biases: dict[str, Tensor] = {}
        #: Given to the adapter modules that come, so that those who come in a context are in it too.
        self._contexts = Contexts()
        #: Whether an adapter ever came that is invoked by tokens (aLoRA): asked at every call.
        self.invocable = False
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
        return {path: m for path, m in walk(self.model) if isinstance(m, LoraLayer)}

    def mergeable(self) -> dict[str, Mergeable]:
        """The modules whose adapters go into the base weights, by their path in the base model."""
        return {path: m for path, m in walk(self.model) if isinstance(m, Mergeable)}

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
        if getattr(config, "bias", "none") != "none":
            for path, layer in self.layers().items():
                if any(layer.lora_bias[name] for name in layer.merged_adapters):
                    raise MergeError(
                        f"{path} has a lora_bias merged into its bias, which bias={config.bias!r} would "
                        "train: "
                        "unmerge_adapter() first"
                    )
        if adapter_name in self.peft_config:
            raise AdapterNameError(
                f"the model has an adapter named {adapter_name!r} already; delete_adapter it first or "
                "choose another name"
            )
        return prepare(self.model, config, adapter_name, **options)

    def commit(self, injection: Injection, *, activate: bool, trainable: bool = True) -> None:
        """Put a prepared adapter in."""
        active, before = self.index.active(), set(self.index.modules())
        biases = {name: parameter.detach().clone() for name, parameter in injection.biases()}
        injection.commit(active=None if activate else active, trainable=trainable)
        for module in self.index.modules():
            if module not in before:
                module._contexts = self._contexts
        self._biases.update(biases)
        self.peft_config[injection.adapter] = injection.config
        self.invocable = self.invocable or bool(injection.config.alora_invocation_tokens)
        scalings = sorted({a.spec.scaling for a in injection.additions})
        logger.info(
            "adapter %r: %d modules, scaling s = %s",
            injection.adapter,
            len(injection.additions),
            " … ".join(f"{s:.4g}" for s in dict.fromkeys((scalings[0], scalings[-1]))),
        )

    def unmeasured(self) -> dict[str, str]:
        """Adapters whose start was to be measured on data and never was, with what to say of them."""
        found = {}
        for name, config in self.peft_config.items():
            init = _init_of(config)
            starts = [x.specs[name].init for x in self.layers().values() if name in x.held_adapters]
            if init.measured_in_place and starts and not any(inits.find(start) is init for start in starts):
                found[name] = (
                    f"the adapter {name!r} has init_lora_weights={config.init_lora_weights!r}, but its start "
                    f"was never measured and is the default one: call {init.measured_by} before training, or "
                    "use init_lora_weights=True"
                )
        return found

    def note_start(self, adapter_name: str, config: LoraConfig) -> None:
        """Note from which start the factors came that an adapter goes on from."""
        if _init_of(self.peft_config[adapter_name]).measured_in_place:
            for layer in self.layers().values():
                if adapter_name in layer.held_adapters:
                    layer.note_start(adapter_name, resolve(config, adapter_name, "").init)

    def mention_unmeasured(self, names: Iterable[str], more: str = "", stacklevel: int = 4) -> None:
        """Warn of those of these adapters whose start was to be measured on data and never was."""
        found = self.unmeasured()
        for name in [name for name in names if name in found]:
            warnings.warn(found[name] + more, VeneerWarning, stacklevel=stacklevel)

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
        if isinstance(adapter_name, Mapping):
            for factor in adapter_name.values():
                _check_factor(factor)
        self.index.activate(names, inference_mode=inference_mode)
        for adapter, _, parameter in self._trained_biases():
            parameter.requires_grad_(adapter in names and not inference_mode)
        if isinstance(adapter_name, Mapping):
            for name, factor in adapter_name.items():
                self.set_strength(name, factor)

    def check_mixed_batch(self, names: Sequence[str]) -> None:
        """Refuse names for the rows of a batch that cannot be served.

        Raises:
            RoutingError: Listing all that is wrong.
        """
        problems = []
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise RoutingError(f"adapter_names is a list of names, one for each row, got {names!r}")
        used = list(dict.fromkeys(name for name in names if name != BASE))
        if not names:
            problems.append("it is empty: one name for each row of the batch is needed")
        if unknown := [name for name in used if name not in self.peft_config]:
            have = ", ".join(map(repr, [*self.peft_config, BASE]))
            problems.append(f"no adapter named {', '.join(map(show, unknown))}; there are: {have}")
        modules = self.index.modules()
        if merged := sorted({n for module in modules for n in module.merged_adapters}):
            problems.append(
                f"{', '.join(map(repr, merged))} is merged into the weights, so no row would be without it: "
                "unmerge_adapter() first"
            )
        if biased := [n for n in self.peft_config if self.peft_config[n].bias != "none"]:
            bias = self.peft_config[biased[0]].bias
            problems.append(f"{biased[0]!r} trains biases of the base itself (bias={bias!r}), for all rows")
        refused = [reason for module in modules if (reason := module.refuses_rows(used)) is not None]
        problems += refused[:3] + ([f"… and {len(refused) - 3} more like these"] if len(refused) > 3 else [])
        if problems:
            raise RoutingError("this batch cannot be mixed:\n" + "\n".join(f"  - {p}" for p in problems))

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Let an adapter count ``factor`` times as much as its configuration says.

        ``s = factor · lora_alpha / r``. It is a property of the running model and is not saved. A merged
        adapter keeps the strength it was merged with until it is merged again.

        Raises:
            AdapterNameError: If there is no such adapter.
        """
        self.index.check([adapter_name], known=self.peft_config)
        _check_factor(factor)
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
        # What uses another module's tensors comes after it.
        modules = sorted(self.index.modules(), key=lambda m: m.tied_adapter is not None)
        config = copy.deepcopy(self.peft_config[old])
        for put in [module.copying(old, new) for module in modules if old in module.held_adapters]:
            put()
        self.peft_config[new] = config

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, it leaves nothing active in its place."""
        self.index.check([adapter_name], known=self.peft_config)
        merged: dict[Mergeable, dict[str, Any]] = {}
        if self.peft_config[adapter_name].bias != "none":
            # What is merged may have a bias among it, so it is taken out before biases are given back.
            for layer in self.mergeable().values():
                if layer._undo is not None:
                    merged[layer] = dict(layer._undo.updates)
            self.unmerge_adapter()
            self._restore_biases()
        was_active = adapter_name in self.active_adapters
        self.index.delete(adapter_name)
        with Rollback() as back:
            for layer, updates in merged.items():
                updates.pop(adapter_name, None)
                if updates:
                    merge_updates(layer, updates, "copy", back)
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
        mention_biases(self.peft_config, stacklevel=4)

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

    def unmerge_adapter(self) -> None:
        """Give every base weight back, bit for bit.

        Raises:
            MergeError: Naming every layer whose weight cannot be had back. Nothing has changed then.
        """
        settle(self)
        unmerge_all(self.mergeable())


def mention_biases(configs: Mapping[str, LoraConfig], stacklevel: int = 3) -> None:
    """Warn that what an adapter trained of the base itself stays when adapters are disabled."""
    trained = next((name for name, config in configs.items() if config.bias != "none"), None)
    if trained is not None:
        warnings.warn(
            f"the adapter {trained!r} trains biases of the base itself (bias={configs[trained].bias!r}): "
            "with adapters disabled the output keeps them, and is not the base model's",
            VeneerWarning,
            stacklevel=stacklevel,
        )


def _init_of(config: LoraConfig) -> inits.Init:
    return inits.find(resolve(config, "", "").init)


def _check_factor(factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ConfigError(f"the strength of an adapter is a finite number, got {factor!r}")

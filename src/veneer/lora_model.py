"""LoraModel: a base model with adapters in it, and every verb over them."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import arithmetic, inits, module_names
from veneer.adapters import AdapterSet, Contexts, as_names, check_adapter_name, walk
from veneer.arithmetic import CombineReport
from veneer.config import LoraConfig
from veneer.dequantise import dequantise, forget_quantisation
from veneer.errors import CombineError, ConfigError, MergeError, TargetError
from veneer.inject.api import eject
from veneer.inject.base_tensors import bias_parameters, embedding_of
from veneer.inject.injection import Injection
from veneer.inject.prepare import prepare
from veneer.inject.sites import sites
from veneer.layers import LoraLayer
from veneer.layers.flattening import that_flatten
from veneer.layers.making import draw_seed
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.parameter import LoraParameter
from veneer.layers.trainable_tokens import TrainableTokens
from veneer.merge import Mergeable, Undoing, merge_all, merge_updates, unmerge_all
from veneer.merge_report import MergeReport, mention_lost
from veneer.rollback import Rollback
from veneer.routing import check_mixed_batch
from veneer.sharded import reshard
from veneer.spec import resolve, restate
from veneer.wording import bullets, listed, warn

logger = logging.getLogger("veneer")


class LoraModel(nn.Module):
    """A base model with adapters in it, and the methods that act on all of its adapted modules.

    Args:
        model: The base model; adapters are put into it in place.
        peft_config: Configuration of the first adapter, or None to start without one.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
    """

    prefix: str = "lora_"

    #: What the last merge kept.
    merge_report: MergeReport | None = None

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
                "or unload() first"
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
        #: What `that_flatten` finds: asked at every mixed call.
        self.flattening: list[nn.Module] = []
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
        """The layers with low-rank factors, by their path in the base model."""
        return {path: m for path, m in walk(self.model) if isinstance(m, LoraLayer)}

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted modules in the base model."""
        return [path for path, m in self.layers().items() if not isinstance(m, LoraParameter)]

    @property
    def targeted_parameter_names(self) -> list[str]:
        """Paths of the bare parameters that are adapted (``target_parameters``)."""
        specs = {s.path: s for layer in self.layers().values() for s in layer.specs.values()}
        return [path for path, spec in specs.items() if spec.parameter]

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
                f"(bias={self.peft_config[others[0]].bias!r}); there is one set of them, so a second "
                "adapter needs bias='none'"
            )
        if getattr(config, "bias", "none") != "none":
            for path, layer in self.layers().items():
                if any(layer.lora_bias[name] for name in layer.merged_adapters):
                    raise MergeError(
                        f"{path} has a lora_bias merged into its bias, which bias={config.bias!r} would "
                        "train: unmerge_adapter() first"
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
        self.flattening = that_flatten(self.model)
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

    def mention_unmeasured(self, names: Iterable[str], more: str = "") -> None:
        """Warn of those of these adapters whose start was to be measured on data and never was."""
        found = self.unmeasured()
        for name in [name for name in names if name in found]:
            warn(found[name] + more)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.index.active()

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list if it is not exactly one."""
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
        biased = [n for n in self.peft_config if self.peft_config[n].bias != "none"]
        biases = [
            f"{name!r} trains biases of the base itself (bias={self.peft_config[name].bias!r}), for all rows"
            for name in biased[:1]
        ]
        check_mixed_batch(names, self.peft_config, self.index.modules(), biases)

    def set_strength(self, adapter_name: str, factor: float) -> None:
        """Multiply an adapter's configured strength by ``factor``.

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
        """Add an adapter ``new`` that is a copy of ``old``; it is not activated.

        Raises:
            AdapterNameError: If ``old`` does not exist, or ``new`` is taken or unusable.
            ConfigError: If ``old`` trains biases of the base, of which there is one set.
        """
        self.index.check([old], known=self.peft_config)
        check_adapter_name(new, self.peft_config)
        if self.peft_config[old].bias != "none":
            raise ConfigError(f"{old!r} trains biases of the base itself, so it cannot be copied")
        # What uses another module's tensors comes after it.
        modules = sorted(self.index.modules(), key=lambda m: m.tied_adapter is not None)
        config = copy.deepcopy(self.peft_config[old])
        for put in [module.copying(old, new) for module in modules if old in module.held_adapters]:
            put()
        self.peft_config[new] = config

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, no other one takes its place."""
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
            warn(
                f"the deleted adapter {adapter_name!r} was the active one: no adapter is active now. "
                f"Choose with set_adapter: {rest}"
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
        """Enable the active adapters again."""
        self.index.enable(True)

    def disable_adapter_layers(self) -> None:
        """Disable all adapters: the model computes what its base computes, until they are enabled again."""
        mention_biases(self.peft_config)
        self.index.enable(False)

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

    # -- merging -------------------------------------------------------------------------------------------

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        untie: bool = False,
        undo: Undoing = "copy",
    ) -> MergeReport:
        """Add adapters to the base weights; `unmerge_adapter` undoes it.

        An adapter that is already merged stays as it was merged, even if it has changed since.

        Args:
            adapter_names: The adapters; None means the active ones.
            safe_merge: Also refuse a base that holds NaN or infinity. An adapter that does, or whose sum with
                the weight would overflow, is always refused.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.
            undo: What is kept of each weight for `unmerge_adapter`: "copy", all of it.

        Returns:
            The share of the update that each layer kept.

        Raises:
            MergeError: Naming every layer that cannot be merged.

        Whatever is raised, the model is then as it was, bit for bit.
        """
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        merged = {name for layer in self.mergeable().values() for name in layer.merged_adapters}
        done = [name for name in names if name in merged]
        with Rollback() as back:
            report = self._merge(names, safe_merge, untie, undo, back)
        self.merge_report = report
        mention_lost(report)
        if done:
            warn(f"{', '.join(map(repr, done))} had been merged before and stays as it was merged")
        return report

    def _merge(
        self,
        names: Sequence[str],
        safe_merge: bool,
        untie: bool,
        undo: Undoing,
        back: Rollback,
        progressbar: bool = False,
    ) -> MergeReport:
        """Refuse everything that can be known, then write; ``back`` gets what undoes it."""
        self.index.check(names, known=self.peft_config)
        self.mention_unmeasured(names)
        reshard(self)
        layers = self.mergeable()
        kept = merge_all(
            self.model,
            layers,
            names,
            back,
            safe_merge=safe_merge,
            untie=untie,
            undo=undo,
            progressbar=progressbar,
        )
        requantised = tuple(path for path in kept if layers[path].backend.quantization is not None)
        before = {} if self.merge_report is None else self.merge_report.kept
        merged = [path for path, layer in layers.items() if layer.merged and layer.tied_adapter is None]
        kept = {path: before[path] for path in merged if path in before} | kept
        return MergeReport(kept, requantised)

    def unmerge_adapter(self) -> None:
        """Restore every base weight, bit for bit.

        Raises:
            MergeError: Naming every layer whose weight cannot be restored. Nothing has changed then.
        """
        reshard(self)
        unmerge_all(self.mergeable())

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        untie: bool = False,
        dequantize: bool | torch.dtype = False,
    ) -> nn.Module:
        """Merge adapters into the base and return it without any trace of them.

        Afterwards `merge_report` says how much of the update was kept. No copy of the base is made: if memory
        runs out between two layers, or the call is interrupted, the layers already written stay merged, and
        the error names them. The model then computes the same as before, and calling this again continues.
        For all or nothing call `merge_adapter` first, which keeps copies.

        Args:
            progressbar: Show progress on standard error.
            safe_merge: Also refuse a base that holds NaN or infinity. An adapter that does, or whose sum with
                the weight would overflow, is always refused.
            adapter_names: The adapters; None means the active ones.
            untie: Give an adapted layer whose weight is shared with another module a weight of its own.
            dequantize: First replace every quantised module of the model, adapted or not, by an ordinary one,
                so that the update is not quantised away. Its weights get this type; with True that of the
                model's configuration, or else the one that was quantised.

        Raises:
            ConfigError: If ``dequantize`` is neither a boolean nor a floating-point type.
            MergeError: Naming every layer that cannot be merged; the model is then as it was. Or naming the
                layers that stay merged, with what stopped the others as its cause.
        """
        if not (isinstance(dequantize, bool) or getattr(dequantize, "is_floating_point", None) is True):
            raise ConfigError(f"dequantize must be a boolean or a floating-point type, got {dequantize!r}")
        names = self.active_adapters if adapter_names is None else as_names(adapter_names)
        if self.peft_config and not names:
            raise MergeError(
                f"no adapter is active, so there is nothing to merge; the model has: "
                f"{', '.join(self.peft_config)}. "
                "Choose with set_adapter or adapter_names, or take the base alone by unload()"
            )
        if reasons := {r for m in self.index.modules() if (r := m.refuses_active(names)) is not None}:
            raise MergeError("; ".join(sorted(reasons)))
        before = {path: layer.merged_adapters for path, layer in self.mergeable().items()}
        try:
            with Rollback() as back:
                if dequantize:
                    self._dequantise(dequantize, back)
                report = self._merge(names, safe_merge, untie, None, back, progressbar)
        except BaseException as error:
            self._name_what_stays(before, error)
            raise
        self.merge_report = report
        if dequantize:
            forget_quantisation(self.model)
        extra = [n for layer in self.mergeable().values() for n in layer.merged_adapters if n not in names]
        for module in self.index.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module.set_adapter(names, inference_mode=True)
                module.enable_adapters(True)
        eject(self.model, trained_copies=True)
        _note_untied(self.model)
        self.peft_config = {}
        mention_lost(report)
        if extra:
            warn(f"the adapter {extra[0]!r} was merged before and stays merged")
        return self.model

    def _name_what_stays(self, before: Mapping[str, list[str]], error: BaseException) -> None:
        """After a failure: the layers that could not be put back, since no copy was kept of their weight."""
        layers = self.mergeable().items()
        paths = [path for path, layer in layers if layer.merged_adapters != before.get(path)]
        if not paths:
            return
        text = (
            f"merging stopped: {type(error).__name__}: {error}. {len(paths)} of {len(before)} layers are "
            f"merged by now ({listed(paths)}) and stay so, as merge_and_unload keeps no copies. The model "
            "computes the same as before; calling merge_and_unload again goes on with the others"
        )
        if isinstance(error, Exception):
            raise MergeError(text) from error
        warn(text)

    def _dequantise(self, dtype: bool | torch.dtype, back: Rollback) -> None:
        if merged := [path for path, layer in self.layers().items() if layer.merged]:
            raise MergeError(
                f"adapters are merged into {listed(merged, 1)} as the weights are "
                "quantised: unmerge_adapter() first"
            )
        dequantise(self.model, back, dtype if isinstance(dtype, torch.dtype) else None)

    def unload(self) -> nn.Module:
        """The base model without adapters, its weights and biases bit for bit as they were."""
        self.unmerge_adapter()
        self._restore_biases()
        eject(self.model)
        self.peft_config = {}
        return self.model

    # -- combining -----------------------------------------------------------------------------------------

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
        check_adapter_name(adapter_name, self.peft_config)
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
        results = arithmetic.with_equal_biases(results)
        config = copy.deepcopy(self.peft_config[names[0]])
        restate(config, [c.spec for c in results])
        config.lora_dropout, config.init_lora_weights = 0.0, True
        config.lora_bias = any(c.spec.lora_bias for c in results)
        config.target_modules = module_names.portable_targets(
            report.ranks, set(sites(self.model)) - set(report.ranks)
        )
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        prepared = [(c.layer, c.layer.prepared(c.spec, c.start)) for c in results]
        for layer, adapter in prepared:
            layer.put_adapter(adapter)
        self.peft_config[adapter_name] = config
        return report

    def _check_combination(self, names: Sequence[str], svd_clamp: int | None) -> None:
        biases = {name: self.peft_config[name].bias for name in names}
        problems = [
            f"{name!r} trains biases of the base (bias={bias!r})"
            for name, bias in biases.items()
            if bias != "none"
        ]
        for kind, what in (
            (ModulesToSaveWrapper, "whole modules (modules_to_save)"),
            (TrainableTokens, "single tokens"),
        ):
            held = {name for m in self.index.modules() if isinstance(m, kind) for name in m.held_adapters}
            if both := [name for name in names if name in held]:
                problems.append(f"{both[0]!r} trains {what}, which are no low-rank updates")
        if svd_clamp is not None:
            problems.append("svd_clamp would change the update that was asked for")
        if problems:
            raise CombineError(bullets("these adapters cannot be combined:", problems))

    # -- the model inside ----------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The model that was adapted."""
        return self.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the adapted model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.model, name)


def mention_biases(configs: Mapping[str, LoraConfig]) -> None:
    """Warn that what an adapter trained of the base itself stays when adapters are disabled."""
    trained = next((name for name, config in configs.items() if config.bias != "none"), None)
    if trained is not None:
        warn(
            f"the adapter {trained!r} trains biases of the base itself (bias={configs[trained].bias!r}): "
            "with adapters disabled the output keeps them, and is not the base model's"
        )


def _init_of(config: LoraConfig) -> inits.Init:
    return inits.find(resolve(config, "", "").init)


def _check_factor(factor: object) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor):
        raise ConfigError(f"the strength of an adapter is a finite number, got {factor!r}")


def _note_untied(model: nn.Module) -> None:
    """Let a configuration not say that embeddings are tied where a trained copy of one took its place."""
    weights = [getattr(embedding_of(model, kind), "weight", None) for kind in ("input", "output")]
    if weights[0] is None or weights[1] is None or weights[0] is weights[1]:
        return
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    for part in (config, text):
        if part is not None and getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False

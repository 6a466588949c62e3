"""A strict `load_adapter` for transformers' models: every tensor is used, or nothing changes.

If keys match nothing, transformers logs a report and goes on: the adapter is there, newly initialised, and
has no effect. Here the adapter is removed again and an error is raised unless the report is empty.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...adapters import AdapterModule, AdapterSet
from ...errors import AdapterFileError, LoadMismatchError
from ...files.layout import ATTEMPTS, BIN_NAME, SAFETENSORS_NAME, watched
from ...files.values import check_values
from ...hotswap import prepare_model_for_compiled_hotswap
from ...inject.base_tensors import bias_parameters
from ...inject.sites import sites
from ...layers import LoraLayer
from ...wording import listed

_CONTAINERS = (*LoraLayer.adapter_layer_names, "modules_to_save")
# Attributes that transformers sets on the model.
_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded", "_weight_conversions", "_prepare_lora_hotswap_kwargs")


def load_adapter(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Call transformers' own `load_adapter`, and undo it if anything went wrong.

    Args:
        original: `PeftAdapterMixin.load_adapter` as transformers defines it.
        model: The transformers model.
        args: Arguments of the call.
        kwargs: Arguments of the call.

    Returns:
        What transformers returns: its loading report, empty.

    Raises:
        LoadMismatchError: There are unexpected or missing keys, or other shapes. The model is unchanged.
        ConfigError: Its rank exceeds the one passed to `enable_peft_hotswap`; the model is unchanged.
        AdapterFileError: Another process replaces the tensors again and again. The model is unchanged.
    """
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    name = arguments.get("adapter_name") or "default"
    for _ in range(ATTEMPTS):
        before = Before(model, name)
        with _unchanged_tensors(arguments) as unchanged:
            try:
                report = _load(before, original, arguments, *args, **kwargs)
            except Exception:
                if unchanged():
                    raise
                continue
            # transformers reads the configuration and the tensors one after the other.
            if unchanged():
                return report
            before.restore()
    raise AdapterFileError(f"{_source(arguments)} cannot be read: its tensors are replaced again and again")


@contextmanager
def _unchanged_tensors(given: dict[str, Any]) -> Iterator[Callable[[], bool]]:
    """Tells whether the tensors in a directory are still the same file; always True for other sources."""
    directory = Path(_source(given), (given.get("adapter_kwargs") or {}).get("subfolder") or "")
    files = [directory / name for name in (SAFETENSORS_NAME, BIN_NAME) if (directory / name).is_file()]
    if given.get("adapter_state_dict") is not None or not files:
        yield lambda: True
        return
    with watched(files[0]) as unchanged:
        yield unchanged


def _load(
    before: Before, original: Callable[..., Any], given: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    model, name = before.model, before.name
    config = given.get("load_config")
    tolerant = bool(kwargs.get("ignore_mismatched_sizes", getattr(config, "ignore_mismatched_sizes", False)))
    if "load_config" in inspect.signature(original).parameters:
        # transformers raises at a wrong shape without naming it; its report does.
        kwargs["ignore_mismatched_sizes"] = True
    try:
        with _factors_in_memory(model):
            report = original(model, *args, **kwargs)
    except Exception:
        before.restore()
        raise
    if report is None:
        # Before version 5 it loads through set_peft_model_state_dict, which is strict itself.
        return None
    before.put_back("_weight_conversions")
    report.missing_keys = {key for key in report.missing_keys if _belongs(key, name)}
    missing = sorted(report.missing_keys)
    unexpected = sorted(report.unexpected_keys)
    shapes = [] if tolerant else sorted(report.mismatched_keys)
    if missing or unexpected or shapes:
        total = len(_tensors(model, name))
        before.restore()
        raise LoadMismatchError(
            _message(type(model).__name__, name, _source(given), missing, unexpected, shapes, total)
        )
    try:
        check_values(_tensors(model, name), _source(given))
    except AdapterFileError:
        before.restore()
        raise
    _own_tensors(model, name)
    before.freeze_replaced(model.peft_config[name])
    if not given.get("is_trainable", False):
        to_inference(model, name)
    try:
        _make_room(model)
    except Exception:
        before.restore()
        raise
    return report


@contextmanager
def _factors_in_memory(model: Any) -> Iterator[None]:
    """For "disk" in the device map, transformers would offload the factors and never read them."""
    spread = getattr(model, "hf_device_map", None)
    if not spread or "disk" not in spread.values():
        yield
        return
    model.hf_device_map = {path: "cpu" if place == "disk" else place for path, place in spread.items()}
    try:
        yield
    finally:
        model.hf_device_map = spread


def _own_tensors(model: nn.Module, adapter: str) -> None:
    """Copy the adapter's tensors to the device of their module.

    They are views of the file, which may be overwritten, and may be on another device than the computation.
    """
    for module in model.modules():
        if isinstance(module, AdapterModule) and adapter in module.held_adapters:
            device = module.base_device()
            for parameter in module.adapter_parameters(adapter):
                parameter.data = parameter.data.to(device, copy=True)


def to_inference(model: nn.Module, adapter: str) -> None:
    """Freeze an adapter in every module, and set the model to evaluation mode."""
    model.eval()
    for parameter in AdapterSet(model).parameters(adapter):
        parameter.requires_grad_(False)


def _make_room(model: Any) -> None:
    """Apply `enable_peft_hotswap`: make room for other ranks once there is an adapter."""
    options = getattr(model, "_prepare_peft_hotswap_kwargs", None)
    if options:
        prepare_model_for_compiled_hotswap(model, config=model.peft_config, **options)
        model._prepare_peft_hotswap_kwargs = None


class Before:
    """The state of a model that loading an adapter may change.

    Args:
        model: The model, before.
        name: The adapter. If the model has it, its tensors are kept; empty if no tensors will be written.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model = model
        self.name = name
        self.existed = name in AdapterSet(model).names()
        self.attributes = {key: vars(model)[key] for key in _ATTRIBUTES if key in vars(model)}
        self.configs = dict(self.attributes.get("peft_config", {}))
        # transformers replaces the parameters that the file has, also those of the base.
        self.parameters = [
            (module, key, p, p.requires_grad)
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None
        ]
        self.training = [(m, m.training) for m in model.modules()]
        self.states = [
            (m, m.active_adapters, m._disabled) for m in model.modules() if isinstance(m, AdapterModule)
        ]

    def put_back(self, key: str) -> None:
        """Restore one attribute of the model, or remove it again."""
        if key in self.attributes:
            setattr(self.model, key, self.attributes[key])
        else:
            vars(self.model).pop(key, None)

    def freeze_replaced(self, config: Any) -> None:
        """Freeze parameters of the base that came from the file, except biases that `bias` trains."""
        trained = {id(p) for _, p in bias_parameters(self.model, config.bias, self.name)}
        for module, key, before, _ in self.parameters:
            now = module._parameters.get(key)
            if now is not None and now is not before and id(now) not in trained:
                now.requires_grad_(False)

    def restore(self) -> None:
        """Restore the model."""
        model = self.model
        if not self.existed:
            _remove(model, self.name)
        for module, active, disabled in self.states:
            module.set_adapter(active)
            module.enable_adapters(not disabled)
        for module, key, parameter, wanted in self.parameters:
            module._parameters[key] = parameter
            parameter.requires_grad_(wanted)
        for module, mode in self.training:
            module.training = mode
        for key in _ATTRIBUTES:
            self.put_back(key)
        if "peft_config" in self.attributes:
            self.attributes["peft_config"].clear()
            self.attributes["peft_config"].update(self.configs)


def _remove(model: nn.Module, name: str) -> None:
    """Remove an adapter, and unwrap every module that then has none."""
    for site in sites(model).values():
        if isinstance(site.module, AdapterModule):
            site.module.delete_adapter(name)
            if not site.module.held_adapters:
                site.replace(site.base)


def _belongs(key: str, adapter: str) -> bool:
    parts = key.split(".")
    return any(a in _CONTAINERS and b == adapter for a, b in itertools.pairwise(parts))


def _tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {key: p for key, p in model.named_parameters() if _belongs(key, adapter)}


def _source(given: dict[str, Any]) -> str:
    if given.get("adapter_state_dict") is not None:
        return "the state dict"
    config = given.get("load_config")
    return str(given.get("peft_model_id") or getattr(config, "pretrained_model_name_or_path", None))


def _message(
    model: str,
    name: str,
    source: str,
    missing: list[str],
    unexpected: list[str],
    shapes: list[tuple[str, Iterable[int], Iterable[int]]],
    total: int,
) -> str:
    lines = [
        f"{source} does not fit this {model} as adapter {name!r}; nothing was loaded, the model is as before."
    ]
    if unexpected:
        lines.append(f"  {len(unexpected)} keys match nothing in the model: {listed(unexpected)}")
    if missing:
        lines.append(f"  {len(missing)} of the adapter's {total} tensors were not given: {listed(missing)}")
    if shapes:
        mismatches = [f"{key} is {tuple(given)}, expected {tuple(wanted)}" for key, given, wanted in shapes]
        lines.append(f"  {len(shapes)} have another shape: {listed(mismatches)}")
    if len(missing) == total:
        lines.append(
            "  Not one tensor matched: the keys have another prefix than base_model.model.<path of the "
            "module>, or the adapter was made for another model."
        )
    elif missing or unexpected:
        lines.append(
            "  Part of it matched: the adapter was made for a variant of this model (other depth, other "
            "names of modules), or its target_modules are not those of its tensors."
        )
    else:
        lines.append(
            "  The names match: the adapter was made for a wider or narrower variant of this model, or its "
            "configuration gives another rank than its tensors have."
        )
    return "\n".join(lines)

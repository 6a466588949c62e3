"""Putting an adapter into any module, and taking all of them out again."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import Tensor, nn

from veneer.adapters import AdapterModule, uncompiled
from veneer.config import LoraConfig
from veneer.errors import TargetError
from veneer.files.keys import PREFIX
from veneer.inject.encoder import give_back_fused_kernels
from veneer.inject.prepare import prepare
from veneer.inject.replication import restore
from veneer.inject.sites import sites
from veneer.layers.making import check_config, draw_seed
from veneer.layers.modules_to_save import ModulesToSaveWrapper


def inject_adapter_in_model(
    peft_config: LoraConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    *,
    strict_targets: bool = False,
) -> nn.Module:
    """Put an adapter into any torch module, in place.

    Args:
        peft_config: The configuration; not changed.
        model: The module, compiled or not; every parameter but the adapter's is frozen.
        adapter_name: The adapter's name; it becomes the active one.
        low_cpu_mem_usage: Create the factors on the meta device, to be loaded.
        state_dict: Take the targets from the keys of this adapter, instead of from the configuration. Its
            values are not loaded (use `set_peft_model_state_dict`).
        strict_targets: Raise where part of the configuration matches nothing.

    Returns:
        The same object.

    Raises:
        TargetError: If nothing matches or cannot be adapted. The model is then as it was.
    """
    peft_config = check_config(peft_config)
    config = peft_config if state_dict is None else _targets_of(peft_config, state_dict)
    inner = uncompiled(model)
    injection = prepare(
        inner, config, adapter_name, autocast_adapter_dtype=False, strict_targets=strict_targets
    )
    injection.initialise(draw_seed(), meta=low_cpu_mem_usage)
    injection.commit(trainable=not config.inference_mode)
    if state_dict is not None:
        injection.config.target_modules = peft_config.target_modules or injection.config.target_modules
    configs: dict[str, LoraConfig] = inner.__dict__.setdefault("peft_config", {})
    configs[adapter_name] = injection.config
    return model


def _targets_of(config: LoraConfig, state_dict: Mapping[str, Tensor]) -> LoraConfig:
    """A copy of the configuration whose targets, ranks and strengths are those that the keys show."""
    ranks: dict[str, int] = {}
    for key, tensor in state_dict.items():
        for marker in (".lora_A.", ".lora_embedding_A"):
            path, mark, _ = key.partition(marker)
            if mark:
                ranks[path.removeprefix(PREFIX)] = int(tensor.shape[0])
    if not ranks:
        raise TargetError(
            "the state dict holds no lora_A or lora_embedding_A key: it is not a LoRA adapter's"
        )
    result = copy.deepcopy(config)
    result.target_modules = set(ranks)
    result.exclude_modules = None
    result.layers_to_transform = result.layers_pattern = None
    result.rank_pattern = {f"^{path}$": r for path, r in ranks.items() if r != config.r}
    return result


def eject(model: nn.Module, *, trained_copies: bool = False) -> nn.Module:
    """Put every original module back in its place.

    Args:
        model: A model with adapters.
        trained_copies: Of modules that an adapter trained whole, leave the active copy instead.

    Returns:
        The same model.
    """
    for site in sites(model).values():
        if trained_copies and isinstance(site.module, ModulesToSaveWrapper):
            site.replace(site.module.current)
        elif isinstance(site.module, AdapterModule):
            site.replace(site.base)
    restore(model, merged=trained_copies)
    give_back_fused_kernels(model)
    model.__dict__.pop("peft_config", None)
    return model

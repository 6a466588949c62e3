"""What a configuration may ask for that Veneer cannot do."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from veneer.config.base import NEEDS_INIT, init_name
from veneer.config.lora import LoraConfig
from veneer.config.parts import LoftQConfig, part
from veneer.errors import show


def init_options(config: LoraConfig) -> Any:
    """The options of the initialisation that a configuration asks for, None where it has none."""
    for name, init in NEEDS_INIT.items():
        if init == init_name(config.init_lora_weights):
            value = getattr(config, name)
            return part(LoftQConfig, value) if name == "loftq_config" else value
    return None


#: By the name of a variant, how a configuration asks for it.
_VARIANT_OPTIONS = {
    "dora": "use_dora=True",
    "alora": "alora_invocation_tokens",
    "velora": "velora_config",
    "qalora": "use_qalora=True",
    "bdlora": "use_bdlora",
    "arrow": "arrow_config",
    "kasa": "kasa_config",
    "monteclora": "monteclora_config",
}


def variants_of(config: LoraConfig) -> list[str]:
    """The variants of the update that a configuration asks for, by name; none for plain low-rank updates."""
    values = {name: getattr(config, option.partition("=")[0]) for name, option in _VARIANT_OPTIONS.items()}
    asked = [name for name, value in values.items() if value not in (None, False, [])]
    return [*asked, *([config.variant] if config.variant else [])]


def unsupported_options(
    config: LoraConfig, variants: Collection[str] = ("plain",), inits: Collection[str] | None = None
) -> list[str]:
    """A sentence for each option that a configuration switches on and that cannot be honoured.

    Args:
        config: Any configuration that parses.
        variants: The names of the variants that exist.
        inits: The names of the initialisations that exist besides True and False; None leaves them unchecked.

    Returns:
        Sentences for people; empty when all of it can be done.
    """
    requested = variants_of(config)
    if config.variant in ("plain", *_VARIANT_OPTIONS):
        way_out = _VARIANT_OPTIONS.get(config.variant, "no option at all")
        return [
            f"variant={show(config.variant)} is selected by {way_out}; the option variant is for plug-ins"
        ]
    if config.variant and config.variant not in variants:
        return [
            f"variant={show(config.variant)} belongs to a plug-in that is not here: install its package, or "
            "import the module that defines it"
        ]
    found = [
        f"{_VARIANT_OPTIONS[name]} asks for the variant {name!r}, which Veneer does not have"
        for name in requested
        if name not in variants
    ]
    if len(requested) > 1:
        found.append(f"the variants {', '.join(requested)} cannot be combined: choose one")
    init = str(init_name(config.init_lora_weights)).split("_niter_")[0]
    if inits is not None and init not in ("True", "False") and init not in inits:
        found.append(f"init_lora_weights={config.init_lora_weights!r} is no initialisation of Veneer's")
    if config.megatron_config:
        found.append("megatron_config: Megatron's layers are not supported")
    return found

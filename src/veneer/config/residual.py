"""The configuration of an adapter with a frozen term on disk: see `veneer.files.residual`."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping

from veneer.config.lora import LoraConfig
from veneer.errors import AdapterFileError, ConfigError

#: Key of the mark in the metadata of a file of tensors.
RESIDUAL_MARK = "veneer_residual"

_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")


def plain_config(config: LoraConfig) -> LoraConfig:
    """The configuration of the plain adapter of twice the rank: the same scaling in every layer."""
    plain = copy.deepcopy(config)
    times = 2**0.5 if config.use_rslora else 2
    plain.r = 2 * config.r
    plain.lora_alpha = times * config.lora_alpha
    plain.rank_pattern = {name: 2 * r for name, r in config.rank_pattern.items()}
    plain.alpha_pattern = {name: times * alpha for name, alpha in config.alpha_pattern.items()}
    plain.init_lora_weights = True
    return plain


def mark(config: LoraConfig, init: bool | str) -> str:
    """What `marked_config` needs to undo `plain_config`."""
    values = {name: getattr(config, name) for name in _FIELDS}
    return json.dumps({**values, "init_lora_weights": init}, sort_keys=True)


def marked_config(config: LoraConfig, metadata: Mapping[str, str], where: object) -> LoraConfig:
    """The configuration of the adapter in memory, from that of a file.

    Where the file is not marked, or the configuration is not the marked file's (the caller's own perhaps), it
    is the same: a plain adapter of twice the rank computes the same.

    Raises:
        AdapterFileError: If the mark is damaged.
    """
    text = metadata.get(RESIDUAL_MARK)
    if text is None:
        return config
    try:
        values = json.loads(text)
        restored = copy.deepcopy(config)
        for name in _FIELDS:
            setattr(restored, name, values[name])
        restored.validate()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, ConfigError) as error:
        raise AdapterFileError(
            f"{where}: the mark of its frozen term is damaged ({error}); without the metadata "
            f"{RESIDUAL_MARK!r} the file is a plain adapter of twice the rank"
        ) from error
    plain = plain_config(restored)
    fits = all(getattr(plain, name) == getattr(config, name) for name in _FIELDS)
    return restored if fits else config

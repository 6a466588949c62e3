"""Options that do not exist, and the ones that were probably meant."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from veneer.config.values import show
from veneer.errors import UnknownOptionError
from veneer.wording import did_you_mean, listed

_SPELLINGS = {
    "alpha": "lora_alpha",
    "scaling": "lora_alpha",
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "dim": "r",
    "dropout": "lora_dropout",
    "initialize_lora_weights": "init_lora_weights",
    "init_weights": "init_lora_weights",
    "init": "init_lora_weights",
    "target_module": "target_modules",
    "targets": "target_modules",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "module_to_save": "modules_to_save",
    "excluded_modules": "exclude_modules",
    "layers": "layers_to_transform",
    "ranks": "rank_pattern",
    "alphas": "alpha_pattern",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "task": "task_type",
    "base_model": "base_model_name_or_path",
    "base_model_name": "base_model_name_or_path",
    "lora_bias_type": "bias",
}


_C = TypeVar("_C")


def unknown_options(names: Sequence[str], known: Iterable[str], values: Mapping[str, Any] = {}) -> str:
    """Unknown names, each with the known one that was probably meant and its value; the first 20 of many."""
    known = list(known)

    def described(name: str) -> str:
        meant = _SPELLINGS.get(name)
        near = f" (did you mean {meant!r}?)" if meant in known else did_you_mean(name, known)
        value = f" = {show(values[name])}" if name in values else ""
        return show(name) + near + value

    return listed([*map(described, names[:20]), *names[20:]], 20)


def names_unknown_options(cls: type[_C]) -> type[_C]:
    """Make the constructor answer an unknown keyword with the option that was probably meant."""
    original = cls.__init__
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if unknown := [name for name in kwargs if name not in known]:
            raise UnknownOptionError(f"{cls.__name__} has no option {unknown_options(unknown, known)}")
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls

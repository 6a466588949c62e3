"""Trainers of transformers and TRL with a Veneer model, the real peft present or not.

transformers' Trainer saves only the adapter, resumes from it, and looks through the wrapper for the base
model's signature if `isinstance(model, peft.PeftModel)`; otherwise it writes the whole model into every
checkpoint. TRL does the same with models and configurations. Here the classes that they test against are
extended by Veneer's, module by module:

* if peft is installed, the name `PeftModel` in the trainer's module becomes a class that means "peft's or
  Veneer's", a subclass of peft's class, so that its other uses still work;
* if it is not, the name is Veneer's class, and the module's `is_peft_available` returns True.

Neither library itself is changed, and models of the real peft are treated as before.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from veneer.wording import warn

from ..config import PeftConfig
from ..sharded import reshard
from . import trl

# The names of a module that it tests against. Without peft, the module never imported them. Each of TRL's
# modules uses some; with peft, a name that a module does not use is not added to it.
NAMES = {
    "transformers.trainer_utils": ("PeftModel", "PeftMixedModel"),
    "transformers.trainer": ("PeftModel",),
}


def enable_trainer() -> None:
    """Make transformers' Trainer treat a Veneer model as an adapter.

    After `import veneer` this happens by itself when the trainer is imported, before or after Veneer. Calling
    it imports transformers' trainer. Calling it again does nothing.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    from ..errors import MissingExtraError

    try:
        modules = [importlib.import_module(name) for name in NAMES]
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise MissingExtraError("transformers", "hf", "enable_trainer()") from error
    for module in modules:
        widen(module)


def widen(module: ModuleType) -> None:
    """Extend what one module of transformers, accelerate or TRL accepts as an adapter."""
    name = module.__name__
    if name == "transformers.integrations.peft":
        _widen_add_adapter(module.PeftAdapterMixin)
        return
    if name == "accelerate.utils.fsdp_utils":
        _widen_checkpoints(module)
        return
    if name.startswith("accelerate."):
        _widen_accelerate(module)
        return
    absent = not _is_peft_installed(module)
    if absent and hasattr(module, "is_peft_available"):
        module.is_peft_available = _always  # type: ignore[attr-defined]
    for word in NAMES.get(name, trl.GIVEN if absent else trl.TESTED):
        ours = _ours(word)
        present = vars(module).get(word)
        if present is None and (absent or name in NAMES):
            setattr(module, word, ours)
        elif present is not None and not _accepts(present, ours):
            setattr(module, word, _wider(word, present, ours))
    if name == "transformers.trainer":
        _widen_fsdp(module)
        _check_trainer(module)


def _is_peft_installed(module: ModuleType) -> bool:
    """Whether the module found a peft, real or ours, when it was imported."""
    answer = getattr(module, "is_peft_available", None)
    if answer is None:
        return "peft" in sys.modules
    return bool(answer is not _always and answer())


def _always() -> bool:
    return True


def _ours(word: str) -> Any:
    if word == "peft":
        return trl.PEFT
    return getattr(importlib.import_module(f"{__package__}.as_peft.objects"), word)


def _accepts(present: Any, ours: Any) -> bool:
    return present is ours or getattr(present, "veneer_accepts", None) is ours


def _wider(word: str, present: Any, ours: Any) -> Any:
    return _either(present, ours) if isinstance(present, type) else _dispatching(present, ours)


def _either(theirs: type, ours: type) -> type:
    """A class whose instances are those of `theirs` and of `ours`.

    It derives from `theirs`, so that its methods can be called through it; not from an abstract class, which
    would query its subclasses.
    """
    accepted = (theirs, ours)

    class Either(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, accepted) if cls is wide else super().__instancecheck__(instance)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, accepted) if cls is wide else super().__subclasscheck__(subclass)

    attributes = {"__module__": theirs.__module__, "__doc__": theirs.__doc__, "veneer_accepts": ours}
    wide: type = Either(theirs.__name__, (theirs,) if type(theirs) is type else (), attributes)
    return wide


def _dispatching(theirs: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """`get_peft_model`: Veneer's for Veneer's configurations, else peft's."""

    @functools.wraps(theirs)
    def get_peft_model(model: Any, peft_config: Any, *args: Any, **kwargs: Any) -> Any:
        make = ours if isinstance(peft_config, PeftConfig) else theirs
        return make(model, peft_config, *args, **kwargs)

    get_peft_model.veneer_accepts = ours  # type: ignore[attr-defined]
    return get_peft_model


def _widen_add_adapter(mixin: Any) -> None:
    """Transformers' `model.add_adapter` with a configuration of Veneer's beside the peft library."""
    theirs = mixin.add_adapter

    @functools.wraps(theirs)
    def add_adapter(self: Any, adapter_config: Any, *args: Any, **kwargs: Any) -> Any:
        return theirs(self, _for_peft(adapter_config), *args, **kwargs)

    mixin.add_adapter = add_adapter


def _for_peft(config: Any) -> Any:
    """A configuration of Veneer's as one of the peft library's, where that is what is imported as peft."""
    if not isinstance(config, PeftConfig) or importlib.util.find_spec("peft") is None:
        return config
    peft = importlib.import_module("peft")
    if isinstance(config, peft.PeftConfig):
        return config
    warn(
        "transformers' add_adapter makes layers of the installed peft library here, not Veneer's. For those "
        "call veneer.as_peft.register_as_peft() first, or get_peft_model(model, config)"
    )
    values = config.to_json(inference_mode=None)
    return peft.get_peft_config(values)


def _widen_accelerate(module: ModuleType) -> None:
    """Extend accelerate's `is_peft_model`, and the names that were imported from it before."""
    theirs = vars(module).get("is_peft_model")
    ours = _ours("PeftModel")
    if theirs is None or _accepts(theirs, ours):
        return

    @functools.wraps(theirs)
    def is_peft_model(model: Any) -> bool:
        inner = importlib.import_module("accelerate.utils.other").extract_model_from_parallel(model)
        return isinstance(inner, ours) or bool(theirs(model))

    is_peft_model.veneer_accepts = ours  # type: ignore[attr-defined]
    for name, other in list(sys.modules.items()):
        if name.split(".")[0] in ("accelerate", "trl") and vars(other).get("is_peft_model") is theirs:
            other.is_peft_model = is_peft_model  # type: ignore[attr-defined]


def _widen_checkpoints(module: ModuleType) -> None:
    """Make accelerate save and load our adapters in FSDP's checkpoints with our functions.

    Its own code calls those of peft for every model. It makes a full state dict of FSDP2 without them.
    """
    ours = _ours("PeftModel")

    def replace(name: str, function: str) -> None:
        theirs = vars(module).get(name)
        if theirs is None or _accepts(theirs, ours):
            return

        @functools.wraps(theirs)
        def own(model: Any, *args: Any, adapter_only: bool = False, sd_options: Any = None) -> Any:
            inner = importlib.import_module("accelerate.utils.other").extract_model_from_parallel(model)
            full = sd_options is not None and sd_options.full_state_dict
            if isinstance(inner, ours):  # torch does not expect what a forward without gradients leaves
                reshard(inner)
            if not adapter_only or full or not isinstance(inner, ours):
                return theirs(model, *args, adapter_only=adapter_only, sd_options=sd_options)
            return _ours(function)(model, *args, adapter_name=inner.active_adapter)

        own.veneer_accepts = ours  # type: ignore[attr-defined]
        setattr(module, name, own)

    replace("_get_model_state_dict", "get_peft_model_state_dict")
    replace("_set_model_state_dict", "set_peft_model_state_dict")


def _widen_fsdp(trainer: ModuleType) -> None:
    """With FSDP, Trainer takes the auto-wrap policy of adapters from peft; give it ours for our models."""
    theirs = vars(trainer).get("update_fsdp_plugin_peft")
    ours = _ours("PeftModel")
    peft = sys.modules.get("peft")
    if theirs is None or _accepts(theirs, ours) or getattr(peft, "PeftModel", None) is ours:
        return

    @functools.wraps(theirs)
    def update_fsdp_plugin_peft(model: Any, accelerator: Any) -> None:
        if peft is not None:
            theirs(model, accelerator)
        if isinstance(model, ours):
            accelerator.state.fsdp_plugin.auto_wrap_policy = _ours("fsdp_auto_wrap_policy")(model)

    update_fsdp_plugin_peft.veneer_accepts = ours  # type: ignore[attr-defined]
    trainer.update_fsdp_plugin_peft = update_fsdp_plugin_peft  # type: ignore[attr-defined]


def _check_trainer(trainer: ModuleType) -> None:
    """Test the trainer with an empty instance; warn if this version uses another test."""
    ask = vars(trainer).get("_is_peft_model")
    probe = object.__new__(_ours("PeftModel"))
    if ask is None or not ask(probe):
        from transformers import __version__

        warn(
            f"transformers {__version__} decides in a way that Veneer does not know whether a model is an "
            "adapter: Trainer may write whole models into its checkpoints. Call "
            "veneer.as_peft.register_as_peft() before importing transformers, or save with "
            "model.save_pretrained() yourself."
        )

"""Veneer with other libraries: the hub, transformers, and libraries that import peft.

Nothing here is needed to use Veneer by itself, and large libraries are imported when they are needed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from veneer_as_peft import after_import

# transformers, accelerate and TRL test `isinstance(model, peft.PeftModel)`, in these modules.
WATCHED = (
    "transformers.trainer_utils",
    "transformers.trainer",
    "transformers.integrations.peft",
    "accelerate.utils.modeling",
    "accelerate.utils.fsdp_utils",
    "trl.trainer.utils",
    "trl.trainer.base_trainer",
    "trl.trainer.sft_trainer",
    "trl.trainer.dpo_trainer",
    "trl.trainer.kto_trainer",
    "trl.trainer.reward_trainer",
    "trl.trainer.grpo_trainer",
    "trl.trainer.rloo_trainer",
    "trl.trainer.distillation_trainer",
)
#: Modules that both libraries have, with other contents.
_SHARED = ("veneer.config", "veneer.optimizers", "veneer.peft_model")
_watching = False


def watch() -> None:
    """Make trainers treat a Veneer model as an adapter over a frozen base.

    Called by `import veneer`. It imports nothing: a trainer's module is changed when that module is imported,
    or at once if it has been imported already. Calling it again does nothing.
    """
    global _watching
    if _watching:
        return
    _watching = True
    for name in WATCHED:
        after_import(name, _widen)
    sys.meta_path.append(_PeftModules())
    for name in _SHARED:
        after_import(name, _complete)


class _PeftModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds `veneer.utils` and the other modules of PEFT's layout that Veneer has under other names."""

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        """The spec of a module in the table `as_peft.layout`; None for any other."""
        if not fullname.startswith("veneer."):
            return None
        from .as_peft import is_package
        from .as_peft.layout import LAYOUT

        row = "peft" + fullname.removeprefix("veneer")
        if row not in LAYOUT:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin="veneer", is_package=is_package(row))

    def exec_module(self, module: ModuleType) -> None:
        """Fill the module."""
        from .as_peft import fill

        fill(module)


def _complete(module: ModuleType) -> None:
    """Let one of Veneer's own modules have also what PEFT's of that name has."""
    from .as_peft import names_of

    module.__getattr__ = names_of(module)  # type: ignore[method-assign]


def _widen(module: ModuleType) -> None:
    from .transformers import widen

    widen(module)

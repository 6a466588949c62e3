"""Veneer with other libraries: the hub, transformers, and libraries that import peft.

Nothing here is needed to use Veneer by itself, and large libraries are imported when they are needed.
"""

from __future__ import annotations

from types import ModuleType

from veneer_as_peft import after_import

# transformers, accelerate and TRL test `isinstance(model, peft.PeftModel)`, in these modules.
WATCHED = (
    "transformers.trainer_utils",
    "transformers.trainer",
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


def _widen(module: ModuleType) -> None:
    from .transformers import widen

    widen(module)

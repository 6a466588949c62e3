"""The names that TRL's modules import from peft: which are extended, and what replaces them without peft.

A module of TRL imports these names if it finds peft, and tests models and configurations against them.
`transformers.py` extends them.
"""

from __future__ import annotations

from types import SimpleNamespace

from ..config.base import KNOWN_PEFT_VERSION

#: Classes to test against. With peft, they are extended in the modules that use them.
TESTED = ("PeftModel", "PeftConfig", "get_peft_model", "BaseTunerLayer", "PrefixTuningConfig")

#: Added to modules that found no peft. With peft, `LoraConfig` is not extended: TRL creates configurations
#: with it, and uses it to find out whether this version of peft needs a workaround.
GIVEN = (*TESTED, "LoraConfig", "PromptLearningConfig", "peft")

#: Replaces the module `peft`, of which TRL only reads the version.
PEFT = SimpleNamespace(__version__=".".join(map(str, KNOWN_PEFT_VERSION)))

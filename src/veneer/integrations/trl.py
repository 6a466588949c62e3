"""What TRL's modules take from peft by name: which of it is widened, and what stands in where peft is absent.

A module of TRL imports these names where it finds peft, and tests models and configurations against them. The
widening itself is that of `transformers.py`.
"""

from __future__ import annotations

from types import SimpleNamespace

from ..config.base import KNOWN_PEFT_VERSION

#: Tested against. Where peft is there, widened in the modules that use them.
TESTED = ("PeftModel", "PeftConfig", "get_peft_model", "BaseTunerLayer", "PrefixTuningConfig")

#: Given to modules that found no peft. `LoraConfig` is not widened beside peft's own: TRL makes
#: configurations of it, and asks with it whether this peft is one that it has to work around.
GIVEN = (*TESTED, "LoraConfig", "PromptLearningConfig", "peft")

#: In the place of the module `peft`, which TRL asks for its version alone.
PEFT = SimpleNamespace(__version__=".".join(map(str, KNOWN_PEFT_VERSION)))

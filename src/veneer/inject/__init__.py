"""Plan -> wrapped model, all or nothing; and back.

Everything that can fail happens in `prepare`, which leaves the model as it is. `Injection.commit`
then only puts finished modules in their places.
"""

from __future__ import annotations

from veneer.inject.api import eject, inject_adapter_in_model
from veneer.inject.base_tensors import bias_parameters, differs_from_base, embedding_weights, merged_over
from veneer.inject.expert_names import stacked
from veneer.inject.injection import Addition, Copy, Injection
from veneer.inject.places import Site, candidates, model_type, plan, sites
from veneer.inject.preparing import prepare

__all__ = [
    "Addition",
    "Copy",
    "Injection",
    "Site",
    "bias_parameters",
    "candidates",
    "differs_from_base",
    "eject",
    "embedding_weights",
    "inject_adapter_in_model",
    "merged_over",
    "model_type",
    "plan",
    "prepare",
    "sites",
    "stacked",
]

"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from ..adapters import check_adapter_name
from .card import hub_id, merge_card, model_card
from .fingerprints import BaseComparison, compare_fingerprints, fingerprint
from .keys import to_disk
from .layout import BIN_NAME, CARD_NAME, CONFIG_NAME, SAFETENSORS_NAME, read_config
from .listing import AdapterEntry, find_adapters
from .matching import LoadReport, match
from .reading import AdapterFile, open_adapter
from .residual import RESIDUAL_MARK, joined, layers_of, mark, marked_config, parted, plain_config
from .values import check_values
from .writing import check_tensors, write_adapter, write_card

__all__ = [
    "RESIDUAL_MARK",
    "joined",
    "layers_of",
    "mark",
    "marked_config",
    "parted",
    "plain_config",
    "BIN_NAME",
    "CARD_NAME",
    "CONFIG_NAME",
    "SAFETENSORS_NAME",
    "AdapterEntry",
    "AdapterFile",
    "BaseComparison",
    "LoadReport",
    "check_adapter_name",
    "check_tensors",
    "check_values",
    "compare_fingerprints",
    "find_adapters",
    "fingerprint",
    "hub_id",
    "match",
    "merge_card",
    "model_card",
    "open_adapter",
    "read_config",
    "to_disk",
    "write_adapter",
    "write_card",
]

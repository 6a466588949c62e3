"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from ...forward import IGNORED
from .batch import Collator, LabelCollator, Row, pad_token
from .encoding import Encoded, encode, has_template, pieces, prompt_ids
from .forms import FORMS, PURPOSES, Form, Purpose
from .labels import EncodedLabels, encode_classification
from .packing import Packed, pack, packing_for
from .preferences import Preferences, encode_preferences
from .recognition import form_of
from .records import Records
from .sources import read_records

__all__ = [
    "FORMS",
    "IGNORED",
    "PURPOSES",
    "Collator",
    "Encoded",
    "EncodedLabels",
    "Form",
    "LabelCollator",
    "Packed",
    "Preferences",
    "Purpose",
    "Records",
    "Row",
    "encode",
    "encode_classification",
    "encode_preferences",
    "form_of",
    "has_template",
    "pack",
    "packing_for",
    "pad_token",
    "pieces",
    "prompt_ids",
    "read_records",
]

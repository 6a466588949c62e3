"""The public names of the package; its own docstring says what it is for."""

from __future__ import annotations

from .chat import Chat
from .data import (
    Collator,
    Encoded,
    EncodedLabels,
    LabelCollator,
    Packed,
    Preferences,
    Records,
    encode,
    encode_classification,
    encode_preferences,
    form_of,
    pack,
    packing_for,
    prompt_ids,
    read_records,
)
from .evaluate import answer_loss, exact_match, valid_json
from .generation import answer_file, generate_answers
from .models import load_base
from .options import RunOptions, TrainOptions
from .progress import Progress, Silent, Terminal
from .sampling import Sampling
from .train_rows import train

__all__ = [
    "Chat",
    "Collator",
    "Encoded",
    "EncodedLabels",
    "LabelCollator",
    "Packed",
    "Preferences",
    "Progress",
    "Records",
    "RunOptions",
    "Sampling",
    "Silent",
    "Terminal",
    "TrainOptions",
    "answer_file",
    "answer_loss",
    "encode",
    "encode_classification",
    "encode_preferences",
    "exact_match",
    "form_of",
    "generate_answers",
    "load_base",
    "pack",
    "packing_for",
    "prompt_ids",
    "read_records",
    "train",
    "valid_json",
]

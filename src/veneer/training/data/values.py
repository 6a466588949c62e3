"""The values in a record: checked, and read as text or as a list."""

from __future__ import annotations

import json
import math
from typing import Any

from .problems import Unfit


def text_of(value: object, name: str) -> str:
    """Text that tokenizers take; anything else is `Unfit`."""
    if not isinstance(value, str):
        raise Unfit(f"{name} is {kind_of(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


def answer_of(value: object, name: str) -> str:
    """As `text_of`; numbers and booleans are written as in JSON."""
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return text_of(value, name)


def list_of(value: object, name: str) -> list[Any]:
    """A list, or one as JSON; anything else is `Unfit`."""
    value = decoded(value, name)
    if not isinstance(value, list):
        raise Unfit(f"{name} is {kind_of(value)}, not a list")
    return value


def decoded(value: object, name: str) -> object:
    """A list that is written as JSON in a text, as in a CSV file; other values as they are."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return read_json(value)
    except ValueError as error:
        raise Unfit(f"{name} is no JSON ({error})") from None


def read_json(text: str) -> Any:
    """A JSON value; `ValueError` if it is none, or nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def kind_of(value: object) -> str:
    """A value's type in the words of JSON."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    names: dict[type, str] = {str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)

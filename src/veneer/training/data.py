"""Records -> token rows whose loss falls on the answers only.

A record has ``prompt`` and ``completion`` (strings, or lists of messages), or ``messages`` with roles and
contents. Where the tokenizer has a chat template, prompt and completion are one turn of the user and one of
the assistant; where it has none, they are joined as they are and closed by the end-of-sequence token.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

IGNORED = -100
COLUMNS = ("prompt", "completion", "messages")

Row = dict[str, list[int]]
Message = dict[str, str]


@dataclass(frozen=True)
class Encoded:
    """Token rows and what happened on the way.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each example; labels are -100 where no loss falls.
        cut: How many examples were cut at the maximum length.
        dropped: How many were left out because nothing of their answer fitted.
    """

    rows: list[Row]
    cut: int = 0
    dropped: int = 0


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a JSONL file, checked for columns that training understands.

    Raises:
        DataError: The file is missing, no JSONL, empty, or lacks the columns; says which line.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise DataError(f"cannot read the data file {file}: {reason}") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{file}, line {number} is no JSON ({error}). A JSONL file has one JSON object a line."
            ) from error
        check_columns(record, f"{file}, line {number}")
        records.append(record)
    if not records:
        raise DataError(f"{file} holds no records")
    return records


def check_columns(record: object, where: str) -> None:
    """Raise unless a record has the columns that training understands.

    Raises:
        DataError: Names the columns found, the nearest right ones, and the forms understood.
    """
    forms = 'Understood: {"prompt": …, "completion": …} or {"messages": [{"role": …, "content": …}, …]}.'
    if not isinstance(record, dict):
        raise DataError(f"{where} is no JSON object but {type(record).__name__}. {forms}")
    if "messages" in record or {"prompt", "completion"} <= record.keys():
        return
    found = ", ".join(map(repr, record)) or "none"
    near = []
    for name in record:
        close = [c for c in difflib.get_close_matches(str(name), COLUMNS, n=1) if c not in record]
        near += [f"{name!r} should perhaps be {c!r}" for c in close]
    hint = f" ({'; '.join(near)})" if near else ""
    raise DataError(f"{where} lacks the columns that training needs: it has {found}{hint}. {forms}")


def conversation(record: Mapping[str, Any], where: str = "record") -> list[Message]:
    """A record as messages, answers being those of the role ``assistant``.

    Raises:
        DataError: A part of it has the wrong type.
    """
    if "messages" in record:
        parts: list[Any] = [record["messages"]]
    else:
        roles = {"prompt": "user", "completion": "assistant"}
        parts = [
            [{"role": role, "content": record[column]}] if isinstance(record[column], str) else record[column]
            for column, role in roles.items()
        ]
    messages = [message for part in parts if isinstance(part, list) for message in part]
    good = all(isinstance(part, list) for part in parts) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        raise DataError(f"{where}: prompt, completion and messages are texts or lists of role and content")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no message of the role 'assistant', so there is nothing to learn")
    return messages


def pieces(record: Mapping[str, Any], tokenizer: Any, where: str = "record") -> list[tuple[str, bool]]:
    """The text of an example in order, each piece with whether loss falls on it.

    Raises:
        DataError: Messages without a chat template, or a template that rewrites earlier turns.
    """
    end = tokenizer.eos_token or ""
    if not getattr(tokenizer, "chat_template", None):
        if not all(isinstance(record.get(column), str) for column in ("prompt", "completion")):
            raise DataError(
                f"{where}: the tokenizer has no chat template, so messages cannot be laid out; "
                "give texts as prompt and completion, or take a chat model"
            )
        return [(record["prompt"], False), (record["completion"] + end, True)]
    messages, text, found = conversation(record, where), "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:place], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
        if not (before.startswith(text) and after.startswith(before)):
            raise DataError(
                f"{where}: the chat template of this model rewrites earlier turns, so loss on the answers "
                "only cannot be laid out; give one prompt and one completion a record"
            )
        answer = after[len(before) :]
        if end and end in answer:
            answer = answer[: answer.rindex(end) + len(end)]
        found += [(before[len(text) :], False), (answer, True)]
        text = before + answer
    return found


def encode(records: Sequence[Mapping[str, Any]], tokenizer: Any, max_length: int = 1024) -> Encoded:
    """Tokenise records; pieces are tokenised one by one, as generation will see the prompt.

    Raises:
        DataError: A record that cannot be laid out, or none of which anything of the answer fits.
    """
    rows: list[Row] = []
    cut = dropped = 0
    for number, record in enumerate(records, start=1):
        ids: list[int] = []
        labels: list[int] = []
        for text, answer in pieces(record, tokenizer, f"record {number}"):
            # A template writes its own first token; plain text gets the tokenizer's.
            first = not ids and not getattr(tokenizer, "chat_template", None)
            piece = tokenizer(text, add_special_tokens=first)["input_ids"]
            ids += piece
            labels += piece if answer else [IGNORED] * len(piece)
        cut += len(ids) > max_length
        ids, labels = ids[:max_length], labels[:max_length]
        if any(label != IGNORED for label in labels[1:]):
            rows.append({"input_ids": ids, "labels": labels})
        else:
            dropped += 1
    if not rows:
        raise DataError(
            f"nothing of any answer fits into {max_length} tokens (of {len(records)} records): "
            "raise the maximum length"
        )
    return Encoded(rows, cut, dropped)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any) -> list[int]:
    """The tokens that a model is given before it answers: ``prompt`` laid out as in training."""
    if not getattr(tokenizer, "chat_template", None):
        if not isinstance(prompt, str):
            raise DataError("the tokenizer has no chat template, so the prompt must be a text")
        return list(tokenizer(prompt)["input_ids"])
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@dataclass(frozen=True)
class Collator:
    """Rows -> a batch padded at its right end to the longest row.

    Attributes:
        pad: Token that fills up; masked out, so which one does not matter.
    """

    pad: int

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``labels``, each of shape (rows, longest)."""
        longest = max(len(row["input_ids"]) for row in rows)

        def fill(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([v + [filler] * (longest - len(v)) for v in values])

        return {
            "input_ids": fill([row["input_ids"] for row in rows], self.pad),
            "attention_mask": fill([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": fill([row["labels"] for row in rows], IGNORED),
        }


def pad_token(tokenizer: Any) -> int:
    """A token to fill batches with."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0

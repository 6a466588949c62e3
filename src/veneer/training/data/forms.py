"""The forms of records: their columns, and how each is read.

`FORMS` has an entry for each form. Its ``read`` returns a record in plain words (``prompt`` and
``completion``, ``messages``, ``text``, …), or raises `Unfit` with what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .messages import Message, as_messages, messages_of, tools_of, turn
from .problems import Unfit
from .values import answer_of, decoded, kind_of, text_of

Record = Mapping[str, Any]
Reader = Callable[[Record], dict[str, Any]]
Purpose = Literal["sft", "dpo", "kto", "classification", "prompt"]
PURPOSES: tuple[Purpose, ...] = ("dpo", "kto", "sft", "classification", "prompt")


@dataclass(frozen=True, kw_only=True)
class Form:
    """A form of records.

    Attributes:
        name: Its name in code.
        title: Its name in messages.
        purpose: What it is used for.
        columns: Required columns.
        more: Optional columns.
        read: Record -> record in plain words.
        example: A short record, for messages; by default one with the required columns.
        separator: Stands between prompt and answer if the model has no chat template.
    """

    name: str
    title: str
    purpose: Purpose
    columns: tuple[str, ...]
    read: Reader = field(repr=False, compare=False)
    example: str = ""
    more: tuple[str, ...] = ()
    separator: str = ""

    def __post_init__(self) -> None:
        shown = ", ".join(f'"{column}": …' for column in self.columns)
        object.__setattr__(self, "example", self.example or f"{{{shown}}}")

    def __str__(self) -> str:
        return f"columns {' + '.join(self.columns)} ({self.title})"

    def fits(self, record: Record) -> bool:
        """Whether the record has all required columns, not null."""
        return all(record.get(column) is not None for column in self.columns)


def _with_tools(record: Record, found: dict[str, Any]) -> dict[str, Any]:
    tools = tools_of(record.get("tools"))
    return {**found, "tools": tools} if tools else found


def _conversation(record: Record, column: str) -> list[Message]:
    """The messages in a column, with ShareGPT's system text in front."""
    messages = messages_of(decoded(record[column], column), column)
    if column == "conversations" and record.get("system"):
        messages.insert(0, turn("system", record["system"], "system"))
    return messages


def _answered(messages: list[Message], name: str) -> dict[str, Any]:
    if not any(message["role"] == "assistant" for message in messages):
        raise Unfit(f"{name} has no message of the role 'assistant', so there is nothing to learn")
    return {"messages": messages}


def _learned(column: str) -> Reader:
    return lambda record: _with_tools(record, _answered(_conversation(record, column), column))


def _asked(column: str) -> Reader:
    """Reads the messages without the last answer, if they end in one."""

    def read(record: Record) -> dict[str, Any]:
        messages = _conversation(record, column)
        if messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise Unfit(f"{column} holds an answer only, and nothing to answer")
        return _with_tools(record, {"prompt": messages})

    return read


def _prompt_of(record: Record) -> str | list[Message]:
    value = record["prompt"]
    return messages_of(value, "prompt") if isinstance(value, list) else text_of(value, "prompt")


def _answer(record: Record, column: str) -> str | list[Message]:
    value = record[column]
    return messages_of(value, column) if isinstance(value, list) else answer_of(value, column)


def _prompt_completion(record: Record) -> dict[str, Any]:
    prompt, completion = _prompt_of(record), _answer(record, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return _with_tools(record, {"prompt": prompt, "completion": completion})
    turns = [*as_messages(prompt), *as_messages(completion, "assistant")]
    return _with_tools(record, _answered(turns, "completion"))


def _prompt(record: Record) -> dict[str, Any]:
    prompt = _prompt_of(record)
    if isinstance(prompt, str) and not prompt.strip():
        raise Unfit("prompt is empty")
    return _with_tools(record, {"prompt": prompt})


def _instruction(record: Record) -> dict[str, Any]:
    prompt = text_of(record["instruction"], "instruction")
    if record.get("input"):
        prompt = f"{prompt}\n\n{text_of(record['input'], 'input')}"
    if not record.get("system"):
        return {"prompt": prompt}
    return {"prompt": [turn("system", record["system"], "system"), turn("user", prompt, "instruction")]}


def _alpaca(record: Record) -> dict[str, Any]:
    prompt = _instruction(record)["prompt"]
    answer = turn("assistant", record["output"], "output")
    if isinstance(prompt, str):
        return {"prompt": prompt, "completion": answer["content"]}
    return {"messages": [*prompt, answer]}


def _text(record: Record) -> dict[str, Any]:
    return {"text": text_of(record["text"], "text")}


def _classified(column: str) -> Reader:
    def read(record: Record) -> dict[str, Any]:
        label = record["label"]
        if not isinstance(label, int | str) or isinstance(label, bool):
            raise Unfit(f"label is {kind_of(label)}, not a name or a whole number")
        return {"text": text_of(record[column], column), "label": label}

    return read


def _preference(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": _prompt_of(record)}
    found |= {column: _answer(record, column) for column in ("chosen", "rejected")}
    if isinstance(found["chosen"], str) != isinstance(found["rejected"], str):
        raise Unfit("chosen and rejected are not alike: one is a text, the other a list of messages")
    return _differing(found)


def _preference_whole(record: Record) -> dict[str, Any]:
    """Two whole conversations; their common beginning is the prompt."""
    chosen, rejected = (messages_of(record[column], column) for column in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise Unfit("chosen and rejected do not begin alike, and there is no prompt")
    return _differing({"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]})


def _differing(found: dict[str, Any]) -> dict[str, Any]:
    if found["chosen"] == found["rejected"]:
        raise Unfit("chosen and rejected are the same, so there is nothing to prefer")
    if not (found["chosen"] and found["rejected"]):
        raise Unfit("chosen or rejected holds nothing beside what both begin with")
    return found


def _judged(record: Record) -> dict[str, Any]:
    label = record["label"]
    if label not in (True, False):
        raise Unfit(f"label is {kind_of(label)}, not true (a good answer) or false")
    return {"prompt": _prompt_of(record), "completion": _answer(record, "completion"), "label": bool(label)}


#: In the order in which they are tried.
FORMS: tuple[Form, ...] = (
    Form(
        name="messages", title="conversation", purpose="sft",
        columns=("messages",), more=("tools",), read=_learned("messages"),
        example='{"messages": [{"role": …, "content": …}, …]}',
    ),
    Form(
        name="prompt-completion", title="instruction", purpose="sft",
        columns=("prompt", "completion"), more=("tools",), read=_prompt_completion,
    ),
    Form(
        name="sharegpt", title="ShareGPT", purpose="sft",
        columns=("conversations",), more=("system", "tools"), read=_learned("conversations"),
        example='{"conversations": [{"from": …, "value": …}, …]}',
    ),
    Form(
        name="alpaca", title="Alpaca", purpose="sft",
        columns=("instruction", "output"), more=("input", "system"), read=_alpaca, separator="\n\n",
    ),
    Form(
        name="text", title="plain text, loss on all of it", purpose="sft",
        columns=("text",), read=_text,
    ),
    Form(
        name="preference", title="preference", purpose="dpo",
        columns=("prompt", "chosen", "rejected"), read=_preference,
    ),
    Form(
        name="preference-whole", title="preference, whole conversations", purpose="dpo",
        columns=("chosen", "rejected"), read=_preference_whole,
        example='{"chosen": [{"role": …, "content": …}, …], "rejected": […]}',
    ),
    Form(
        name="judged", title="answers that are good or bad", purpose="kto",
        columns=("prompt", "completion", "label"), read=_judged,
        example='{"prompt": …, "completion": …, "label": true}',
    ),
    Form(
        name="classification", title="classification", purpose="classification",
        columns=("text", "label"), read=_classified("text"),
    ),
    Form(
        name="classification-sentence", title="classification", purpose="classification",
        columns=("sentence", "label"), read=_classified("sentence"),
    ),
    Form(
        name="prompt-messages", title="conversation", purpose="prompt",
        columns=("messages",), more=("tools",), read=_asked("messages"),
        example='{"messages": [{"role": …, "content": …}, …]}',
    ),
    Form(
        name="prompt", title="prompt", purpose="prompt",
        columns=("prompt",), more=("tools",), read=_prompt,
    ),
    Form(
        name="prompt-sharegpt", title="ShareGPT", purpose="prompt",
        columns=("conversations",), more=("system", "tools"), read=_asked("conversations"),
        example='{"conversations": [{"from": …, "value": …}, …]}',
    ),
    Form(
        name="prompt-alpaca", title="Alpaca", purpose="prompt",
        columns=("instruction",), more=("input", "system"), read=_instruction, separator="\n\n",
    ),
)  # fmt: skip

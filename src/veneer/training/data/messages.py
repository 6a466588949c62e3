"""Messages of a conversation, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...wording import did_you_mean
from .problems import Unfit
from .values import answer_of, kind_of, list_of, read_json, text_of

Message = dict[str, Any]

#: ShareGPT's speakers -> roles of chat templates.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}


def messages_of(value: object, name: str) -> list[Message]:
    """A list of messages with role and content, without what is null in them; anything else is `Unfit`."""
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of(value)
        raise Unfit(f"{name} is {what}, not a list of messages with role and content")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(value)]


def turn(role: str, text: object, name: str) -> Message:
    """A message with a text; the assistant's may be a number."""
    return {"role": role, "content": (answer_of if role == "assistant" else text_of)(text, name)}


def as_messages(prompt: str | Sequence[Message], role: str = "user") -> list[Message]:
    """A text as the one message of a role; messages as they are."""
    return [{"role": role, "content": prompt}] if isinstance(prompt, str) else list(prompt)


def tools_of(value: object) -> list[Any]:
    """The tools that a conversation may use; an empty list without any."""
    return list_of(value, "tools") if value else []


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise Unfit(f"{name} is {kind_of(value)}, not an object with role and content")
    if "role" not in value and "from" in value:
        return _sharegpt_message(value, name)
    message = {key: part for key, part in value.items() if part is not None}
    role = text_of(message.get("role"), f"{name}.role")
    if calls := _tool_calls(message.pop("tool_calls", []), f"{name}.tool_calls"):
        message["tool_calls"] = calls
    if "content" in message or not calls:
        message["content"] = _content(role, message.get("content"), f"{name}.content")
    return message


def _sharegpt_message(value: Mapping[str, Any], name: str) -> Message:
    speaker = text_of(value.get("from"), f"{name}.from")
    if speaker.lower() not in SPEAKERS:
        near = did_you_mean(speaker, SPEAKERS)
        raise Unfit(f"{name}.from is {speaker!r}, which is none of {', '.join(SPEAKERS)}{near}")
    return turn(SPEAKERS[speaker.lower()], value.get("value"), f"{name}.value")


def _content(role: str, value: object, name: str) -> str:
    """A text. Parts are joined without anything between them, as the templates that take parts do."""
    if isinstance(value, list):
        return "".join(_part(part, f"{name}[{place}]") for place, part in enumerate(value))
    # What a tool answers is often a number, too.
    return answer_of(value, name) if role in ("assistant", "tool") else text_of(value, name)


def _part(value: object, name: str) -> str:
    if not isinstance(value, Mapping):
        raise Unfit(f"{name} is {kind_of(value)}, not a part with type and text")
    if value.get("type") != "text":
        raise Unfit(
            f"{name} is a part of type {value.get('type')!r}; a model of text takes parts of type 'text'"
        )
    return text_of(value.get("text"), f"{name}.text")


def _tool_calls(value: object, name: str) -> list[Message]:
    calls = list_of(value, name)
    if wrong := [call for call in calls if not isinstance(call, Mapping)]:
        raise Unfit(f"{name} has {kind_of(wrong[0])} in the place of an object with name and arguments")
    return [_tool_call(call) for call in calls]


def _tool_call(call: Mapping[str, Any]) -> Message:
    """A call whose arguments are an object: templates write it as JSON, and would quote JSON once more."""
    found = {key: part for key, part in call.items() if part is not None}
    if isinstance(found.get("function"), Mapping):
        found["function"] = _tool_call(found["function"])
    if isinstance(found.get("arguments"), str):
        try:
            arguments = read_json(found["arguments"])
        except ValueError:
            return found
        if isinstance(arguments, Mapping):
            found["arguments"] = arguments
    return found

"""Messages as chat templates take them: parts, numbers, calls of tools."""

from __future__ import annotations

from typing import Any

import pytest

from veneer.training.data.messages import messages_of
from veneer.training.data.problems import Unfit

USER, ANSWER = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}


@pytest.mark.parametrize(
    ("message", "meaning"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "Tw"}, {"type": "text", "text": "o?"}]},
            USER,
        ),
        ({"role": "user", "content": [{"type": "text", "text": "Two?", "image": None}]}, USER),
        ({"role": "assistant", "content": 2}, ANSWER),
        ({"role": "tool", "content": 2.5, "name": "add"}, {"role": "tool", "content": "2.5", "name": "add"}),
        ({"role": "assistant", "content": "2", "tool_calls": []}, ANSWER),
        (
            {"role": "assistant", "content": None, "tool_calls": [{**CALL, "id": None}]},
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {
                "role": "assistant",
                "tool_calls": [
                    {"type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":1}'}}
                ],
            },
            {"role": "assistant", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{1"}]},
            {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "{1"}]},
        ),
    ],
)
def test_what_a_message_means(message: dict[str, Any], meaning: dict[str, Any]) -> None:
    assert messages_of([message], "messages") == [meaning]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "url": "a.png"}]},
            r"messages\[0\].content\[1\] is a part of type 'image'; a model of text takes",
        ),
        ({"role": "user", "content": ["a"]}, r"content\[0\] is a text, not a part with type and text"),
        ({"role": "user", "content": [{"type": "text"}]}, r"content\[0\].text is null"),
        ({"role": "user", "content": 2}, r"content is a number \(2\), not text"),
        ({"role": "assistant", "tool_calls": {}}, "tool_calls is an object, not a list"),
        ({"role": "assistant", "tool_calls": ["add"]}, "tool_calls has a text in the place of an object"),
    ],
)
def test_what_is_wrong_with_a_message(message: dict[str, Any], words: str) -> None:
    with pytest.raises(Unfit, match=words):
        messages_of([message], "messages")

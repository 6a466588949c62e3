"""The forms of records: their columns, and how each is read.

`FORMS` has an entry for each form. Its ``read`` returns a record in plain words (``prompt`` and
``completion``, ``messages``, ``text``, …), or raises `Unfit` with what is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...errors import DataError, Hint, Text
from ...wording import did_you_mean, nearest

Record = Mapping[str, Any]
Message = dict[str, Any]
Reader = Callable[[Record], dict[str, Any]]
Purpose = Literal["sft", "dpo", "classification", "prompt"]
#: (place, what is wrong) of a bad record.
Problem = tuple[str, "str | Text"]
PURPOSES: tuple[Purpose, ...] = ("sft", "dpo", "classification", "prompt")
SHOWN = 3

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


class Unfit(DataError):
    """One record is wrong; readers of many records collect these into one `DataError`."""


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
        example: A short record, for messages.
        separator: Stands between prompt and answer if the model has no chat template.
    """

    name: str
    title: str
    purpose: Purpose
    columns: tuple[str, ...]
    read: Reader = field(repr=False, compare=False)
    example: str
    more: tuple[str, ...] = ()
    separator: str = ""

    def __str__(self) -> str:
        return f"columns {' + '.join(self.columns)} ({self.title})"

    def fits(self, record: Record) -> bool:
        """Whether the record has all required columns, not null."""
        return all(record.get(column) is not None for column in self.columns)


def text_of(value: object, name: str) -> str:
    """Check that a value is text that tokenizers take.

    Raises:
        Unfit: It is something else.
    """
    if not isinstance(value, str):
        raise Unfit(f"{name} is {kind_of(value)}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Unfit(f"{name} holds half of a surrogate pair, which is no character") from None
    return value


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


def messages_of(value: object, name: str) -> list[Message]:
    """Check a list of messages with role and content, and drop what is null in them.

    Raises:
        Unfit: It is no such list.
    """
    if not isinstance(value, list) or not value:
        what = "an empty list" if value == [] else kind_of(value)
        raise Unfit(f"{name} is {what}, not a list of messages with role and content")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(value)]


def _message(value: object, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise Unfit(f"{name} is {kind_of(value)}, not an object with role and content")
    if "role" not in value and "from" in value:
        return _sharegpt_message(value, name)
    message = {key: part for key, part in value.items() if part is not None}
    if isinstance(message.get("content"), list):
        raise Unfit(f"{name}.content is a list of parts; only text is understood")
    text_of(message.get("role"), f"{name}.role")
    if "content" in message or "tool_calls" not in message:
        text_of(message.get("content"), f"{name}.content")
    return message


def _sharegpt_message(value: Record, name: str) -> Message:
    speaker = text_of(value.get("from"), f"{name}.from")
    if speaker.lower() not in SPEAKERS:
        near = did_you_mean(speaker, SPEAKERS)
        raise Unfit(f"{name}.from is {speaker!r}, which is none of {', '.join(SPEAKERS)}{near}")
    return _turn(SPEAKERS[speaker.lower()], value.get("value"), f"{name}.value")


def _with_tools(record: Record, found: dict[str, Any]) -> dict[str, Any]:
    tools = record.get("tools")
    if tools is None:
        return found
    if not isinstance(tools, list):
        raise Unfit(f"tools is {kind_of(tools)}, not a list")
    return {**found, "tools": tools}


def _turn(role: str, text: object, name: str) -> Message:
    return {"role": role, "content": text_of(text, name)}


def _text_or_messages(value: object, name: str) -> str | list[Message]:
    return messages_of(value, name) if isinstance(value, list) else text_of(value, name)


def _conversation(record: Record, column: str) -> list[Message]:
    """The messages in a column, with ShareGPT's system text in front."""
    messages = messages_of(record[column], column)
    if column == "conversations" and record.get("system"):
        messages.insert(0, _turn("system", record["system"], "system"))
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


def _prompt_completion(record: Record) -> dict[str, Any]:
    turns = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        value = record[column]
        turns += messages_of(value, column) if isinstance(value, list) else [_turn(role, value, column)]
    if isinstance(record["prompt"], str) and isinstance(record["completion"], str):
        return {"prompt": record["prompt"], "completion": record["completion"]}
    return _with_tools(record, _answered(turns, "completion"))


def _prompt(record: Record) -> dict[str, Any]:
    prompt = _text_or_messages(record["prompt"], "prompt")
    if isinstance(prompt, str) and not prompt.strip():
        raise Unfit("prompt is empty")
    return _with_tools(record, {"prompt": prompt})


def _instruction(record: Record) -> dict[str, Any]:
    prompt = text_of(record["instruction"], "instruction")
    if record.get("input"):
        prompt = f"{prompt}\n\n{text_of(record['input'], 'input')}"
    if not record.get("system"):
        return {"prompt": prompt}
    return {"prompt": [_turn("system", record["system"], "system"), _turn("user", prompt, "instruction")]}


def _alpaca(record: Record) -> dict[str, Any]:
    prompt = _instruction(record)["prompt"]
    answer = _turn("assistant", record["output"], "output")
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
    found = {column: _text_or_messages(record[column], column) for column in ("prompt", "chosen", "rejected")}
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
        example='{"prompt": …, "completion": …}',
    ),
    Form(
        name="sharegpt", title="ShareGPT", purpose="sft",
        columns=("conversations",), more=("system", "tools"), read=_learned("conversations"),
        example='{"conversations": [{"from": …, "value": …}, …]}',
    ),
    Form(
        name="alpaca", title="Alpaca", purpose="sft",
        columns=("instruction", "output"), more=("input", "system"), read=_alpaca, separator="\n\n",
        example='{"instruction": …, "output": …}',
    ),
    Form(
        name="text", title="plain text, loss on all of it", purpose="sft",
        columns=("text",), read=_text,
        example='{"text": …}',
    ),
    Form(
        name="preference", title="preference", purpose="dpo",
        columns=("prompt", "chosen", "rejected"), read=_preference,
        example='{"prompt": …, "chosen": …, "rejected": …}',
    ),
    Form(
        name="preference-whole", title="preference, whole conversations", purpose="dpo",
        columns=("chosen", "rejected"), read=_preference_whole,
        example='{"chosen": [{"role": …, "content": …}, …], "rejected": […]}',
    ),
    Form(
        name="classification", title="classification", purpose="classification",
        columns=("text", "label"), read=_classified("text"),
        example='{"text": …, "label": …}',
    ),
    Form(
        name="classification-sentence", title="classification", purpose="classification",
        columns=("sentence", "label"), read=_classified("sentence"),
        example='{"sentence": …, "label": …}',
    ),
    Form(
        name="prompt-messages", title="conversation", purpose="prompt",
        columns=("messages",), more=("tools",), read=_asked("messages"),
        example='{"messages": [{"role": …, "content": …}, …]}',
    ),
    Form(
        name="prompt", title="prompt", purpose="prompt",
        columns=("prompt",), more=("tools",), read=_prompt,
        example='{"prompt": …}',
    ),
    Form(
        name="prompt-sharegpt", title="ShareGPT", purpose="prompt",
        columns=("conversations",), more=("system", "tools"), read=_asked("conversations"),
        example='{"conversations": [{"from": …, "value": …}, …]}',
    ),
    Form(
        name="prompt-alpaca", title="Alpaca", purpose="prompt",
        columns=("instruction",), more=("input", "system"), read=_instruction, separator="\n\n",
        example='{"instruction": …}',
    ),
)  # fmt: skip

#: What to say about data that is for another purpose.
ELSEWHERE: dict[Purpose, str | Text] = {
    "sft": "that is data for fine-tuning on answers, not for this",
    "dpo": Text("that is preference data", Hint("method", "dpo", ": train on it with {}")),
    "classification": "that is data for a classifier, not for this",
    "prompt": "there are prompts, but no answers to learn from",
}


def form_of(records: Sequence[object], purpose: Purpose = "sft") -> Form:
    """The form of most records; of two equally frequent ones, the first in `FORMS`.

    Args:
        records: At least one.
        purpose: ``sft``, ``dpo``, ``classification`` or ``prompt``.

    Raises:
        DataError: No record has a form for the purpose; names the columns found and the nearest right ones.
    """
    form = most_common_form(records, purpose)
    if form is None:
        problems: list[Problem] = [
            (f"record {n}", lacking(r, purpose)) for n, r in enumerate(records, start=1)
        ]
        raise DataError(problem_list(problems, len(records), "the data", understood(purpose)))
    return form


def most_common_form(records: Sequence[object], purpose: Purpose) -> Form | None:
    """As `form_of`, but None if no record has a form for the purpose.

    Raises:
        DataError: There is no such purpose.
    """
    if purpose not in PURPOSES:
        raise DataError(f"the purpose of data is one of {', '.join(PURPOSES)}, not {purpose!r}")
    found = Counter(form.name for record in records if (form := _first_fit(record, purpose)) is not None)
    return max((form for form in FORMS if form.name in found), key=lambda f: found[f.name], default=None)


def read_as(form: Form, record: object) -> dict[str, Any]:
    """Read a record in plain words.

    Raises:
        Unfit: The record does not have the form.
    """
    if isinstance(record, Mapping) and form.fits(record):
        return form.read(record)
    other = _first_fit(record, form.purpose)
    if other is not None:
        raise Unfit(f"it has the {other}, the others have the {form}; one set of data has one form")
    raise Unfit(lacking(record, form.purpose))


def _first_fit(record: object, purpose: Purpose) -> Form | None:
    if not isinstance(record, Mapping):
        return None
    return next((form for form in FORMS if form.purpose == purpose and form.fits(record)), None)


def lacking(record: object, purpose: Purpose) -> str | Text:
    """What is wrong with the columns of a record that has no form for a purpose."""
    if not isinstance(record, Mapping):
        return f"it is no object but {kind_of(record)}"
    found = ", ".join(repr(name) for name in record) or "no column"
    hints = _hints(record, purpose)
    more = (" (", Text.join("; ", hints), ")") if hints else ()
    return Text(f"it lacks columns that are needed: it has {found}", *more)


def _hints(record: Record, purpose: Purpose) -> list[str | Text]:
    columns = {column for form in FORMS if form.purpose == purpose for column in form.columns}
    null = [f"{name!r} is null" for name in record if name in columns and record[name] is None]
    others = (other for other in PURPOSES if other != purpose and _first_fit(record, other) is not None)
    return [*near_columns(record, columns), *null] or [ELSEWHERE[other] for other in others][:1]


def near_columns(record: Record, columns: Collection[str]) -> list[str]:
    """Which columns of a record may be misspelt."""
    absent = [column for column in columns if column not in record]
    unknown = [name for name in record if name not in set(columns)]
    near = ((name, nearest(str(name).strip(), absent, cutoff=0.7)) for name in unknown)
    return [f"{name!r} should perhaps be {close[0]!r}" for name, close in near if close]


def understood(purpose: Purpose) -> str:
    """The forms for a purpose, for the end of a message."""
    return "Understood: " + ", ".join(form.example for form in FORMS if form.purpose == purpose)


def problem_list(problems: Sequence[Problem], total: int, source: str, way_out: str = "") -> Text:
    """One message for all bad records: their number, the first few, and a way out.

    Args:
        problems: (place, problem) of each bad record.
        total: Number of all records.
        source: Where they come from.
        way_out: A last line.
    """
    alike: dict[str | Text, list[str]] = {}
    for place, words in problems:
        alike.setdefault(words, []).append(place)
    lines: list[str | Text] = [
        f"{len(problems)} of {total} {'record' if total == 1 else 'records'} of {source} cannot be used:"
    ]
    for words, places in list(alike.items())[:SHOWN]:
        others = f" (and {len(places) - 1} more like it)" if len(places) > 1 else ""
        lines.append(Text(f"  {places[0]}: ", words, others))
    if len(alike) > SHOWN:
        rest = sum(len(places) for places in list(alike.values())[SHOWN:])
        lines.append(f"  … and {rest} more")
    return Text.join("\n", [*lines, *([way_out] if way_out else [])])

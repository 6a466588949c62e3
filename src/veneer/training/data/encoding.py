"""Records -> rows of tokens with labels on the answers only.

With a chat template, a prompt and its completion are a turn of the user and a turn of the assistant; without
one, they are joined as they are and closed by the end-of-sequence token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import DataError
from ...forward import IGNORED
from .batch import Row
from .forms import Form, Purpose, Record
from .messages import Message, as_messages
from .problems import Unfit, read_all
from .recognition import form_of, read_as
from .records import Records

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """The lengths of examples.

    Attributes:
        lengths: Tokens of each record, before anything is cut.
        max_length: The maximum length, at which examples are cut.
    """

    lengths: Sequence[int]
    max_length: int

    @property
    def cut(self) -> int:
        """Number of examples that exceed the maximum length."""
        return sum(length > self.max_length for length in self.lengths)

    def about_cut(self, word: str = "example", what: str = "cut") -> list[str]:
        """A warning of the examples that exceed the maximum length, if there are any."""
        longer = f"{count(self.cut, word)} longer than {self.max_length} tokens"
        return [f"warning: {longer} {'was' if self.cut == 1 else 'were'} {what}"] if self.cut else []


@dataclass(frozen=True, kw_only=True)
class Encoded(Lengths):
    """Rows of tokens, and what was cut or left out.

    Attributes:
        rows: ``input_ids`` and ``labels`` of each example; labels are -100 where there is no loss.
        dropped: Number of examples left out because no label is left within that length.
        empty: Number of examples with an empty answer.
    """

    rows: list[Row]
    dropped: int = 0
    empty: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def learned(self) -> int:
        """Number of tokens with a loss; the first of a row has none."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"][1:])

    def lines(self) -> list[str]:
        """What to say about it."""
        lines = [
            f"{count(len(self.rows), 'example')}, {self.tokens:,} tokens, loss on {self.learned:,} of them",
            *self.about_cut(),
        ]
        if self.dropped:
            lines.append(
                f"warning: {count(self.dropped, 'example')} left out: nothing to learn in the first "
                f"{self.max_length} tokens"
            )
        if self.empty:
            lines.append(
                f"warning: {count(self.empty, 'example')} with an empty answer, which teaches to say nothing"
            )
        return lines


def count(number: int, word: str) -> str:
    """``1 example``, ``2 examples``."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def encode(records: Sequence[Record], tokenizer: Any, max_length: int = 1024) -> Encoded:
    """Tokenise records; the tokens of a prompt are those that it has in generation.

    Args:
        records: From `read_records`, or mappings of one form.
        tokenizer: A tokenizer of transformers; its chat template lays out conversations.
        max_length: Maximum length of an example, in tokens.

    Raises:
        DataError: Some records cannot be laid out (one error for all), or no record has a label left.
    """
    rows: list[Row] = []
    lengths: list[int] = []
    empty = 0
    for row, blank in each(records, "sft", lambda example, form: _row(example, form, tokenizer)):
        lengths.append(len(row["input_ids"]))
        row = {name: values[:max_length] for name, values in row.items()}
        if any(label != IGNORED for label in row["labels"][1:]):
            rows.append(row)
            empty += blank
    if not rows:
        raise DataError(
            f"nothing of any answer fits into {max_length} tokens (of {count(len(records), 'record')}): "
            "raise the maximum length"
        )
    return Encoded(
        rows=rows, dropped=len(records) - len(rows), empty=empty, lengths=lengths, max_length=max_length
    )


def each(records: Sequence[Record], purpose: Purpose, make: Callable[[dict[str, Any], Form], T]) -> list[T]:
    """Apply a function to each record in plain words and to the form; raise one error for all bad records.

    Raises:
        DataError: With their number and the first few of them.
    """
    known = records if isinstance(records, Records) and records.form.purpose == purpose else None
    form, source = (form_of(records, purpose), "the data") if known is None else (known.form, known.source)
    places = [known.where(n) if known else f"record {n + 1}" for n in range(len(records))]
    found = list(zip(places, records, strict=True))
    return read_all(found, lambda record: make(read_as(form, record), form), source)


def _row(example: dict[str, Any], form: Form, tokenizer: Any) -> tuple[Row, bool]:
    """(row, whether an answer is empty)."""
    ids: list[int] = []
    labels: list[int] = []
    parts = pieces(example, tokenizer, form.separator)
    for text, answer in parts:
        # A template writes its own first token; plain text gets the tokenizer's.
        plain = not ids and ("text" in example or not has_template(tokenizer))
        piece = opening(text, tokenizer) if plain else tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        labels += piece if answer else [IGNORED] * len(piece)
    return {"input_ids": ids, "labels": labels}, _says_nothing(example)


def _says_nothing(example: Mapping[str, Any]) -> bool:
    if "messages" in example:
        answers = [m for m in example["messages"] if m["role"] == "assistant"]
        return any(not m.get("content", "").strip() and not m.get("tool_calls") for m in answers)
    return not example.get("completion", example.get("text", "")).strip()


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer lays out conversations."""
    return bool(getattr(tokenizer, "chat_template", None))


def pieces(example: Record, tokenizer: Any, separator: str = "") -> list[tuple[str, bool]]:
    """The text of an example in pieces, each with whether it has a loss.

    Args:
        example: A record in plain words: ``text``, ``prompt`` and ``completion``, or ``messages``.
        tokenizer: A tokenizer of transformers.
        separator: Stands between prompt and completion if there is no chat template.

    Raises:
        Unfit: There are messages and no chat template, or the template fails or rewrites earlier turns.
    """
    end = tokenizer.eos_token or ""
    if "text" in example:
        return [(example["text"] + end * (not example["text"].endswith(end)), True)]
    if not has_template(tokenizer):
        if "messages" in example or example.get("tools"):
            raise Unfit(
                "the tokenizer has no chat template, so messages and tools cannot be laid out; give texts as "
                "prompt and completion, or take a chat model"
            )
        return [(example["prompt"] + separator, False), (example["completion"] + end, True)]
    tools = example.get("tools")
    messages = example.get("messages") or [
        *as_messages(example["prompt"]),
        *as_messages(example["completion"], "assistant"),
    ]
    text, found = "", []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = laid_out(tokenizer, messages[:place], tools, answer_next=True)
        after = laid_out(tokenizer, messages[: place + 1], tools)
        if not (before.startswith(text) and after.startswith(before)):
            raise Unfit(
                "the chat template of this model rewrites earlier turns, so loss on the answers only cannot "
                "be laid out; give one prompt and one completion a record"
            )
        answer = after[len(before) :]
        if end and end in answer:
            answer = answer[: answer.rindex(end) + len(end)]
        found += [(before[len(text) :], False), (answer, True)]
        text = before + answer
    return found


def laid_out(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, answer_next: bool = False
) -> str:
    """Apply a chat template to messages.

    Raises:
        Unfit: The template fails, or would leave out tools or calls of them.
    """
    try:
        template = tokenizer.get_chat_template(tools=tools)
        _check_tools(template, messages, tools)
        text: str = tokenizer.apply_chat_template(
            list(messages), tools=tools, tokenize=False, add_generation_prompt=answer_next
        )
    except Unfit:
        raise
    except Exception as error:  # a template may raise anything
        words = str(error).strip() or type(error).__name__
        roles = ", ".join(message["role"] for message in messages)
        raise Unfit(
            f"the model's chat template refuses the roles {roles or 'of no message'}: {words}"
        ) from error
    return text


def _check_tools(template: str, messages: Sequence[Message], tools: Any) -> None:
    given = {"tools": bool(tools), "tool_calls": any(message.get("tool_calls") for message in messages)}
    if lost := [name for name, there in given.items() if there and name not in template]:
        raise Unfit(
            f"the model's chat template leaves out {' and '.join(lost)}, so the model would never see them; "
            "take a model that was made to call tools, or leave them out of the data"
        )


def prompt_ids(prompt: str | Sequence[Message], tokenizer: Any, tools: Any = None) -> list[int]:
    """The tokens of a prompt, laid out as in training.

    Raises:
        DataError: There are messages and no chat template, or the template fails.
    """
    return prompt_tokens({"prompt": prompt, "tools": tools}, tokenizer)


def prompt_tokens(example: Record, tokenizer: Any, separator: str = "") -> list[int]:
    """As `prompt_ids`, for a record with ``prompt`` and perhaps ``tools``.

    Raises:
        Unfit: There are messages and no chat template, or the template fails.
    """
    prompt = example["prompt"]
    if not has_template(tokenizer):
        if not isinstance(prompt, str) or example.get("tools"):
            raise Unfit("the tokenizer has no chat template, so the prompt must be a text, without tools")
        return opening(prompt + separator, tokenizer)
    text = laid_out(tokenizer, as_messages(prompt), example.get("tools"), answer_next=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def last_turn(example: Record) -> tuple[dict[str, Any], str] | None:
    """(what precedes the last answer, that answer) of a record in plain words, if it has one."""
    if "completion" in example:
        return {"prompt": example["prompt"], "tools": example.get("tools")}, example["completion"]
    messages = example.get("messages", [])
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not places or not messages[places[-1]].get("content"):
        return None
    return {"prompt": messages[: places[-1]], "tools": example.get("tools")}, messages[places[-1]]["content"]


def opening(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text that is continued: with the tokenizer's first special token, without its last."""
    first = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    ids = list(tokenizer(text, add_special_tokens=first)["input_ids"])
    closed = ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(tokenizer.eos_token or "")
    return ids[:-1] if closed else ids

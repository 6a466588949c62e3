"""Records -> rows: what loss falls on, and what is refused in which words."""

from __future__ import annotations

import json

import pytest

from tests.unit.training.tiny import RECORDS, TEMPLATE, tiny_tokenizer
from veneer import DataError
from veneer.training import Collator, encode, prompt_ids
from veneer.training.data import IGNORED, pieces

TOKENIZER = tiny_tokenizer()


def learned(row: dict[str, list[int]]) -> str:
    return TOKENIZER.decode([label for label in row["labels"] if label != IGNORED])


def test_loss_falls_on_the_answer_and_its_end_only() -> None:
    row = encode([{"prompt": "Two?", "completion": "2"}], TOKENIZER).rows[0]
    assert TOKENIZER.decode(row["input_ids"]) == "<|user|>Two?<|end|>\n<|assistant|>2<|end|>"
    assert learned(row) == "2<|end|>"


def test_every_answer_of_a_conversation_is_learned() -> None:
    turns = [("system", "Be short."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": content} for role, content in turns]
    row = encode([{"messages": messages}], TOKENIZER).rows[0]
    assert learned(row) == "b<|end|>d<|end|>"
    whole = TOKENIZER.apply_chat_template(messages, tokenize=False)
    assert TOKENIZER.decode(row["input_ids"]) == whole.rstrip("\n")


def test_lists_of_messages_as_prompt_and_completion() -> None:
    as_text = encode([{"prompt": "Two?", "completion": "2"}], TOKENIZER).rows
    as_lists = {
        "prompt": [{"role": "user", "content": "Two?"}],
        "completion": [{"role": "assistant", "content": "2"}],
    }
    assert encode([as_lists], TOKENIZER).rows == as_text


def test_the_prompt_of_training_is_the_prompt_of_generation() -> None:
    for record in RECORDS[:3]:
        row = encode([record], TOKENIZER).rows[0]
        ids = prompt_ids(record["prompt"], TOKENIZER)
        assert row["input_ids"][: len(ids)] == ids
        assert row["labels"][: len(ids)] == [IGNORED] * len(ids)
        assert row["labels"][len(ids)] != IGNORED


WITH_TOOLS = (
    "{% for tool in tools or [] %}<|system|>{{ tool.name }}{% endfor %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLED = [
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": 2},
    {"role": "assistant", "content": "Two."},
]


def test_calls_of_tools_go_through_the_chat_template() -> None:
    row = encode([{"messages": CALLED, "tools": [{"name": "add"}]}], tiny_tokenizer(WITH_TOOLS)).rows[0]
    call = '{"name": "add", "arguments": {"a": 1}}<|end|>'
    assert TOKENIZER.decode(row["input_ids"]) == (
        f"<|system|>add<|user|>Two?<|end|>\n<|assistant|>{call}\n<|user|>2<|end|>\n<|assistant|>Two.<|end|>"
    )
    assert learned(row) == f"{call}Two.<|end|>"


def test_tools_of_a_prompt_and_its_completion() -> None:
    record = {"prompt": "Two?", "completion": "2", "tools": [{"name": "add"}]}
    row = encode([record], tiny_tokenizer(WITH_TOOLS)).rows[0]
    assert TOKENIZER.decode(row["input_ids"]).startswith("<|system|>add<|user|>Two?")
    for words, template in (("leaves out tools", TEMPLATE), ("no chat template", None)):
        with pytest.raises(DataError, match=words):
            encode([record], tiny_tokenizer(template))
    with pytest.raises(DataError, match="must be a text, without tools"):
        prompt_ids("Two?", tiny_tokenizer(template=None), [{"name": "add"}])


def test_a_template_that_would_lose_calls_is_refused() -> None:
    for more, lost in (({}, "tool_calls"), ({"tools": [{"name": "add"}]}, "tools")):
        with pytest.raises(DataError, match=f"chat template leaves out {lost}, so the model would never"):
            encode([{"messages": CALLED, **more}], TOKENIZER)


def test_without_a_chat_template_texts_are_joined() -> None:
    plain = tiny_tokenizer(template=None)
    row = encode([{"prompt": "1 + 1 = ", "completion": "2"}], plain).rows[0]
    assert plain.decode(row["input_ids"]) == "1 + 1 = 2<|end|>"
    with pytest.raises(DataError, match="no chat template"):
        encode(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], plain
        )


def test_messages_are_no_prompt_without_a_chat_template() -> None:
    plain = tiny_tokenizer(template=None)
    assert plain.decode(prompt_ids("1 + 1 = ", plain)) == "1 + 1 = "
    with pytest.raises(DataError, match="no chat template, so the prompt must be a text"):
        prompt_ids([{"role": "user", "content": "1 + 1?"}], plain)


def test_long_examples_are_cut_and_counted() -> None:
    records = [{"prompt": "p", "completion": "abcdefgh"}, {"prompt": "p" * 50, "completion": "a"}]
    encoded = encode(records, TOKENIZER, max_length=9)
    assert (encoded.cut, encoded.dropped, len(encoded.rows)) == (2, 1, 1)
    assert len(encoded.rows[0]["input_ids"]) == 9
    with pytest.raises(DataError, match="raise the maximum length"):
        encode(records, TOKENIZER, max_length=3)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    rewriting = tiny_tokenizer("{{ messages | length }}{{ messages[0]['content'] }}")
    with pytest.raises(DataError, match="rewrites earlier turns"):
        pieces({"prompt": "a", "completion": "b"}, rewriting)


def test_the_collator_pads_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6], "labels": [IGNORED, 6]},
        {"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]},
    ]
    batch = Collator(pad=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 3], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED], [IGNORED, 8, 9]]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": 3, "completion": "a"},
        {"messages": "hello"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": "a"}]},
    ],
    ids=json.dumps,
)
def test_records_of_a_wrong_shape(record: dict[str, object]) -> None:
    with pytest.raises(DataError, match="record 1"):
        encode([record], TOKENIZER)


def test_plain_text_is_learned_whole() -> None:
    for tokenizer in (TOKENIZER, tiny_tokenizer(template=None)):
        encoded = encode([{"text": "Once upon"}, {"text": ""}, {"text": "Closed.<|end|>"}], tokenizer)
        assert learned(encoded.rows[0]) == "Once upon<|end|>" and learned(encoded.rows[1]) == "Closed.<|end|>"
        assert (encoded.dropped, encoded.empty) == (1, 0)


def test_what_happened_is_said() -> None:
    records = [
        {"prompt": "p", "completion": "abcdefgh"},
        {"prompt": "p" * 50, "completion": "a"},
        {"prompt": "p", "completion": " "},
    ]
    encoded = encode(records, TOKENIZER, max_length=9)
    assert (encoded.tokens, encoded.learned) == (16, 6)
    assert encoded.lines() == [
        "2 examples, 16 tokens, loss on 6 of them",
        "warning: 2 examples longer than 9 tokens were cut",
        "warning: 1 example left out: nothing to learn in the first 9 tokens",
        "warning: 1 example with an empty answer, which teaches to say nothing",
    ]
    assert encode(RECORDS, TOKENIZER).lines() == ["16 examples, 272 tokens, loss on 48 of them"]


def test_other_forms_are_laid_out_like_prompt_and_completion() -> None:
    expected = encode([{"prompt": "Two?", "completion": "2"}], TOKENIZER).rows
    turns = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]
    for record in ({"instruction": "Two?", "input": "", "output": "2"}, {"conversations": turns}):
        assert encode([record], TOKENIZER).rows == expected


def test_an_instruction_without_a_chat_template_is_set_apart() -> None:
    plain = tiny_tokenizer(template=None)
    row = encode([{"instruction": "Add.", "input": "1, 1", "output": "2"}], plain).rows[0]
    assert plain.decode(row["input_ids"]) == "Add.\n\n1, 1\n\n2<|end|>"
    assert learned(row) == "2<|end|>"


def test_tokens_that_a_tokenizer_puts_around_every_text() -> None:
    from tokenizers.processors import TemplateProcessing

    plain = tiny_tokenizer(template=None)
    plain.add_special_tokens({"bos_token": "<|user|>"})
    ids = [("<|user|>", plain.bos_token_id), ("<|end|>", plain.eos_token_id)]
    plain.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=ids
    )
    assert plain("a")["input_ids"] == [plain.bos_token_id, *tiny_tokenizer()("a")["input_ids"], 0]
    for record in ({"prompt": "a", "completion": "b"}, {"prompt": "<|user|>a", "completion": "b"}):
        row = encode([record], plain).rows[0]
        assert plain.decode(row["input_ids"]) == "<|user|>ab<|end|>"
        ids = prompt_ids(record["prompt"], plain)
        assert row["input_ids"][: len(ids)] == ids and learned(row) == "b<|end|>"


def test_a_template_that_fails_is_refused_with_what_it_says() -> None:
    failing = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="chat template refuses the roles user: roles must alternate"):
        prompt_ids("Two?", failing)
    with pytest.raises(DataError, match=r"16 of 16 records[^\n]*\n.*15 more like it"):
        encode(RECORDS, failing)

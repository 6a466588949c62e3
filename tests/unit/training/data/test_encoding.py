"""Records -> rows: what loss falls on, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.training.tiny import RECORDS, saved_records, tiny_tokenizer
from veneer import DataError
from veneer.training import Collator, encode, prompt_ids, read_records
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


def test_without_a_chat_template_texts_are_joined() -> None:
    plain = tiny_tokenizer(template=None)
    row = encode([{"prompt": "1 + 1 = ", "completion": "2"}], plain).rows[0]
    assert plain.decode(row["input_ids"]) == "1 + 1 = 2<|end|>"
    with pytest.raises(DataError, match="no chat template"):
        encode(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}], plain
        )


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


def test_a_good_file_is_read(tmp_path: Path) -> None:
    assert read_records(saved_records(tmp_path / "data.jsonl")) == RECORDS


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2: it is no JSON"),
        ('{"promt": "a", "completion": "b"}\n', "'promt' should perhaps be 'prompt'"),
        ('{"question": "a", "answer": "b"}\n', "it has 'question', 'answer'"),
        ('["a", "b"]\n', "no object but a list"),
        ("\n\n", "holds no records"),
    ],
)
def test_a_bad_file_is_refused_with_the_place(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        read_records(file)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no UTF-8 text"):
        read_records(tmp_path / "bytes.jsonl")


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


def test_separators_inside_strings_and_a_byte_order_mark_are_data(tmp_path: Path) -> None:
    text = json.dumps({"prompt": "a\u2028b\u0085c", "completion": "d"}, ensure_ascii=False)
    (tmp_path / "d.jsonl").write_text(f"\ufeff{text}\n", encoding="utf-8")
    assert read_records(tmp_path / "d.jsonl")[0]["prompt"] == "a\u2028b\u0085c"

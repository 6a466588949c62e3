"""A conversation: what the model is given, who answers, what ends an answer."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

from tests.unit.training.tiny import tiny_model, tiny_tokenizer
from veneer import AdapterNameError, DataError, LoraConfig, VeneerError, get_peft_model
from veneer.training import Chat, Sampling, generate_answers, prompt_ids

TOKENIZER = tiny_tokenizer()


def two_adapters() -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config)
    model.add_adapter("second", config)
    return model


def asked(chat: Chat, text: str) -> tuple[str, list[str]]:
    pieces: list[str] = []
    return chat.ask(text, pieces.append), pieces


def test_an_answer_comes_in_pieces_and_is_that_of_generate() -> None:
    model = two_adapters().train()
    chat = Chat(model, TOKENIZER, Sampling(12))
    answer, pieces = asked(chat, "Hello there")
    assert model.training and len(pieces) > 1 and "".join(pieces).strip() == answer
    model.eval()
    expected = generate_answers(model, TOKENIZER, [prompt_ids("Hello there", TOKENIZER)], max_new_tokens=12)
    assert answer == expected[0].strip()


def test_the_model_sees_what_was_said_before() -> None:
    chat = Chat(two_adapters(), TOKENIZER, Sampling(4), system="Be short.")
    first, _ = asked(chat, "One")
    asked(chat, "Two")
    assert chat.messages[:4] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Two"},
    ]
    turns = [*chat.messages[:4]]
    expected = generate_answers(chat.model, TOKENIZER, [prompt_ids(turns, TOKENIZER)], max_new_tokens=4)
    assert chat.messages[4]["content"] == expected[0].strip()
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be short."}]


def test_adapters_are_switched_and_turned_off() -> None:
    model = two_adapters()
    chat = Chat(model, TOKENIZER, Sampling(6))
    assert chat.adapters == ["default", "second"] and chat.adapter == "default"
    first, _ = asked(chat, "Hello")
    chat.use("second")
    second = chat.again(lambda text: None)
    assert model.active_adapters == ["second"]
    chat.use(None)
    base = chat.again(lambda text: None)
    plain = generate_answers(tiny_model(), TOKENIZER, [prompt_ids("Hello", TOKENIZER)], max_new_tokens=6)
    assert base == plain[0].strip() and len({first, second, base}) == 3
    assert [message["content"] for message in chat.messages] == ["Hello", base]
    chat.use("default")
    assert chat.again(lambda text: None) == first
    with pytest.raises(AdapterNameError, match="no adapter 'third'; there are: default, second"):
        chat.use("third")
    assert chat.adapter == "default"


def test_without_a_chat_template_lines_are_continued() -> None:
    plain = tiny_tokenizer(template=None)
    chat = Chat(two_adapters(), plain, Sampling(4))
    assert not chat.remembers
    assert asked(chat, "Hello")[0] == asked(chat, "Hello")[0]
    with pytest.raises(VeneerError, match="cannot take a system message"):
        Chat(two_adapters(), plain, system="Be short.")


def test_what_cannot_be_asked_leaves_the_conversation_as_it_was() -> None:
    model = two_adapters()
    chat = Chat(model, TOKENIZER, Sampling(4))
    with pytest.raises(VeneerError, match="nothing has been asked yet"):
        chat.again(lambda text: None)
    asked(chat, "One")
    before = list(chat.messages)
    model.get_base_model().config.max_position_embeddings = 40
    with pytest.raises(VeneerError, match="the model reads 40 at most: /clear starts over"):
        asked(chat, "x" * 40)
    TOKENIZER_THAT_FAILS = tiny_tokenizer("{{ raise_exception('never') }}")
    chat.tokenizer = TOKENIZER_THAT_FAILS
    for act in (lambda: asked(chat, "Two"), lambda: chat.again(lambda text: None)):
        with pytest.raises(DataError, match="never"):
            act()
    assert chat.messages == before


def test_an_answer_ends_where_the_model_ends() -> None:
    model = two_adapters()
    model.get_base_model().config.max_position_embeddings = len(prompt_ids("Hello", TOKENIZER)) + 3
    pieces: list[str] = []
    Chat(model, TOKENIZER, Sampling(50)).ask("Hello", pieces.append)
    assert 0 < len(TOKENIZER("".join(pieces))["input_ids"]) <= 9  # three tokens, at most three bytes each


def test_ctrl_c_ends_the_answer_and_keeps_what_there_is() -> None:
    chat = Chat(two_adapters(), TOKENIZER, Sampling(200))
    pieces: list[str] = []

    def write(text: str) -> None:
        pieces.append(text)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    answer = chat.ask("Hello", write)
    assert 3 <= len(pieces) < 10 and chat.messages[-1]["content"] == answer == "".join(pieces).strip()
    assert signal.getsignal(signal.SIGINT) is before

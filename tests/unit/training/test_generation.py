"""Batched answers equal single ones; files of them are written whole, and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.tiny import RECORDS, saved_records, tiny_model, tiny_tokenizer
from veneer import ConfigError, DataError, LoraConfig, get_peft_model
from veneer.training import Sampling, answer_file, generate_answers, generation, prompt_ids, read_records
from veneer.training.data import Records
from veneer.training.forward import evaluating
from veneer.training.generation import batched_answers, prompts_of

TOKENIZER = tiny_tokenizer()


def test_answers_in_a_batch_equal_those_alone() -> None:
    model = tiny_model().train()
    prompts = [prompt_ids(text, TOKENIZER) for text in ("One", "A much longer question", "Three?", "4")]
    together = generate_answers(model, TOKENIZER, prompts, max_new_tokens=6, batch_size=3)
    assert model.training
    alone = [generate_answers(model, TOKENIZER, [ids], max_new_tokens=6)[0] for ids in prompts]
    assert together == alone
    assert len(set(together)) > 1


def test_adapters_answer_in_one_batch_as_alone() -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model(), config, "a")
    model.add_adapter("b", config)
    prompts = [prompt_ids(text, TOKENIZER) for text in ("One", "A much longer question")]
    names = ["a", "b", "__base__"]
    owners, asked = [name for name in names for _ in prompts], prompts * 3
    found = generate_answers(model, TOKENIZER, asked, max_new_tokens=6, batch_size=5, adapter_names=owners)
    alone = generate_answers(tiny_model(), TOKENIZER, prompts, max_new_tokens=6)
    for name in ("b", "a"):
        model.set_adapter(name)
        alone = generate_answers(model, TOKENIZER, prompts, max_new_tokens=6) + alone
    assert found == alone and len(set(found)) > 4


def test_sampling_follows_the_seed() -> None:
    model, prompts = tiny_model(), [prompt_ids("Hello", TOKENIZER)]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate_answers(model, TOKENIZER, prompts, max_new_tokens=12, temperature=1.5)[0])
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_base_answers_with_the_adapter_turned_off() -> None:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    model, prompts = get_peft_model(tiny_model(), config), [prompt_ids("Hello", TOKENIZER)]
    plain = generate_answers(tiny_model(), TOKENIZER, prompts, max_new_tokens=6)
    assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=6) != plain
    with evaluating(model, base=True):
        assert generate_answers(model, TOKENIZER, prompts, max_new_tokens=6) == plain


@pytest.mark.parametrize(
    ("given", "draws"),
    [
        ({}, False),
        ({"temperature": 0.0}, False),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.9}, True),
        ({"top_k": 3}, True),
        ({"do_sample": True}, True),
        ({"do_sample": False, "repetition_penalty": 1.2}, False),
    ],
)
def test_when_tokens_are_drawn(given: dict[str, Any], draws: bool) -> None:
    sampling = Sampling(**given)
    assert sampling.draws is draws
    config = sampling.config(tiny_model(), TOKENIZER)
    assert config.do_sample is draws
    assert config.repetition_penalty == given.get("repetition_penalty")
    if draws:
        found = (config.temperature, config.top_p, config.top_k)
        assert found == (given.get("temperature", 1.0), given.get("top_p", 1.0), given.get("top_k", 0))


def test_a_model_of_other_taste_is_not_asked_how_to_draw() -> None:
    model = tiny_model()
    model.generation_config.update(temperature=0.1, top_k=1, do_sample=True, eos_token_id=[7, 9])
    assert Sampling().config(model, TOKENIZER).eos_token_id == [7, 9, 0]
    prompts, drawn = [prompt_ids("Hello", TOKENIZER)], set()
    for seed in range(3):
        torch.manual_seed(seed)
        drawn.add(generate_answers(model, TOKENIZER, prompts, sampling=Sampling(6, do_sample=True))[0])
    assert len(drawn) == 3


def test_everything_wrong_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Sampling(0, False, -1.0, 1.5, 0, 0.0)
    for said in (
        "max_new_tokens must be above 0, not 0",
        "temperature must be at least 0, not -1.0",
        "top_p must be above 0 and at most 1, not 1.5",
        "top_k must be above 0",
        "repetition_penalty must be above 0",
    ):
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match="do_sample is off"):
        Sampling(do_sample=False, top_p=0.9)
    for given in ({"do_sample": True}, {"top_p": 0.9}):
        with pytest.raises(ConfigError, match="nothing to sample"):
            Sampling(temperature=0.0, **given)  # type: ignore[arg-type]


def records_of(tmp_path: Path) -> Records:
    return read_records(saved_records(tmp_path / "data.jsonl"), "prompt")


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_of_prompts_becomes_a_file_of_answers(tmp_path: Path) -> None:
    records, model, out = records_of(tmp_path), tiny_model(), tmp_path / "out.jsonl"
    assert answer_file(model, TOKENIZER, records, out, Sampling(4), batch_size=1) == 0
    alone = generate_answers(model, TOKENIZER, prompts_of(records, TOKENIZER), max_new_tokens=4)
    assert lines(out) == [{**r, "generated_text": a} for r, a in zip(RECORDS, alone, strict=True)]
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "out.jsonl"}


@pytest.mark.parametrize("torn", [b"", b'{"prompt": "Double 18.", "compl'])
def test_a_run_that_broke_off_goes_on(tmp_path: Path, torn: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    records, model, sampling = records_of(tmp_path), tiny_model(), Sampling(4, do_sample=True)
    whole, out, part = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", tmp_path / ".out.jsonl.part"
    answer_file(model, TOKENIZER, records, whole, sampling, batch_size=1, seed=5)
    asked: list[int] = []

    def breaking(*given: Any, **more: Any) -> list[str]:
        asked.append(len(given[2]))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return batched_answers(*given, **more)

    monkeypatch.setattr(generation, "batched_answers", breaking)
    with pytest.raises(KeyboardInterrupt):
        answer_file(model, TOKENIZER, records, out, sampling, batch_size=1, seed=5)
    assert not out.exists() and len(part.read_bytes().splitlines()) == 1 + 8
    part.write_bytes(part.read_bytes() + torn)
    assert answer_file(model, TOKENIZER, records, out, sampling, batch_size=1, seed=5) == 8
    assert asked == [8, 8, 8] and out.read_bytes() == whole.read_bytes() and not part.exists()


def test_another_run_is_begun_anew(tmp_path: Path) -> None:
    records, model, out = records_of(tmp_path), tiny_model(), tmp_path / "out.jsonl"
    for content in (b"", b"nonsense\n", b'{"begun": "otherwise"}\n{}\n', b"[]\n{}\n"):
        (tmp_path / ".out.jsonl.part").write_bytes(content)
        assert answer_file(model, TOKENIZER, records, out, Sampling(1)) == 0
        assert len(lines(out)) == 16


def test_prompts_of_every_form(tmp_path: Path) -> None:
    turn, answer = {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "2"}
    expected = prompt_ids("Two?", TOKENIZER)
    for number, record in enumerate(
        (
            {"prompt": "Two?"},
            {"prompt": [turn]},
            {"messages": [turn]},
            {"messages": [turn, answer]},
            {"instruction": "Two?", "input": ""},
            {"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "2"}]},
        )
    ):
        file = tmp_path / f"{number}.jsonl"
        file.write_text(json.dumps(record) + "\n")
        assert prompts_of(read_records(file, "prompt"), TOKENIZER) == [expected]
    for bad in ({"messages": [answer]}, {"prompt": " "}, {"text": "a"}):
        file.write_text(json.dumps(bad) + "\n")
        with pytest.raises(DataError, match=r"1 of 1 record of .*\n  line 1: "):
            read_records(file, "prompt")


def test_answers_are_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "One"}) + "\n")
    victim, out = tmp_path / "victim", tmp_path / "out.jsonl"
    victim.write_text("precious")
    for name in (".out.jsonl.part", ".out.jsonl.whole"):
        (tmp_path / name).symlink_to(victim)
    records = read_records(tmp_path / "data.jsonl", "prompt")
    answer_file(tiny_model(), TOKENIZER, records, out, Sampling(max_new_tokens=2))
    assert victim.read_text() == "precious"
    assert len(out.read_text().splitlines()) == 1 and not (tmp_path / ".out.jsonl.part").is_symlink()

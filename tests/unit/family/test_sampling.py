from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tolerances import FAMILY, assert_close
from tests.unit.family.tiny import family, text
from veneer import Family, LoraConfig
from veneer.errors import ConfigError, DataError

PROMPTS = {"a": [[1, 5, 6], [1, 7]], "b": [[1, 9, 9, 4]]}


def trained() -> Family:
    made = family("a", "b", learning_rate=0.1)
    made.forward_backward({"a": text(), "b": text(1)})
    made.optim_step()
    return made


def test_each_adapter_samples_as_if_it_were_alone() -> None:
    together = trained().sample(PROMPTS, max_tokens=6, num_samples=2, stop=[])
    assert [len(answers) for answers in together["a"]] == [2, 2] and len(together["b"]) == 1
    for name in "ab":
        alone = trained().sample({name: PROMPTS[name]}, max_tokens=6, num_samples=2, stop=[])[name]
        for mine, theirs in zip(together[name], alone, strict=True):
            assert [one.tokens for one in mine] == [one.tokens for one in theirs]


def test_logprobs_are_those_that_training_computes() -> None:
    made = trained()
    prompt = PROMPTS["b"][0]
    (answer,) = made.sample({"b": [prompt]}, max_tokens=5, temperature=0.7, stop=[])["b"][0]
    ids = torch.tensor([prompt + answer.tokens])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    computed = made.forward({"b": {"input_ids": ids, "labels": labels}})["b"].logprobs
    assert computed is not None
    assert_close(torch.tensor(answer.logprobs), computed[0, len(prompt) :], FAMILY)


def test_temperature_zero_takes_the_likeliest_and_stops_where_it_is_told_to() -> None:
    made = trained()
    (greedy,) = made.sample({"a": [[1, 5]]}, max_tokens=4, temperature=0, stop=[])["a"][0]
    (again,) = made.sample({"a": [[1, 5]]}, max_tokens=4, temperature=0, stop=[greedy.tokens[0]])["a"][0]
    assert again.tokens == greedy.tokens[:1] and len(again.logprobs) == 1
    ids = torch.tensor([[1, 5]])
    with torch.no_grad():
        logits = made.model(input_ids=ids, adapter_names=["a"]).logits[0, -1]
    assert greedy.tokens[0] == int(logits.argmax())


def test_samples_follow_the_distribution() -> None:
    made = trained()
    answers = made.sample({"a": [[1, 5]]}, max_tokens=1, num_samples=2000, temperature=0.1, stop=[])["a"][0]
    with torch.no_grad():
        logits = made.model(input_ids=torch.tensor([[1, 5]]), adapter_names=["a"]).logits[0, -1]
    expected = (logits / 0.1).softmax(-1)
    counts = torch.bincount(torch.tensor([one.tokens[0] for one in answers]), minlength=64) / len(answers)
    deviation = (expected * (1 - expected) / len(answers)).sqrt()
    assert ((counts - expected).abs() <= 4.5 * deviation + 1 / len(answers)).all()


def test_what_is_no_prompt_is_refused() -> None:
    made = family("a", "b")
    with pytest.raises(DataError, match="'a': a list of prompts is needed"):
        made.sample({"a": ["text"], "b": [[1]]}, max_tokens=1)  # type: ignore[list-item]
    with pytest.raises(DataError, match="'b': a list of prompts"):
        made.sample({"a": [[1]], "b": [[]]}, max_tokens=1)
    with pytest.raises(DataError, match="there is no prompt"):
        made.sample({"a": []}, max_tokens=1)
    plain = Family(nn.Sequential(nn.Linear(2, 2)))
    plain.add("a", LoraConfig(target_modules=["0"]))
    with pytest.raises(ConfigError, match="has no generate"):
        plain.sample({"a": [[1]]}, max_tokens=1)

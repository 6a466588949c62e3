"""An adapter beside its base on data: the measures are those that transformers' losses and answers give."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tolerances import assert_close
from tests.unit.training.tiny import RECORDS, tiny_model, tiny_tokenizer
from veneer import DataError, LoraConfig, get_peft_model
from veneer.training import Collator, Records, encode, form_of, generate_answers, prompt_ids
from veneer.training.scores import Comparison, Score, accuracy, compare, perplexity_of

TOKENIZER = tiny_tokenizer()


def adapted() -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def known(records: list[dict[str, Any]], purpose: Any = "sft") -> Records:
    return Records(records, source="data", form=form_of(records, purpose))


def test_loss_and_perplexity_of_adapter_and_base() -> None:
    model = adapted()
    found = compare(model, TOKENIZER, known(RECORDS), batch_size=3, exact_match=False)
    batch = Collator(0)(encode(RECORDS, TOKENIZER).rows)
    with torch.no_grad():
        expected = {"adapter": model(**batch).loss, "base": tiny_model()(**batch).loss}
    assert list(found.scores) == ["base", "adapter"]
    for name, score in found.scores.items():
        assert_close(torch.tensor(score.loss), expected[name])
        assert score.perplexity == math.exp(score.loss) and score.exact is None
    assert (found.examples, found.tokens, found.asked) == (16, 48, None)
    assert [row[0] for row in found.table()] == ["", "loss", "perplexity"]


def test_exact_match_counts_answers_that_are_as_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [record["completion"] for record in RECORDS]
    answers = [["20 and more"] * 16, [*wanted[:-1], "no"]]  # of the base, of the adapter
    monkeypatch.setattr("veneer.training.scores.generate_answers", lambda *given, **more: answers.pop(0))
    found = compare(adapted(), TOKENIZER, known(RECORDS))
    assert found.asked == 16 and {n: s.exact for n, s in found.scores.items()} == {"base": 0, "adapter": 15}


def test_exact_match_asks_adapter_and_base(monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[list[str]] = []

    def noting(*given: Any, **more: Any) -> list[str]:
        own.append(generate_answers(*given, **more))
        return own[-1]

    monkeypatch.setattr("veneer.training.scores.generate_answers", noting)
    model = adapted()
    compare(model, TOKENIZER, known(RECORDS[:3]))
    prompts = [prompt_ids(record["prompt"], TOKENIZER) for record in RECORDS[:3]]
    assert own[0] == generate_answers(tiny_model(), TOKENIZER, prompts, max_new_tokens=3)
    assert own[1] == generate_answers(model, TOKENIZER, prompts, max_new_tokens=3) != own[0]


def test_every_adapter_gets_its_own_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    right = {"__base__": 1, "default": 2, "other": 3}

    def answering(model: Any, tokenizer: Any, prompts: Any, adapter_names: list[str], **more: Any) -> Any:
        counts = {name: iter(range(9)) for name in right}
        return ["a" if next(counts[name]) < right[name] else "b" for name in adapter_names]

    monkeypatch.setattr("veneer.training.scores.generate_answers", answering)
    records = known([{"prompt": str(number), "completion": "a"} for number in range(4)])
    found = compare(model, TOKENIZER, records, labels={"default": "first", "other": "second"})
    assert {name: score.exact for name, score in {**found.scores, **found.adapters}.items()} == {
        "base": 1, "first": 2, "second": 3
    }  # fmt: skip
    assert [row[0] for row in found.table()] == ["", "base", "first", "second"]


def test_the_last_answer_of_a_conversation_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    record = {"messages": [*turns, {"role": "assistant", "content": " d "}]}
    seen: list[Any] = []

    def answering(model: Any, tokenizer: Any, prompts: Any, **more: Any) -> list[str]:
        seen.append((prompts, more["sampling"].max_new_tokens))
        return ["d\n"]

    monkeypatch.setattr("veneer.training.scores.generate_answers", answering)
    found = compare(adapted(), TOKENIZER, known([record]))
    assert seen == [([prompt_ids(turns, TOKENIZER)], 2)] * 2
    assert [score.exact for score in found.scores.values()] == [1, 1]
    assert found.table()[3] == ("exact match", "1/1 (100.0%)", "1/1 (100.0%)")


def test_plain_text_has_no_exact_match() -> None:
    found = compare(adapted(), TOKENIZER, known([{"text": "Once upon a time"}]))
    assert found.asked is None and found.scores["adapter"].exact is None
    told = json.loads(json.dumps(found.as_json()))
    assert told["adapter"].keys() == {"loss", "perplexity"} and "notes" not in told


def test_perplexities_beyond_floats() -> None:
    assert perplexity_of(0) == 1 and perplexity_of(1e4) is None
    table = Comparison({"base": Score(20.0, math.exp(20.0)), "adapter": Score(1e4)}, 1).table()
    assert table[2] == ("perplexity", "4.85e+08", "too large")


def classifier() -> Any:
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels, config.pad_token_id = 3, 0
    return LlamaForSequenceClassification(config).eval()


def test_accuracy_of_a_classifier() -> None:
    model = classifier()
    texts = ["one", "two two", "3", "four four four", "5"]
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([TOKENIZER(t)["input_ids"]])).logits for t in texts])
    names = ["a", "b", "c"]
    right = [names[int(n)] for n in logits.argmax(-1)]
    wrong = [*right[:3], *(names[(names.index(name) + 1) % 3] for name in right[3:])]
    records = known([{"text": t, "label": n} for t, n in zip(texts, wrong, strict=True)], "classification")
    found = accuracy(model, TOKENIZER, records, names, batch_size=2)
    score = found.scores["model"]
    assert (score.correct, found.examples, len(found.scores)) == (3, 5, 1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([names.index(n) for n in wrong]))
    assert_close(torch.tensor(score.loss), expected)
    assert found.commonest == max(wrong.count(n) for n in names) / 5
    assert found.table()[1] == ("accuracy", f"{found.commonest:.1%}", "3/5 (60.0%)")
    with pytest.raises(DataError, match="label 'd' is no class"):
        accuracy(model, TOKENIZER, known([{"text": "a", "label": "d"}], "classification"), names)


def test_nothing_is_left_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compare(adapted(), TOKENIZER, known(RECORDS[:2]))
    assert not list(tmp_path.iterdir())

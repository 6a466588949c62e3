"""Adapters evaluated by lm-evaluation-harness together, and merged one by one: for `make other-trainers`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch

import veneer.integrations.lm_eval  # noqa: F401  registers the model
from tests.tolerances import assert_close
from tests.unit.training.tiny import saved_tiny, tiny_model, tiny_tokenizer
from veneer import LoraConfig, PeftModel, get_peft_model

BASE = "__base__"


def tasks(place: Path) -> list[dict[str, Any]]:
    """One task of each kind of request."""
    rows = [{"q": f"Double {n}.", "choices": [str(2 * n), str(n)], "answer": 0} for n in range(10, 22)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(place / "rows.jsonl")}}}
    made = {
        "multiple_choice": {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
        "generate_until": {"generation_kwargs": {"until": ["."], "max_gen_toks": 5}},
        "loglikelihood_rolling": {"doc_to_text": "", "doc_to_target": "{{q}}"},
    }
    metrics = dict(zip(made, ("acc", "exact_match", "word_perplexity"), strict=True))
    return [
        {
            "task": kind,
            "output_type": kind,
            "test_split": "test",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": metrics[kind]}],
            **data,
            **own,
        }
        for kind, own in made.items()
    ]


def answers(place: Path, model: str, **arguments: str) -> dict[str, list[Any]]:
    found = lm_eval.simple_evaluate(
        model, arguments, tasks=tasks(place), batch_size=4, device="cpu", log_samples=True, bootstrap_iters=0
    )
    return {
        task: [one for sample in samples for one in sample["resps"]]
        for task, samples in found["samples"].items()
    }


def numbers(responses: list[Any]) -> torch.Tensor:
    return torch.tensor([float(one[0] if isinstance(one, tuple) else one) for (one,) in responses])


def main(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    base, adapters, seen = saved_tiny(place / "base"), [BASE], set()
    for r in (2, 5):
        torch.manual_seed(r)
        config = LoraConfig(r=r, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        get_peft_model(tiny_model(), config).save_pretrained(place / str(r))
        adapters.append(str(place / str(r)))
    for adapter in adapters:
        given = {"pretrained": str(base), "adapters": ";".join(adapters), "adapter": adapter}
        together, merged = answers(place, "veneer", **given), tiny_model()
        if adapter != BASE:
            merged = PeftModel.from_pretrained(merged, adapter).merge_and_unload()
        merged.save_pretrained(place / "alone")
        tiny_tokenizer().save_pretrained(place / "alone")
        alone = answers(place, "hf", pretrained=str(place / "alone"))
        assert together.pop("generate_until") == alone.pop("generate_until")
        for task, responses in together.items():
            assert_close(numbers(responses), numbers(alone[task]))
        seen.add(str(together))
    assert len(seen) == len(adapters)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

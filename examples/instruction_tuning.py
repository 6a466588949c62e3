"""Instruction tuning: SmolLM2-135M learns to answer with strict JSON, through TRL's SFTTrainer.

Base, LoRA and full fine-tuning side by side. The mails are those of the demo, cut to their ``Date``
and ``From`` lines; no sender is in both training and held-out mails.
"""

from __future__ import annotations

import json
from typing import Any

import data
import torch
from datasets import Dataset
from side_by_side import QUIET, Study, quiet, run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from veneer import LoraConfig, TaskType, get_peft_model

LORA = "LoRA, r=16"
RATES = {LORA: 2e-3, "full fine-tuning": 2e-4}
BATCH, STEPS = 4, 10
INSTRUCTION = "Turn this into JSON with the keys date (YYYY-MM-DD) and domain (of the sender)."


def conversation(mail: dict[str, Any]) -> dict[str, Any]:
    """A mail as TRL's prompt and completion."""
    lines = [line for line in mail["header"].splitlines() if line.startswith(("Date:", "From:"))]
    answer = {name: mail["answer"][name] for name in ("date", "domain")}
    return {
        "prompt": [{"role": "user", "content": "\n".join([INSTRUCTION, *lines])}],
        "completion": [{"role": "assistant", "content": json.dumps(answer)}],
    }


def main() -> int:
    study = Study(__doc__)
    place = data.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
    parts = {name: [conversation(mail) for mail in part] for name, part in data.headers().items()}
    heldout = parts["heldout"][: 4 if study.short else 32]
    train_set = Dataset.from_list(parts["train"])

    def build(method: str) -> Any:
        # Small updates are lost in weights of 16 bits: they are trained in 32, and computed with in 16.
        whole = method == "full fine-tuning"
        model = AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32 if whole else data.fast_dtype()
        )
        if method == LORA:
            config = LoraConfig(
                r=16, lora_alpha=16, target_modules="all-linear", task_type=TaskType.CAUSAL_LM
            )
            return get_peft_model(model, config)
        return model.requires_grad_(whole)

    def train(model: Any, method: str, seed: int) -> None:
        arguments = SFTConfig(
            str(study.out),
            max_steps=5 if study.short else STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=RATES[method],
            lr_scheduler_type="cosine",
            warmup_steps=2,
            activation_checkpointing=False,
            bf16=method == "full fine-tuning" and data.fast_dtype() is torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **QUIET,
        )
        quiet(SFTTrainer(model, arguments, train_dataset=train_set, processing_class=tokenizer)).train()

    @torch.no_grad()
    def score(model: Any) -> dict[str, float]:
        model = model.to(data.fast_dtype()).eval()
        prompts = [
            tokenizer.apply_chat_template(mail["prompt"], tokenize=False, add_generation_prompt=True)
            for mail in heldout
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        made = model.generate(
            **batch, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        answers = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [mail["completion"][0]["content"] for mail in heldout]
        study.extra.setdefault("first answers", []).append(answers[0])
        return {
            "% exact": 100 * sum(a.strip() == r for a, r in zip(answers, right, strict=True)) / len(right),
            "% JSON with both keys": 100 * sum(map(well_formed, answers)) / len(right),
        }

    study.compare(["base", *RATES][: 2 if study.short else 3], build, train, score, once=("base",))
    counted = "% JSON with both keys" if study.short else "% exact"
    study.claim(f"LoRA has more {counted} than the base, with every seed",
                study.lowest(LORA, counted) > study.highest("base", counted))  # fmt: skip
    if not study.short:
        study.claim("LoRA answers at least half of the held-out mails exactly", study.median(LORA) >= 50)
    study.show(f"{len(heldout)} held-out mails. The first is\n\n{heldout[0]['prompt'][0]['content']}\n")
    study.show(f"and the base answers\n\n{study.extra['first answers'][0]}\n")
    study.show(f"and with the adapter\n\n{study.extra['first answers'][1]}\n")
    study.picture()
    return study.finish()


def well_formed(answer: str) -> bool:
    """Whether an answer is a JSON object with the two keys, and nothing else."""
    try:
        found = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and set(found) == {"date", "domain"}


if __name__ == "__main__":
    run(main)

"""Sequence to sequence: a small T5 that turns English into German learns Dutch through an adapter.

No pretrained T5 is available as a package, so this one starts from random weights and is first trained in
full on Django's German messages: its translations are poor. The example compares base, LoRA and full fine-
tuning, and shows that transformers' Seq2SeqTrainer and ``generate`` work with an adapter. The messages come
from Django's translations (``make examples-data``).
"""

from __future__ import annotations

import copy
import random
from typing import Any

import data
import torch
from side_by_side import QUIET, Study, quiet, run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from veneer import LoraConfig, TaskType, get_peft_model

LORA = "LoRA, r=16"
RATES = {LORA: 1e-2, "full fine-tuning": 3e-3}
#: Longest message, in characters and in tokens.
CHARACTERS, TOKENS = 60, 32


def messages(language: str, held: dict[str, set[str]]) -> dict[str, list[tuple[str, str]]]:
    """Short pairs, split by their English text: what is held out of one language is held out of all."""
    pairs = [pair for pair in data.translations(language) if len(pair[0]) <= CHARACTERS]
    parts = {part: [pair for pair in pairs if pair[0] in texts] for part, texts in held.items()}
    return {"train": [pair for pair in pairs if pair[0] not in set().union(*held.values())], **parts}


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A vocabulary of 1,000 pieces, from the training messages only."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")


def main() -> int:
    study = Study(__doc__, validation=True)
    english = sorted({pair[0] for pair in data.translations("de")})
    fifth = len(english) // 5
    held = random.Random(0).sample(english, 2 * fifth)
    held = {"validation": set(held[:fifth]), "test": set(held[fifth:])}
    german, dutch = messages("de", held), messages("nl", held)
    tokenizer = make_tokenizer([text for part in (german, dutch) for pair in part["train"] for text in pair])

    def rows(pairs: list[tuple[str, str]]) -> list[dict[str, list[int]]]:
        return [
            {
                "input_ids": tokenizer(source, truncation=True, max_length=TOKENS)["input_ids"],
                "labels": tokenizer(target, truncation=True, max_length=TOKENS)["input_ids"],
            }
            for source, target in pairs
        ]

    collate = DataCollatorForSeq2Seq(tokenizer)

    def fit(model: Any, pairs: list[tuple[str, str]], steps: int, rate: float, seed: int) -> None:
        arguments = Seq2SeqTrainingArguments(
            study.out,
            max_steps=steps,
            per_device_train_batch_size=32,
            learning_rate=rate,
            warmup_steps=0.1,
            seed=seed,
            **QUIET,
        )
        quiet(Seq2SeqTrainer(model, arguments, collate, rows(pairs))).train()

    torch.manual_seed(0)
    base = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=128,
            d_kv=32,
            num_heads=4,
            d_ff=512,
            num_layers=2,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )
    fit(base, german["train"], 30 if study.short else 300, 3e-3, seed=0)

    def build(method: str) -> Any:
        model = copy.deepcopy(base)
        if method == LORA:
            config = LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type=TaskType.SEQ_2_SEQ_LM
            )
            return get_peft_model(model, config)
        return model.requires_grad_(method != "base")

    def train(model: Any, method: str, seed: int) -> None:
        fit(model, dutch["train"], 30 if study.short else 100, RATES[method], seed)

    @torch.no_grad()
    def score(model: Any, pairs: list[tuple[str, str]] | None = None) -> dict[str, float]:
        batch = collate(rows(pairs or dutch[study.part]))
        logits = model.eval()(**batch).logits
        asked = batch["labels"] != -100
        right = (logits.argmax(-1) == batch["labels"])[asked].float().mean().item()
        loss = torch.nn.functional.cross_entropy(logits[asked], batch["labels"][asked]).item()
        return {"% of next tokens right": 100 * right, "loss": loss}

    study.show(
        f"Trained whole on {len(german['train'])} German messages, the base guesses "
        f"{score(base, german[study.part])['% of next tokens right']:.1f} % of the tokens of "
        f"{len(german[study.part])} others.\nDutch: {len(dutch['train'])} messages, "
        f"{len(dutch[study.part])} held out.\n"
    )
    study.compare(["base", *RATES], build, train, score, once=("base",))
    study.claim(
        "LoRA guesses more Dutch tokens than the base, with every seed",
        study.lowest(LORA) > study.highest("base"),
    )

    # One more adapter, asked: with it Dutch comes out, without it German.
    torch.manual_seed(0)
    model = build(LORA)
    train(model, LORA, 0)
    ask = tokenizer([pair[0] for pair in dutch["train"][:4]], return_tensors="pt", padding=True)
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    with_it = tokenizer.batch_decode(model.generate(**ask, **options), skip_special_tokens=True)
    with model.disable_adapter():
        without = tokenizer.batch_decode(model.generate(**ask, **options), skip_special_tokens=True)
    for (source, _), new, old in zip(dutch["train"][:4], with_it, without, strict=True):
        study.show(f"of the training set, {source!r}: with the adapter {new!r}, without {old!r}")
    study.extra["messages of the training set, generated"] = {"adapter": with_it, "base": without}
    untouched = tokenizer.batch_decode(base.generate(**ask, **options), skip_special_tokens=True)
    study.claim("with the adapter disabled, generate says what the base says", without == untouched)
    study.picture()
    return study.finish()


if __name__ == "__main__":
    run(main)

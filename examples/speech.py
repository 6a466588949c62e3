"""Speech to text: Whisper tiny learns to listen through a window of three seconds instead of thirty.

Whisper pads its input to thirty seconds, so a prompt of two seconds costs as much as thirty. A shorter window
is cheaper, but the model was never trained with one. ``python examples/speech.py`` measures the word error
rate on spoken prompts of a telephone exchange with both windows, and repairs the short one by LoRA and by
full fine-tuning; no text is in both training and test. It exits with 1 unless LoRA brings the short window's
errors below a tenth of what they were.
"""

from __future__ import annotations

import random
import re

import torch
from data import Prompt, spoken_prompts
from side_by_side import Study, run
from torch import nn
from torch.nn import functional as F
from transformers import WhisperFeatureExtractor, logging
from whisper_tiny import END, NO_TIMES, PLACES, whisper_tiny, whisper_tokenizer

from veneer import LoraConfig, get_peft_model

WINDOW, BATCH = 3, 8
LEARNING_RATE = {"LoRA": 2e-3, "full": 3e-5}
TOKENIZER = whisper_tokenizer()
logging.set_verbosity_error()  # Whisper's generate passes options that it itself calls deprecated


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without punctuation."""
    return re.findall(r"[a-z0-9']+", text.lower())


def word_errors(said: list[str], heard: list[str]) -> int:
    """The edit distance in words: insertions, deletions and substitutions."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def features(prompts: list[Prompt], window: int) -> torch.Tensor:
    """Log-mel spectrograms (n, 80, 100 · window) of sounds brought to 16 kHz and padded to the window."""
    extract = WhisperFeatureExtractor(feature_size=80, chunk_length=window)
    sounds = [
        F.interpolate(p.samples[None, None], scale_factor=16000 / p.rate, mode="linear")[0, 0]
        for p in prompts
    ]
    return extract([s.numpy() for s in sounds], sampling_rate=16000, return_tensors="pt").input_features


def labels_of(prompts: list[Prompt]) -> torch.Tensor:
    """Labels (n, longest): the token for no timestamps, the text, the end; then -100."""
    rows = [torch.tensor([NO_TIMES, *TOKENIZER(" " + p.text).input_ids, END]) for p in prompts]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def split(validation: int, test: int) -> dict[str, list[Prompt]]:
    """Prompts of three words or more that fit into the window; no text is in two parts."""
    fitting = [p for p in spoken_prompts() if len(words(p.text)) >= 3 and len(p.samples) <= WINDOW * p.rate]
    texts = sorted({" ".join(words(p.text)) for p in fitting})
    random.Random(0).shuffle(texts)
    ends = {"validation": validation, "test": validation + test, "train": len(texts)}
    parts: dict[str, list[Prompt]] = {part: [] for part in ends}
    for prompt in fitting:
        place = texts.index(" ".join(words(prompt.text)))
        parts[next(part for part, end in ends.items() if place < end)].append(prompt)
    return parts


def build(method: str) -> nn.Module:
    model = whisper_tiny(30 if method.endswith("30 s") else WINDOW)
    if method != "LoRA":
        return model.requires_grad_(method == "full")
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
        task_type="SEQ_2_SEQ_LM",
    )
    return get_peft_model(model, config)


def main() -> int:
    study = Study(__doc__, validation=True)
    parts = split(8, 8) if study.short else split(48, 32)
    train_prompts, test_prompts = parts["train"], parts[study.part]
    steps = 8 if study.short else 24
    heard = features(train_prompts, WINDOW)
    study.show(f"{len(train_prompts)} prompts to train on, {len(test_prompts)} held out")

    def train(model: nn.Module, method: str, seed: int) -> None:
        model.train()
        rate = LEARNING_RATE[method]
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
        for _ in range(steps):
            rows = torch.randperm(len(train_prompts))[:BATCH].tolist()
            labels = labels_of([train_prompts[row] for row in rows])
            loss = model(input_features=heard[rows], labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()

    examples: dict[str, list[str]] = {}

    def score(model: nn.Module) -> dict[str, float]:
        model.eval()
        window = model.config.max_source_positions // PLACES
        spoken = features(test_prompts, window)
        texts: list[str] = []
        for part in spoken.split(20):
            with torch.no_grad():
                tokens = model.generate(input_features=part, max_new_tokens=24)
            texts += TOKENIZER.batch_decode(tokens, skip_special_tokens=True)
        examples["latest"] = texts
        wrong = sum(word_errors(words(p.text), words(t)) for p, t in zip(test_prompts, texts, strict=True))
        return {"word errors in %": 100 * wrong / sum(len(words(p.text)) for p in test_prompts)}

    for method in ("base, 30 s", "base, 3 s", "LoRA", *(() if study.short else ("full",))):
        study.compare([method], build, train, score, once=("base, 30 s", "base, 3 s"))
        examples[method] = examples.pop("latest")
    for row in range(3):
        study.show(f"said: {test_prompts[row].text}")
        for method, texts in examples.items():
            study.show(f"  {method:12}{texts[row].strip()}")
    study.extra["heard"] = {"said": [p.text for p in test_prompts], **examples}
    name, part = ("a half", 2) if study.short else ("a tenth", 10)
    fell = study.highest("LoRA") < study.median("base, 3 s") / part
    study.claim(f"LoRA brings the short window's word errors below {name}", fell)
    study.picture()
    return study.finish()


if __name__ == "__main__":
    run(main)

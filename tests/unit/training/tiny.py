"""A causal language model and a tokenizer that are made in a moment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from veneer.training.progress import Silent

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


class Told(Silent):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def tiny_tokenizer(template: str | None = TEMPLATE) -> Any:
    """One token a byte, and the chat marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(SPECIAL + letters)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(seed: int = 0) -> Any:
    """A Llama of two layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def saved_tiny(place: Path, seed: int = 0) -> Path:
    """The model and the tokenizer in a directory, as transformers writes them."""
    tiny_model(seed).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


RECORDS = [{"prompt": f"Double {n}.", "completion": f"{2 * n}"} for n in range(10, 26)]


def saved_records(place: Path) -> Path:
    """RECORDS as a JSONL file."""
    place.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    return place

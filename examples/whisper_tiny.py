"""Whisper tiny.en from the files that ``make examples-data`` fetches."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from data import folder
from transformers import GenerationConfig, PreTrainedTokenizerFast, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

END, START, NO_TIMES = 50256, 50257, 50362
#: Whisper's encoder has fifty places for every second of sound.
PLACES = 50


def whisper_tiny(window: int) -> Whisper:
    """Whisper tiny.en that listens to `window` seconds (30 at most)."""
    where = folder("whisper-tiny-en")
    weights = _named(_read(where / "model.bin"))
    positions = "model.encoder.embed_positions.weight"
    weights[positions] = weights[positions][: window * PLACES]
    config = WhisperConfig(
        vocab_size=51864,
        encoder_layers=4,
        decoder_layers=4,
        max_source_positions=window * PLACES,
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = Whisper(config)
    model.load_state_dict(weights)
    ids = json.loads((where / "config.json").read_text())
    model.generation_config = GenerationConfig(
        decoder_start_token_id=START,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        suppress_tokens=ids["suppress_ids"],
        begin_suppress_tokens=ids["suppress_ids_begin"],
        is_multilingual=False,
        no_timestamps_token_id=NO_TIMES,
    )
    return model


def whisper_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokenizer; text comes out of it without special tokens around it."""
    file = str(folder("whisper-tiny-en") / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The half-precision tensors of a CTranslate2 file of version 6, by their names there."""
    content, at = path.read_bytes(), 0

    def take(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(f"<{form}", content, at)
        at += struct.calcsize(form)
        return int(value)

    def take_bytes(count: int) -> bytes:
        nonlocal at
        at += count
        return content[at - count : at]

    assert take("I") == 6
    take_bytes(take("H")), take("I")  # the model's kind and its revision
    found = {}
    for _ in range(take("I")):
        name = take_bytes(take("H"))[:-1].decode()
        shape = [take("I") for _ in range(take("B"))]
        is_half = take("B") == 4
        raw = take_bytes(take("I"))
        if is_half:
            found[name] = torch.frombuffer(bytearray(raw), dtype=torch.float16).view(shape).float()
    return found


def _named(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors by the names of transformers; joined projections are taken apart."""
    weights = {"proj_out.weight": found["decoder/embeddings/weight"]}
    for name, tensor in found.items():
        stack, *rest = name.split("/")
        path, last = "/".join(rest[:-1]), rest[-1]
        last = {"gamma": "weight", "beta": "bias", "encodings": "weight"}.get(last, last)
        layer, _, inner = path.partition("/")
        number = layer.removeprefix("layer_")
        if not number.isdigit():
            inner, number = path, ""
        prefix = f"model.{stack}." + (f"layers.{number}." if number else "")
        for target, part in _targets(inner, tensor):
            if not (
                target.endswith("k_proj") and last == "bias"
            ):  # Whisper's keys have none; these are zeros
                weights[f"{prefix}{target}.{last}"] = part
    return weights


def _targets(inner: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    plain = {
        "embeddings": "embed_tokens",
        "position_encodings": "embed_positions",
        "ffn/layer_norm": "final_layer_norm",
        "ffn/linear_0": "fc1",
        "ffn/linear_1": "fc2",
        "self_attention/layer_norm": "self_attn_layer_norm",
        "self_attention/linear_1": "self_attn.out_proj",
        "attention/layer_norm": "encoder_attn_layer_norm",
        "attention/linear_0": "encoder_attn.q_proj",
        "attention/linear_2": "encoder_attn.out_proj",
    }
    joined = {
        "self_attention/linear_0": [f"self_attn.{kind}_proj" for kind in "qkv"],
        "attention/linear_1": [f"encoder_attn.{kind}_proj" for kind in "kv"],
    }
    if inner in joined:
        return list(zip(joined[inner], tensor.chunk(len(joined[inner])), strict=True))
    return [(plain.get(inner, inner), tensor)]

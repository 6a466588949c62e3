"""Models of transformers with a few thousand weights each, far from zero, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 23


def llama_config(**options: Any) -> LlamaConfig:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**given | options)


def gpt2_config(**options: Any) -> GPT2Config:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    # Two implementations drop different numbers; nothing here is about the base's own dropout.
    given |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return GPT2Config(**given | options)


def bert_config(**options: Any) -> BertConfig:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
        "num_labels": 3,
        "pad_token_id": 0,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**given | options)


def t5_config(**options: Any) -> T5Config:
    given: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "dropout_rate": 0.0,
    }
    return T5Config(**given | options)


def ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length))


def one_text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def two_texts() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 4)}


@dataclass(frozen=True)
class Tiny:
    """A model, its inputs, its labels for training, and the task it is for."""

    build: Callable[[], nn.Module]
    task: str
    labels: Callable[[], dict[str, Tensor]]
    inputs: Callable[[], dict[str, Tensor]] = one_text


def _of(kind: Any, config: Callable[..., Any], **options: Any) -> Callable[[], nn.Module]:
    return lambda: kind(config(**options))


def _classes() -> dict[str, Tensor]:
    return {"labels": torch.randint(0, 3, (2,))}


def _class_per_token() -> dict[str, Tensor]:
    return {"labels": torch.randint(0, 3, (2, 7))}


def _spans() -> dict[str, Tensor]:
    return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 6])}


def _words() -> dict[str, Tensor]:
    return {"labels": ids()}


TINY: dict[str, Tiny] = {
    "llama": Tiny(_of(LlamaForCausalLM, llama_config), "CAUSAL_LM", _words),
    "gpt2": Tiny(_of(GPT2LMHeadModel, gpt2_config), "CAUSAL_LM", _words),
    "t5": Tiny(
        _of(T5ForConditionalGeneration, t5_config), "SEQ_2_SEQ_LM", lambda: {"labels": ids(2, 4)}, two_texts
    ),
    "bert_classifier": Tiny(_of(BertForSequenceClassification, bert_config), "SEQ_CLS", _classes),
    "bert_tokens": Tiny(_of(BertForTokenClassification, bert_config), "TOKEN_CLS", _class_per_token),
    "bert_answers": Tiny(_of(BertForQuestionAnswering, bert_config, num_labels=2), "QUESTION_ANS", _spans),
    "bert_features": Tiny(_of(BertModel, bert_config), "FEATURE_EXTRACTION", dict),
    "llama_score": Tiny(_of(LlamaForSequenceClassification, llama_config, num_labels=3), "SEQ_CLS", _classes),
    "llama_tokens": Tiny(
        _of(LlamaForTokenClassification, llama_config, num_labels=3), "TOKEN_CLS", _class_per_token
    ),
    "llama_answers": Tiny(_of(LlamaForQuestionAnswering, llama_config, num_labels=2), "QUESTION_ANS", _spans),
    "gpt2_score": Tiny(_of(GPT2ForSequenceClassification, gpt2_config, num_labels=3), "SEQ_CLS", _classes),
}

"""A small model of each task with a batch to train on; imported in fresh processes by path, as `tiny` is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import X, classifier, llama


def bert(kind: str) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return getattr(transformers, kind)(config).eval()


def question_answering() -> Any:
    """Its head says where an answer begins and ends: two labels."""
    model = bert("BertForQuestionAnswering")
    model.config.num_labels = 2
    model.qa_outputs = torch.nn.Linear(16, 2)
    return model


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return transformers.T5ForConditionalGeneration(config).eval()


#: By task_type: the model, what to adapt, the batch, the output that is compared, the head.
TASKS: dict[str, tuple[Any, list[str], dict[str, Any], str, str | None]] = {
    "CAUSAL_LM": (llama, ["q_proj", "down_proj"], {"input_ids": X, "labels": X}, "logits", None),
    "SEQ_2_SEQ_LM": (t5, ["q", "wo"], {"input_ids": X, "labels": X}, "logits", None),
    "SEQ_CLS": (
        classifier,
        ["query", "value"],
        {"input_ids": X, "labels": torch.tensor([0, 2])},
        "logits",
        "classifier",
    ),
    "TOKEN_CLS": (
        lambda: bert("BertForTokenClassification"),
        ["query", "value"],
        {"input_ids": X, "labels": X % 3},
        "logits",
        "classifier",
    ),
    "QUESTION_ANS": (
        question_answering,
        ["query", "value"],
        {"input_ids": X, "start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        "start_logits",
        "qa_outputs",
    ),
    "FEATURE_EXTRACTION": (
        lambda: bert("BertModel"),
        ["query", "value"],
        {"input_ids": X},
        "last_hidden_state",
        None,
    ),
}


def tokenizer() -> Any:
    """Words of two letters, one for each row of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<unk>", "<s>", "</s>"]
    words += [a + b for a in "abcdefg" for b in "abcdefg"][: 50 - len(words)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", cls_token="<s>", sep_token="</s>"
    )


def adapters_of(place: Path) -> None:
    """Train one adapter a task for a few steps, and save bases and adapters below `place`."""
    from veneer import LoraConfig, get_peft_model

    for task, (make, targets, batch, wanted, _) in TASKS.items():
        base = make()
        base.save_pretrained(place / task / "base")
        base = type(base).from_pretrained(place / task / "base")
        model = get_peft_model(base, LoraConfig(task_type=task, r=3, lora_alpha=12, target_modules=targets))
        assert type(model).task.value == task, type(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        model.train()
        losses = []
        for _ in range(3):
            output = model(**batch)
            # Of a few features: the mean square of all of them is what the last norm makes it.
            loss = output.loss if "loss" in output else output[wanted][..., :4].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0], (task, losses)
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == trained, (task, moved ^ trained)
        model.eval()
        model.save_pretrained(place / task / "adapter")
        torch.save(output_of(model, task), place / task / "output.pt")


@torch.no_grad()
def output_of(model: Any, task: str) -> torch.Tensor:
    _, _, batch, wanted, _ = TASKS[task]
    given: torch.Tensor = model(**batch)[wanted]
    return given

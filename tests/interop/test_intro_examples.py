"""The field's introductory examples, run as they stand but for the import."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
)

import veneer
from veneer import (
    AutoPeftModelForCausalLM,
    LoftQConfig,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSeq2SeqLM,
    TaskType,
    get_peft_model,
    inject_adapter_in_model,
)

TINY_GPT2 = GPT2Config(
    vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)
#: bigscience/mt0-large is an mt5-large by its configuration.
MT0_LARGE = MT5Config(
    vocab_size=250112,
    d_model=1024,
    d_kv=64,
    d_ff=2816,
    num_layers=24,
    num_decoder_layers=24,
    num_heads=16,
    feed_forward_proj="gated-gelu",
)
TINY_MT5 = MT5Config(
    vocab_size=60, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=4
)


def printed(model: PeftModel, capsys: pytest.CaptureFixture[str]) -> str:
    model.print_trainable_parameters()
    return capsys.readouterr().out


# --- a default LoraConfig on GPT-2


def test_default_config_on_gpt2_prints_the_known_line(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    model = get_peft_model(model, LoraConfig())
    assert printed(model, capsys) == (
        "trainable params: 294,912 || all params: 124,734,720 || trainable%: 0.23643136409814364\n"
    )


def test_default_config_on_gpt2_trains(capsys: pytest.CaptureFixture[str]) -> None:
    base = GPT2LMHeadModel(TINY_GPT2)
    frozen = copy.deepcopy(base.state_dict())
    model = get_peft_model(base, LoraConfig())
    assert type(model) is PeftModel
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted == {f"base_model.model.transformer.h.{i}.attn.c_attn" for i in range(2)}

    ids = torch.randint(50, (4, 12))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.unload().state_dict()
    assert frozen.keys() == after.keys()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)


# --- SEQ_2_SEQ_LM on an mT5


def seq2seq_config() -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )


def test_mt0_large_has_the_known_number_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        base = MT5ForConditionalGeneration(MT0_LARGE)
    base.tie_weights()
    tied = get_peft_model(base, seq2seq_config())
    assert type(tied) is PeftModelForSeq2SeqLM
    assert tied.get_nb_trainable_parameters() == (2_359_296, 975_825_920)

    base.lm_head.weight = nn.Parameter(torch.empty_like(base.lm_head.weight), requires_grad=False)
    assert tied.get_nb_trainable_parameters() == (2_359_296, 1_231_940_608)
    assert printed(tied, capsys).startswith("trainable params: 2,359,296 || all params: 1,231,940,608 || ")


def test_seq2seq_on_a_small_mt5_trains_saves_and_generates(tmp_path: Path) -> None:
    base = MT5ForConditionalGeneration(TINY_MT5)
    untouched = copy.deepcopy(base)
    model = get_peft_model(base, seq2seq_config())
    ids, labels = torch.randint(2, 60, (4, 6)), torch.randint(2, 60, (4, 5))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(5):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path / "output_dir")
    written = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert written.shape[0] == 4

    again = PeftModel.from_pretrained(untouched, tmp_path / "output_dir")
    with torch.no_grad():
        assert torch.equal(
            again(input_ids=ids, labels=labels).logits, model(input_ids=ids, labels=labels).logits
        )
    assert torch.equal(again.generate(ids, max_new_tokens=5, do_sample=False), written)


# --- inject_adapter_in_model


class DummyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 10)
        self.linear = nn.Linear(10, 10)
        self.lm_head = nn.Linear(10, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        x = self.linear(x)
        x = self.lm_head(x)
        return x


def test_inject_adapter_in_model() -> None:
    lora_config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", target_modules=["linear"])
    base = DummyModel()
    head, embedding, linear = base.lm_head, base.embedding, base.linear
    dummy_inputs = torch.LongTensor([[0, 1, 2, 3, 4, 5, 6, 7]])
    before = base(dummy_inputs)

    model = inject_adapter_in_model(lora_config, base)
    dummy_outputs = model(dummy_inputs)

    assert model is base
    assert torch.equal(dummy_outputs, before)  # B is zero
    assert model.lm_head is head
    assert model.embedding is embedding
    assert model.linear.base_layer is linear
    assert model.linear.lora_A["default"].weight.shape == (64, 10)  # a rank above the layer's size is legal
    assert model.linear.lora_B["default"].weight.shape == (10, 64)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "linear.lora_A.default.weight",
        "linear.lora_B.default.weight",
    ]
    dummy_outputs.sum().backward()
    assert model.linear.lora_B["default"].weight.grad.abs().sum() > 0
    assert set(veneer.get_peft_model_state_dict(model)) == {"linear.lora_A.weight", "linear.lora_B.weight"}


# --- LoftQ


def test_loftq() -> None:
    base = GPT2LMHeadModel(TINY_GPT2)
    weights = {n: p.detach().clone() for n, p in base.named_parameters() if "c_attn.weight" in n}
    loftq_config = LoftQConfig(loftq_bits=4)
    lora_config = LoraConfig(init_lora_weights="loftq", loftq_config=loftq_config, target_modules=["c_attn"])
    model = get_peft_model(base, lora_config)

    assert len(weights) == 2
    for name, original in weights.items():
        layer = model.get_submodule(f"base_model.model.{name.removesuffix('.weight')}")
        quantised = layer.base_layer.weight
        assert len(quantised.unique()) < len(original.unique()) / 2
        lost = (original - quantised).norm()
        assert (original - quantised - layer.get_delta_weight("default")).norm() < 0.9 * lost


# --- save, AutoPeftModelForCausalLM, generate, decode


@pytest.mark.model
def test_auto_class_generates_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    peft_model = get_peft_model(
        base, LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    peft_model.eval().save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(smollm2)

    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model.eval()
    inputs = tokenizer("Preheat the oven to 350 degrees and place the cookie dough", return_tensors="pt")
    outputs = model.generate(input_ids=inputs["input_ids"], max_new_tokens=10)
    text = tokenizer.batch_decode(outputs.detach().cpu().numpy(), skip_special_tokens=True)[0]

    assert type(model) is PeftModelForCausalLM
    assert text.startswith("Preheat the oven to 350 degrees and place the cookie dough")
    assert inputs["input_ids"].shape[1] < outputs.shape[1] <= inputs["input_ids"].shape[1] + 10
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, peft_model(**inputs).logits)
        with model.disable_adapter():
            assert not torch.equal(model(**inputs).logits, peft_model(**inputs).logits)

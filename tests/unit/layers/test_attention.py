"""Attention in one module: what is refused, torch's fused kernels, and rows with different adapters."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

from tests.laws.cases import train
from tests.tolerances import assert_close
from veneer import LoraConfig, get_peft_model
from veneer.errors import TargetError


class Holder(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attn = attention
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        return self.last(self.attn(x, x, x, need_weights=False)[0])


class Changed(nn.MultiheadAttention):
    def forward(self, *args: Tensor, **kwargs: object) -> tuple[Tensor, Tensor | None]:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "options", "words"),
    [
        (nn.MultiheadAttention(8, 2, kdim=4), {}, "kdim or vdim"),
        (Changed(8, 2), {}, "a forward of its own"),
        (
            cpu_offload(
                nn.MultiheadAttention(8, 2),
                execution_device="cpu",
                preload_module_classes=["MultiheadAttention"],
            ),
            {},
            "offloaded",
        ),
        (nn.MultiheadAttention(8, 2), {"lora_bias": True}, "lora_bias"),
        (nn.MultiheadAttention(8, 2), {"use_dora": True}, "dora"),
        (nn.MultiheadAttention(8, 2), {"bias": "all"}, "bias='all'"),
    ],
)
def test_what_cannot_be_adapted_is_refused(
    attention: nn.MultiheadAttention, options: dict[str, object], words: str
) -> None:
    model = Holder(attention)
    with pytest.raises(TargetError, match=words):
        get_peft_model(model, LoraConfig(r=2, target_modules=["attn"], **options))
    assert type(model.attn) is type(attention) and type(attention.out_proj).__name__.startswith("NonDynamic")


def test_torchs_encoder_stays_out_of_its_fused_kernel() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = get_peft_model(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(),
        LoraConfig(r=2, lora_alpha=3, target_modules=["self_attn"]),
    )
    train(model, "default")
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 3:] = True
    with torch.no_grad():
        fast = model.eval()(x, src_key_padding_mask=padding)
        merged = model.merge_and_unload()(x, src_key_padding_mask=padding)
    slow = model.train()(x, src_key_padding_mask=padding)
    assert_close(fast[:, :3], slow.detach()[:, :3])
    assert_close(merged[:, :3], fast[:, :3])


def test_rows_of_a_batch_take_the_adapters_named_for_them() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Holder(nn.MultiheadAttention(8, 2, batch_first=True)).eval(),
        LoraConfig(r=2, lora_alpha=3, target_modules=["attn", "last"]),
        "a",
    )
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=4, target_modules=["attn"]))
    train(model, "a")
    train(model, "b", seed=4)
    x = torch.randn(3, 5, 8)
    together = model(x, adapter_names=["a", "__base__", "b"])
    alone = []
    for row, name in enumerate(["a", None, "b"]):
        if name is None:
            with model.disable_adapter():
                alone.append(model(x[row : row + 1]))
        else:
            model.set_adapter(name)
            alone.append(model(x[row : row + 1]))
    assert_close(together, torch.cat(alone))


def test_its_own_dropout_rests_while_the_base_is_in_evaluation() -> None:
    torch.manual_seed(0)
    holder = Holder(nn.MultiheadAttention(8, 2, dropout=0.5)).eval()
    model = get_peft_model(holder, LoraConfig(r=2, target_modules=["attn"]))
    train(model, "default")
    x = torch.randn(4, 3, 8)
    assert torch.equal(model(x), model(x))
    assert not torch.equal(model.train()(x), model(x))


def test_dropout_drops_the_input_of_the_branch() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        Holder(nn.MultiheadAttention(8, 2)),
        LoraConfig(r=2, lora_alpha=3, target_modules=["attn"], lora_dropout=0.5),
    )
    train(model, "default")
    x = torch.randn(4, 3, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))

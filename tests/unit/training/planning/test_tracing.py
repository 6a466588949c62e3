"""A step on the meta device against what torch's allocator hands out for a real one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from benchmarks.plan_memory import MARK, allocated
from tests.unit.training.tiny import tiny_model
from veneer import LoraConfig, get_peft_model
from veneer.training.losses import loss_sum
from veneer.training.planning import shadow
from veneer.training.planning.tracing import trace_step

ROWS, LENGTH = 3, 40


def adapted(model: Any, dropout: float = 0.0) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(model, config, low_cpu_mem_usage=next(model.parameters()).is_meta)
    model.get_base_model().config.use_cache = False
    return model.train()


def batch(device: str, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.ones(ROWS, LENGTH, dtype=torch.long, device=device)
    mask = torch.ones_like(ids)
    if padded and device != "meta":
        mask[0, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def measured(model: Any, padded: bool) -> int:
    """Bytes of the peak of a real forward and backward pass."""
    inputs = batch("cpu", padded)

    def step() -> None:
        total, count = loss_sum(model, {**inputs, "labels": inputs["input_ids"]})
        (total / count).backward()
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        torch.empty(MARK, dtype=torch.uint8)
        step()
    peak, standing = allocated(profiled, MARK)
    return peak - standing


@pytest.mark.parametrize(
    ("dtype", "checkpointing", "padded", "dropout"),
    [
        (torch.float32, False, False, 0.0),
        (torch.float32, False, True, 0.3),
        (torch.bfloat16, True, False, 0.0),
        (torch.bfloat16, True, True, 0.3),
    ],
    ids=str,
)
def test_the_peak_is_that_of_a_real_step(
    dtype: torch.dtype, checkpointing: bool, padded: bool, dropout: float
) -> None:
    base = tiny_model().to(dtype)
    model, empty = adapted(copy.deepcopy(base), dropout), adapted(shadow(base), dropout)
    for one in (model, empty):
        if checkpointing:
            one.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    real = measured(model, padded)
    trace = trace_step(empty, batch("meta", padded), padded=padded)
    assert 0.9 < trace.peak / real < 1.1
    assert trace.left == sum(-(-4 * p.numel() // 64) * 64 for p in model.parameters() if p.requires_grad)


def test_flops_are_those_of_the_products() -> None:
    torch.manual_seed(0)
    tokens, width, out, r = 6, 16, 24, 4

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(width, out, bias=False)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.fc(x)}

    model = get_peft_model(One().to("meta"), LoraConfig(r=r, target_modules=["fc"]), low_cpu_mem_usage=True)
    x = torch.empty(tokens, width, device="meta", requires_grad=True)
    trace = trace_step(model.train(), {"x": x})
    assert trace.forward_flops == 2 * tokens * width * out + 2 * tokens * r * (width + out)
    assert trace.flops == 4 * tokens * width * out + 6 * tokens * r * (width + out)


def test_attention_counts_half_of_the_scores_where_later_tokens_are_hidden() -> None:
    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8, device="meta"))

        def forward(self, x: torch.Tensor, causal: bool) -> dict[str, torch.Tensor]:
            q = x + self.shift
            return {"logits": nn.functional.scaled_dot_product_attention(q, q, q, is_causal=causal)}

    x = torch.empty(2, 3, 10, 8, device="meta")
    whole, half = (trace_step(Causal(), {"x": x, "causal": c}) for c in (False, True))  # type: ignore[dict-item]
    assert whole.forward_flops == 4 * 2 * 3 * 10 * 10 * 8 == 2 * half.forward_flops
    assert whole.flops == 14 * 2 * 3 * 10 * 10 * 8


class Attends(nn.Module):
    """Attention whose scores are 3 × 2 × 10 × 10, with something done in the midst of the forward."""

    def __init__(self, midst: Callable[[], object] = bool) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8, device="meta"))
        self.midst = midst

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.midst()
        q = x + self.shift
        return {"logits": nn.functional.scaled_dot_product_attention(q, q, q)}


HEADS = {"x": torch.empty(2, 3, 10, 8, device="meta")}


def test_torchs_attention_is_not_replaced() -> None:
    usual = nn.functional.scaled_dot_product_attention
    seen = []
    trace_step(Attends(lambda: seen.append(nn.functional.scaled_dot_product_attention)), HEADS)
    assert seen == [usual]


def test_other_tensors_get_torchs_attention() -> None:
    q = torch.randn(1, 1, 2, 4)
    expected = nn.functional.scaled_dot_product_attention(q, q, q)
    seen = []
    trace_step(Attends(lambda: seen.append(nn.functional.scaled_dot_product_attention(q, q, q))), HEADS)
    assert torch.equal(seen[0], expected)


def test_a_trace_inside_another_ends_alone() -> None:
    alone = trace_step(Attends(), HEADS)
    inner = []

    def fails() -> None:
        raise RuntimeError("no values")

    def midst() -> None:
        inner.append(trace_step(Attends(), HEADS))
        with pytest.raises(RuntimeError, match="no values"):
            trace_step(Attends(fails), HEADS)

    outer = trace_step(Attends(midst), HEADS)
    assert inner == [alone] and outer.forward_flops == alone.forward_flops
    assert trace_step(Attends(), HEADS) == alone


def test_threads_do_not_see_one_anothers_traces() -> None:
    """Two traces overlap, each ending after the other has begun; a third thread only computes."""
    alone = trace_step(Attends(), HEADS)
    met, computed = threading.Barrier(3, timeout=60), threading.Event()
    q = torch.zeros(1, 1, 2, 4, device="meta")

    def midst() -> None:
        met.wait()
        assert computed.wait(60)

    with ThreadPoolExecutor(2) as pool:
        traces = [pool.submit(trace_step, Attends(midst), HEADS) for _ in range(2)]
        met.wait()
        plain = nn.functional.scaled_dot_product_attention(q, q, q)
        computed.set()
        assert [trace.result() for trace in traces] == [alone, alone]
    assert plain.shape == q.shape
    assert trace_step(Attends(), HEADS) == alone


@pytest.mark.parametrize("checkpointing", [False, True])
def test_attention_inside_torchs_own_modules_and_in_the_backward_pass_is_met(checkpointing: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            def attend(x: torch.Tensor) -> torch.Tensor:
                return self.attention(x, x, x, need_weights=False)[0]

            return {"logits": checkpoint(attend, x, use_reentrant=False) if checkpointing else attend(x)}

    x = torch.empty(3, 50, 8, device="meta", requires_grad=True)
    trace = trace_step(Layer().to("meta").train(), {"x": x})
    products, scores = 3 * 50 * 8 * (24 + 8), 3 * 50 * 50 * 8
    assert trace.forward_flops == 2 * products + 4 * scores
    # The last product is not computed again: nothing of it was kept that is needed.
    again = trace.forward_flops - 2 * 3 * 50 * 8 * 8
    assert trace.flops == 6 * products + 14 * scores + checkpointing * again
    assert trace.activations < 3 * 2 * 50 * 50 * 4, "the scores are not kept"

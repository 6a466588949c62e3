"""aLoRA against the reference: where it acts, in forward, backward and generate, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import veneer
from tests.interop.reference import both, from_reference, randomise
from tests.interop.tiny import llama
from tests.tolerances import assert_close
from veneer.errors import MergeError, RoutingError, TargetError, VeneerWarning

INVOCATION = [7, 9]
#: Invoked twice (the last counts), at the very end, never, and by a half only.
IDS = torch.tensor(
    [[7, 9, 3, 7, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7, 9], [1, 2, 3, 4, 5, 6, 7, 8], [9, 7, 1, 7, 2, 9, 4, 7]]
)


def models(**options: Any) -> tuple[veneer.PeftModel, Any]:
    ours, theirs = both(
        llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "alora_invocation_tokens": INVOCATION,
            "task_type": "CAUSAL_LM",
        }
        | options,
    )
    theirs.load_state_dict(copy.deepcopy(randomise(ours).state_dict()))
    return ours, theirs


def test_outputs_gradients_and_what_comes_before_the_invocation() -> None:
    ours, theirs = models()
    grads = []
    for model in (ours, theirs):
        logits = model(input_ids=IDS).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"y": logits})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_close(grad, grads[1][name])
    logits = ours(IDS).logits
    with ours.disable_adapter():
        plain = ours(IDS).logits
    same = [[bool(torch.equal(a, b)) for a, b in zip(*rows, strict=True)] for rows in zip(logits, plain)]  # noqa: B905
    assert same == [[True] * 3 + [False] * 5, [True] * 6 + [False] * 2, [True] * 8, [True] * 8]


@pytest.mark.parametrize("cache", [True, False])
def test_generate(cache: bool) -> None:
    ours, theirs = models()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mine = ours.generate(input_ids=IDS, use_cache=cache, **options)
    # Without a cache the reference counts from the end of a text that grows; with one it is as ours.
    assert torch.equal(mine, theirs.generate(input_ids=IDS, use_cache=True, **options))
    assert torch.equal(
        ours.generate(IDS, num_beams=2, use_cache=cache, **options)[2], plain_beams(ours, options)
    )


def plain_beams(model: veneer.PeftModel, options: dict[str, Any]) -> Tensor:
    """What the base generates for the row that is not invoked."""
    with model.disable_adapter():
        return model.generate(IDS, num_beams=2, **options)[2]


def test_a_mixed_batch_with_a_lora_and_the_base() -> None:
    ours, _ = models()
    ours.add_adapter(
        "plain", veneer.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    )
    names = ["default", "plain", "__base__", "default"]
    rows = ours(IDS, adapter_names=names).logits
    for i, name in enumerate(names):
        if name == "__base__":
            with ours.disable_adapter():
                assert_close(rows[i], ours(IDS[i : i + 1]).logits[0])
        else:
            ours.set_adapter(name)
            assert_close(rows[i], ours(IDS[i : i + 1]).logits[0])


def test_files(tmp_path: Path) -> None:
    ours, _ = models()
    ours.save_pretrained(tmp_path)
    there = from_reference(llama(), tmp_path)
    assert there.peft_config["default"].alora_invocation_tokens == INVOCATION
    assert_close(there(input_ids=IDS).logits, ours(IDS).logits)


def test_offsets_of_ones_own_and_embeddings_without_a_text() -> None:
    ours, theirs = models()
    given = [3, None, 8, 1]
    assert_close(ours(IDS, alora_offsets=given).logits, theirs(input_ids=IDS, alora_offsets=given).logits)
    embeds = ours.get_input_embeddings()(IDS)
    with pytest.warns(VeneerWarning, match="what the base model does"):
        logits = ours(inputs_embeds=embeds).logits
    with ours.disable_adapter():
        assert torch.equal(logits, ours(inputs_embeds=embeds).logits)
    assert_close(
        ours(inputs_embeds=embeds, alora_offsets=given).logits, ours(IDS, alora_offsets=given).logits
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same(reentrant: bool) -> None:
    ours, _ = models()
    ours.enable_input_require_grads()
    ours(IDS).logits.square().mean().backward()
    expected = {n: p.grad.clone() for n, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    ours.train()
    ours(IDS, use_cache=False).logits.square().mean().backward()
    for name, grad in expected.items():
        assert_close(dict(ours.named_parameters())[name].grad, grad)


def test_a_recomputation_that_does_not_know_is_refused() -> None:
    ours, _ = models()

    class Rerun(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(self.inner, *args, use_reentrant=False, **kwargs)

    layers: Any = ours.get_base_model().model.layers
    layers[0].mlp = Rerun(layers[0].mlp)
    loss = ours(IDS).logits.square().mean()
    with pytest.raises(RoutingError):
        loss.backward()


def test_refusals() -> None:
    ours, _ = models()
    with pytest.raises(MergeError, match="no weight does that"):
        ours.merge_adapter()
    with pytest.raises(RoutingError, match="does not say where"):
        ours.get_base_model()(IDS)
    with pytest.raises(RoutingError, match="prompt_lookup_num_tokens"):
        ours.generate(IDS, prompt_lookup_num_tokens=2)
    with pytest.raises(TargetError, match="positions of a text"):
        models(target_modules=["embed_tokens"])

"""The optimizers against the reference: the same groups, and the same parameters after some steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.interop.reference import both, quiet, randomise
from tests.tolerances import BY_DTYPE, assert_close
from veneer import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer

with quiet():
    from peft import optimizers as reference


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.q = nn.Linear(6, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.q(self.embed(x))
        return self.head(self.norm(self.conv(h.transpose(1, 2)).transpose(1, 2)))


X = torch.arange(12).view(2, 6) % 7


def models(**options: Any) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["embed", "q", "conv"]} | options
    ours, theirs = both(Net, options)
    theirs.load_state_dict(copy.deepcopy(randomise(ours).state_dict()))
    return ours.train(), theirs.train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, times: int = 1) -> None:
    for _ in range(times):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def named(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return [
        {**{k: v for k, v in g.items() if k != "params"}, "params": sorted(names[id(p)] for p in g["params"])}
        for g in optimizer.param_groups
    ]


@pytest.mark.parametrize(
    "options", [{}, {"lora_bias": True, "target_modules": ["q", "conv"]}, {"use_dora": True},
                {"modules_to_save": ["norm", "head"]}, {"bias": "all"}],
)  # fmt: skip
def test_loraplus(options: dict[str, Any]) -> None:
    ours, theirs = models(**options)
    given = {
        "lr": 1e-2,
        "loraplus_lr_ratio": 8.0,
        "loraplus_lr_embedding": 3e-3,
        "loraplus_weight_decay": 0.1,
        "betas": (0.8, 0.99),
    }
    mine = create_loraplus_optimizer(ours, torch.optim.AdamW, **given)
    its = reference.create_loraplus_optimizer(theirs, torch.optim.AdamW, **given)
    assert named(ours, mine) == named(theirs, its)
    step(ours, mine, 2)
    step(theirs, its, 2)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lorafa(use_rslora: bool) -> None:
    # The reference projects in bfloat16 where the machine can.
    ours, theirs = models(target_modules=["q", "embed"], modules_to_save=["head"], use_rslora=use_rslora)
    with quiet():
        its = reference.create_lorafa_optimizer(theirs, 2, 6, 1e-2, weight_decay=0.1)
    mine = create_lorafa_optimizer(ours, 2, 6, 1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    step(ours, mine, 3)
    step(theirs, its, 3)
    moved = set()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        if not torch.equal(p, before[name]):
            moved.add(name.rpartition(".default")[0])
        assert_close(p - before[name], q - before[name], BY_DTYPE[torch.bfloat16])
    assert moved == {
        f"base_model.model.{n}" for n in ("q.lora_B", "embed.lora_embedding_B", "head.modules_to_save")
    }


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["head"], "bias": "all"}])
def test_riemannian(cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    ours, theirs = models(**options)
    mine = create_riemannian_optimizer(ours, cls, lr=1e-2, reg=0.05, weight_decay=0.1)
    its = reference.create_riemannian_optimizer(theirs, cls, lr=1e-2, reg=0.05, weight_decay=0.1)
    assert named(ours, mine) == named(theirs, its) and isinstance(mine, cls)
    step(ours, mine, 3)
    step(theirs, its, 3)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(p, q)

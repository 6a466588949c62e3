"""What the Riemannian preconditioner does to gradients, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, create_riemannian_optimizer
from veneer.errors import ConfigError, TrainingError
from veneer.layers import LoraLayer, wrap


def made(**options: object) -> LoraLayer:
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False} | options)
    return wrap(nn.Linear(6, 5), config).double()


@torch.no_grad()
def product_after_a_step(times: Tensor) -> tuple[Tensor, Tensor]:
    """``BA`` before and after a step, with the factors ``times⁻¹ A`` and ``B times``."""
    layer = made()
    a, b, _ = layer.factors("default")
    a.copy_(torch.linalg.solve(times, a))
    b.copy_(b @ times)
    optimizer = create_riemannian_optimizer(layer, torch.optim.SGD, lr=1e-3, reg=0.0)
    before = b @ a
    with torch.enable_grad():
        layer(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    return before, b @ a


def test_the_step_does_not_depend_on_how_the_update_is_divided() -> None:
    before, after = product_after_a_step(torch.eye(2, dtype=torch.float64))
    same, other = product_after_a_step(torch.tensor([[4.0, 1.0], [0.0, 0.1]], dtype=torch.float64))
    assert_close(before, same, BY_DTYPE[torch.float32])
    assert_close(after, other, BY_DTYPE[torch.float32])
    assert not torch.allclose(before, after)


def test_gradients_that_are_missing_or_not_of_factors_are_left_as_they_are() -> None:
    layer = made(lora_bias=True)
    optimizer = create_riemannian_optimizer(layer, torch.optim.SGD, lr=1.0, reg=0.5)
    a, b, bias = layer.factors("default")
    assert bias is not None
    old_a, old_b, old_bias = a.detach().clone(), b.detach().clone(), bias.detach().clone()
    b.grad, bias.grad = torch.ones_like(b), torch.ones_like(bias)
    optimizer.step()
    gram = old_a @ old_a.T + 0.5 * torch.eye(2, dtype=torch.float64)
    assert torch.equal(a, old_a)
    assert_close(old_b - b, torch.ones_like(b) @ torch.linalg.inv(gram), BY_DTYPE[torch.float32])
    assert_close(old_bias - bias, torch.ones_like(bias), BY_DTYPE[torch.float32])


def test_refusals() -> None:
    layer = made()
    for optimizer_cls, options, reason in (
        (torch.nn.Linear, {}, "must be a class of optimizers"),
        (torch.optim.LBFGS, {}, "LBFGS evaluates the model again"),
        (torch.optim.SGD, {"reg": -1.0}, "reg must not be negative"),
    ):
        with pytest.raises(ConfigError, match=reason):
            create_riemannian_optimizer(layer, optimizer_cls, lr=0.1, **options)  # type: ignore[arg-type]
    optimizer = create_riemannian_optimizer(layer, torch.optim.SGD, lr=0.1)
    for step in (lambda: optimizer.step(lambda: 1.0), lambda: optimizer.step(closure=lambda: 1.0)):
        with pytest.raises(TrainingError, match="takes no closure"):
            step()
    layer.requires_grad_(False)
    with pytest.raises(TrainingError, match="no linear layer has a factor"):
        create_riemannian_optimizer(layer, torch.optim.SGD, lr=0.1)

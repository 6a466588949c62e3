"""What LoRA-FA projects and refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tolerances import BY_DTYPE, assert_close
from veneer import LoraConfig, create_lorafa_optimizer
from veneer.errors import ConfigError, VeneerWarning
from veneer.layers import LoraLayer, wrap
from veneer.optimizers import LoraFAOptimizer


def made(base: nn.Module | None = None, **options: object) -> LoraLayer:
    torch.manual_seed(0)
    return wrap(base or nn.Linear(6, 5), LoraConfig(**{"r": 2, "lora_alpha": 6} | options))


@pytest.mark.parametrize("base", [nn.Linear(6, 5), nn.Conv2d(2, 5, 3)])
def test_the_step_of_b_is_the_nearest_to_the_gradient_of_the_weight(base: nn.Module) -> None:
    layer = made(base).double()
    optimizer = create_lorafa_optimizer(layer, 2, 6, 1e-2)
    a, b, _ = layer.factors("default")
    a2 = a.flatten(1)
    whole = torch.randn(5, a2.shape[1], dtype=torch.float64)  # the gradient of the weight
    b.grad = (layer.scaling["default"] * whole @ a2.T).view_as(b)
    projected = layer.scaling["default"] * optimizer._gradient(b).flatten(1) @ a2
    # Least squares: what is left of the gradient is orthogonal to all that a step of B can do.
    assert_close((whole - projected) @ a2.T, torch.zeros(5, 2), BY_DTYPE[torch.float32])
    assert not a.requires_grad and b.requires_grad


def test_a_stays_and_states_return() -> None:
    layer, x = made(), torch.ones(3, 6)
    optimizer = create_lorafa_optimizer(layer, 2, 6, 1e-2)
    a, b, _ = layer.factors("default")
    before = a.clone()

    def loss() -> torch.Tensor:
        value = layer(x).square().sum()
        value.backward()
        return value.detach()

    losses = [float(optimizer.step(loss)) for _ in range(3)]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
    assert torch.equal(a, before) and b.any()
    again = create_lorafa_optimizer(layer, 2, 6, 1e-2)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[b]["exp_avg"], optimizer.state[b]["exp_avg"])
    assert again.state[b]["step"] == 3


def test_all_that_is_wrong_is_said_at_once() -> None:
    net = nn.Sequential(made(nn.Embedding(5, 4)), made(nn.Conv1d(4, 4, 3, groups=2)), made(use_rslora=True))
    with pytest.raises(ConfigError) as error:
        create_lorafa_optimizer(net, 2, 6, 1e-2, use_rslora=False)
    for part in ("0: A of 'default' is all zeros", "1: the update", "use_rslora=False"):
        assert part in str(error.value)
    assert all(p.requires_grad for layer in net for p in layer.adapter_parameters("default"))
    with pytest.raises(ConfigError, match="no active"):
        create_lorafa_optimizer(nn.Linear(2, 2), 2, 6, 1e-2)
    with pytest.raises(ConfigError, match=r"lr=-1.*betas"):
        LoraFAOptimizer([torch.nn.Parameter(torch.ones(1))], {}, lr=-1, betas=(0.9, 1.0))


def test_another_rank_than_any_layers_is_said() -> None:
    with pytest.warns(VeneerWarning, match="r=4"):
        create_lorafa_optimizer(made(), 4, 6, 1e-2)

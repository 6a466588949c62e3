"""The defining property of each start that is taken off the update, on shapes as models have them."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tolerances import CONTEXT, OPS_SPECTRUM, assert_close
from veneer import ConfigError, CordaConfig, LoraConfig, LoraGAConfig, TargetError, get_peft_model
from veneer.inits import note_statistics, statistics_of
from veneer.inits.corda import context_directions
from veneer.layers import LoraLayer, wrap
from veneer.ops.svd import randomised_svd

R = 16
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(576, 192),
    "wide": lambda: nn.Linear(192, 576),
    "conv1d": lambda: Conv1D(192, 256),
    "embedding": lambda: nn.Embedding(500, 128),
    "conv": lambda: nn.Conv2d(32, 64, 3),
}


def base_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return BASES[kind]()  # type: ignore[no-any-return]


def start(base: nn.Module, init: str, **options: Any) -> tuple[LoraLayer, Tensor, Tensor, Tensor]:
    """The layer, and W, s·B₀ and A₀ as matrices."""
    config = LoraConfig(**{"r": R, "lora_alpha": 3 * R / 2, "init_lora_weights": init, **options})
    layer = wrap(base, config)
    a, b, _ = layer.factors("default")
    b2, a2 = layer.matrices(a.detach(), b.detach())
    return layer, layer.matrix(), b2 * layer.scaling["default"], a2


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16"])
def test_pissa_is_the_best_approximation_of_its_rank(kind: str, init: str) -> None:
    layer, weight, b, a = start(base_of(kind), init)
    values = torch.linalg.svdvals(weight)
    best = float(values[R:].square().sum().sqrt())  # Eckart and Young
    error = float((weight - b @ a).norm())
    assert best * (1 - 1e-5) <= error <= best * (1.01 if "niter" in init else 1 + 1e-5)
    if init == "pissa":
        assert_close(a.norm(dim=1).square() * layer.scaling["default"], values[:R], OPS_SPECTRUM)
    assert not layer.get_delta_weight("default").any()


@pytest.mark.parametrize("kind", BASES)
def test_olora_begins_with_an_orthonormal_basis_of_the_columns(kind: str) -> None:
    layer, weight, _, a = start(base_of(kind), "olora")
    b = layer.matrices(*(t.detach() for t in layer.factors("default")[:2]))[0]
    assert_close(b.T @ b, torch.eye(R))
    assert_close(b.T @ weight, a)  # A = Qᵀ W
    assert_close(b @ a[:, :R], weight[:, :R])  # and the first columns are met exactly
    assert not layer.get_delta_weight("default").any()


def inputs(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    turn = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
    return torch.randn(4 * size, size, generator=generator) * torch.logspace(0, -2, size) @ turn


@pytest.mark.parametrize("kind", ["linear", "wide", "conv1d", "conv"])
def test_corda_is_the_best_approximation_in_the_light_of_the_inputs(kind: str) -> None:
    base = base_of(kind)
    weight = wrap(base_of(kind), LoraConfig(r=1, lora_alpha=2)).matrix()
    rows = inputs(weight.shape[1])
    covariance = rows.T @ rows
    note_statistics(base, context_directions(weight, covariance, R, "ipm"))
    layer, _, b, a = start(base, "corda")
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance))
    best = torch.linalg.svdvals(weight @ damped)[R:].square().sum().sqrt()
    error = ((weight - b @ a) @ damped).norm()
    assert_close(error / best, torch.ones(()))
    _, _, b1, a1 = start(base_of(kind), "pissa")
    assert float(((weight - b1 @ a1) @ damped).norm()) > 1.2 * float(best)
    assert not layer.get_delta_weight("default").any()
    assert statistics_of(base) is None, "statistics are kept for ever"


def test_corda_kpm_takes_what_matters_least_for_the_inputs() -> None:
    weight, rows = base_of("linear").weight.detach(), inputs(576)
    parts = {m: context_directions(weight, rows.T @ rows, R, m) for m in ("ipm", "kpm")}
    shares = {m: float((d.u * d.s @ d.v.T @ rows.T).norm()) for m, d in parts.items()}
    assert shares["kpm"] < 0.2 * shares["ipm"]
    whole = context_directions(weight, rows.T @ rows, 192, "ipm")
    assert_close((whole.u * whole.s @ whole.v.T - weight).norm() / weight.norm(), torch.zeros(()), CONTEXT)


def test_corda_refuses_what_cannot_be_inverted_or_does_not_fit() -> None:
    weight = torch.randn(4, 6)
    for covariance in (torch.zeros(6, 6), torch.full((6, 6), float("nan"))):
        with pytest.raises(ConfigError, match="zero or not finite"):
            context_directions(weight, covariance, 2, "ipm")
    base = nn.Linear(6, 4)
    note_statistics(base, context_directions(weight, torch.eye(6), 3, "ipm"))
    with pytest.raises(ConfigError, match="same model and configuration"):
        wrap(base, LoraConfig(r=2, lora_alpha=3, init_lora_weights="corda"))


def gradient_of(kind: str) -> Tensor:
    shape = wrap(base_of(kind), LoraConfig(r=1, lora_alpha=2)).matrix().shape
    generator = torch.Generator().manual_seed(5)
    size = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator)).Q for n in shape)
    return left * 0.8 ** torch.arange(size) @ right.T


PICKS = {
    "ArB2r": (range(R), range(R, 2 * R)),
    "A2rBr": (range(R, 2 * R), range(R)),
    "ArBr": (range(1, 2 * R, 2), range(0, 2 * R, 2)),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("direction", PICKS)
def test_lora_ga_takes_the_first_singular_directions_of_the_gradient(kind: str, direction: str) -> None:
    base, gradient = base_of(kind), gradient_of(kind)
    note_statistics(base, gradient)
    options = LoraGAConfig(direction=direction, scale="unit")
    layer, _, _, a = start(base, "lora_ga", lora_ga_config=options)
    b = layer.matrices(*(t.detach() for t in layer.factors("default")[:2]))[0]
    u, s, vh = torch.linalg.svd(gradient, full_matrices=False)
    for_a, for_b = (list(pick) for pick in PICKS[direction])
    assert_close((a * vh[for_a]).sum(1).abs(), torch.ones(R))
    assert_close((b * u[:, for_b]).sum(0).abs() / s[for_b], torch.ones(R))
    assert not layer.get_delta_weight("default").any()


def test_scales_of_lora_ga() -> None:
    gradient, found = gradient_of("linear"), {}
    for scale in ("unit", "stable", "weight_svd", "gd_scale"):
        base = base_of("linear")
        note_statistics(base, gradient)
        options = LoraGAConfig(scale=scale, stable_gamma=9)
        layer, weight, _, a = start(base, "lora_ga", lora_ga_config=options)
        found[scale] = (a, layer.factors("default")[1].detach())
    a, b = found["unit"]
    assert_close(found["stable"][1], b * (192**0.25 / 3))
    assert_close(found["gd_scale"][0] * 1.5, a)
    assert_close(found["gd_scale"][1] * 1.5, b)
    assert_close(found["weight_svd"][1][:, 0].norm(), torch.linalg.svdvals(weight)[0], OPS_SPECTRUM)


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "loftq"])
def test_a_rank_beyond_the_matrix_leaves_directions_that_can_learn(init: str) -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5)
    stats: Any = torch.randn(5, 6)
    if init == "corda":
        stats = context_directions(base.weight.detach(), torch.eye(6), 12, "ipm")
    note_statistics(base, stats)
    layer = wrap(base, LoraConfig(r=12, lora_alpha=18, init_lora_weights=init))
    layer(torch.randn(4, 6)).square().sum().backward()
    a, b, _ = layer.factors("default")
    learns = (a.grad.abs().sum(1) > 0) | (b.grad.abs().sum(0) > 0)
    assert bool(learns.all())


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga", "loftq"])
def test_groups_have_no_one_matrix(init: str) -> None:
    with pytest.raises(TargetError, match="groups"):
        wrap(nn.Conv2d(4, 8, 3, groups=2), LoraConfig(r=2, lora_alpha=3, init_lora_weights=init))


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_without_measuring_the_way_to_it_is_said(init: str) -> None:
    with pytest.raises(ConfigError, match="call preprocess_"):
        wrap(nn.Linear(4, 8), LoraConfig(r=2, lora_alpha=3, init_lora_weights=init))


@pytest.mark.parametrize("init", ["corda", "eva"])
def test_indices_have_no_directions(init: str) -> None:
    with pytest.raises(TargetError, match="indices"):
        wrap(nn.Embedding(9, 8), LoraConfig(r=2, lora_alpha=3, init_lora_weights=init))


def test_small_differences_survive_sixteen_bits() -> None:
    # The start is much larger than what training adds: as two products it would drown in rounding.
    torch.manual_seed(0)
    layer = wrap(nn.Linear(256, 256).bfloat16(), LoraConfig(r=R, lora_alpha=24, init_lora_weights="pissa"))
    with torch.no_grad():
        for parameter in layer.adapter_parameters("default"):
            parameter += 1e-4 * torch.randn_like(parameter)
    x = torch.randn(8, 256).bfloat16()
    exact = x.double() @ layer.get_delta_weight("default").double().T
    branch = layer.low_rank("default", x).detach().double() * layer.scaling["default"]
    assert float((branch - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("rounds", [0, 4])
def test_randomised_svd_is_exact_where_the_projection_keeps_everything(rounds: int) -> None:
    matrix = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    u, s, vh = randomised_svd(matrix, 6, rounds, torch.Generator().manual_seed(1))
    exact = torch.linalg.svdvals(matrix)[:6]
    assert_close(s, exact, OPS_SPECTRUM)
    assert_close(u.T @ u, torch.eye(6))
    assert_close(u.T @ matrix @ vh.T, torch.diag(s), OPS_SPECTRUM)
    assert math.isclose(float((u * s @ vh).norm()), float(exact.norm()), rel_tol=1e-5)


def test_a_copy_of_a_measured_model_starts_from_what_was_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    measured = context_directions(model[0].weight.detach(), torch.eye(8), 2, "ipm")
    note_statistics(model[0], measured)
    twin = copy.deepcopy(model)
    assert statistics_of(pickle.loads(pickle.dumps(model))[0]) is None
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda", corda_config=CordaConfig())
    get_peft_model(twin, config)
    assert statistics_of(model[0]) is measured and statistics_of(twin[0].base_layer) is None

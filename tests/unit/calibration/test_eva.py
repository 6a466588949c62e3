"""EVA: directions of the inputs, ranks where they explain most, and a model that is left alone otherwise."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.laws.snapshots import Snapshot
from tests.laws.test_out_of_memory import times_out_of_memory
from tests.tolerances import assert_close
from veneer import (
    AdapterNameError,
    ConfigError,
    EvaConfig,
    LoadMismatchError,
    LoraConfig,
    MergeError,
    PeftModel,
    VeneerWarning,
    get_eva_state_dict,
    get_peft_model,
    initialize_lora_eva_weights,
)

PLAIN: dict[str, Any] = {
    "forward_fn": lambda model, batch: model(batch),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


class Net(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.out = nn.Linear(24, 16), nn.Linear(24, 20), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.query(x))) + self.key(x)[..., :12]


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int = 4, rows: int = 50) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = 3.0 * 0.6 ** torch.arange(24)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    return [torch.randn(rows, 24, generator=generator) * scales @ turn + 0.5 for _ in range(count)]


def config(**options: Any) -> LoraConfig:
    eva = EvaConfig(**{"rho": 1.0, **options.pop("eva", {})})
    return LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "key", "out"], init_lora_weights="eva",
        eva_config=eva, **options,
    )  # fmt: skip


def principal(rows: Tensor, k: int) -> Tensor:
    centred = rows.double() - rows.double().mean(0)
    vectors: Tensor = torch.linalg.svd(centred, full_matrices=False).Vh[:k]
    return vectors


def test_the_rows_of_a_are_the_principal_directions_of_the_inputs() -> None:
    data = batches()
    model = get_peft_model(net(), config(eva={"tau": 0.9999}))
    initialize_lora_eva_weights(model, data, **PLAIN)
    expected = principal(torch.cat(data), 4)
    for name in ("query", "key"):
        layer = getattr(model.get_base_model(), name)
        cosine = (layer.lora_A["default"].weight.detach().double() * expected).sum(1).abs()
        assert float(cosine.min()) > 0.999
        assert not layer.lora_B["default"].weight.any()


def test_the_adapted_model_is_the_base_until_trained() -> None:
    base, data = net(), batches()
    model = get_peft_model(copy.deepcopy(base), config())
    assert torch.equal(model(data[0]), base(data[0]))
    initialize_lora_eva_weights(model, data, **PLAIN)
    assert torch.equal(model(data[0]), base(data[0]))
    assert all(p.requires_grad == ("lora_" in n) for n, p in model.named_parameters())


def test_ranks_go_where_they_explain_most_and_strengths_follow() -> None:
    data, base = batches(), net()
    # What the last layer is given varies in few directions, so it earns a small rank.
    base.query.weight.data = torch.outer(torch.linspace(-1, 1, 16), torch.linspace(-0.3, 0.3, 24))
    model = get_peft_model(copy.deepcopy(base), config(eva={"rho": 2.0}))
    initialize_lora_eva_weights(model, data, **PLAIN)
    layers = model.base_model.layers()
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    assert sum(ranks.values()) == 3 * 4 and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    inputs = {"query": torch.cat(data), "key": torch.cat(data)}
    inputs["out"] = torch.tanh(base.query(inputs["query"])).detach()
    shares = []
    for name, rows in inputs.items():
        values = torch.linalg.svdvals(rows.double() - rows.double().mean(0)).square()
        shares += [(float(v / values.sum()), name) for v in values[:8]]
    best = [name for _, name in sorted(shares, reverse=True)[:12]]
    assert ranks == {name: best.count(name) for name in ranks} or abs(ranks["query"] - ranks["key"]) <= 1
    assert {layer.scaling["default"] for layer in layers.values()} == {1.5}
    given = model.peft_config["default"]
    assert {p.strip("^$"): r for p, r in given.rank_pattern.items()} == {
        p: r for p, r in ranks.items() if r != 4
    }


def test_without_adjusting_strengths_alpha_stays() -> None:
    model = get_peft_model(net(), config(eva={"rho": 2.0, "adjust_scaling_factors": False}))
    initialize_lora_eva_weights(model, batches(), **PLAIN)
    assert not model.peft_config["default"].alpha_pattern
    assert all(layer.lora_alpha["default"] == 6 for layer in model.base_model.layers().values())


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    plain = get_eva_state_dict(net(), batches(), config(), **PLAIN)
    white = get_eva_state_dict(net(), batches(), config(eva={"whiten": True}), **PLAIN)
    ratio = white["query"].norm(dim=1)
    assert_close(white["query"] / ratio[:, None], plain["query"])
    assert bool((ratio.diff() > 0).all())


def test_a_base_model_gives_what_a_peft_model_takes() -> None:
    data = batches()
    directions = get_eva_state_dict(net(), data, config(), **PLAIN)
    one, two = (get_peft_model(net(), config()) for _ in range(2))
    initialize_lora_eva_weights(one, eva_state_dict=directions)
    initialize_lora_eva_weights(two, data, **PLAIN)
    for (name, p), (_, q) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_saved_adapter_has_the_ranks_it_earned(tmp_path: Any) -> None:
    from veneer import PeftModel

    model = get_peft_model(net(), config(eva={"rho": 2.0}))
    initialize_lora_eva_weights(model, batches(), **PLAIN)
    with torch.no_grad():
        for parameter in (p for n, p in model.named_parameters() if "lora_B" in n):
            parameter.normal_()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(batches()[0]), model.eval()(batches()[0]))


def test_a_layer_without_a_rank_loses_the_adapter() -> None:
    model = get_peft_model(net(), config())
    directions = get_eva_state_dict(model, batches(), **PLAIN)
    name = next(n for n in directions if n.endswith("key"))
    initialize_lora_eva_weights(model, eva_state_dict={**directions, name: directions[name][:0]})
    assert "default" not in model.get_base_model().key.held_adapters
    assert model.peft_config["default"].target_modules == {"query", "out"}


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_rows_of_a_convolution_are_its_patches(kind: Any) -> None:
    torch.manual_seed(0)
    dims = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[kind]
    base = nn.Sequential(kind(3, 5, 3, stride=2, padding=1, padding_mode="circular", dilation=2))
    x = torch.randn(4, 3, *(9, 8, 7)[:dims])
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights="eva"))
    layer = model.get_base_model()[0]
    rows = layer.rows(x)
    weight = layer.base_layer.weight.flatten(1)
    expected = base[0].base_layer(x) - layer.base_layer.bias.view(1, -1, *[1] * dims)
    assert_close(rows @ weight.T, expected.movedim(1, -1).reshape(-1, 5))
    initialize_lora_eva_weights(model, [x, x + 1], **PLAIN)
    assert layer.lora_A["default"].weight.shape == (layer.r["default"], 3, *[3] * dims)


def test_memory_is_that_of_the_directions_and_one_batch() -> None:
    from veneer.ops.svd import update_components

    found = None
    for batch in batches(20):
        found = update_components(found, batch, 4)
    assert found is not None
    assert (
        sum(t.numel() for t in (found.mean, found.variance, found.values, found.vectors))
        == 24 * 2 + 4 + 4 * 24
    )
    exact = torch.cat(batches(20)).double()
    values = torch.linalg.svdvals(exact - exact.mean(0))[:4]
    assert float((found.values.double() / values - 1).abs().max()) < 0.01
    assert_close(found.mean, exact.mean(0))
    assert_close(found.variance.float(), (exact - exact.mean(0)).square().sum(0))


def test_what_cannot_be_measured_is_said_and_nothing_has_changed() -> None:
    model = get_peft_model(net(), config())
    with pytest.warns(VeneerWarning, match="never measured"):
        model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="empty"):
        initialize_lora_eva_weights(model, [], **PLAIN)
    with pytest.raises(ConfigError, match="no batch has as many rows"):
        initialize_lora_eva_weights(model, batches(2, 3), **PLAIN)
    with pytest.raises(ConfigError, match="not measured: nothing"):
        get_eva_state_dict(model, batches(), **{**PLAIN, "prepare_layer_inputs_fn": {"nothing": None}})
    with pytest.raises(LoadMismatchError, match=r"no such layer(.|\n)*\(rank, 24\) is needed"):
        initialize_lora_eva_weights(
            model, eva_state_dict={"nowhere": torch.ones(1, 3), "query": torch.ones(2, 7)}
        )
    with pytest.raises(ConfigError, match="'eva' is measured here"):
        plain = get_peft_model(net(), LoraConfig(r=2, lora_alpha=3, target_modules=["key"]))
        initialize_lora_eva_weights(plain, batches(), **PLAIN)

    def fails(model: nn.Module, batch: Tensor) -> None:
        model(batch)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        initialize_lora_eva_weights(model, batches(), **{**PLAIN, "forward_fn": fails})
    assert model.training and all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.warns(VeneerWarning, match="never measured"):
        model.merge_adapter()
    with pytest.raises(MergeError, match="unmerge"):
        initialize_lora_eva_weights(model, batches(), **PLAIN)


def test_layers_that_were_not_measured_are_named() -> None:
    model = get_peft_model(net(), config())
    directions = get_eva_state_dict(model, batches(), **PLAIN)
    name = next(n for n in directions if n.endswith("key"))
    with pytest.warns(VeneerWarning, match="keep their default start(.|\n)*key"):
        initialize_lora_eva_weights(model, eva_state_dict={n: t for n, t in directions.items() if n != name})


def test_inputs_of_fewer_dimensions_than_directions_settle() -> None:
    flat = [
        torch.randn(50, 2, generator=torch.Generator().manual_seed(i)) @ torch.ones(2, 24) for i in range(3)
    ]
    directions = get_eva_state_dict(net(), flat, config(), **PLAIN)
    assert directions["query"].isfinite().all()


def test_what_is_missing_is_named() -> None:
    model = get_peft_model(net(), config())
    with pytest.raises(ConfigError, match="pass peft_config"):
        get_eva_state_dict(net(), batches(), **PLAIN)
    with pytest.raises(ConfigError, match="PeftModel is needed, got Net"):
        initialize_lora_eva_weights(net(), batches(), **PLAIN)
    with pytest.raises(AdapterNameError, match=r"'other'.*default"):
        initialize_lora_eva_weights(model, batches(), adapter_name="other", **PLAIN)
    with pytest.raises(ConfigError, match="pass a dataloader"):
        initialize_lora_eva_weights(model, **PLAIN)


def test_inputs_that_are_not_those_of_a_language_model_are_refused() -> None:
    model, part = net(), {**PLAIN, "forward_fn": lambda model, batch: model.key(batch)}
    with pytest.raises(ConfigError, match="not reach these layers: query, out"):
        get_eva_state_dict(model, batches(), config(), **part)
    by_name = {**PLAIN, "forward_fn": lambda model, batch: model.key(input=batch)}
    with pytest.raises(ConfigError, match="key was called without a tensor"):
        get_eva_state_dict(model, batches(), config(), **by_name)
    with pytest.raises(ConfigError, match="dictionaries, got Tensor"):
        get_eva_state_dict(model, batches(), config())


# -- a start that was never measured -------------------------------------------------------------------


NEVER = r"(?i)'default' has init_lora_weights='eva', but .* never measured.*initialize_lora_eva_weights"


def saved_init(model: Any, place: Path) -> Any:
    model.save_pretrained(place)
    values = json.loads((place / "adapter_config.json").read_text())
    assert (values.get("eva_config") is None) is (values["init_lora_weights"] is True)
    return values["init_lora_weights"]


@pytest.mark.parametrize("lower", ["eva", "EVA"])
def test_a_start_that_was_never_measured_is_said_and_no_file_claims_it(lower: str, tmp_path: Path) -> None:
    model = get_peft_model(net(), dataclasses.replace(config(), init_lora_weights=lower))
    model.copy_adapter("default", "twin")
    with pytest.warns(VeneerWarning, match=NEVER):
        model.train()
    with pytest.warns(VeneerWarning, match=NEVER):
        model.merge_adapter()
    model.unmerge_adapter()
    assert set(model.base_model.unmeasured()) == {"default", "twin"}
    model.delete_adapter("twin")
    with pytest.warns(VeneerWarning, match=NEVER):
        assert saved_init(model, tmp_path) is True
    model.eval()
    initialize_lora_eva_weights(model, batches(), **PLAIN)
    model.train()
    model.merge_adapter()
    model.unmerge_adapter()
    assert saved_init(model, tmp_path / "measured") == lower
    PeftModel.from_pretrained(net(), tmp_path / "measured", is_trainable=True).train()


def test_a_measured_adapter_loaded_into_a_fresh_one_is_measured(tmp_path: Path) -> None:
    model = get_peft_model(net(), config())
    initialize_lora_eva_weights(model, batches(), **PLAIN)
    model.save_pretrained(tmp_path)
    again = get_peft_model(net(), model.peft_config["default"])
    again.load_adapter(tmp_path, "default", is_trainable=True)
    again.train()
    assert saved_init(again, tmp_path / "again") == "eva"
    fresh = get_peft_model(net(), model.peft_config["default"])
    with pytest.warns(VeneerWarning, match=NEVER):
        fresh.save_pretrained(tmp_path / "fresh")
    again.load_adapter(tmp_path / "fresh", "default", is_trainable=True)
    with pytest.warns(VeneerWarning, match=NEVER):
        assert saved_init(again, tmp_path / "again") is True


def test_a_failed_start_leaves_the_adapter_as_it_was() -> None:
    model = get_peft_model(net(), config(eva={"rho": 2.0}))
    directions = get_eva_state_dict(model, batches(), **PLAIN)
    before = Snapshot(model)

    def unchanged() -> None:
        before.assert_same(model)
        assert set(model.base_model.unmeasured()) == {"default"}

    start = functools.partial(initialize_lora_eva_weights, model, eva_state_dict=directions)
    assert times_out_of_memory(start, unchanged) > 3
    assert not model.base_model.unmeasured()


def test_inputs_that_never_vary_give_whitened_directions_of_length_one() -> None:
    config = LoraConfig(
        r=4, target_modules=["query"], init_lora_weights="eva", eva_config=EvaConfig(whiten=True)
    )
    found = get_eva_state_dict(net(), [torch.ones(50, 24)] * 2, config, **PLAIN)["query"]
    assert_close(found @ found.T, torch.eye(len(found)))

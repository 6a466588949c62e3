"""The reference's initialisations from weights and data, and ours: the same effective weights."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import veneer
from tests.interop import tiny
from tests.interop.reference import from_reference, output, peft, quiet
from tests.tolerances import assert_close


def rows() -> list[dict[str, Tensor]]:
    """Batches of a language model: some padding, some masked labels."""
    made = []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 50, (8, 12), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[0, 9:] = 0
        labels[:, :3] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_eva_gives_the_same_directions_and_ranks(rho: float) -> None:
    # The reference projects inputs at random onto 2·rho·r directions: exact where these are all there are.
    base = tiny.llama()
    given: dict[str, Any] = {"r": 8, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    models = {}
    for library in (veneer, peft):
        config = library.LoraConfig(
            **given, init_lora_weights="eva", eva_config=library.EvaConfig(rho=rho, tau=0.8)
        )
        with quiet():
            model = library.get_peft_model(copy.deepcopy(base), config)
            library.initialize_lora_eva_weights(model, rows(), show_progress_bar=False)
        models[library] = model
    ranks: dict[Any, dict[str, int]] = {}
    for library, model in models.items():
        ranks[library] = {
            name: module.weight.shape[0]
            for name, module in model.named_modules()
            if name.endswith("lora_A.default")
        }
    ours, theirs = models[veneer], models[peft]
    for name in ranks[peft]:
        # Layers with the same input explain the same: which of two gets a rank more is arbitrary.
        assert abs(ranks[veneer][name] - ranks[peft][name]) <= (0 if rho == 1.0 else 1), name
        common = min(ranks[veneer][name], ranks[peft][name])
        pair = [m.get_submodule(name).weight[:common].detach() for m in (ours, theirs)]
        assert_close((pair[0] * pair[1]).sum(1).abs(), torch.ones(common))
    assert sum(ranks[veneer].values()) == sum(ranks[peft].values())


TARGETS = ["q_proj", "down_proj"]
SHARED: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
X = {"input_ids": tiny.X}


def step(model: nn.Module) -> None:
    """A backward pass of a language model."""
    model(**X, labels=tiny.X).loss.backward()


def preprocess_corda_there(*args: Any, **kwargs: Any) -> None:
    """The reference's; its module takes a decorator from a package that it does not require."""
    with pytest.MonkeyPatch.context() as patch:
        if "attr" not in sys.modules:
            stand_in = types.ModuleType("attr")
            stand_in.dataclass = dataclasses.dataclass  # type: ignore[attr-defined]
            patch.setitem(sys.modules, "attr", stand_in)
        from peft.tuners.lora.corda import preprocess_corda

    preprocess_corda(*args, **kwargs)


def started(library: Any, base: nn.Module, init: str, **options: Any) -> Any:
    """A model with an adapter that starts in that way, in either library."""
    if init == "corda":
        kind = peft.tuners.lora.config.CordaConfig if library is peft else veneer.CordaConfig
        options["corda_config"] = kind()
    if init == "lora_ga":
        options["lora_ga_config"] = library.LoraGAConfig()
    config = library.LoraConfig(**SHARED, init_lora_weights=init, **options)
    own = copy.deepcopy(base)
    with quiet():
        # Its hooks count backward passes of layers whose inputs need no gradient, and torch says so.
        warnings.filterwarnings("ignore", "Full backward hook")
        if init == "corda":
            measure = veneer.preprocess_corda if library is veneer else preprocess_corda_there
            measure(own, config, run_model=lambda: [own(input_ids=row[None]) for row in tiny.X])
        if init == "lora_ga":
            library.preprocess_loraga(own, config, lambda: step(own))
        return library.get_peft_model(own, config).eval()


def effective(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By layer: the whole weight, and ``s·BA`` of the trainable factors alone."""
    result = {}
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        a, b = (getattr(module, f"lora_{f}")["default"].weight.detach() for f in "AB")
        product = module.scaling["default"] * b @ a
        change = module.get_delta_weight("default") if isinstance(model, veneer.PeftModel) else product
        result[name] = (module.base_layer.weight + change).detach(), product
    return result


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Move the trained factors away from their start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "lora_ga"])
def test_the_same_start_with_the_same_effective_weights(init: str) -> None:
    base = tiny.llama()
    ours, theirs = (started(library, base, init) for library in (veneer, peft))
    mine, its = effective(ours), effective(theirs)
    assert mine.keys() == its.keys() and len(mine) == 4
    for name in mine:
        assert_close(mine[name][0], its[name][0])
        if init == "lora_ga":  # A and B are other directions, so the signs of the two are free
            assert_close(torch.linalg.svdvals(mine[name][1]), torch.linalg.svdvals(its[name][1]))
        else:
            assert_close(mine[name][1], its[name][1])
    assert torch.equal(output(ours, X), output(base, X))
    assert_close(output(theirs, X), output(base, X))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_same_steps_give_the_same_model(init: str) -> None:
    base = tiny.llama()
    models = [started(library, base, init) for library in (veneer, peft)]
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            step(model)
            optimizer.step()
    assert_close(output(models[0], X), output(models[1], X))
    assert not torch.allclose(output(models[0], X), output(base, X))


FILES: list[tuple[str, dict[str, Any]]] = [
    *((init, {}) for init in ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")),
    ("pissa", {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}}),
    ("olora", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5}}),
]


@pytest.mark.parametrize(("init", "more"), FILES, ids=str)
def test_our_files_are_plain_adapters_there(tmp_path: Path, init: str, more: dict[str, Any]) -> None:
    base = tiny.llama()
    model = started(veneer, base, init, **more)
    shake(model)
    model.save_pretrained(tmp_path)
    theirs = from_reference(base, tmp_path)  # without a warning: they are errors here
    assert_close(output(theirs, X), output(model, X))
    assert theirs.peft_config["default"].init_lora_weights is True


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_their_files_of_trained_factors_load_here_and_say_so(tmp_path: Path, init: str) -> None:
    base = tiny.llama()
    theirs = started(peft, base, init)
    shake(theirs)
    with quiet():
        theirs.save_pretrained(tmp_path)
    with pytest.warns(veneer.VeneerWarning, match="must be the original base"):
        ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(output(ours, X), output(theirs, X))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_their_converted_files_load_here(init: str, tmp_path: Path) -> None:
    base = tiny.llama()
    theirs = started(peft, base, init)
    with quiet():
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
        shake(theirs)
        end = tmp_path / "end"
        theirs.save_pretrained(end, path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = veneer.PeftModel.from_pretrained(copy.deepcopy(base), end)
    assert_close(output(ours, X), output(theirs, X))


def test_minor_components_are_trained_as_there(tmp_path: Path) -> None:
    """The signs of singular vectors are free, so their start is taken over."""
    base = tiny.llama()
    theirs = started(peft, base, "mica").train()
    ours = started(veneer, base, "mica").train()
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine.keys() == its.keys()
    for name in (name for name in its if "lora_" in name):
        assert_close(mine[name] @ mine[name].T, its[name] @ its[name].T)
    ours.load_state_dict(its)
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            step(model)
            optimizer.step()
    assert_close(output(ours.eval(), X), output(theirs.eval(), X))
    assert not torch.allclose(output(ours, X), output(base, X))
    ours.save_pretrained(tmp_path / "ours")
    with quiet():
        theirs.save_pretrained(tmp_path / "theirs")
    from_there = veneer.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    from_here = from_reference(base, tmp_path / "ours", is_trainable=True)
    for model in (from_there, from_here):
        assert_close(output(model.eval(), X), output(ours, X))
        assert all("lora_A" in n for n, p in model.named_parameters() if p.requires_grad)


def test_orthogonal_factors_are_distributed_as_theirs() -> None:
    found = {}
    for library in (veneer, peft):
        torch.manual_seed(0)
        config = library.LoraConfig(r=8, lora_alpha=12, target_modules=["0"], init_lora_weights="orthogonal")
        model = library.get_peft_model(nn.Sequential(nn.Linear(2000, 1500)), config)
        factors = [p.detach() for n, p in model.named_parameters() if "lora_" in n]
        found[library] = [float(p.std()) for p in factors]
        assert float((factors[1] @ factors[0]).abs().max()) < 1e-6
    for ours, theirs in zip(found[veneer], found[peft], strict=True):
        assert abs(ours / theirs - 1) < 0.05


def test_a_file_that_another_library_wrote_again_computes_the_same(tmp_path: Path) -> None:
    model = started(veneer, tiny.llama(), "pissa")
    shake(model)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file)
    again = veneer.PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert_close(output(again, X), output(model, X))
    assert again.peft_config["default"].r == 8

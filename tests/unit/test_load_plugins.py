"""Plug-ins of other packages: found by entry point, asked for in a configuration, refused where missing."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from veneer import LoraConfig, PeftConfig, PeftModel, get_peft_model, registry
from veneer.errors import ConfigError, VeneerWarning
from veneer.testing import registered_for_now

MODULE = """
import torch
from veneer.inits import Init, InitResult
from veneer.variants.plain import Plain
from veneer.variants import Variant


class Halved(Variant):
    name = "halved"

    def forward(self, layer, name, x, result, base):
        return result + (layer.add_branch(name, x, result) - result) / 2

    def merged(self, weight, delta, extra):
        return weight + delta / 2


class Twos(Init):
    names = ("twos",)

    def __call__(self, request):
        return InitResult(torch.full(request.shape_a, 2.0), torch.zeros(request.shape_b))


class Rounded(Twos):
    names = ("rounded",)
    replaces_base = True

    def __call__(self, request):
        rounded = request.matrix().round()
        return InitResult(torch.ones(request.shape_a), torch.zeros(request.shape_b), base=rounded)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package with a plug-in that was not looked for yet."""
    place = tmp_path / "site"
    (place / "halves-1.0.dist-info").mkdir(parents=True)
    (place / "halves_plugin.py").write_text(MODULE)
    (place / "halves-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\n")
    (place / "halves-1.0.dist-info" / "entry_points.txt").write_text(
        "[veneer.plugins]\nhalves = halves_plugin\n"
    )
    monkeypatch.syspath_prepend(place)
    with registered_for_now():
        monkeypatch.setattr(registry._Plugins, "loaded", False)
        yield place
    sys.modules.pop("halves_plugin", None)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def config(**more: object) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["0"]} | more)


def test_they_are_loaded_before_anything_is_looked_up(package: Path) -> None:
    assert "halves_plugin" not in sys.modules
    made = get_peft_model(model(), config(init_lora_weights="twos", variant="halved"))
    assert "halves_plugin" in sys.modules
    assert torch.equal(made.base_model.model[0].lora_A["default"].weight, torch.full((2, 4), 2.0))


def test_saved_loaded_and_refused_without_the_plug_in(package: Path, tmp_path: Path) -> None:
    made = get_peft_model(model(), config(init_lora_weights=False, variant="halved")).eval()
    made.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (text["peft_type"], text["variant"]) == ("LORA:halved", "halved")
    assert "variant_options" not in text
    again = PeftModel.from_pretrained(model(), tmp_path).eval()
    x = torch.randn(2, 4)
    assert torch.equal(again(x), made(x))
    assert PeftConfig.from_pretrained(tmp_path).to_json() == text
    (package / "halves-1.0.dist-info" / "entry_points.txt").write_text("")
    from veneer.variants import registry as variants

    del variants._items["halved"]
    with pytest.raises(ConfigError, match=r"'halved' belongs to a plug-in that is not here: install"):
        PeftModel.from_pretrained(model(), tmp_path)


def test_an_initialisation_is_named_in_a_file_only_where_it_matters(package: Path, tmp_path: Path) -> None:
    for name, saved in (("twos", True), ("rounded", "rounded")):
        made = get_peft_model(model(), config(init_lora_weights=name))
        assert made.peft_config["default"].init_lora_weights == name
        assert made.peft_config["default"].to_json()["init_lora_weights"] == saved


def test_a_broken_one_is_said_and_left_out(package: Path) -> None:
    (package / "halves_plugin.py").write_text("import nothing_of_that_name")
    with pytest.warns(VeneerWarning, match=r"'halves' \(halves_plugin\) of halves could not be loaded"):
        registry.load_plugins()
    registry.load_plugins()
    with pytest.raises(ConfigError, match="twos"):
        config(init_lora_weights="twos")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "dora"}, "use_dora=True"),
        ({"variant": "plain"}, "no option at all"),
        ({"variant": "nothing"}, "not here"),
        ({"variant_options": {"a": 1}}, "without a variant"),
        ({"variant": 3}, "variant must be"),
        ({"variant": "x", "variant_options": [1]}, "must be a dictionary"),
        ({"variant": "x", "use_dora": True}, "not here"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        get_peft_model(model(), config(**options))


def test_no_file_names_code(tmp_path: Path) -> None:
    made = get_peft_model(model(), config())
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    text = json.loads(path.read_text())
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    path.write_text(json.dumps({**text, "variant": "evil", "peft_type": "LORA:evil"}))
    with (
        pytest.warns(VeneerWarning, match="was edited after it was saved.*variant: None -> 'evil'"),
        pytest.raises(ConfigError, match="'evil' belongs to a plug-in"),
    ):
        PeftModel.from_pretrained(model(), tmp_path)
    assert "evil" not in sys.modules

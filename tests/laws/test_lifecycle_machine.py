"""Any order of operations on a model, compared with a dense model of what it should compute.

The dense model is ``W + Σ s·B A`` over the adapters that are active or merged, by plain torch on the base's
own layer types. After `unload` the base is bit-identical.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.tolerances import assert_close
from veneer import LoraConfig, PeftModel, get_peft_model
from veneer.layers import LoraLayer

NAMES = ("a", "b", "c", "d")
LAYERS = ("embed", "up", "mix", "conv")


class Net(nn.Module):
    """One layer of each geometry."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.up = nn.Linear(6, 8)
        self.mix = Conv1D(6, 8)
        self.conv = nn.Conv1d(6, 4, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, length) integer -> (batch, 4, length)."""
        return self.conv(self.mix(torch.tanh(self.up(self.embed(x)))).transpose(1, 2))


def fresh() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double().eval()


@dataclass
class Shadow:
    """What is known of one adapter: the factors as they were when it was merged, and as they are."""

    scaling: dict[str, float]
    factors: dict[str, tuple[Tensor, Tensor]]
    frozen: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def dense_delta(layer: str, a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in the layout of each layer's weight, written out without the library."""
    if layer == "embed":
        return (b @ a).T
    if layer == "up":
        return b @ a
    if layer == "mix":
        return (b @ a).T
    full = torch.zeros(4, 6, 3, dtype=a.dtype)  # the grouped convolution, without its groups
    half = b.shape[1]
    for g in range(2):
        for row in range(2):
            out = 2 * g + row
            full[out] = torch.einsum("r,rik->ik", b[out, :, 0], a[g * half : (g + 1) * half])
    return full


class Life(RuleBasedStateMachine):
    """The verbs as rules; the invariant compares outputs after each."""

    @initialize()
    def begin(self) -> None:
        self.base = fresh()
        self.model: PeftModel = get_peft_model(
            self.base, LoraConfig(r=2, lora_alpha=3, target_modules=list(LAYERS)), "a"
        ).eval()
        self.shadows = {"a": self.look("a")}
        self.active = ["a"]
        self.merged: list[str] = []
        self.disabled = False
        self.loaded = True
        self.seed = 0
        self.directory = tempfile.TemporaryDirectory()
        self.saved: dict[str, Shadow] = {}
        self.train_("a")

    def teardown(self) -> None:
        if hasattr(self, "directory"):
            self.directory.cleanup()

    # -- helpers ---------------------------------------------------------------------------------

    def layers(self) -> dict[str, LoraLayer]:
        return self.model.base_model.layers()

    def look(self, name: str) -> Shadow:
        held = {p: layer for p, layer in self.layers().items() if name in layer.held_adapters}
        factors = {p: tuple(t.detach().clone() for t in layer.factors(name)[:2]) for p, layer in held.items()}
        return Shadow({p: layer.scaling[name] for p, layer in held.items()}, factors)

    def train_(self, name: str) -> None:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for layer in self.layers().values():
                if name in layer.held_adapters:
                    for p in layer.adapter_parameters(name):
                        p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.3)
        frozen = self.shadows[name].frozen if name in self.shadows else {}
        self.shadows[name] = self.look(name)
        self.shadows[name].frozen = frozen

    def some(self, data: st.DataObject) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.shadows)), min_size=1, max_size=3, unique=True))

    def one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.shadows)))

    def free(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([n for n in NAMES if n not in self.shadows]))

    def expected(self) -> Tensor:
        dense = fresh()
        counted = [] if self.disabled else list(dict.fromkeys([*self.active, *self.merged]))
        with torch.no_grad():
            for layer in LAYERS:
                module = getattr(dense, layer)
                delta = torch.zeros(())
                for name in counted:
                    shadow = self.shadows[name]
                    if layer in shadow.factors:
                        # A merged adapter counts as it was when it was merged.
                        use = shadow.frozen if name in self.merged else shadow.factors
                        delta = delta + shadow.scaling[layer] * dense_delta(layer, *use[layer])
                if delta.dim():
                    if layer == "conv":
                        weight = torch.zeros(4, 6, 3, dtype=torch.float64)
                        weight[:2, :3], weight[2:, 3:] = module.weight[:2], module.weight[2:]
                        module.groups, module.weight = 1, nn.Parameter(weight + delta)
                    else:
                        module.weight += delta
            return dense(self.x)

    @property
    def x(self) -> Tensor:
        return torch.arange(10).view(2, 5) % 7

    # -- rules ---------------------------------------------------------------------------------------

    @precondition(lambda self: self.loaded and len(self.shadows) < len(NAMES))
    @rule(data=st.data(), r=st.sampled_from([2, 4, 16]), where=st.sets(st.sampled_from(LAYERS), min_size=1))
    def add(self, data: st.DataObject, r: int, where: set[str]) -> None:
        name = self.free(data)
        first = not self.shadows
        config = LoraConfig(r=r, lora_alpha=r / 2 + 2, target_modules=sorted(where), use_rslora=r == 16)
        self.model.add_adapter(name, config)
        self.shadows[name] = self.look(name)
        self.train_(name)
        if first:
            self.active = [name]

    @precondition(lambda self: self.loaded and self.shadows)
    @rule(data=st.data())
    def retrain(self, data: st.DataObject) -> None:
        self.train_(self.one(data))

    @precondition(lambda self: self.loaded and self.shadows)
    @rule(data=st.data(), single=st.booleans())
    def set_active(self, data: st.DataObject, single: bool) -> None:
        names = self.some(data)
        if single:
            names = names[:1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unmerging")
            self.model.set_adapter(names[0] if single else names)
        self.active = names
        self.merged = [n for n in self.merged if n in names]

    @precondition(lambda self: self.loaded)
    @rule(disabled=st.booleans())
    def switch(self, disabled: bool) -> None:
        if disabled:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
        self.disabled = disabled

    @precondition(lambda self: self.loaded and self.shadows)
    @rule(data=st.data(), all_active=st.booleans())
    def merge(self, data: st.DataObject, all_active: bool) -> None:
        names = list(self.active) if all_active else self.some(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*stays as it was merged")
            self.model.merge_adapter(None if all_active else names)
        # What is merged already stays as it was merged, whatever became of its factors.
        new = [n for n in names if n not in self.merged]
        for shadow in (self.shadows[n] for n in new):
            shadow.frozen = dict(shadow.factors)
        self.merged += new

    @precondition(lambda self: self.loaded)
    @rule()
    def unmerge(self) -> None:
        self.model.unmerge_adapter()
        self.merged = []

    @precondition(lambda self: self.loaded and self.shadows)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.one(data)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was the active one.*")
            self.model.delete_adapter(name)
        self.merged = [n for n in self.merged if n != name]
        del self.shadows[name]
        self.active = [n for n in self.active if n != name]

    @precondition(lambda self: self.loaded and 0 < len(self.shadows) < len(NAMES))
    @rule(data=st.data())
    def rename(self, data: st.DataObject) -> None:
        old, new = self.one(data), self.free(data)
        self.model.base_model.rename_adapter(old, new)
        self.shadows[new] = self.shadows.pop(old)
        self.active = [new if n == old else n for n in self.active]
        self.merged = [new if n == old else n for n in self.merged]

    @precondition(lambda self: self.loaded and self.shadows)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = self.one(data)
        self.model.save_pretrained(self.directory.name, selected_adapters=[name])
        self.saved[name] = Shadow(
            {p: layer.specs[name].scaling for p, layer in self.layers().items() if name in layer.specs},
            dict(self.shadows[name].factors),
        )

    @precondition(lambda self: self.loaded and self.saved and len(self.shadows) < len(NAMES))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        file, name = data.draw(st.sampled_from(sorted(self.saved))), self.free(data)
        first = not self.shadows
        self.model.load_adapter(Path(self.directory.name) / file, name)
        self.shadows[name] = copy.deepcopy(self.saved[file])
        for path, pair in self.look(name).factors.items():
            assert all(map(torch.equal, pair, self.saved[file].factors[path]))
        if first:
            self.active = [name]

    @precondition(lambda self: self.loaded and 0 < len(self.shadows) < len(NAMES))
    @rule(data=st.data(), kind=st.sampled_from(["linear", "cat", "svd"]))
    def add_weighted(self, data: st.DataObject, kind: str) -> None:
        names, new = self.some(data), self.free(data)
        if kind == "svd" and any("conv" in self.shadows[n].factors for n in names):
            kind = "cat"  # groups have no single pair of factors: refused, see the unit tests
        weights = data.draw(
            st.lists(st.sampled_from([1.0, -1.0, 0.5]), min_size=len(names), max_size=len(names))
        )
        rank = 64 if kind == "svd" else None
        self.model.base_model.add_weighted_adapter(names, weights, new, kind, svd_rank=rank)
        made = self.look(new)
        for layer in made.factors:
            wanted = sum(
                w * s.scaling[layer] * dense_delta(layer, *s.factors[layer])
                for w, s in zip(weights, (self.shadows[n] for n in names), strict=True)
                if layer in s.factors
            )
            assert_close(made.scaling[layer] * dense_delta(layer, *made.factors[layer]), wanted)
        self.shadows[new] = made

    @precondition(lambda self: self.loaded)
    @rule()
    def unload(self) -> None:
        self.base = self.model.base_model.unload()
        self.loaded = False
        self.compare_base()

    @precondition(lambda self: not self.loaded)
    @rule()
    def adapt_again(self) -> None:
        directory, saved, seed = self.directory, self.saved, self.seed
        self.model = get_peft_model(
            self.base, LoraConfig(r=2, lora_alpha=3, target_modules=list(LAYERS)), "a"
        ).eval()
        self.shadows, self.active, self.merged = {}, ["a"], []
        self.disabled, self.loaded = False, True
        self.directory, self.saved, self.seed = directory, saved, seed
        self.train_("a")

    # -- what always holds ---------------------------------------------------------------------------

    def compare_base(self) -> None:
        expected = fresh()
        assert [n for n, _ in self.base.named_modules()] == [n for n, _ in expected.named_modules()]
        for (name, after), (_, before) in zip(
            self.base.named_parameters(), expected.named_parameters(), strict=True
        ):
            assert torch.equal(after, before), name
        assert self.base.conv.groups == 2

    @invariant()
    def computes_what_it_should(self) -> None:
        if not hasattr(self, "model") or not self.loaded:
            return
        model = self.model
        assert sorted(model.peft_config) == sorted(self.shadows)
        assert model.active_adapters == self.active
        if self.disabled:
            with torch.no_grad():
                assert torch.equal(model(self.x), fresh()(self.x))
        else:
            assert_close(model(self.x), self.expected())
        for layer in self.layers().values():
            trainable = {n for n in layer.held_adapters if next(layer.adapter_parameters(n)).requires_grad}
            assert trainable <= set(self.active)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

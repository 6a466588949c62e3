"""The laws of one adapted layer: what has to hold for every layer, initialisation, variant and backend."""

from __future__ import annotations

import copy
import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.backends import find, prepare_backward
from veneer.errors import MergeError
from veneer.layers import Factor, LoraLayer, wrap
from veneer.peft_model import PeftModel, get_peft_model
from veneer.testing.made import Made, train
from veneer.testing.tolerances import BY_DTYPE, assert_close


@dataclass(frozen=True)
class Law:
    """One law.

    Attributes:
        holds: Raises an `AssertionError` if the law does not hold.
        mergeable: It is about merging, so it is skipped where merging is refused.
        once: It does not depend on the values: one dtype and the default initialisation are enough.
    """

    holds: Callable[[Made], None]
    mergeable: bool = False
    once: bool = False

    @property
    def name(self) -> str:
        return self.holds.__name__


LAWS: list[Law] = []


def law(mergeable: bool = False, once: bool = False) -> Callable[[Callable[[Made], None]], Law]:
    """Add a function to `LAWS`."""

    def enter(holds: Callable[[Made], None]) -> Law:
        LAWS.append(made := Law(holds, mergeable, once))
        return made

    return enter


@contextmanager
def rounding_is_known() -> Iterator[None]:
    """Ignore the warning that a 16-bit merge rounds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*survives rounding.*")
        yield


def weight_of(base: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors, wherever they are stored."""
    if not find(base).readable:
        return {name: tensor.clone() for name, tensor in base.state_dict().items()}
    names = [name for name in ("weight", "bias") if isinstance(getattr(base, name, None), Tensor)]
    return {name: find(base).read(base, name).clone() for name in names}


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, types and bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def dense_like(made: Made, layer: LoraLayer) -> nn.Module:
    """The base as an ordinary frozen module, with the weight that the initialisation gave it."""
    base = made.dense().eval()
    with torch.no_grad():
        for name, tensor in weight_of(layer.base_layer).items():
            getattr(base, name).copy_(tensor)
    return base


def address(tensor: Tensor) -> int:
    """The address of its values; 0 if it has none, or is made of other tensors."""
    return 0 if tensor.is_meta or hasattr(tensor, "__tensor_flatten__") else tensor.data_ptr()


def parts_of(tensor: Tensor) -> list[Tensor]:
    """The tensor, or those that it is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def base_of(made: Made, layer: LoraLayer) -> nn.Module:
    """What the layer must equal bit for bit while its adapters are disabled."""
    return copy.deepcopy(layer.base_layer) if made.quantised else dense_like(made, layer)


def slack(made: Made) -> float:
    """How many rounding errors may add up: outputs of a merged weight are sums over its rows."""
    return 4.0 if made.dtype in (torch.bfloat16, torch.float16) else 1.0


def close(actual: Tensor, expected: Tensor, made: Made) -> None:
    """Assert that two results of the same formula agree, as closely as the dtype allows."""
    tolerance = BY_DTYPE[made.dtype]
    size = float(expected.detach().abs().max()) if expected.numel() else 1.0
    wide = tolerance._replace(atol=tolerance.atol * slack(made) * max(1.0, size))
    if (stored := made.stored) is not None:
        wide = stored._replace(atol=stored.atol * max(1.0, size))
    assert_close(actual, expected, wide)


def close_once_merged(actual: Tensor, expected: Tensor, made: Made) -> None:
    """As `close`, but a weight that was quantised again may differ by what that costs."""
    if made.requantised is None:
        close(actual, expected, made)
    elif expected.numel():
        error = (actual - expected).detach().double().norm() / expected.detach().double().norm()
        assert error <= made.requantised.rtol


@law()
def a_fresh_adapter_is_an_identity_where_its_init_promises_it(made: Made) -> None:
    """A new adapter changes nothing if its initialisation promises so, and the base only if declared."""
    layer, x = made.layer(trained=False), made.x()
    base = base_of(made, layer)
    init = made.start
    if init.identity and not (init.exact and made.kind.additive):
        close(layer(x), base(x), made)
    elif init.identity:
        fused = type(base) is nn.Linear and made.is_dense
        # The fused step lays its input out anew, and torch's kernels differ by layout in the last place.
        assert torch.equal(layer(x), base(x.contiguous() if fused else x))
        alone = made.base() if made.quantised else made.dense()
        prepare_backward(alone)
        assert torch.equal(alone.eval()(x), base(x)), "the init replaced the base weight"
    elif x.numel():
        assert not torch.equal(layer(x), base(x))


@law()
def only_factors_get_gradients(made: Made) -> None:
    """The adapter's parameters get gradients, and nothing else does."""
    layer, x = made.layer().train(), made.x()
    if x.is_floating_point():
        x.requires_grad_()
    layer(x).float().square().sum().backward()
    own = {id(p) for p in layer.trained_parameters("default")}
    for name, parameter in layer.named_parameters():
        assert parameter.requires_grad == (id(parameter) in own), name
        assert (parameter.grad is not None) == (id(parameter) in own), name
        if parameter.grad is not None and x.numel():
            assert parameter.grad.to_dense().any(), name


@law()
def the_branch_is_the_delta(made: Made) -> None:
    """The layer computes what a dense twin with the merged weight computes; so do its gradients."""
    if made.unmergeable:
        _merge_is_refused(made)
        return
    layer, x = made.layer(), made.x()
    dense: Any = dense_like(made, layer).double()
    base64 = dense_like(made, layer).double()
    delta = layer.get_delta_weight("default").double()
    bias = layer.factors("default")[2]
    with torch.no_grad():
        start, attributes = layer.before_merge(dense.weight)
        extra = {key: tensor.double() for key, tensor in layer.extra("default").items()}
        merged = made.kind.merged(layer.to_matrix(start), layer.to_matrix(delta), extra)
        dense.weight = nn.Parameter(layer.from_matrix(merged, start), requires_grad=False)
        for key, value in attributes.items():
            setattr(dense, key, value)
        if bias is not None:
            dense.bias += layer.scaling["default"] * bias.double()
    x64 = x.double() if x.is_floating_point() else x
    close(layer(x).double(), dense(x64), made)
    if x.numel():
        assert not torch.allclose(dense(x64), base64(x64)), "the case shows no difference"
    if x.is_floating_point():
        (ours,) = torch.autograd.grad(layer(x.requires_grad_()).sum(), x)
        (theirs,) = torch.autograd.grad(dense(x64.requires_grad_()).sum(), x64)
        close(ours.double(), theirs, made)


def _merge_is_refused(made: Made) -> None:
    layer = made.layer()
    before = weight_of(layer.base_layer)
    try:
        layer.merge()
    except MergeError as error:
        assert made.unmergeable in str(error)
    else:
        raise AssertionError("merging was not refused")
    assert_same_tensors(weight_of(layer.base_layer), before)
    assert not layer.merged


@law(mergeable=True)
def merged_equals_unmerged(made: Made) -> None:
    """Merging does not change what the layer computes."""
    layer, x = made.layer(), made.x()
    expected = layer(x)
    with rounding_is_known():
        kept = layer.merge()
    assert layer.merged_adapters == ["default"]
    assert kept <= 1.0 + 1e-6 and (kept >= 0.0 or made.quantised)
    close_once_merged(layer(x), expected, made)


@law(mergeable=True)
def unmerge_gives_the_base_back_bit_for_bit(made: Made) -> None:
    """After any number of merges and unmerges the base is what it was."""
    layer, x = made.layer(), made.x()
    before, output = weight_of(layer.base_layer), layer(x)
    attributes = {k: v for k, v in vars(layer.base_layer).items() if isinstance(v, int | str | tuple | None)}
    for _ in range(2):
        layer.merge(safe_merge=True)
        layer.unmerge()
    assert not layer.merged
    assert_same_tensors(weight_of(layer.base_layer), before)
    assert {k: vars(layer.base_layer).get(k) for k in attributes} == attributes
    assert torch.equal(layer(x), output)


@law(mergeable=True)
def unmerge_is_exact_after_the_factors_changed(made: Made) -> None:
    """Unmerging does not depend on what happened to the factors meanwhile."""
    layer = made.layer()
    before = weight_of(layer.base_layer)
    layer.merge()
    train(layer, "default", seed=9)
    layer.rename_adapter("default", "other")
    for parameter in layer.adapter_parameters("other"):
        parameter.data = parameter.data.to(torch.bfloat16)
    layer.unmerge()
    assert_same_tensors(weight_of(layer.base_layer), before)


@law(mergeable=True)
def unmerge_is_exact_after_a_cast_copy_or_pickle(made: Made) -> None:
    """Unmerging does not depend on what happened to the layer meanwhile."""
    for dtype in (torch.bfloat16, torch.float64) if made.is_dense else ():
        layer = made.layer()
        expected = {name: tensor.to(dtype) for name, tensor in weight_of(layer.base_layer).items()}
        layer.merge()
        names = set(layer.state_dict())
        for moved in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert set(moved.state_dict()) == names
            moved.to(dtype)
            moved.unmerge()
            assert_same_tensors(weight_of(moved.base_layer), expected)
        assert layer.merged
        layer.delete_adapter("default")
        assert_same_tensors({n: t.to(dtype) for n, t in weight_of(layer.base_layer).items()}, expected)


@law(mergeable=True)
def merging_one_of_two_keeps_the_other(made: Made) -> None:
    """Of several active adapters any may be merged, in any order."""
    layer, x = made.layer(), made.x()
    wrap(layer, made.config(init_lora_weights=False), "second")
    train(layer, "second", seed=5)
    before = weight_of(layer.base_layer)
    layer.set_adapter(["default", "second"])
    expected = layer(x)
    for name in ("default", "second"):
        layer.merge(adapter_names=[name])
        assert layer.merged_adapters == [name]
        close_once_merged(layer(x), expected, made)
        layer.unmerge([name])
        assert_same_tensors(weight_of(layer.base_layer), before)
    layer.merge(adapter_names=["second"])
    layer.merge()
    assert layer.merged_adapters == ["second", "default"]
    close_once_merged(layer(x), expected, made)
    layer.unmerge(["second"])
    close_once_merged(layer(x), expected, made)
    layer.unmerge()
    assert_same_tensors(weight_of(layer.base_layer), before)


@law(mergeable=True)
def what_is_merged_stays_as_it_was_merged(made: Made) -> None:
    """A new strength or new factors have no effect on a merged adapter until it is merged again."""
    layer, x = made.layer(), made.x()
    wrap(layer, made.config(init_lora_weights=False), "second")
    train(layer, "second", seed=5)
    before = weight_of(layer.base_layer)
    layer.set_adapter(["default", "second"])
    expected = layer(x)
    layer.merge(adapter_names=["second"])
    alone = weight_of(layer.base_layer)
    layer.set_strength("second", 0.0)
    with torch.no_grad():
        for parameter in layer.adapter_parameters("second"):
            parameter.zero_()
    layer.merge()
    close_once_merged(layer(x), expected, made)
    layer.unmerge(["default"])
    assert_same_tensors(weight_of(layer.base_layer), alone)
    layer.unmerge()
    assert_same_tensors(weight_of(layer.base_layer), before)


@law()
def disabled_equals_the_base_bit_for_bit(made: Made) -> None:
    """With adapters disabled the layer is its base, merged or not."""
    layer, x = made.layer().train(), made.x()
    base = base_of(made, layer).train()
    for merged in (False,) if made.unmergeable else (False, True):
        if merged:
            layer.merge()
        layer.enable_adapters(False)
        for grad in (False, True):
            given = x.clone().requires_grad_(grad and x.is_floating_point())
            with torch.set_grad_enabled(grad):
                assert torch.equal(layer(given), base(given))
        layer.enable_adapters(True)
        if x.numel():
            assert not torch.equal(layer(x), base(x))


@law()
def forward_writes_nothing(made: Made) -> None:
    """A forward leaves parameters, buffers, modules and the state of adapters alone."""
    layer, x = made.layer(lora_dropout=0.3), made.x()
    states = ["trained", "disabled"] if made.unmergeable else ["trained", "disabled", "merged", "both"]
    for state in states:
        if state == "merged":
            layer.enable_adapters(True)
            layer.merge()
        elif state in ("disabled", "both"):
            layer.enable_adapters(False)
        layer.train(state == "trained")
        held = dict(layer.named_parameters()) | dict(layer.named_buffers())
        # nn.Embedding's own renormalisation is the base's business.
        held = {n: t for n, t in held.items() if not (made.case.renormalises and ".lora_" not in f".{n}")}
        before = {
            name: (t._version, address(t), [part.clone() for part in parts_of(t)]) for name, t in held.items()
        }
        modules = [id(m) for m in layer.modules()]
        attributes = {k: copy.copy(v) for k, v in vars(layer).items() if not k.startswith("__")}
        given = x.clone()
        layer(given)
        assert torch.equal(given, x)
        assert [id(m) for m in layer.modules()] == modules
        assert vars(layer).keys() == attributes.keys()
        for key in ("scaling", "_active", "_merged", "_live", "_disabled", "_specs"):
            assert vars(layer)[key] == attributes[key], key
        for name, tensor in held.items():
            version, pointer, value = before[name]
            assert tensor._version == version and address(tensor) == pointer, name
            assert tensor.is_meta or all(map(torch.equal, parts_of(tensor), value)), name


@law(once=True)
def configuration_is_not_changed(made: Made) -> None:
    """The caller's configuration stays the caller's."""
    config = made.config()
    before = copy.deepcopy(config)
    wrap(made.base(), config)
    assert config == before and vars(config) == vars(before)


@law(once=True)
def deepcopy_and_pickle_give_independent_equals(made: Made) -> None:
    """Copies compute the same and share nothing."""
    layer, x = made.layer(), made.x()
    expected = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), expected)
        assert [n for n, _ in twin.named_modules()] == [n for n, _ in layer.named_modules()]
        shared = {t.data_ptr() for t in layer.parameters()} & {t.data_ptr() for t in twin.parameters()}
        assert not shared
        train(twin, "default", seed=11)
        assert torch.equal(layer(x), expected)
        if x.numel():
            assert not torch.equal(twin(x), expected)


class Swept(nn.Module):
    """What a quantiser puts in a module's place."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


def sweep(module: nn.Module) -> int:
    """Replace every torch module that a quantiser looks for, as quantisers do."""
    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    count = 0
    for name, child in list(module.named_children()):
        if isinstance(child, kinds) or type(child).__name__ == "Conv1D":
            setattr(module, name, Swept(child))
            count += 1
        else:
            count += sweep(child)
    return count


@law(once=True)
def quantising_after_wrapping_leaves_the_factors_alone(made: Made) -> None:
    """A quantiser that replaces the linear layers of a model finds only the base."""
    layer, x = made.layer(), made.x()
    expected = layer(x)
    factors = [p.detach().clone() for p in layer.adapter_parameters("default")]
    known = sweep(Holder(made.dense()))  # a base of another type is nothing that a quantiser looks for
    assert sweep(layer) == known
    assert isinstance(layer.base_layer, Swept) == bool(known)
    assert all(isinstance(m, Factor) for c in ("lora_A", "lora_B") for m in dict(getattr(layer, c)).values())
    for after, before in zip(layer.adapter_parameters("default"), factors, strict=True):
        assert torch.equal(after, before) and after.dtype == before.dtype
    if type(layer).__name__ in ("LoraLinear", "LoraConv1D"):
        close(layer(x), expected, made)


@law()
def the_fused_step_equals_its_twin(made: Made) -> None:
    """Values and gradients are those of base and branch one after the other."""
    layer, x = made.layer(), made.x()
    if not made.kind.additive:
        return
    results = []
    for twin in (False, True):
        given = x.clone().requires_grad_(x.is_floating_point())
        layer.zero_grad()
        if twin:
            branch = layer.low_rank("default", given) * layer.scaling["default"]
            out = layer.base_layer(given) + branch.to(made.dtype)
        else:
            out = layer(given)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out).to(out)).sum().backward()
        grads = [p.grad.to_dense() for p in layer.adapter_parameters("default") if p.grad is not None]
        results.append((out.detach(), *grads, *([given.grad] if given.grad is not None else [])))
    for fused, plain in zip(*results, strict=True):
        close(fused, plain, made)


class Holder(nn.Module):
    """A model around one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)  # type: ignore[no-any-return]


@law(once=True)
def saved_and_loaded_is_the_same_bit_for_bit(made: Made) -> None:
    """Every parameter of an adapter is in its file, and comes back from there."""
    model: Any = get_peft_model(Holder(made.base()), made.config(target_modules=["inner"])).eval()
    train(model, "default")
    x = made.x()
    expected = model(x)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        base = Holder(made.dense())
        for name, tensor in weight_of(model.get_base_model().inner.base_layer).items():
            getattr(base.inner, name).data.copy_(tensor)
        again = PeftModel.from_pretrained(base, place).eval()
    ours, theirs = ({n: p for n, p in m.named_parameters() if "lora_" in n} for m in (model, again))
    assert_same_tensors(dict(theirs), dict(ours))
    close(again(x), expected, made)

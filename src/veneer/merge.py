"""Merging adapters into base weights, and taking them out again bit for bit.

For one module (`merge`, `unmerge`) or for all modules of a model (`merge_all`, `unmerge_all`), all or none:
everything that can be checked is checked before anything is written (`refusals`), and writing happens under a
`Rollback`. Nothing else writes base weights.

`unmerge` restores a copy; it does not subtract. With the copy (`Undo`) the merged updates are kept: a merged
adapter stays as it was merged, whatever happens to its factors and its strength.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from veneer import backends, variants
from veneer.adapters import AdapterModule, adapter_modules, as_names, walk
from veneer.backends import Backend
from veneer.errors import Hint, MergeError, Text
from veneer.ops.merging import (
    SMALL,
    Term,
    check_merge,
    is_finite,
    kept_share,
    merge_dense,
    merge_into_,
    shared_buffers,
    written_at_once,
)
from veneer.rollback import Rollback, Rows, Undo, Update
from veneer.sharded import UNMERGEABLE, in_pieces
from veneer.wording import bullets

#: What a merge keeps in order to be undone: a copy of the weight, or nothing.
Undoing: TypeAlias = Literal["copy"] | None


class Mergeable(AdapterModule):
    """A module whose adapters can be merged into the weight of its base.

    A module with a `tied_adapter` shares that module's weight and factors, and is merged with it.
    """

    #: The tensor of the base that is adapted.
    weight_name: str = "weight"
    _merged: list[str]
    _undo: Undo | None

    def __init__(self, **state: Any) -> None:
        super().__init__(_merged=[], **state)
        self._modules["_undo"] = None  # present from the start, because compiled code reads it

    # -- what a subclass says --------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        raise NotImplementedError

    def update_of(self, name: str) -> Update | Rows:
        """What merging an adapter now would write: the adapter's tensors, detached."""
        raise NotImplementedError

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Reasons against merging these adapters, apart from the storage of the weight."""
        return []

    # -- what is merged --------------------------------------------------------------------------------

    @property
    def backend(self) -> Backend:
        return backends.find(self.get_base_layer(), self.weight_name)

    @property
    def _owner(self) -> Mergeable:
        owner = self.tied_adapter or self
        assert isinstance(owner, Mergeable)
        return owner

    @property
    def merged_adapters(self) -> list[str]:
        present = self.held_adapters
        return [name for name in self._owner._merged if name in present]

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def rename_merged(self, old: str, new: str) -> None:
        """Rename a merged adapter."""
        self._merged = [new if name == old else name for name in self._merged]
        if (kept := self._undo) is not None:
            kept.updates = {new if name == old else name: u for name, u in kept.updates.items()}

    @property
    def merged_for_good(self) -> bool:
        """Whether adapters are merged without a copy of the weight from before."""
        return self.merged and self._owner._modules["_undo"] is None

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        undo: Undoing = "copy",
    ) -> float:
        """Add adapters into the base weight: see `veneer.merge.merge`."""
        return merge(self, safe_merge, adapter_names, undo=undo)

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Restore the base weight, bit for bit: see `veneer.merge.unmerge`."""
        unmerge(self, adapter_names)


# -- one module ----------------------------------------------------------------------------------------


def merge(
    layer: Mergeable,
    safe_merge: bool = False,
    adapter_names: Sequence[str] | None = None,
    *,
    undo: Undoing = "copy",
) -> float:
    """Add adapters of one module into its base weight: ``W ← W + Σ s·BA``, rounded once from float32.

    Adapters that are already merged stay as they were merged, even if their factors or strengths changed.

    Args:
        layer: The module.
        safe_merge: Also refuse a base that is not finite. An update that is not finite, or that would leave
            the range of the weight's type, is always refused.
        adapter_names: The adapters; None means the active ones. Those that are already merged, or that this
            module does not have, are skipped.
        undo: What to keep for `unmerge`: "copy", the weight; None, nothing that is not already kept.

    Returns:
        The share of the update that survived rounding to the weight's type, in [0, 1]. For a weight that is
        quantised again it is negative if that changes the weight more than the update does. NaN if the base
        is not finite.

    Raises:
        MergeError: If merging would give a wrong weight. Nothing has changed then.
    """
    names = layer.active_adapters if adapter_names is None else as_names(adapter_names)
    layer = layer._owner
    updates = updates_of(layer, names)
    if not updates:
        return 1.0
    if reasons := [*_no_undo(undo), *refusals(layer, updates, safe_merge, undo)]:
        raise MergeError("; ".join(reasons))
    with Rollback() as back:
        return merge_updates(layer, updates, undo, back)


def updates_of(layer: Mergeable, names: Sequence[str]) -> dict[str, Update | Rows]:
    """What merging would write, for those of the adapters that the module has and that are not merged yet."""
    present = layer.held_adapters
    return {n: layer.update_of(n) for n in names if n in present and n not in layer._merged}


def refuses_merge(layer: Mergeable, names: Sequence[str]) -> list[str]:
    """Reasons against merging these adapters of a module, whatever their values; empty if none."""
    base, name = layer.get_base_layer(), layer.weight_name
    weight = getattr(base, name, None)
    if isinstance(weight, Tensor) and in_pieces(weight):
        return [UNMERGEABLE]
    reasons = []
    if (
        isinstance(weight, Tensor)
        and weight.is_meta
        and layer.backend.tensor_device(base, name).type == "meta"
    ):
        reasons.append("the base weight is on the meta device: it has no values to merge into")
    if (reason := layer.backend.refuses_to_write(base, name)) is not None:
        reasons.append(reason)
    return [*reasons, *layer.refuses_merge(names)]


def refusals(
    layer: Mergeable, updates: Mapping[str, Update | Rows], safe_merge: bool, undo: Undoing
) -> list[str]:
    """All reasons against merging updates into a module that can be checked."""
    reasons = refuses_merge(layer, list(updates))
    if undo is not None and layer.merged_for_good:
        reasons.append(original_is_gone(layer._merged))
    if not reasons and (reason := _not_finite(layer, updates, safe_merge)) is not None:
        reasons.append(reason)  # last, because there may be no values to check
    return reasons


def original_is_gone(merged: Sequence[str]) -> str:
    """Why the weight from before these adapters were merged is not available."""
    return (
        f"{', '.join(map(repr, merged))} was merged without an undo (merge_and_unload, or undo=None), so the "
        "weight before that is gone: load the base again"
    )


def _no_undo(undo: object) -> list[str]:
    """Why a value of ``undo`` is invalid, or None."""
    if undo in ("copy", None):
        return []
    gone = (
        "it was removed, since it saved one byte a weight for twice the time: " if undo == "residual" else ""
    )
    return [f"undo={undo!r} does not exist; {gone}use undo='copy'"]


@torch.no_grad()
def merge_updates(
    layer: Mergeable, updates: Mapping[str, Update | Rows], undo: Undoing, back: Rollback
) -> float:
    """Merge updates that have passed `refusals`.

    Args:
        layer: The module.
        updates: By the names of their adapters, none of which is merged.
        undo: As of `merge`.
        back: Receives what restores the module. If that takes memory (see `_keeps_old`), it must end before
            another module is merged.

    Returns:
        As of `merge`.
    """
    base, backend, kept_before = layer.get_base_layer(), layer.backend, layer._undo
    biased = any(update.bias is not None for update in updates.values())
    rows = any(isinstance(update, Rows) for update in updates.values())
    merged, every = [*layer._merged, *updates], list(updates.values())
    keeps = undo is not None or rows or kept_before is not None
    weight = None if keeps or biased else _written_at_once(layer, every)
    back.on_failure(_note_merged, layer, merged, weight, 0 if weight is None else weight._version)
    back.hold(layer, base)
    kept = kept_before or (Undo() if keeps else None)
    if kept_before is not None:
        back.hold(kept_before)
        if rows:
            back.on_failure(_write, layer, list(kept_before.updates.values()))
        else:
            back.hold_values(backend, base, layer.weight_name)
    elif kept is None and weight is None:
        back.hold_values(backend, base, layer.weight_name, briefly=True)
    if biased or (kept_before is not None and "bias" in kept_before.tensors()):
        back.hold_values(backend, base, "bias")
    if kept is not None:
        if kept.updates:
            _restore(layer, kept)
            every = [*kept.updates.values(), *every]
        _keep(layer, kept, every)
        if kept_before is None or rows:
            back.on_failure(_restore, layer, kept)
        kept.updates = {**kept.updates, **{name: update.copied() for name, update in updates.items()}}
    share = _write(layer, every)
    layer._undo = kept
    layer._merged = merged
    layer.adapters_changed()
    return share


@torch.no_grad()
def unmerge(layer: Mergeable, adapter_names: Sequence[str] | None = None) -> None:
    """Restore the base weight of one module, bit for bit, whatever happened to the factors meanwhile.

    Adapters that stay merged stay as they were merged.

    Args:
        layer: The module.
        adapter_names: The adapters to take out; None means all that are merged.

    Raises:
        MergeError: If the weight was merged without keeping an undo. Nothing has changed then.
    """
    layer = layer._owner
    out = layer._merged if adapter_names is None else as_names(adapter_names)
    if not any(name in layer._merged for name in out):
        return
    if (kept := layer._undo) is None:
        raise MergeError(original_is_gone(layer._merged))
    rest = {name: update for name, update in kept.updates.items() if name not in out}
    base, backend = layer.get_base_layer(), layer.backend
    with Rollback() as back:
        back.on_failure(layer.adapters_changed)
        back.hold(layer, base, kept)
        if rest and "rows" not in kept.tensors():
            back.hold_values(backend, base, layer.weight_name)
            if "bias" in kept.tensors():
                back.hold_values(backend, base, "bias")
        else:  # merged once more; no memory is taken before that
            back.on_failure(_write, layer, list(kept.updates.values()))
            back.on_failure(_restore, layer, kept)
        _restore(layer, kept)
        layer._merged = list(rest)
        kept.updates = rest
        if rest:
            if (reason := _not_finite(layer, {}, False)) is not None:
                raise MergeError(f"without {', '.join(map(repr, out))}, {reason}")
            _keep(layer, kept, list(rest.values()))
            _write(layer, list(rest.values()))
        else:
            layer._undo = None
        layer.adapters_changed()


def get_delta_weight(layer: Any, adapter: str) -> Tensor:
    """The scaled update ``s·BA`` of a LoRA layer, in the layout of the weight."""
    base, name = layer.geometry(), layer.weight_name
    weight, _ = layer.before_merge(backends.find(base, name).like(base, name))
    matrix: Tensor = _dense(layer, layer.update_of(adapter))
    return layer.from_matrix(matrix, weight)  # type: ignore[no-any-return]


def _keeps_old(layer: Mergeable) -> bool:
    """Whether rolling back a merge of the module takes no memory beyond what is kept anyway."""
    return layer._undo is not None or layer.backend.quantization is not None


def _note_merged(layer: Mergeable, merged: list[str], weight: Tensor | None, version: int) -> None:
    """Note what is merged after a failure, depending on whether the write happened."""
    if weight is not None and weight._version != version:
        layer._merged = merged
    layer.adapters_changed()


# Below, a layer with an `Update` is a `LoraLayer`, whose geometry tells how ``s·BA`` fits the weight.


def _keep(layer: Any, kept: Undo, updates: Collection[Update | Rows]) -> None:
    """Keep the parts of a base without merged adapters that these updates will change."""
    base, backend, name = layer.get_base_layer(), layer.backend, layer.weight_name
    if each := [update.places for update in updates if isinstance(update, Rows)]:
        weight = backend.read(base, name)
        places = torch.cat([place.to(weight.device) for place in each])
        kept.keep(places=places, rows=weight[places])
        return
    if not kept.tensors():
        _, attributes = layer.before_merge(backend.like(base, name))
        kept.attributes = {key: getattr(base, key) for key in attributes}
        kept.coded = backend.quantization is not None
        kept.keep(**backend.keep(base, name))
    # Only a merged bias changes that of the base, which may be trained meanwhile.
    if not any(update.bias is not None for update in updates):
        kept._buffers.pop("bias", None)
    elif "bias" not in kept.tensors():
        kept.keep(bias=backend.read(base, "bias").clone())


def _restore(layer: Mergeable, kept: Undo) -> None:
    base, backend, tensors = layer.get_base_layer(), layer.backend, kept.tensors()
    if "rows" in tensors:
        _write(layer, [Rows(tensors["places"], tensors["rows"])])
        return
    if (bias := tensors.pop("bias", None)) is not None:
        backend.write(base, bias, "bias")
    backend.put_back(base, tensors, layer.weight_name)
    for name, value in kept.attributes.items():
        setattr(base, name, value)


@torch.no_grad()
def _write(layer: Any, updates: Collection[Any]) -> float:
    """Write the sums of the present weight and bias and these updates; returns the share kept."""
    base, backend, name = layer.get_base_layer(), layer.backend, layer.weight_name
    weight = backend.read(base, name)
    if any(isinstance(update, Rows) for update in updates):
        in_place = backend.writable_in_place(base)
        new = weight if in_place else weight.clone()
        for update in updates:
            new.index_copy_(0, update.places.to(new.device), update.rows.to(new))
        if not in_place:
            backend.write(base, new, name)
        return 1.0
    if _adds_in_place(layer, updates):
        terms = [_term(layer, update) for update in updates]
        kept = merge_into_(weight, terms, transpose=layer.transposed, checked=True)
    else:
        start, attributes = layer.before_merge(weight)
        delta = _delta(layer, start, updates)
        if backend.quantization is None:
            new, kept = merge_dense(start, delta)
            backend.write(base, new, name)
        else:
            target = start.to(delta.dtype) + delta
            backend.write(base, target, name)
            kept = kept_share(delta, backend.read(base, name).to(delta.dtype) - target)
        for key, value in attributes.items():
            setattr(base, key, value)
    if any(update.bias is not None for update in updates):
        backend.write(base, _with_biases(backend.read(base, "bias"), updates), "bias")
    return kept


@torch.no_grad()
def _not_finite(layer: Any, updates: Mapping[str, Any], safe_merge: bool) -> str | None:
    """Why the merged weight or bias would not be finite, or None; nothing is written.

    An update that is not finite is always refused.

    Args:
        layer: The module.
        updates: What is to be merged, in addition to what is merged.
        safe_merge: Also refuse a base that is not finite.
    """
    if any(isinstance(update, Rows) for update in updates.values()):
        dtype = layer.base_dtype()
        broken = [repr(name) for name, update in updates.items() if not is_finite(update.rows.to(dtype))]
        return f"the rows of {', '.join(broken)} would be NaN or infinite in {dtype}" if broken else None
    every = [*(layer._undo.updates.values() if layer._undo is not None else ()), *updates.values()]
    if any(isinstance(update, Rows) for update in every):
        return None
    sizes = {name: update.size() for name, update in updates.items()}
    broken = [repr(name) for name, update in updates.items() if not update.is_finite(sizes[name])]
    if broken:
        return (
            f"{', '.join(broken)} holds values that are NaN or infinite (a diverged training run?), which "
            "merging would spread over the weight"
        )
    if any(u.bias is not None for u in every):
        bias = _original(layer, "bias")
        made = _with_biases(bias, every)
        if not bool((made.isfinite() if safe_merge else made.isfinite() | ~bias.isfinite()).all()):
            return f"the merged bias would hold infinite or undefined values in {bias.dtype}"
    backend = layer.backend
    dtype = backend.tensor_dtype(layer.get_base_layer(), layer.weight_name)
    narrow = dtype == torch.float16 and backend.quantization is None
    if not safe_merge and not narrow and all(size < SMALL for size in sizes.values()):
        return None
    weight = _original(layer, layer.weight_name)
    if _adds_in_place(layer, every):
        try:
            terms = [_term(layer, update) for update in every]
            check_merge(weight, terms, transpose=layer.transposed, check_finite=safe_merge)
        except MergeError as error:
            return str(error)
        return None
    start, _ = layer.before_merge(weight)
    made = merge_dense(start, _delta(layer, start, every))[0]
    if is_finite(made) or not (safe_merge or bool((start.isfinite() & ~made.isfinite()).any())):
        return None
    return f"the merged weight would hold infinite or undefined values in {made.dtype}"


def _original(layer: Any, name: str) -> Tensor:
    """A tensor of the base without adapters, except those that are merged for good."""
    base = layer.get_base_layer() if layer.merged_for_good else layer.original_base()
    return backends.find(base, layer.weight_name).read(base, name)


def _adds_in_place(layer: Any, updates: Collection[Any]) -> bool:
    additive = all(variants.get(update.variant).additive for update in updates)
    return layer.linear and additive and layer.backend.writable_in_place(layer.get_base_layer())


def _written_at_once(layer: Any, updates: Sequence[Any]) -> Tensor | None:
    """The weight, if a single operation writes the update, so that no copy is needed; else None."""
    if not _adds_in_place(layer, updates):
        return None
    weight: Tensor = layer.backend.read(layer.get_base_layer(), layer.weight_name)
    terms = [_term(layer, update) for update in updates]
    return weight if written_at_once(weight, terms) and not weight.is_inference() else None


def _term(layer: Any, update: Update) -> Term:
    b, a = layer.matrices(update.a, update.b)
    return b, a, update.scaling


def _dense(layer: Any, update: Update) -> Tensor:
    matrix: Tensor = layer.product(update.a, update.b)
    return matrix * update.scaling


def _delta(layer: Any, start: Tensor, updates: Collection[Update]) -> Tensor:
    """The sum of all updates, in the shape of the weight and at least in float32."""
    matrix = layer.to_matrix(start).to(torch.promote_types(start.dtype, torch.float32))
    total = torch.zeros_like(matrix)
    for update in updates:
        extra = {key: tensor.to(matrix) for key, tensor in update.extra.items()}
        merged = variants.get(update.variant).merged(matrix, _dense(layer, update).to(matrix), extra)
        total += merged - matrix
    return layer.from_matrix(total, start)  # type: ignore[no-any-return]


def _with_biases(bias: Tensor, updates: Collection[Update]) -> Tensor:
    """The bias of a base plus those of the updates, in its own type."""
    total = bias.to(torch.promote_types(bias.dtype, torch.float32))
    for update in updates:
        if update.bias is not None:
            total = total + update.bias.to(total) * update.scaling
    return total.to(bias.dtype)


# -- all modules of a model ------------------------------------------------------------------------------


def merge_all(
    model: nn.Module,
    layers: Mapping[str, Mergeable],
    names: Sequence[str],
    back: Rollback,
    *,
    safe_merge: bool = False,
    untie: bool = False,
    undo: Undoing = "copy",
    progressbar: bool = False,
) -> dict[str, float]:
    """Merge adapters into all modules of a model, after checking everything that can be checked.

    Args:
        model: The base model with the modules in it.
        layers: The modules by their paths.
        names: The adapters.
        back: Receives what restores the model, as far as that takes no additional copies.
        safe_merge: As of `merge`.
        untie: Give a module whose weight is shared with another one a weight of its own.
        undo: As of `merge`.
        progressbar: Show progress on standard error.

    Returns:
        The share of the update that each module kept, by its path: see `merge`.

    Raises:
        MergeError: Naming every module that cannot be merged.
    """
    if reasons := _no_undo(undo):
        raise MergeError(reasons[0])
    own = {path: layer for path, layer in layers.items() if layer.tied_adapter is None}
    chosen = {p: updates for p, layer in own.items() if (updates := updates_of(layer, names))}
    shared = shared_weights(model, {path: own[path] for path in chosen})
    problems = [
        Text(f"{path}: {reason}")
        for path, updates in chosen.items()
        for reason in refusals(own[path], updates, safe_merge, undo)
    ]
    if not untie:
        problems += [
            Text(
                f"{path}: its weight is also the weight of {', '.join(others)}, which would change with it. ",
                Hint("untie", True),
                " gives it a weight of its own",
            )
            for path, others in shared.items()
        ]
    if problems:
        raise MergeError(bullets("these layers cannot be merged:", problems, len(problems)))
    _untie(model, [own[path] for path in shared], back)
    kept = {}
    try:
        with shared_buffers():
            for number, (path, updates) in enumerate(chosen.items(), 1):
                if progressbar:
                    print(f"\rmerging {number}/{len(chosen)}", end="", file=sys.stderr, flush=True)
                with Rollback() as one:
                    kept[path] = merge_updates(own[path], updates, undo, one)
                    if _keeps_old(own[path]):
                        back.take_over(one)
    finally:
        if progressbar:
            print(file=sys.stderr)
    return kept


def unmerge_all(layers: Mapping[str, Mergeable]) -> None:
    """Unmerge all modules of a model.

    Args:
        layers: The modules by their paths.

    Raises:
        MergeError: Naming every module whose weight cannot be restored. Nothing has changed then.
    """
    gone = [(path, layer) for path, layer in layers.items() if layer.merged_for_good]
    if gone:
        reasons = [f"{path}: {original_is_gone(layer.merged_adapters)}" for path, layer in gone]
        raise MergeError(bullets("these layers cannot be unmerged:", reasons, len(reasons)))
    for layer in layers.values():
        unmerge(layer)


def _untie(model: nn.Module, layers: Sequence[Mergeable], back: Rollback) -> None:
    """Give modules their own weights, and update the model's configuration."""
    for layer in layers:
        base, name = layer.get_base_layer(), layer.weight_name
        back.hold(base)
        weight: nn.Parameter = getattr(base, name)
        setattr(base, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
    config: Any = getattr(model, "config", None)
    if layers and getattr(config, "tie_word_embeddings", False):
        back.hold(config)
        config.tie_word_embeddings = False


def shared_weights(model: nn.Module, layers: Mapping[str, Mergeable]) -> dict[str, list[str]]:
    """Modules whose base weight is another module's weight too, with those modules' paths."""
    users: dict[Any, dict[int, str]] = {}
    # A module that appears in several places counts once: it does not share its weight.
    for place, module in walk(model):
        for parameter in (p for p in module._parameters.values() if p is not None):
            place = place.removesuffix(".base_layer").removesuffix(".token_adapter")
            users.setdefault(_storage(parameter), {}).setdefault(id(module), place)
    followers = {
        id(m.get_base_layer()): m.tied_adapter
        for m in adapter_modules(model)
        if isinstance(m, Mergeable) and m.tied_adapter is not None
    }
    found = {}
    for path, layer in layers.items():
        base = layer.get_base_layer()
        weight = base._parameters.get(layer.weight_name)
        if weight is None or id(base) in followers:
            continue
        sharing = users.get(_storage(weight), {})
        others = [p for i, p in sharing.items() if i != id(base) and followers.get(i) is not layer]
        if others:
            found[path] = others
    return found


def _storage(parameter: nn.Parameter) -> Any:
    """Identifies the memory of a parameter; the parameter itself if it has no memory of its own."""
    if parameter.is_meta or parameter.numel() == 0 or hasattr(parameter, "__tensor_flatten__"):
        return id(parameter)
    address = parameter.untyped_storage().data_ptr()
    return (address, parameter.storage_offset()) if address else id(parameter)

"""Adapters into the base weight, and out of it again bit for bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, variants
from veneer.adapters import as_names
from veneer.errors import AdapterNameError, MergeError
from veneer.layers.factor import Factor, Undo, Undoing, Update, not_an_undo
from veneer.layers.holder import Holder, original_is_gone
from veneer.ops.merging import (
    SMALL,
    Term,
    check_merge,
    is_finite,
    kept_share,
    merge_dense,
    merge_into_,
    written_at_once,
)
from veneer.rollback import Rollback
from veneer.sharded import UNMERGEABLE, in_pieces, is_distributed


class Mergeable(Holder):
    """A holder whose adapters can be added into the base weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The scaled update ``s·BA`` in the layout of the weight it is merged into."""
        if adapter not in self._specs:
            raise AdapterNameError(f"this layer has no adapter {adapter!r}; it has: {list(self._specs)}")
        weight, _ = self.before_merge(self._weight_meta())
        return self.from_matrix(self._dense_update(self.update_of(adapter)), weight)

    def update_of(self, name: str) -> Update:
        """What merging an adapter now would add; its own tensors, detached."""
        a, b, bias = self.update_factors(name)
        extra = {key: tensor.detach() for key, tensor in self.extra(name).items()}
        variant = self._specs[name].variant
        return Update(
            a.detach(),
            b.detach(),
            None if bias is None else bias.detach(),
            extra,
            self.scaling[name],
            variant,
        )

    def _dense_update(self, update: Update) -> Tensor:
        """The scaled update as a matrix (out, in·k…)."""
        return self.product(update.a, update.b) * update.scaling

    def _term(self, update: Update) -> Term:
        return (*self.matrices(update.a, update.b), update.scaling)

    def _weight_meta(self) -> Tensor:
        """The base weight's shape before merging, without its values."""
        base, name = self.geometry(), self.weight_name
        return backends.find(base, name).like(base, name)

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Why merging these adapters would be wrong; empty if it is right."""
        base, backend = self.get_base_layer(), self.backend
        reasons: list[str] = []
        weight = getattr(base, self.weight_name, None)
        if isinstance(weight, Tensor) and in_pieces(weight):
            return [UNMERGEABLE]
        if is_distributed(weight) and not all(map(Factor.is_plain, self._factor_modules(names))):
            return [
                "its factors are units of FSDP by themselves, which shows them where they are called alone: "
                "shard whole adapted layers or blocks, or merge where the base is whole"
            ]
        if isinstance(weight, Tensor) and weight.is_meta and self.base_device().type == "meta":
            reasons.append("the base weight is on the meta device: it has no values to merge into")
        if (reason := backend.refuses_to_write(base, self.weight_name)) is not None:
            reasons.append(reason)
        empty = [n for n in names if any(p.is_meta for p in self.adapter_parameters(n))]
        if empty and self.base_device().type != "meta":
            named = ", ".join(map(repr, empty))
            reasons.append(f"the factors of {named} were never loaded (low_cpu_mem_usage)")
        specs = [self._specs[name] for name in names]
        kinds = {variants.get(s.variant).refuses_merge(s) for s in specs}
        reasons += sorted(reason for reason in kinds if reason is not None)
        if self.merged_for_good and not all(variants.get(s.variant).additive for s in specs):
            reasons.append(original_is_gone(self._merged))
        biased = [n for n in names if self.bias_of(n) is not None]
        if biased and getattr(base, "bias", None) is None:
            reasons.append(
                f"lora_bias of {', '.join(map(repr, biased))} has no place to go: the base layer has no "
                "bias, and the architecture would drop one. Keep the adapter unmerged"
            )
        elif biased and (reason := backend.refuses_to_write(base, "bias")) is not None:
            reasons.append(reason)
        return reasons

    def _factor_modules(self, names: Sequence[str]) -> list[nn.Module]:
        """The modules that hold factors of adapters; an embedding's are parameters."""
        held = [self._container(key)[name] for key in self.factor_names for name in names]
        return [module for module in held if isinstance(module, nn.Module)]

    def refuses_undo(self, undo: Undoing) -> str | None:
        """Why a merge cannot be undone in that way, or None.

        What a quantised or an offloaded weight was is always kept as it was stored.
        """
        if (reason := not_an_undo(undo)) is not None:
            return reason
        return original_is_gone(self._merged) if undo is not None and self.merged_for_good else None

    @torch.no_grad()
    def refuses_values(self, updates: Mapping[str, Update], safe_merge: bool) -> str | None:
        """Why the merged weight or bias would not be finite, or None; nothing is written.

        An update that is not finite is refused whatever is asked for.

        Args:
            updates: What is to be merged, beside what is merged already.
            safe_merge: Refuse a base that is not finite too.
        """
        sizes = {name: update.size() for name, update in updates.items()}
        broken = [name for name, update in updates.items() if not update.is_finite(sizes[name])]
        if broken:
            return (
                f"{', '.join(map(repr, broken))} holds values that are NaN or infinite (a diverged training "
                "run?), which merging would spread over the weight"
            )
        every = [*(self._undo.updates.values() if self._undo is not None else ()), *updates.values()]
        if any(u.bias is not None for u in every):
            bias = self._original("bias")
            made = _with_biases(bias, every)
            if not bool((made.isfinite() if safe_merge else made.isfinite() | ~bias.isfinite()).all()):
                return f"the merged bias would hold infinite or undefined values in {bias.dtype}"
        base, backend = self.get_base_layer(), self.backend
        dtype = backend.tensor_dtype(base, self.weight_name)
        narrow = dtype == torch.float16 and backend.quantization is None
        if not safe_merge and not narrow and all(size < SMALL for size in sizes.values()):
            return None
        weight = self._original(self.weight_name)
        if self._adds_in_place(backend, every):
            try:
                terms = [self._term(update) for update in every]
                check_merge(weight, terms, transpose=self.transposed, check_finite=safe_merge)
            except MergeError as error:
                return str(error)
            return None
        start, _ = self.before_merge(weight)
        made = merge_dense(start, self._delta(start, every))[0]
        if is_finite(made) or not (safe_merge or bool((start.isfinite() & ~made.isfinite()).any())):
            return None
        return f"the merged weight would hold infinite or undefined values in {made.dtype}"

    def _original(self, name: str) -> Tensor:
        """A tensor of the base without adapters; with those that are merged for good."""
        base = self.get_base_layer() if self.merged_for_good else self.original_base()
        backend = backends.find(base, self.weight_name)
        return backend.read(base, name)

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        undo: Undoing = "copy",
    ) -> float:
        """Add adapters into the base weight: ``W ← W + Σ s·BA``, rounded once from float32.

        What is merged already stays as it was merged, whatever became of its factors and its strength.

        Args:
            safe_merge: Refuse a base too that is not finite. An update that is not, or that would leave the
                range of the weight's type, is refused in any case.
            adapter_names: The adapters; None means the active ones. Those merged already, or not held
                here, are passed over.
            undo: What to keep for `unmerge`: "copy", the weight; None, nothing more than there is already.

        Returns:
            The share of the update that survived rounding to the weight's type, in [0, 1]. Where the weight
            is quantised again, below 0 if that changes it by more than the update does. NaN where the base
            is not finite.

        Raises:
            MergeError: If merging would give a wrong weight. Nothing has changed then.
        """
        names = self.to_merge(self._active if adapter_names is None else as_names(adapter_names))
        if not names:
            return 1.0
        reasons = self.refuses_merge(names)
        if (reason := self.refuses_undo(undo)) is not None:
            reasons.append(reason)
        if reasons:
            raise MergeError("; ".join(reasons))
        updates = {name: self.update_of(name) for name in names}
        if (reason := self.refuses_values(updates, safe_merge)) is not None:
            raise MergeError(reason)
        with Rollback() as back:
            return self.merge_updates(updates, undo, back)

    def to_merge(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters that are held here and not merged yet."""
        return [n for n in names if n in self._specs and n not in self._merged]

    @property
    def merged_for_good(self) -> bool:
        """Whether adapters are merged whose weight before merging was not kept."""
        return bool(self._merged) and self._undo is None

    def keeps_old(self, undo: Undoing) -> bool:
        """Whether what puts a merge back costs no memory beside what is kept anyway."""
        return undo is not None or self._undo is not None or self.backend.quantization is not None

    def merged_updates(self) -> dict[str, Update]:
        """What was merged, as it was, by adapter name."""
        return {} if self._undo is None else dict(self._undo.updates)

    @torch.no_grad()
    def merge_updates(self, updates: Mapping[str, Update], keep: Undoing, back: Rollback) -> float:
        """Merge updates, for a caller that has asked all that `refuses_…`.

        Args:
            updates: By the names of their adapters, none of which is merged.
            keep: As ``undo`` of `merge`.
            back: Is given what puts this layer back. Where that takes memory of its own (see `keeps_old`), it
                ends before another layer is merged.

        Returns:
            As of `merge`.
        """
        base, backend, undo = self.get_base_layer(), self.backend, self._undo
        biased = any(update.bias is not None for update in updates.values())
        merged = [*self._merged, *updates]
        weight = None if keep or undo is not None or biased else self._written_at_once(backend, updates)
        back.on_failure(self._note_merged, merged, weight, 0 if weight is None else weight._version)
        back.hold(self, base)
        if undo is None and keep is not None:
            undo = self._take_undo()
            back.on_failure(self._restore, undo)
        elif undo is not None:
            back.hold(undo)
            back.hold_values(backend, base, self.weight_name)
        elif weight is None:
            back.hold_values(backend, base, self.weight_name, briefly=True)
        if biased:
            back.hold_values(backend, base, "bias")
        every = list(updates.values())
        if undo is not None:
            if biased:
                self._keep_bias(undo)
            if undo.updates:
                self._restore(undo)
                every = [*undo.updates.values(), *every]
            undo.updates = {**undo.updates, **{name: update.copied() for name, update in updates.items()}}
        kept = self._write(backend, every)
        self._undo = undo
        self._merged = merged
        self.adapters_changed()
        return kept

    def _written_at_once(self, backend: backends.Backend, updates: Mapping[str, Update]) -> Tensor | None:
        """The weight, if one operation writes all of the update: it needs no copy, as it is done or not."""
        if not self._adds_in_place(backend, updates.values()):
            return None
        weight = backend.read(self.get_base_layer(), self.weight_name)
        terms = [self._term(update) for update in updates.values()]
        return weight if written_at_once(weight, terms) and not weight.is_inference() else None

    def _note_merged(self, merged: list[str], weight: Tensor | None, version: int) -> None:
        """After a failure: what is merged, which is no less than before if the one operation is done."""
        if weight is not None and weight._version != version:
            self._merged = merged
        self.adapters_changed()

    def refuses_unmerge(self) -> str | None:
        """Why the weight that was before merging cannot be had back, or None."""
        if not self._merged:
            return None
        if self._undo is None:
            return original_is_gone(self._merged)
        return None

    @torch.no_grad()
    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Give the base weight back, bit for bit, whatever happened to the factors meanwhile.

        Adapters that stay merged stay as they were merged.

        Args:
            adapter_names: The adapters to take out; None means all that are merged.

        Raises:
            MergeError: If the weight was merged without keeping an undo. Nothing has changed then.
        """
        if not self._merged:
            return
        if self._undo is None:
            raise MergeError(str(self.refuses_unmerge()))
        undo = self._undo
        out = self._merged if adapter_names is None else as_names(adapter_names)
        rest = {name: update for name, update in undo.updates.items() if name not in out}
        base, backend = self.get_base_layer(), self.backend
        with Rollback() as back:
            back.on_failure(self.adapters_changed)
            back.hold(self, base, undo)
            if rest:
                back.hold_values(backend, base, self.weight_name)
                if "bias" in undo.tensors():
                    back.hold_values(backend, base, "bias")
            self._restore(undo)
            self._merged = list(rest)
            undo.updates = rest
            if rest:
                if (reason := self.refuses_values({}, False)) is not None:
                    raise MergeError(f"without {', '.join(map(repr, out))}, {reason}")
                self._write(backend, list(rest.values()))
                self._drop_bias(undo)
            else:
                self._undo = None
            self.adapters_changed()

    def _take_undo(self) -> Undo:
        base, backend, name = self.get_base_layer(), self.backend, self.weight_name
        attributes: dict[str, Any] = {}
        if type(self).before_merge is not Holder.before_merge:
            _, attributes = self.before_merge(backend.like(base, name))
        coded = backend.quantization is not None
        return Undo(backend.keep(base, name), {key: getattr(base, key) for key in attributes}, coded)

    def _keep_bias(self, undo: Undo) -> None:
        """Keep the base's bias too: only a merged bias changes it, and it may be trained by itself."""
        if "bias" not in undo.tensors():
            bias = self.backend.read(self.get_base_layer(), "bias")
            undo.register_buffer("bias", bias.clone(), persistent=False)

    def _drop_bias(self, undo: Undo) -> None:
        """Keep no bias that no merged adapter changes: restored later, it would undo its training."""
        if not any(update.bias is not None for update in undo.updates.values()):
            undo._buffers.pop("bias", None)

    def _restore(self, undo: Undo) -> None:
        base, backend = self.get_base_layer(), self.backend
        tensors = undo.tensors()
        if (bias := tensors.pop("bias", None)) is not None:
            backend.write(base, bias, "bias")
        backend.put_back(base, tensors, self.weight_name)
        for name, value in undo.attributes.items():
            setattr(base, name, value)

    def _adds_in_place(self, backend: backends.Backend, updates: Collection[Update]) -> bool:
        additive = all(variants.get(update.variant).additive for update in updates)
        return self.linear and additive and backend.writable_in_place(self.get_base_layer())

    def _delta(self, start: Tensor, updates: Collection[Update]) -> Tensor:
        """What all updates together change in a weight, in its shape and in float32 at least."""
        matrix = self.to_matrix(start).to(torch.promote_types(start.dtype, torch.float32))
        total = torch.zeros_like(matrix)
        for update in updates:
            extra = {key: tensor.to(matrix) for key, tensor in update.extra.items()}
            variant = variants.get(update.variant)
            total += variant.merged(matrix, self._dense_update(update).to(matrix), extra) - matrix
        return self.from_matrix(total, start)

    def _write(self, backend: backends.Backend, updates: Collection[Update]) -> float:
        """Write the sum of the present weight and these updates, and that of the bias; the share kept."""
        base = self.get_base_layer()
        weight = backend.read(base, self.weight_name)
        if self._adds_in_place(backend, updates):
            terms = [self._term(update) for update in updates]
            kept = merge_into_(weight, terms, transpose=self.transposed, checked=True)
        else:
            start, attributes = self.before_merge(weight)
            delta = self._delta(start, updates)
            if backend.quantization is None:
                new, kept = merge_dense(start, delta)
                backend.write(base, new, self.weight_name)
            else:
                target = start.to(delta.dtype) + delta
                backend.write(base, target, self.weight_name)
                kept = kept_share(delta, backend.read(base, self.weight_name).to(delta.dtype) - target)
            for key, value in attributes.items():
                setattr(base, key, value)
        if any(update.bias is not None for update in updates):
            backend.write(base, _with_biases(backend.read(base, "bias"), updates), "bias")
        return kept


def _with_biases(bias: Tensor, updates: Collection[Update]) -> Tensor:
    """The bias of a base with those of the updates in it, in its own type."""
    total = bias.to(torch.promote_types(bias.dtype, torch.float32))
    for update in updates:
        if update.bias is not None:
            total = total + update.bias.to(total) * update.scaling
    return total.to(bias.dtype)

"""Adapters into the base weight, and out of it again bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from veneer import backends, variants
from veneer.adapters import as_names
from veneer.errors import AdapterNameError, MergeError
from veneer.layers.holder import Holder
from veneer.layers.parts import Undo
from veneer.ops.merging import kept_share, merge_dense, merge_into_


class Mergeable(Holder):
    """A holder whose adapters can be added into the base weight."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The scaled update ``s·BA`` in the layout of the weight it is merged into."""
        if adapter not in self._specs:
            raise AdapterNameError(f"this layer has no adapter {adapter!r}; it has: {list(self._specs)}")
        weight, _ = self.before_merge(self._weight_meta())
        return self.from_matrix(self._dense_update(adapter), weight)

    def _dense_update(self, adapter: str) -> Tensor:
        """The scaled update as a matrix (out, in·k…)."""
        b2, a2 = self.update(adapter)
        return b2.detach() @ a2.detach() * self.scaling[adapter]

    def _weight_meta(self) -> Tensor:
        """The base weight's shape before merging, without its values."""
        base, name = self.original_base(), self.weight_name
        return backends.find(base, name).like(base, name)

    def refuses_merge(self, names: Sequence[str]) -> list[str]:
        """Why merging these adapters would be wrong; empty if it is right."""
        base, backend = self.get_base_layer(), self.backend
        reasons = []
        weight = getattr(base, self.weight_name, None)
        if isinstance(weight, Tensor) and weight.is_meta and self.base_device().type == "meta":
            reasons.append("the base weight is on the meta device: it has no values to merge into")
        if (reason := backend.refuses_to_write(base, self.weight_name)) is not None:
            reasons.append(reason)
        empty = [n for n in names if any(p.is_meta for p in self.adapter_parameters(n))]
        if empty and self.base_device().type != "meta":
            named = ", ".join(map(repr, empty))
            reasons.append(f"the factors of {named} were never loaded (low_cpu_mem_usage)")
        kinds = {variants.get(s.variant).refuses_merge(s) for s in map(self._specs.__getitem__, names)}
        reasons += sorted(reason for reason in kinds if reason is not None)
        biased = [n for n in names if self.factors(n)[2] is not None]
        if biased and getattr(base, "bias", None) is None:
            reasons.append(
                f"lora_bias of {', '.join(map(repr, biased))} has no place to go: the base layer has no "
                "bias, "
                "and the architecture would drop one. Keep the adapter unmerged"
            )
        return reasons

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        keep_undo: bool = True,
    ) -> float:
        """Add adapters into the base weight: ``W ← W + Σ s·BA``, rounded once from float32.

        Args:
            safe_merge: Refuse, before anything changes, if the result would not be finite.
            adapter_names: The adapters; None means the active ones. Those merged already, or not held
                here, are passed over.
            keep_undo: Keep what `unmerge` needs.

        Returns:
            The share of the update that survived rounding to the weight's type, in [0, 1]. Where the weight
            is quantised again, below 0 if that changes it by more than the update does.

        Raises:
            MergeError: If merging would give a wrong weight. Nothing has changed then.
        """
        asked = self._active if adapter_names is None else as_names(adapter_names)
        names = [n for n in asked if n in self._specs and n not in self._merged]
        if not names:
            return 1.0
        if reasons := self.refuses_merge(names):
            raise MergeError("; ".join(reasons))
        undo = self._undo
        if undo is None and keep_undo:
            undo = self._take_undo()
        if undo is not None and any(self.factors(n)[2] is not None for n in names):
            self._add_bias(undo)
        before = list(self._merged)
        try:
            if before and undo is not None:
                self._restore(undo)
            kept = self._merge_from_original([*before, *names], safe_merge)
        except Exception:
            if undo is not None:
                self._restore(undo)
                if before:
                    self._merge_from_original(before, False)
                self._drop_bias(undo, before)
            raise
        self._undo = undo
        self._merged = [*before, *names]
        self.adapters_changed()
        return kept

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Give the base weight back, bit for bit, whatever happened to the factors meanwhile.

        Args:
            adapter_names: The adapters to take out; None means all that are merged.

        Raises:
            MergeError: If the weight was merged without keeping an undo.
        """
        if not self._merged:
            return
        if self._undo is None:
            raise MergeError(
                "these adapters were merged without an undo (merge_and_unload): load the base again"
            )
        rest = [] if adapter_names is None else [n for n in self._merged if n not in as_names(adapter_names)]
        self._restore(self._undo)
        self._merged = rest
        if rest:
            self._merge_from_original(rest, False)
            self._drop_bias(self._undo, rest)
        else:
            self._undo = None
        self.adapters_changed()

    def _take_undo(self) -> Undo:
        base, name = self.get_base_layer(), self.weight_name
        _, attributes = self.before_merge(self.backend.like(base, name))
        coded = self.backend.quantization is not None
        return Undo(self.backend.keep(base, name), {key: getattr(base, key) for key in attributes}, coded)

    def _add_bias(self, undo: Undo) -> None:
        """Keep the base's bias too: only a merged bias changes it, and it may be trained by itself."""
        if "bias" not in undo.tensors():
            bias = self.backend.read(self.get_base_layer(), "bias")
            undo.register_buffer("bias", bias.clone(), persistent=False)

    def _drop_bias(self, undo: Undo, merged: Sequence[str]) -> None:
        """Keep no bias that no merged adapter changes: restored later, it would undo its training."""
        if not any(self.factors(n)[2] is not None for n in merged):
            undo._buffers.pop("bias", None)

    def _restore(self, undo: Undo) -> None:
        base, backend = self.get_base_layer(), self.backend
        tensors = undo.tensors()
        if (bias := tensors.pop("bias", None)) is not None:
            backend.write(base, bias, "bias")
        backend.put_back(base, tensors, self.weight_name)
        for name, value in undo.attributes.items():
            setattr(base, name, value)

    @torch.no_grad()
    def _merge_from_original(self, names: Sequence[str], check_finite: bool) -> float:
        """Write the weight with these adapters into a base that has none merged; the share kept."""
        base, backend = self.get_base_layer(), self.backend
        weight = backend.read(base, self.weight_name)
        kinds = {name: variants.get(self._specs[name].variant) for name in names}
        if self.linear and backend.writable_in_place(base) and all(v.additive for v in kinds.values()):
            terms = [(*self.update(n), self.scaling[n]) for n in names]
            kept = merge_into_(weight, terms, transpose=self.transposed, check_finite=check_finite)
        else:
            start, attributes = self.before_merge(weight)
            wide = torch.promote_types(start.dtype, torch.float32)
            matrix = self.to_matrix(start).to(wide)
            total = torch.zeros_like(matrix)
            for name, variant in kinds.items():
                extra = {key: tensor.detach().to(matrix) for key, tensor in self.extra(name).items()}
                total += variant.merged(matrix, self._dense_update(name).to(matrix), extra) - matrix
            delta = self.from_matrix(total, start)
            new, kept = merge_dense(start, delta)
            if check_finite and not bool(new.isfinite().all()):
                raise MergeError("the merged weight would hold infinite or undefined values")
            if backend.quantization is None:
                backend.write(base, new, self.weight_name)
            else:
                target = start.to(wide) + delta
                backend.write(base, target, self.weight_name)
                kept = kept_share(delta, backend.read(base, self.weight_name).to(wide) - target)
            for key, value in attributes.items():
                setattr(base, key, value)
        self._merge_biases(names)
        return kept

    def _merge_biases(self, names: Sequence[str]) -> None:
        biases = [(self.factors(n)[2], self.scaling[n]) for n in names]
        if not any(bias is not None for bias, _ in biases):
            return
        base, backend = self.get_base_layer(), self.backend
        bias = backend.read(base, "bias")
        total = bias.to(torch.promote_types(bias.dtype, torch.float32))
        for term, scaling in biases:
            if term is not None:
                total = total + term.detach().to(total) * scaling
        backend.write(base, total.to(bias.dtype), "bias")

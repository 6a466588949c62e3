"""Adapters into the base weight, and out of it again bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, variants
from veneer.adapters import as_names
from veneer.errors import AdapterNameError, MergeError
from veneer.layers.holder import Holder
from veneer.layers.parts import Factor, Undo, UndoKind
from veneer.layers.sharded import UNMERGEABLE, in_pieces, is_distributed
from veneer.ops import bit_residual
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
        kinds = {variants.get(s.variant).refuses_merge(s) for s in map(self._specs.__getitem__, names)}
        reasons += sorted(reason for reason in kinds if reason is not None)
        biased = [n for n in names if self.bias_of(n) is not None]
        if biased and getattr(base, "bias", None) is None:
            reasons.append(
                f"lora_bias of {', '.join(map(repr, biased))} has no place to go: the base layer has no "
                "bias, "
                "and the architecture would drop one. Keep the adapter unmerged"
            )
        return reasons

    def _factor_modules(self, names: Sequence[str]) -> list[nn.Module]:
        """The modules that hold factors of adapters; an embedding's are parameters."""
        held = [self._container(key)[name] for key in self.factor_names for name in names]
        return [module for module in held if isinstance(module, nn.Module)]

    @property
    def undo_kind(self) -> UndoKind | None:
        """How the weight before merging is kept; None if it is not."""
        return None if self._undo is None else self._undo.kind

    def refuses_undo(self, undo: UndoKind | None) -> str | None:
        """Why a merge cannot be undone in that way, or None.

        What a quantised or an offloaded weight was is always kept as it was stored.
        """
        if undo not in ("copy", "residual", None):
            return f"undo must be 'copy' or 'residual', got {undo!r}"
        if undo != "residual":
            return None
        base, backend = self.get_base_layer(), self.backend
        if not backend.writable_in_place(base):
            return None
        if (dtype := backend.tensor_dtype(base, self.weight_name)) in bit_residual.DTYPES:
            return None
        return (
            f"undo='residual' keeps what tells 16-bit weights apart, and its weight is {dtype}: merge with "
            "undo='copy'"
        )

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        undo: UndoKind | None = "copy",
    ) -> float:
        """Add adapters into the base weight: ``W ← W + Σ s·BA``, rounded once from float32.

        Args:
            safe_merge: Refuse, before anything changes, if the result would not be finite.
            adapter_names: The adapters; None means the active ones. Those merged already, or not held
                here, are passed over.
            undo: What to keep for `unmerge`: "copy", the weight; "residual", about half of that, for 16-bit
                weights; None, nothing more than there is already.

        Returns:
            The share of the update that survived rounding to the weight's type, in [0, 1]. Where the weight
            is quantised again, below 0 if that changes it by more than the update does.

        Raises:
            MergeError: If merging would give a wrong weight. Nothing has changed then.
        """
        names = self._to_merge(self._active if adapter_names is None else as_names(adapter_names))
        if not names:
            return 1.0
        reasons = self.refuses_merge(names)
        if (reason := self.refuses_undo(undo)) is not None:
            reasons.append(reason)
        if reasons:
            raise MergeError("; ".join(reasons))
        return self.merge_unasked(names, safe_merge, undo)

    def _to_merge(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if n in self._specs and n not in self._merged]

    def merge_unasked(self, names: Sequence[str], safe_merge: bool, kind: UndoKind | None) -> float:
        """`merge` for a caller that has asked `refuses_merge` and `refuses_undo`, of all its layers first."""
        names = self._to_merge(names)
        if not names:
            return 1.0
        undo, before = self._undo, list(self._merged)
        was = None if undo is None else undo.kind
        if undo is not None:
            self._expand(undo)
        elif kind is not None:
            undo = self._take_undo()
        if undo is not None and any(self.bias_of(n) is not None for n in names):
            self._add_bias(undo)
        try:
            if before and undo is not None:
                self._restore(undo)
            kept = self._merge_from_original([*before, *names], safe_merge)
        except Exception:
            if undo is not None:
                self._restore(undo)
                if before:
                    self._merge_from_original(before, False)
                    self._condense(undo, was)
                self._drop_bias(undo, before)
            raise
        if undo is not None:
            self._condense(undo, kind or was)
        self._undo = undo
        self._merged = [*before, *names]
        self.adapters_changed()
        return kept

    def refuses_unmerge(self) -> str | None:
        """Why the weight that was before merging cannot be had back, or None."""
        if not self._merged:
            return None
        if self._undo is None:
            return "these adapters were merged without an undo (merge_and_unload): load the base again"
        if self._undo.residual is None:
            return None
        return self._undo.residual.refuses(getattr(self.get_base_layer(), self.weight_name).detach())

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Give the base weight back, bit for bit, whatever happened to the factors meanwhile.

        Args:
            adapter_names: The adapters to take out; None means all that are merged.

        Raises:
            MergeError: If the weight was merged without keeping an undo, or with undo="residual" and has
                changed since. Nothing has changed then.
        """
        if not self._merged:
            return
        if self._undo is None:
            raise MergeError(str(self.refuses_unmerge()))
        undo, kind = self._undo, self._undo.kind
        rest = [] if adapter_names is None else [n for n in self._merged if n not in as_names(adapter_names)]
        self._expand(undo)
        self._restore(undo)
        self._merged = rest
        if rest:
            self._merge_from_original(rest, False)
            self._condense(undo, kind)
            self._drop_bias(undo, rest)
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

    def _condense(self, undo: Undo, kind: UndoKind | None) -> None:
        """Let the undo be of that kind, beside a base that is merged."""
        if kind != "residual":
            return
        base, backend = self.get_base_layer(), self.backend
        if backend.writable_in_place(base):
            undo.condense(self.weight_name, backend.read(base, self.weight_name))

    def _expand(self, undo: Undo) -> None:
        if undo.residual is not None:
            undo.expand(self.weight_name, getattr(self.get_base_layer(), self.weight_name).detach())

    def _add_bias(self, undo: Undo) -> None:
        """Keep the base's bias too: only a merged bias changes it, and it may be trained by itself."""
        if "bias" not in undo.tensors():
            bias = self.backend.read(self.get_base_layer(), "bias")
            undo.register_buffer("bias", bias.clone(), persistent=False)

    def _drop_bias(self, undo: Undo, merged: Sequence[str]) -> None:
        """Keep no bias that no merged adapter changes: restored later, it would undo its training."""
        if not any(self.bias_of(n) is not None for n in merged):
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
        biases = [(self.bias_of(n), self.scaling[n]) for n in names]
        if not any(bias is not None for bias, _ in biases):
            return
        base, backend = self.get_base_layer(), self.backend
        bias = backend.read(base, "bias")
        total = bias.to(torch.promote_types(bias.dtype, torch.float32))
        for term, scaling in biases:
            if term is not None:
                total = total + term.detach().to(total) * scaling
        backend.write(base, total.to(bias.dtype), "bias")

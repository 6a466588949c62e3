"""Attention in one module: `torch.nn.MultiheadAttention`, both its projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from veneer import backends
from veneer.layers.factor import stand_in
from veneer.layers.layer import LoraLayer
from veneer.ops.mixed_batch import on_gathered_rows
from veneer.routing import Routing, call_by_rows, current
from veneer.spec import LoraSpec


class LoraMultiheadAttention(LoraLayer):
    """LoRA on the packed in-projection (3E, E); the out-projection is a `LoraLinear` inside the base.

    ``[q k v] = x Wᵀ + b + s · dropout(x) Aᵀ Bᵀ``, with A (r, E) and B (3E, r): query, key and value each use
    a third of B. With active adapters the attention between the two projections is computed here, because
    torch's module passes raw weights to a single function; without any, the module itself runs.

    The update of the out-projection counts twice, ``2 s · B A``: PEFT computes it so, merged and unmerged,
    and adapters were trained that way.

    Shapes: query: (L, N, E), (N, L, E) with ``batch_first``, or (L, E) -> the same, and weights (N, L, S).
    """

    takes_rows = False

    wraps = ("torch.nn.modules.activation.MultiheadAttention",)
    transparent = True
    adapts_inside = MappingProxyType({"out_proj": 2})
    weight_name = "in_proj_weight"

    @classmethod
    def shapes(cls, base: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """A (r, E), B (3E, r)."""
        size: int = base.embed_dim  # type: ignore[assignment]
        return (r, size), (3 * size, r)

    @classmethod
    def refuses(cls, base: nn.Module, spec: LoraSpec) -> str | None:
        """Refuses unpacked projections, another forward, biases and variants."""
        if getattr(base, "in_proj_weight", None) is None:
            return "kdim or vdim differs from embed_dim, so there is no packed in-projection to adapt"
        if type(base).forward is not nn.MultiheadAttention.forward:
            return f"{type(base).__name__} has a forward of its own"
        backend = backends.find(base, "in_proj_weight")
        if base.in_proj_weight.is_meta and backend.tensor_device(base, "in_proj_weight").type != "meta":
            return (
                "its weights are offloaded, and are fetched for its own forward only, which an adapted one "
                "does not run: keep this module in memory"
            )
        if spec.lora_bias:
            return "lora_bias: readers of adapter files drop it on nn.MultiheadAttention"
        if spec.variant != "plain":
            return f"the variant {spec.variant!r} is not defined for packed projections"
        return None

    def refuses_combination(self) -> str | None:
        return "adapters of nn.MultiheadAttention cannot be combined; activate them together"

    @property
    def output_projection(self) -> nn.Module:
        """The out-projection: a `LoraLinear` once an adapter is here."""
        return self.base_layer.out_proj  # type: ignore[return-value]

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """As in torch's module; its transformer layers read it. Others are not adapted."""
        return True

    @property
    def out_proj(self) -> nn.Module:
        """The out-projection without adapters, for code that reads its weight."""
        out = self.output_projection
        return out.base_layer if isinstance(out, LoraLayer) else out

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        """x: (..., E) -> (..., 3E), as if x were query, key and value."""
        a, b = self.operators(name)
        return b(a(x))

    def _as_before(self) -> nn.Module:
        """The attention without any adapter, while some are merged."""
        out = self.output_projection
        base = self.original_base()
        original = out.original_base() if isinstance(out, LoraLayer) else out
        return stand_in(base, {}, {"_modules": {**base._modules, "out_proj": original}})

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As in torch's module; ``adapter_names`` as in any LoRA layer."""
        if adapter_names is not None:
            return call_by_rows(  # type: ignore[no-any-return]
                self,
                adapter_names,
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        out = self.output_projection
        routing = current(self)
        if routing is None:
            adapted = bool(self._live or (isinstance(out, LoraLayer) and out._live))
        else:
            adapted = not self._disabled and routing.concerns(self._specs)
        if not adapted:
            base = self._as_before() if self._disabled or routing is not None else self.base_layer
            return base(  # type: ignore[no-any-return]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask too")
        batched = query.dim() == 3
        turned = batched and bool(self.base_layer.batch_first)
        same = query is key and key is value
        if turned:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        elif not batched:
            query, key, value = (t.unsqueeze(1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        causal = is_causal and key_padding_mask is None and not need_weights
        heads: int = self.base_layer.num_heads  # type: ignore[assignment]
        mask = _combined_mask(key_padding_mask, None if causal else attn_mask, query, heads)
        inputs = [query] if same else [query, key, value]
        q, k, v = self._project_in(inputs, routing)
        result, weights = self._attend(q, k, v, mask, need_weights, causal)
        result = out(result)  # batch first, so that rows can be selected
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if turned else result.transpose(0, 1), weights

    def _project_in(self, inputs: Sequence[Tensor], routing: Routing | None) -> Sequence[Tensor]:
        """Query, key and value after the projections and branches; a single input is used for all three."""
        base: Any = self.base_layer if routing is None else self.original_base()
        parts = 3 // len(inputs)
        size = parts * base.embed_dim
        results: list[Tensor] = []
        for i, x in enumerate(inputs):
            own = slice(i * size, (i + 1) * size)
            bias = None if base.in_proj_bias is None else base.in_proj_bias[own]
            result = F.linear(x, base.in_proj_weight[own], bias)
            if routing is None:
                for name in self._live:
                    result = result + self._branch(name, x, own).to(result)
            else:
                result = self._by_rows(routing, x.transpose(0, 1), result.transpose(0, 1), own)
                result = result.transpose(0, 1)
            results += result.chunk(parts, dim=-1)
        return results

    def _branch(self, name: str, x: Tensor, own: slice) -> Tensor:
        """What an adapter adds to these of the features of query, key and value."""
        b = self.update_factors(name)[1][own]
        reduced = self.operators(name)[0](self.dropped(name, x))
        return F.linear(reduced, b.to(reduced.dtype)) * self.strength(name)

    def _by_rows(self, routing: Routing, x: Tensor, result: Tensor, own: slice) -> Tensor:
        """``result`` with the `_branch` of each row's adapter. x, result: (N, L, E) and (N, L, …)."""
        layout = routing.layouts(routing.rows(x.shape[0], self.held_adapters, self._where))[-1]
        sizes = [stop - start for _, start, stop in layout.runs]

        def together(x: Tensor, result: Tensor, fresh: bool) -> Tensor:
            every = zip(layout.runs, torch.split(x, sizes), torch.split(result, sizes), strict=True)
            return torch.cat(
                [y if name is None else y + self._branch(name, x, own).to(y) for (name, *_), x, y in every]
            )

        order = None if layout.order is None else routing.order(layout.order, x.device)
        return on_gathered_rows(x, result, together, order, fresh=False)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool, causal: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Softmax attention. q: (L, N, E), k and v: (S, N, E) -> (N, L, E) and weights (N, H, L, S)."""
        base: Any = self.base_layer
        length, batch, size = q.shape
        extra = 0
        if base.bias_k is not None:
            k = torch.cat([k, base.bias_k.to(k).expand(1, batch, size)])
            v = torch.cat([v, base.bias_v.to(v).expand(1, batch, size)])
            extra += 1
        q, k, v = (t.reshape(*t.shape[:2], base.num_heads, -1).permute(1, 2, 0, 3) for t in (q, k, v))
        if base.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
            extra += 1
        if mask is not None and extra:
            mask = F.pad(mask, (0, extra))
        dropout = base.dropout if base.training else 0.0
        weights = None
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            result = weights @ v
        else:
            result = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        return result.transpose(1, 2).reshape(batch, length, size), weights


def _combined_mask(
    padding: Tensor | None, attention: Tensor | None, query: Tensor, heads: int
) -> Tensor | None:
    """Both masks as numbers to add to the scores, (N or 1, H or 1, L or 1, S); None without a mask."""

    def numbers(mask: Tensor) -> Tensor:
        if mask.dtype is torch.bool:
            return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask, -math.inf)
        return mask.to(query.dtype)

    joined = None
    if attention is not None:
        joined = numbers(attention)
        joined = joined.view(-1, heads, *joined.shape[1:]) if joined.dim() == 3 else joined[None, None]
    if padding is not None:
        blocked = numbers(padding)[:, None, None]
        joined = blocked if joined is None else joined + blocked
    return joined

"""What a failure must leave as it was."""

from __future__ import annotations

import torch
from torch import nn

from veneer.testing.laws import parts_of


class Snapshot:
    """All that a failure must leave as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(name, id(m), type(m)) for name, m in model.named_modules()]
        self.flags = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        self.keys = [tuple(sorted(vars(m))) for m in model.modules()]
        self.tensors = {
            name: (id(t), t.requires_grad, t._version, [part.detach().clone() for part in parts_of(t)])
            for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
        }

    def assert_same(self, model: nn.Module, *, written: bool = False) -> None:
        """All of it is as it was; `written` says that tensors were written in place and put back."""
        after = Snapshot(model)
        assert after.modules == self.modules, "the modules are others"
        assert after.flags == self.flags, "the flags are others"
        assert after.keys == self.keys, "the attributes are others"
        assert after.tensors.keys() == self.tensors.keys()
        for name, (identity, needs_grad, version, value) in self.tensors.items():
            new = after.tensors[name]
            assert new[:2] == (identity, needs_grad) and (written or new[2] == version), name
            assert all(a.is_meta or _equal(a, b) for a, b in zip(new[3], value, strict=True)), name


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, where a NaN is like any other."""
    if torch.equal(a, b):
        return True
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())

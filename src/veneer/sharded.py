"""Tensors that FSDP keeps in pieces: telling them, putting them together, writing into them.

FSDP2 (``fully_shard``) makes a parameter a tensor that knows its shape and where its pieces are. FSDP1
(``FullyShardedDataParallel``) leaves each rank a flat piece of it, or none; only the module that wraps it can
put it together.
"""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: What to do where FSDP1 shows pieces, for messages.
WAY_OUT = (
    "call this for the wrapped model on every rank (get_peft_model_state_dict(fsdp_model), "
    "set_peft_model_state_dict(fsdp_model, …)), or inside `with FSDP.summon_full_params(fsdp_model):`; to "
    "save, pass state_dict=get_peft_model_state_dict(fsdp_model), or what accelerator.get_state_dict gives"
)

#: Why nothing is merged there.
UNMERGEABLE = (
    "FSDP1 keeps the base weight in pieces: merge where it is whole (save the adapter, load it on a base "
    "that is not sharded), or shard with FSDP2 (fully_shard)"
)


def is_distributed(tensor: object) -> bool:
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """A tensor as a whole: from all ranks where FSDP2 has sharded it and not gathered it now."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_into(place: Tensor, value: Tensor) -> None:
    """``place ← value``; where the place is sharded by FSDP2, every rank takes its piece of the value."""
    if is_distributed(place) and not is_distributed(value):
        there: Any = place
        distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
        value = distribute(value.to(there.device), there.device_mesh, there.placements, src_data_rank=None)
    place.copy_(value)


def in_pieces(tensor: Tensor, whole: Container[int] = ()) -> bool:
    """Whether FSDP1 shows no more of a tensor than this rank's piece.

    Args:
        tensor: A parameter, or what FSDP1 has put in its place.
        whole: Storages that hold whole tensors (`whole_storages`): a vector alone does not show what it is.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        return False
    storage = tensor.untyped_storage()
    if tensor.numel() > 0 and storage.nbytes() == 0:
        return True
    if any(getattr(t, "_fsdp_flattened", False) for t in (tensor, tensor._base)):
        return tensor.dim() < 2 and storage.data_ptr() not in whole
    return False


def whole_storages(model: nn.Module) -> set[int]:
    """Where FSDP1 has put its units together now: storages that hold tensors with more than one axis."""
    return {
        parameter.untyped_storage().data_ptr()
        for parameter in model.parameters()
        if getattr(parameter, "_fsdp_flattened", False) and parameter.dim() > 1
    }


def units(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _is_unit(module)]


def is_sharded(model: nn.Module) -> bool:
    return any(is_distributed(p) or getattr(p, "_fsdp_flattened", False) for p in model.parameters())


def whole_by_unit(model: nn.Module, writeback: bool = False) -> Iterator[set[int]]:
    """Put the parameters of one unit of FSDP1 after the other together, for as long as one step of a loop.

    Every rank has to walk through all of it.

    Args:
        model: What holds the units.
        writeback: Keep what is written into the parameters meanwhile.

    Yields:
        The storages that hold whole tensors meanwhile.
    """
    for unit in units(model):
        kind: Any = type(unit)
        with kind.summon_full_params(unit, recurse=False, writeback=writeback):
            flat: Tensor | None = getattr(unit, "_flat_param", None)
            own = set() if flat is None else {flat.untyped_storage().data_ptr()}
            yield own | whole_storages(model)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 take back the whole tensors that it left after a forward.

    They are copies: what is written into them is lost, and they are gone once something asks for the pieces.
    It does that before a state dict is made, for the units further out than the model too.
    """
    found, seen = [model], {model}
    for module in found:  # by hand: every merge begins with this, and `modules()` is generators in generators
        for hook in list(module._state_dict_pre_hooks.values()) if module._state_dict_pre_hooks else ():
            if getattr(hook, "__qualname__", "").startswith("FSDPParamGroup."):
                hook(module, "", False)
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)


def takes_all_ranks(model: nn.Module, tensors: Iterable[Any], given: bool) -> bool:
    """Whether tensors can be had whole only where all ranks ask for them.

    Args:
        model: What they are of.
        tensors: They, as the model or a state dict has them.
        given: They are of a state dict.
    """
    if any(map(is_distributed, tensors)):
        return True
    inside = [] if given else units(model)
    # Inside summon_full_params there is nothing to gather, nor could it be.
    return bool(inside) and not any("SUMMON" in str(getattr(u, "training_state", "")) for u in inside)


@contextmanager
def one_writer(willing: bool) -> Iterator[bool]:
    """Whether this rank is the first of those that are willing to write; all ranks wait for it at the end."""
    answers: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(answers, willing)
    try:
        yield willing and answers.index(True) == torch.distributed.get_rank()
    finally:
        torch.distributed.barrier()


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors as ``state_dict(keep_vars=True)`` gives them; nothing is gathered for it.

    FSDP1's own state dict would ask all ranks.
    """
    if not any(_is_unit(m) or _hides_parameters(m) for m in module.modules()):
        yield from module.state_dict(keep_vars=True).items()
        return
    for path, inner in module.named_modules():
        if _is_unit(inner):
            continue
        skipped = inner._non_persistent_buffers_set
        own: dict[str, Any] = {
            **inner._parameters,
            **{name: buffer for name, buffer in inner._buffers.items() if name not in skipped},
        }
        if _hides_parameters(inner):
            own.update({n: value for n, value in inner.__dict__.items() if isinstance(value, Tensor)})
        for name, tensor in own.items():
            if tensor is not None and name != "_flat_param":
                yield f"{path}.{name}" if path else name, tensor


def _is_unit(module: nn.Module) -> bool:
    return "_fsdp_wrapped_module" in module._modules and hasattr(type(module), "summon_full_params")


def _hides_parameters(module: nn.Module) -> bool:
    """Whether FSDP1 keeps views of a flat parameter as mere attributes (``use_orig_params=False``)."""
    return module.__dict__.get("_fsdp_use_orig_params") is False

"""Check that a model trains, before hours of training, and that an adapter does something."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from veneer.adapters import AdapterModule, AdapterSet, adapter_modules
from veneer.errors import TrainingError, VeneerError
from veneer.forward import in_mode
from veneer.layers import LoraLayer
from veneer.layers.modules_to_save import ModulesToSaveWrapper
from veneer.layers.trainable_tokens import TrainableTokens


@dataclass(frozen=True)
class TrainingCheck:
    """Which parameters one backward pass reached.

    Attributes:
        loss: The loss of the batch.
        trained: Names of the parameters of active adapters that got a gradient other than zero.
        silent: Names of those that got none, or only zeros, with the reason.
        other: Names of trainable parameters that belong to no adapter.
    """

    loss: float
    trained: tuple[str, ...]
    silent: Mapping[str, str]
    other: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether adapters are trained, and all of their parameters get a gradient."""
        return bool(self.trained) and not self.silent

    def __str__(self) -> str:
        lines = [f"loss {self.loss:.4g}; {len(self.trained)} adapter tensors get a gradient"]
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.silent.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"{len(names)} {reason}: {', '.join(names[:3])}" for reason, names in by_reason.items()]
        if self.other:
            lines.append(f"{len(self.other)} trainable tensors outside adapters: {', '.join(self.other[:3])}")
        return "\n".join(lines)


def check_training(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None = None
) -> TrainingCheck:
    """Run one forward and backward pass, and list the adapter parameters that no gradient reaches.

    The model's gradients, its mode, its buffers (running statistics) and the random states of the CPU and of
    every CUDA device in use are restored afterwards. While B is zero, as at the start, the gradient of A is
    zero too: that is not reported.

    Args:
        model: A model with adapters.
        batch: A mapping is passed as keyword arguments, a tuple or list as positional ones, anything else as
            the only argument.
        loss: ``(model, batch) -> scalar``; by default the output's ``loss``, or its mean square.

    Raises:
        TrainingError: If no parameter of an active adapter requires a gradient, or the loss has none or is
            not finite.
    """
    named = dict(model.named_parameters())
    owned = _active_parameters(model)
    names = [name for name, p in named.items() if id(p) in owned]
    frozen = [name for name in names if not named[name].requires_grad]
    if not names or len(frozen) == len(names):
        raise TrainingError(
            "no parameter of an active adapter requires a gradient (active: "
            f"{AdapterSet(model).active() or 'none'}): load it with is_trainable=True, or call "
            "set_adapter(name)"
        )
    with _restored(model), in_mode(model, True):
        for p in named.values():
            p.grad = None
        value = (loss or _default_loss)(model, batch)
        _check_loss(value)
        value.backward()  # type: ignore[no-untyped-call]
        silent = {name: "are frozen" for name in frozen}
        waiting = _waiting_for_b(model)
        for name in names:
            if name not in silent and (problem := _problem(named[name], waiting)):
                silent[name] = problem
    trained = tuple(n for n in names if n not in silent)
    other = tuple(n for n, p in named.items() if p.requires_grad and id(p) not in owned)
    return TrainingCheck(float(value.detach()), trained, silent, other)


def _problem(parameter: nn.Parameter, waiting: Container[int]) -> str:
    gradient = parameter.grad
    if gradient is None:
        return (
            "get no gradient: their module is not called in this forward, or the code around it reads its "
            "weight instead of calling it"
        )
    if bool((gradient.to_dense() if gradient.is_sparse else gradient).any()) or id(parameter) in waiting:
        return ""
    return "get a gradient of zeros"


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore gradients, buffers and random states of a model at the end."""
    gradients = {p: p.grad for p in model.parameters()}
    buffers = _Buffers(model)
    random, cuda = torch.get_rng_state(), _cuda_random_states()
    try:
        yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        buffers.put_back()
        torch.set_rng_state(random)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class _Buffers:
    """The buffers of a model, with copies of their values on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().to("cpu", copy=True))
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is None or not buffer.is_meta
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for module, name, buffer, kept in self._buffers:
            if module._buffers.get(name) is not buffer:
                module._buffers[name] = buffer
            # An unchanged buffer is not written: it may be expanded, or refuse to be written.
            if buffer is not None and kept is not None and not torch.equal(buffer.cpu(), kept):
                buffer.copy_(kept)


def _cuda_random_states() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]


def _active_parameters(model: nn.Module) -> set[int]:
    return {
        id(p)
        for m in model.modules()
        if isinstance(m, AdapterModule)
        for name in m.active_adapters
        if name in m.held_adapters
        for p in m.trained_parameters(name)
    }


def _waiting_for_b(model: nn.Module) -> set[int]:
    """Each A beside a B of zeros, and the reverse: its gradient is zero until the other factor changes."""
    found = set()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in module.held_adapters:
                a, b, _ = module.factors(name)
                if not bool(b.any()):
                    found.add(id(a))
                if not bool(a.any()):
                    found.add(id(b))
    return found


def _default_loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    elif isinstance(batch, tuple | list):
        output = model(*batch)
    else:
        output = model(batch)
    value = getattr(output, "loss", None)
    if value is None:
        value = getattr(output, "logits", output)
        if not isinstance(value, Tensor):
            raise TrainingError(
                "the model's output has neither loss nor logits and is not a tensor: pass loss=lambda model, "
                "batch: …"
            )
        value = value.float().pow(2).mean()
    return value


def _check_loss(value: Tensor) -> None:
    if not value.requires_grad:
        raise TrainingError(
            "the loss does not depend on any trainable parameter: are the adapters disabled or merged, or "
            "does the forward run under torch.no_grad()?"
        )
    if not bool(torch.isfinite(value)):
        raise TrainingError(f"the loss of this batch is {float(value.detach())}")


@torch.no_grad()
def check_adapters_act(model: Any, labels: Mapping[str, str]) -> None:
    """Refuse adapters with which a model computes what its base computes, as before any training.

    Args:
        model: A `PeftModel`.
        labels: By the names of its adapters, what to call them.

    Raises:
        VeneerError: Some change nothing; names all of them.
    """
    modules = adapter_modules(model)
    idle = [
        label
        for name, label in labels.items()
        if model.peft_config[name].bias == "none"
        and not any(_differs(module, name) for module in modules if name in module.held_adapters)
    ]
    if idle:
        raise VeneerError("\n".join(f"{label} changes nothing: all its updates are zero" for label in idle))


def _differs(module: AdapterModule, name: str) -> bool:
    """Whether an adapter lets a module compute something else than the base does."""
    if isinstance(module, LoraLayer):
        a, b, bias = module.factors(name)
        residual = module.residual(name)
        if residual is None:
            moved = bool(a.any()) and bool(b.any())
        else:
            moved = not (torch.equal(a, residual[0]) and torch.equal(b, residual[1]))
        if moved or (bias is not None and bool(bias.any())):
            return True
        if not (extra := module.extra(name)):
            return False
        weight = module.matrix()
        merged = module.variant(name).merged(weight, torch.zeros_like(weight), extra)
        return not torch.allclose(merged, weight)
    if isinstance(module, TrainableTokens):
        rows = module.rows(name)
        return not torch.equal(rows, module.start(module.token_indices[name]).to(rows))
    if isinstance(module, ModulesToSaveWrapper):
        own, base = module.modules_to_save[name].state_dict(), module.original_module.state_dict()
        return own.keys() != base.keys() or not all(torch.equal(own[k], base[k].to(own[k])) for k in own)
    return True

"""One adapter of a family: its optimizer, schedule and random numbers, and the gradients it has gathered."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from veneer.errors import AdapterFileError, TrainingError


@dataclass(frozen=True)
class Step:
    """What `Family.optim_step` says of one adapter.

    Attributes:
        step: Steps taken, this one included.
        learning_rate: The one of this step.
        grad_norm: Of the mean gradient, before clipping.
        count: What the mean is over: tokens, for a loss of tokens.
        taken: Whether the factors changed. They do not if the gradient is not finite, and it is dropped.
    """

    step: int
    learning_rate: float
    grad_norm: float
    count: float
    taken: bool


class State(TypedDict):
    """Everything that `Trainee.restore` needs, as `torch.save` stores it."""

    parameters: list[Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    generator: Tensor
    sampling: Tensor
    gradients: list[Tensor | None]
    count: float
    steps: int
    own_optimizer: bool
    max_grad_norm: float | None
    settings: dict[str, Any]


@dataclass
class Trainee:
    """One adapter of a family.

    Attributes:
        name: Of the adapter.
        parameters: What is trained.
        optimizer: Of these alone.
        scheduler: Changes the learning rate after each step, or None.
        max_grad_norm: The norm to clip gradients to, or None.
        generator: Of its dropout.
        sampling: Of its samples.
        own_optimizer: Whether the caller made the optimizer or the schedule.
        count: How much the gradients that are gathered count.
        steps: Steps taken.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    max_grad_norm: float | None
    generator: torch.Generator
    sampling: torch.Generator
    own_optimizer: bool
    count: float = 0.0
    steps: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def gather(self, gradients: Sequence[Tensor | None], count: float) -> None:
        """Add gradients of a sum over ``count`` things."""
        self.count += count
        taken: set[int] = set()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                continue
            if parameter.grad is not None:
                parameter.grad.add_(gradient)
            elif _fits(gradient, parameter) and gradient.data_ptr() not in taken:
                taken.add(gradient.data_ptr())  # autograd may give two parameters one tensor
                parameter.grad = gradient
            else:
                parameter.grad = torch.empty_like(parameter).copy_(gradient)

    def check_gathered(self) -> None:
        """Refuse a step without gradients.

        Raises:
            TrainingError: Nothing was gathered since the last step.
        """
        if self.count == 0.0:
            raise TrainingError(
                f"{self.name!r} has no gradients: call forward_backward with a batch that its loss counts in"
            )

    def step(self, learning_rate: float | None) -> Step:
        """Take a step with the mean of the gradients, and forget them."""
        if learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate
        used = float(self.optimizer.param_groups[0]["lr"])
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        count = self.count
        norm = float(torch.nn.utils.get_total_norm(gradients)) / count
        taken = math.isfinite(norm)
        if taken:
            limit = math.inf if self.max_grad_norm is None else self.max_grad_norm
            # Mean and clipping in one pass over the gradients; the 1e-6 is that of torch's clipping.
            torch._foreach_mul_(gradients, min(1.0, limit / (norm + 1e-6)) / count)
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.steps += 1
        self.forget()
        return Step(self.steps, used, norm, count, taken)

    def forget(self) -> None:
        """Drop the gradients."""
        self.count = 0.0
        for parameter in self.parameters:
            parameter.grad = None

    def state(self) -> State:
        """What `restore` goes on from."""
        return {
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generator": self.generator.get_state(),
            "sampling": self.sampling.get_state(),
            # Copies: a gradient may share its memory with those of other adapters, which would be stored too.
            "gradients": [None if p.grad is None else p.grad.clone() for p in self.parameters],
            "count": self.count,
            "steps": self.steps,
            "own_optimizer": self.own_optimizer,
            "max_grad_norm": self.max_grad_norm,
            "settings": self.settings,
        }

    def check_state(self, state: State, source: str) -> None:
        """Refuse the state of an adapter that has other parameters.

        Raises:
            AdapterFileError: It does not fit.
        """
        theirs = [tuple(tensor.shape) for tensor in state["parameters"]]
        if theirs != [tuple(parameter.shape) for parameter in self.parameters]:
            raise AdapterFileError(
                f"{source}: {self.name!r} has other factors than in this family: add it with the "
                "configuration that it was saved with, or not at all"
            )

    def restore(self, state: State) -> None:
        """Go on from `state`."""
        with torch.no_grad():
            for parameter, tensor in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(tensor)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.generator.set_state(state["generator"])
        self.sampling.set_state(state["sampling"])
        for parameter, gradient in zip(self.parameters, state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(parameter)
        self.count, self.steps = state["count"], state["steps"]


def _fits(gradient: Tensor, parameter: Tensor) -> bool:
    """Whether a gradient has the layout of its parameter, which fused optimizers take for granted."""
    return (
        gradient.layout == parameter.layout
        and gradient.dtype == parameter.dtype
        and gradient.stride() == parameter.stride()
    )


#: Makes an optimizer of parameters, or a schedule of an optimizer.
Maker = Callable[..., Any]


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A random generator of a device."""
    return torch.Generator(device).manual_seed(seed)

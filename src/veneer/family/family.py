"""A family: adapters that are trained on one base, in one pass, and do not touch one another."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from veneer import inits
from veneer.adapters import as_names, walk
from veneer.atomic import atomic_file, new_directory
from veneer.config import LoraConfig
from veneer.errors import AdapterFileError, AdapterNameError, ConfigError, Hint, TargetError, TrainingError
from veneer.family.batches import Batch, Joined, join
from veneer.family.losses import ModelLoss, Result, check_loss, label_logprobs, loss_of_caller, token_loss
from veneer.family.sampling import Sample, check_prompts, sample
from veneer.family.trainee import Maker, State, Step, Trainee, generator
from veneer.forward import answer_logits, without_cache
from veneer.layers.layer import LoraLayer
from veneer.ops.dropout import Draws
from veneer.peft_model import PeftModel
from veneer.routing import keep_for_backward
from veneer.spec import resolve
from veneer.wording import first_line, listed, warn

_STATE = "family.pt"


class Family:
    """Many adapters trained on one base in one pass.

    The rows of one batch belong to different adapters. The base computes them together, forwards and
    backwards, and each adapter adds its part to its own rows; its gradients, optimizer, schedule and random
    numbers are its own, and it steps when it is told to. The base is frozen and in evaluation mode: only the
    dropout of the adapters drops anything. Calls from several threads run one after another.

    Args:
        model: Any model without adapters.
        exact: Compute each adapter's rows in a pass of its own. Results are then bit for bit those of the
            adapter alone; otherwise they differ by rounding, since a larger product is summed in another
            order.

    Raises:
        TargetError: The model mixes the rows of a batch even in evaluation, or it holds adapters already.
    """

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        mixing = [
            f"{path} ({type(module).__name__})"
            for path, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        ]
        if mixing:
            raise TargetError(
                f"{listed(mixing)} has no running statistics, so each row of a batch depends on all others: "
                "the adapters of a family could not be kept apart"
            )
        self.model = PeftModel(model.eval())
        self.model.requires_grad_(False)
        self.exact = exact
        self._trainees: dict[str, Trainee] = {}
        self._lock = threading.RLock()

    @property
    def names(self) -> list[str]:
        """The adapters, in the order in which they came."""
        return list(self._trainees)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """What is trained of an adapter."""
        return list(self._of(name).parameters)

    def optimizer(self, name: str) -> torch.optim.Optimizer:
        """The optimizer of an adapter."""
        return self._of(name).optimizer

    def generator(self, name: str) -> torch.Generator:
        """What decides what the dropout of an adapter drops."""
        return self._of(name).generator

    def _of(self, name: str) -> Trainee:
        self._check_names([name])
        return self._trainees[name]

    # -- adapters come and go ----------------------------------------------------------------------------

    def add(
        self,
        name: str,
        config: LoraConfig,
        *,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.0,
        optimizer: Maker | None = None,
        schedule: Maker | None = None,
        max_grad_norm: float | None = 1.0,
        seed: int = 0,
    ) -> None:
        """Add an adapter.

        Args:
            name: Of the adapter.
            config: Any `LoraConfig`, whatever the others have.
            learning_rate: Of AdamW.
            weight_decay: Of AdamW.
            optimizer: Makes another optimizer of the parameters: ``optimizer(parameters)``.
            schedule: Makes a schedule of the optimizer: ``schedule(optimizer)``; it steps after each step.
            max_grad_norm: The norm to clip the mean gradient to; None for no clipping.
            seed: Decides the initial factors, what dropout drops, and samples.

        Raises:
            ConfigError: The configuration changes the base that all adapters share.
            AdapterNameError, TargetError: As `PeftModel.add_adapter`. The family is then as it was.
        """
        settings = {"learning_rate": learning_rate, "weight_decay": weight_decay, "seed": seed}
        with self._lock:
            _refuse_changes_of_the_base(config)
            before = torch.get_rng_state()
            torch.default_generator.manual_seed(seed)  # initial factors draw from no other
            try:
                self.model.add_adapter(name, config)
            finally:
                torch.set_rng_state(before)
            try:
                self.model.set_adapter([])  # rows choose their adapters; the first one would stay active
                self.model.eval()  # dropout of the new one is on in steps of training alone
                parameters = list(dict.fromkeys(self.model.base_model.index.parameters(name)))
                for parameter in (
                    *parameters,
                    *(p for one in self._trainees.values() for p in one.parameters),
                ):
                    parameter.requires_grad_(True)
                made = (
                    optimizer(parameters)
                    if optimizer is not None
                    else torch.optim.AdamW(
                        parameters, lr=learning_rate, weight_decay=weight_decay, fused=_can_fuse(parameters)
                    )
                )
                self._trainees[name] = Trainee(
                    name=name,
                    parameters=parameters,
                    optimizer=made,
                    scheduler=None if schedule is None else schedule(made),
                    max_grad_norm=max_grad_norm,
                    generator=generator(parameters[0].device, seed),
                    sampling=generator(torch.device("cpu"), seed),
                    own_optimizer=optimizer is not None or schedule is not None,
                    settings=settings,
                )
            except BaseException:
                self.model.delete_adapter(name)
                raise
            self.model.base_model.mention_unmeasured([name])

    def remove(self, name: str) -> None:
        """Remove an adapter and all that belongs to it.

        Raises:
            AdapterNameError: There is none of that name.
        """
        with self._lock:
            self._check_names([name])
            del self._trainees[name]
            self.model.delete_adapter(name)

    # -- training ----------------------------------------------------------------------------------------

    def forward_backward(
        self, batches: Mapping[str, Batch], loss: str | ModelLoss = "cross_entropy", **options: Any
    ) -> dict[str, Result]:
        """Compute the losses of several adapters, and add their gradients to those that wait for a step.

        Args:
            batches: By adapter: inputs of the model and what the loss needs, each (rows, ...). Texts may have
                different lengths. ``labels`` are the tokens themselves, -100 where no loss falls, as in
                transformers.
            loss: ``"cross_entropy"``, ``"importance_sampling"`` or ``"ppo"`` (both with ``logprobs`` and
                ``advantages`` of the shape of ``labels``), or a function of the model's output for the rows
                of one adapter (what has no rows is None) and its batch. It returns a scalar, or a sum and
                what it is a sum over: the gradient of a step is the mean over everything that was counted
                since the last one.
            **options: Of a loss of tokens: ``low`` and ``high`` of ``"ppo"``.

        Returns:
            By adapter.

        Raises:
            AdapterNameError, DataError, UnknownOptionError: Nothing has been computed.
        """
        with self._lock:
            self._check_names(batches)
            trained = {name: self._trainees[name] for name in batches}
            with self._training(trained):
                losses = self._losses(batches, loss, options)
                counted = [name for name in batches if losses[name][0].requires_grad]
                every = [parameter for name in counted for parameter in trained[name].parameters]
                gradients = iter(
                    torch.autograd.grad([losses[name][0] for name in counted], every, allow_unused=True)
                )
            # Only now, so that a failure before leaves all gradients as they were.
            for name in counted:
                one = trained[name]
                one.gather([next(gradients) for _ in one.parameters], float(losses[name][1]))
            return {name: _result(*losses[name]) for name in batches}

    @torch.no_grad()
    def forward(
        self, batches: Mapping[str, Batch], loss: str | ModelLoss = "cross_entropy", **options: Any
    ) -> dict[str, Result]:
        """The losses of `forward_backward`, without dropout and without gradients."""
        with self._lock:
            losses = self._losses(batches, loss, options)
            return {name: _result(*losses[name]) for name in batches}

    def optim_step(
        self,
        names: str | Sequence[str] | None = None,
        *,
        learning_rate: float | Mapping[str, float] | None = None,
    ) -> dict[str, Step]:
        """Let adapters take a step of their optimizer with the gradients that they gathered.

        A gradient that is not finite is dropped with a warning, and the factors stay.

        Args:
            names: The adapters; None for all that have gradients.
            learning_rate: From now on, for all of them or by adapter.

        Returns:
            By adapter.

        Raises:
            AdapterNameError, TrainingError: No adapter has taken a step.
        """
        with self._lock:
            chosen = [n for n in self.names if self._trainees[n].count] if names is None else as_names(names)
            if names is None and not chosen:
                raise TrainingError("no adapter has gradients: call forward_backward before optim_step")
            self._check_names(chosen)
            for name in chosen:
                self._trainees[name].check_gathered()
            rates = (
                learning_rate if isinstance(learning_rate, Mapping) else dict.fromkeys(chosen, learning_rate)
            )
            steps = {name: self._trainees[name].step(rates.get(name)) for name in chosen}
        if lost := [name for name, step in steps.items() if not step.taken]:
            warn(
                f"the gradient of {listed(map(repr, lost))} is not finite: it was dropped, and the adapter "
                "is as it was. Lower its learning rate, or look at its data"
            )
        return steps

    def sample(
        self,
        prompts: Mapping[str, Sequence[Sequence[int]]],
        *,
        max_tokens: int,
        num_samples: int = 1,
        temperature: float = 1.0,
        stop: Sequence[int] | None = None,
    ) -> dict[str, list[list[Sample]]]:
        """Let adapters answer prompts, in one batch.

        Args:
            prompts: By adapter, each a list of tokens.
            max_tokens: Of an answer.
            num_samples: Answers to each prompt.
            temperature: 0 takes the likeliest token.
            stop: Tokens that end an answer; None for those that the model's configuration names.

        Returns:
            By adapter, ``[prompt][sample]``.

        Raises:
            AdapterNameError, DataError, ConfigError: Nothing has been computed.
        """
        with self._lock:
            self._check_names(prompts)
            check_prompts(prompts)
            generators = {name: self._trainees[name].sampling for name in prompts}
            return sample(
                self.model,
                prompts,
                generators,
                num_samples=num_samples,
                max_tokens=max_tokens,
                temperature=temperature,
                stop=_ends(self.model) if stop is None else stop,
            )

    def _losses(
        self, batches: Mapping[str, Batch], loss: str | ModelLoss, options: Mapping[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor | int, Tensor | None]]:
        """(sum, what it is a sum over, log-probabilities) by adapter."""
        self._check_names(batches)
        check_loss(loss, options, batches)
        base = self.model.get_base_model()
        # Neighbours of one size and similar ranks share their products.
        order = sorted(batches, key=lambda name: (_length(batches[name]), self.model.peft_config[name].r))
        ordered = {name: batches[name] for name in order}
        passes = [{name: batch} for name, batch in ordered.items()] if self.exact else [ordered]
        joined = [join(some, base) for some in passes]
        found: dict[str, tuple[Tensor, Tensor | int, Tensor | None]] = {}
        for one in joined:
            found |= self._losses_of_pass(one, {n: batches[n] for n in one.rows}, loss, options)
        return found

    def _losses_of_pass(
        self,
        joined: Joined,
        batches: Mapping[str, Batch],
        loss: str | ModelLoss,
        options: Mapping[str, Any],
    ) -> dict[str, tuple[Tensor, Tensor | int, Tensor | None]]:
        base, inputs = self.model.get_base_model(), joined.inputs | without_cache(self.model)
        draws = {n: Draws(self._trainees[n].generator, *joined.tokens[n]) for n in batches}
        activation = self.model._activation(joined.names, False, (), inputs)
        with self.model._routed(joined.names, 1, activation, draws) as routing:
            if isinstance(loss, str):
                output, places = answer_logits(base, inputs, joined.labels)  # type: ignore[arg-type]
            else:
                output = base(**inputs)
        keep_for_backward(output, routing)
        if isinstance(loss, str):
            logprobs = label_logprobs(output, joined.labels, places)  # type: ignore[arg-type]
            return {
                name: token_loss(loss, options, logprobs[rows], places, batches[name])
                for name, rows in joined.rows.items()
            }
        return {name: loss_of_caller(loss, joined.own(name, output), batches[name]) for name in joined.rows}

    @contextmanager
    def _training(self, names: Iterable[str]) -> Iterator[None]:
        """Dropout of these adapters, and checkpointing where the base has it; its own dropout stays off."""
        every = [module for _, module in walk(self.model.get_base_model())]
        layers = [module for module in every if isinstance(module, LoraLayer)]
        modules = [layer.lora_dropout[n] for layer in layers for n in names if n in layer.lora_dropout]
        modules = [dropout for dropout in modules if dropout.p]
        modules += [m for m in every if getattr(m, "gradient_checkpointing", False)]
        for module in modules:
            module.training = True
        try:
            yield
        finally:
            for module in modules:
                module.training = False

    # -- files -------------------------------------------------------------------------------------------

    def save_pretrained(
        self, directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Save adapters as ordinary ones, as `PeftModel.save_pretrained` does: each in its sub-directory.

        Raises:
            AdapterNameError, CheckpointError: What was there before is whole.
        """
        with self._lock:
            names = self.names if selected_adapters is None else list(selected_adapters)
            self._check_names(names)
            self.model.save_pretrained(directory, selected_adapters=names)

    def state_dict(self, selected_adapters: Sequence[str] | None = None) -> dict[str, Any]:
        """What `save_state` saves, by adapter; the tensors are on the CPU, and no copies if they were there.

        Raises:
            AdapterNameError: An adapter is unknown.
        """
        with self._lock:
            names = self.names if selected_adapters is None else list(selected_adapters)
            if selected_adapters is not None:
                self._check_names(names)
            configs = self.model.peft_config
            content = {
                name: {"config": json.dumps(configs[name].to_json()), **self._trainees[name].state()}
                for name in names
            }
            return tree_map_only(Tensor, Tensor.cpu, content)  # type: ignore[no-any-return]

    def load_state_dict(self, states: Mapping[str, Any], *, source: str = "the state") -> None:
        """Go on from `state_dict`, as `load_state` does.

        Args:
            states: By adapter.
            source: Where they are from, for messages.

        Raises:
            AdapterFileError: An adapter does not fit the one that the family has. The family is then as it
                was.
        """
        with self._lock:
            added: list[str] = []
            before = {name: copy.deepcopy(one.state()) for name, one in self._trainees.items()}
            try:
                for name, state in states.items():
                    if name not in self._trainees:
                        self._add_saved(name, state, source)
                        added.append(name)
                    self._trainees[name].check_state(state, source)
                for name, state in states.items():
                    self._trainees[name].restore(state)
            except BaseException:
                for name in added:
                    self.remove(name)
                for name, state in before.items():
                    self._trainees[name].restore(state)
                raise

    def save_state(
        self, directory: str | os.PathLike[str], selected_adapters: Sequence[str] | None = None
    ) -> None:
        """Save everything that training changes, of all adapters or of some, to go on bit for bit.

        It is one file, which replaces an earlier one when it is complete; see `load_state`.

        Raises:
            AdapterNameError: There is none of that name. Nothing has been written.
        """
        with self._lock:
            write_states(directory, self.state_dict(selected_adapters))

    def load_state(self, directory: str | os.PathLike[str]) -> None:
        """Go on from `save_state`, on the same base.

        Adapters that the family lacks are added, and those that were not saved stay as they are. One whose
        optimizer or schedule was given to `add` must be added in the same way first.

        Raises:
            AdapterFileError: There is no state, or it is damaged; or an adapter does not fit the one that the
                family has. The family is then as it was.
        """
        self.load_state_dict(read_states(directory), source=str(Path(directory) / _STATE))

    def _add_saved(self, name: str, state: Mapping[str, Any], source: str) -> None:
        if state["own_optimizer"]:
            raise AdapterFileError(
                f"{source}: {name!r} has an optimizer or a schedule of its own: add it with the same ones "
                "first, then load"
            )
        config = LoraConfig(**json.loads(state["config"]))
        self.add(name, config, max_grad_norm=state["max_grad_norm"], **state["settings"])

    def _check_names(self, names: Mapping[str, Any] | Sequence[str]) -> None:
        if unknown := [name for name in names if name not in self._trainees]:
            have = listed(map(repr, self.names)) or "none"
            raise AdapterNameError(
                f"no adapter is called {listed(map(repr, unknown))}; the family has {have}"
            )
        if not names:
            raise AdapterNameError("no adapter is named")


def _refuse_changes_of_the_base(config: LoraConfig) -> None:
    if getattr(config, "bias", "none") != "none":
        raise ConfigError(
            Hint("bias", config.bias), " trains the base's own biases, which all adapters share"
        )
    if inits.find(resolve(config, "family", "").init).replaces_base:
        raise ConfigError(
            Hint("init_lora_weights", config.init_lora_weights),
            " replaces weights of the base, which all adapters share",
        )


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def _ends(model: PeftModel) -> list[int]:
    ends = getattr(getattr(model.get_base_model(), "generation_config", None), "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _length(batch: Batch) -> int:
    return max((len(tensor) for tensor in batch.values() if tensor.dim()), default=0)


def _result(total: Tensor, count: Tensor | int, logprobs: Tensor | None) -> Result:
    number = float(count)
    return Result(float(total.detach()) / max(number, 1.0), number, logprobs)


def write_states(directory: str | os.PathLike[str], states: Mapping[str, Any]) -> None:
    """Write what `Family.state_dict` gives, atomically."""
    place = Path(directory)
    with new_directory(place), atomic_file(place / _STATE) as waiting:
        torch.save(dict(states), waiting)


def read_states(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `write_states` wrote.

    Raises:
        AdapterFileError: There is no state, or it is damaged.
    """
    place = Path(directory) / _STATE
    if not place.is_file():
        raise AdapterFileError(f"{place} does not exist: there is no state of a family")
    try:
        content = torch.load(place, weights_only=True)
        for state in content.values():
            if missing := {"config", *State.__required_keys__} - set(state):
                raise KeyError(f"it lacks {listed(sorted(missing))}")
    except Exception as error:
        raise AdapterFileError(f"{place} is not a state of a family: {first_line(error)}") from error
    return content  # type: ignore[no-any-return]

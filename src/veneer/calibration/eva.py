"""For EVA: the directions in which the inputs of layers vary, and a rank for each layer."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from veneer import inits, module_names
from veneer.calibration.eva_inputs import (
    first_tensor,
    forward_fn_dict,
    gathered,
    moved,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from veneer.calibration.measuring import Hook, layers_to_start, observe, options, planned
from veneer.config import EvaConfig, LoraConfig
from veneer.errors import ConfigError, LoadMismatchError
from veneer.files.keys import PREFIX
from veneer.forward import in_mode
from veneer.inject.sites import sites
from veneer.layers import LoraLayer
from veneer.layers.layer import Prepared
from veneer.layers.start import initialise
from veneer.ops.svd import Components, update_components
from veneer.peft_model import PeftModel
from veneer.routing import disabled
from veneer.wording import bullets, warn

logger = logging.getLogger("veneer")

LayerInputs = Callable[[Any, Any, str], Tensor]
ModelInputs = Callable[[Any, LoraConfig], Any]

#: The largest number of passes over the data. Directions that have not converged are then used as they are.
_MOST_PASSES = 20


@dataclass
class _Watch:
    """A layer, and up to ``k`` directions of its inputs so far, for a rank of ``r``."""

    name: str
    module: nn.Module
    layer: LoraLayer
    r: int
    k: int
    tau: float
    inputs: LayerInputs | None
    gather: bool
    model_input: Any = None
    components: Components | None = None
    #: Which directions have no variance, so that any others would do as well.
    idle: Tensor | None = None
    converged: Tensor | None = None
    digest: bytes = b""

    def rows(self, args: tuple[Any, ...]) -> Tensor:
        """The rows (n, in·k…) that count in one call."""
        if self.inputs is not None:
            rows = self.inputs(args, self.model_input, self.name)
        else:
            rows = self.layer.rows(first_tensor(args, self.name))
        rows = rows.detach()
        return gathered(rows) if self.gather else rows

    def take_digest(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Identify an input without keeping it."""
        rows = self.rows(args)
        about = f"{tuple(rows.shape)}{rows.dtype}".encode()
        raw = rows.contiguous().cpu().view(torch.uint8).numpy().tobytes() if rows.numel() else b""
        self.digest = hashlib.blake2b(about + raw).digest()

    def update(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Add one call's rows, unless they are fewer than the directions that are needed."""
        rows = self.rows(args)
        if rows.shape[0] < self.k:
            return
        before = self.components
        self.components = update_components(before, rows, self.k)
        values = self.components.values
        self.idle = values <= values[0] * torch.finfo(values.dtype).eps * max(rows.shape)
        if before is not None:
            turned = torch.nn.functional.cosine_similarity(self.components.vectors, before.vectors)
            self.converged = ((turned >= self.tau) | self.idle).cpu()


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """The directions that EVA starts A from, by layer.

    They are those that explain most of the variance, within the budget of ranks. The method is incremental
    SVD over the batches, repeated until the directions converge (cosine similarity of at least ``tau``). For
    each layer ``rho·r`` directions are kept, whatever the number of batches; layers with the same input share
    them. The model is not changed.

    Args:
        model: A PeftModel, whose adapters are disabled meanwhile, or a base model with ``peft_config``.
        dataloader: Yields batches; iterated once for each pass.
        peft_config: Configuration of the adapter, for a base model.
        forward_fn: Runs the model on a batch.
        prepare_model_inputs_fn: Maps a batch and the configuration to the second argument of
            ``prepare_layer_inputs_fn``; None passes the batch itself.
        prepare_layer_inputs_fn: Maps a layer's arguments, the result of the previous function and the layer's
            name to rows (n, in); or a mapping from names of layers to such functions. None takes every row
            (for a convolution: every patch).
        adapter_name: The adapter, for a PeftModel.
        gather_distributed_inputs: In a process group, use the rows of all processes.
        show_progress_bar: Report progress to the logger ``veneer``.

    Returns:
        (rank, in·k…) by the name of each layer in the model; a rank may be 0.

    Raises:
        ConfigError: If there are no batches, or none has enough rows, or a named layer does not exist.
    """
    is_adapted = hasattr(model, "peft_config")
    configs: Mapping[str, LoraConfig] = getattr(model, "peft_config", {})
    config = configs.get(adapter_name) if peft_config is None else peft_config
    if config is None:
        raise ConfigError(
            f"the model has no adapter {adapter_name!r}: pass peft_config, the configuration to measure for"
        )
    options = config.eva_config or EvaConfig()
    found = _layers(model, config, adapter_name if is_adapted else None)
    by_name = dict(prepare_layer_inputs_fn) if isinstance(prepare_layer_inputs_fn, Mapping) else None
    if by_name is not None and (unknown := sorted(set(by_name) - set(found))):
        raise ConfigError(f"prepare_layer_inputs_fn names layers that are not measured: {', '.join(unknown)}")
    watches = {}
    for name, (module, layer, r) in found.items():
        k = max(1, min(round(r * options.rho), _width(layer)))
        own = prepare_layer_inputs_fn if by_name is None else by_name.get(name)
        watches[name] = _Watch(name, module, layer, r, k, options.tau, own, gather_distributed_inputs)  # type: ignore[arg-type]
    run = _Run(model, dataloader, config, forward_fn, prepare_model_inputs_fn)
    resting: AbstractContextManager[None] = disabled(model) if is_adapted else nullcontext()
    with resting, in_mode(model, False):
        sharing = _shared_inputs(run, watches)
        ranks = _measure(run, watches, sharing, show_progress_bar)
    result = {}
    for name in found:
        watch, rank = watches[sharing[name]], ranks[name]
        assert watch.components is not None and watch.idle is not None
        rows, sizes = watch.components.vectors, watch.components.values.masked_fill(watch.idle, 1.0)
        result[name] = (rows / sizes.sqrt()[:, None] if options.whiten else rows.clone())[:rank]
    return result


def _width(layer: LoraLayer) -> int:
    shape_a, _ = layer.shapes(layer.geometry(), 1)
    return torch.Size(shape_a).numel()


def _layers(
    model: nn.Module, config: LoraConfig, adapter: str | None
) -> dict[str, tuple[nn.Module, LoraLayer, int]]:
    """By the name of each layer to measure: the module that is called, its geometry and its rank."""
    if adapter is None:
        return {path: (a.site.module, a.layer, a.spec.r) for path, a in planned(model, config).items()}
    return {
        path: (m, m, m.specs[adapter].r)
        for path, m in model.named_modules()
        if isinstance(m, LoraLayer) and adapter in m.held_adapters and m.takes_rows
    }


class _Run:
    """Runs batches through the model, with hooks on the layers."""

    def __init__(
        self,
        model: nn.Module,
        dataloader: Iterable[Any],
        config: LoraConfig,
        forward_fn: Callable[[nn.Module, Any], Any],
        prepare_inputs: ModelInputs | None,
    ) -> None:
        self.model, self.dataloader, self.config = model, dataloader, config
        self.forward_fn, self.prepare_inputs = forward_fn, prepare_inputs
        self.device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))

    def __call__(self, batch: Any, watches: Iterable[_Watch], take: Callable[[_Watch], Hook]) -> None:
        """Run one batch; each watch receives its layer's inputs."""
        inputs = moved(batch, self.device)
        known = inputs if self.prepare_inputs is None else self.prepare_inputs(inputs, self.config)
        hooks = {}
        for watch in watches:
            watch.model_input = known
            hooks[watch.module] = take(watch)
        observe(hooks, lambda: self.forward_fn(self.model, inputs))


def _shared_inputs(run: _Run, watches: Mapping[str, _Watch]) -> dict[str, str]:
    """For each layer, the first layer with the same input."""
    first = next(iter(run.dataloader), None)
    if first is None:
        raise ConfigError("the dataloader is empty: EVA needs batches to measure")
    run(first, watches.values(), lambda watch: watch.take_digest)
    if unseen := [name for name, w in watches.items() if not w.digest]:
        raise ConfigError(f"the forward does not reach these layers: {', '.join(unseen[:5])}")
    first_with: dict[bytes, str] = {}
    sharing = {name: first_with.setdefault(w.digest, name) for name, w in watches.items()}
    for name, at in sharing.items():
        watches[at].k = max(watches[at].k, watches[name].k)
    return sharing


def _measure(
    run: _Run, watches: Mapping[str, _Watch], sharing: Mapping[str, str], say: bool
) -> dict[str, int]:
    """Run until the needed directions converge, and return the ranks."""
    holders = {name: watches[name] for name in dict.fromkeys(sharing.values())}
    budget = sum(w.r for w in watches.values())
    ranks = {name: watches[at].k for name, at in sharing.items()}
    waiting = dict(holders)
    for turn in range(_MOST_PASSES):
        for batch in run.dataloader:
            waiting = {n: w for n, w in holders.items() if not _has_converged(n, w, sharing, ranks)}
            if not waiting:
                return ranks
            run(batch, waiting.values(), lambda watch: watch.update)
            if all(w.components is not None for w in holders.values()):
                ranks = _ranks(holders, sharing, budget)
        if empty := [f"{n} ({w.k})" for n, w in holders.items() if w.components is None]:
            raise ConfigError(
                f"no batch has as many rows as directions are looked for (rho·r) at {', '.join(empty[:3])}: "
                "use larger batches, a smaller rho, or use_label_mask=False"
            )
        if say:
            done = len(holders) - len(waiting)
            logger.info("EVA: %d of %d inputs have converged after pass %d", done, len(holders), turn + 1)
    if waiting := {n: w for n, w in holders.items() if not _has_converged(n, w, sharing, ranks)}:
        warn(
            f"the directions of {len(waiting)} of {len(holders)} inputs have not converged in "
            f"{_MOST_PASSES} passes over the data (tau={next(iter(waiting.values())).tau}): "
            f"{', '.join(list(waiting)[:3])}"
        )
    return ranks


def _has_converged(name: str, watch: _Watch, sharing: Mapping[str, str], ranks: Mapping[str, int]) -> bool:
    needed = max(ranks[n] for n, at in sharing.items() if at == name)
    return needed == 0 or (watch.converged is not None and bool(watch.converged[:needed].all()))


def _ranks(holders: Mapping[str, _Watch], sharing: Mapping[str, str], budget: int) -> dict[str, int]:
    """Distribute the budget of ranks: to the directions that explain most, whatever their layer."""
    names, shares = [], []
    for name, at in sharing.items():
        components = holders[at].components
        assert components is not None
        explained = components.explained[: holders[at].k].cpu()
        names += [name] * len(explained)
        shares.append(explained)
    best = torch.cat(shares).argsort(descending=True, stable=True)[:budget]
    counts = Counter(names[int(i)] for i in best)
    return {name: counts.get(name, 0) for name in sharing}


@torch.no_grad()
def initialize_lora_eva_weights(
    model: PeftModel,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: ModelInputs | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Initialise an adapter with ``init_lora_weights="eva"`` from data, and redistribute its ranks.

    The factors are new parameters afterwards, so create the optimizer after this call. A layer of rank 0
    loses the adapter. The adapter's configuration gets the new ``rank_pattern``, ``alpha_pattern`` (with
    ``adjust_scaling_factors``) and ``target_modules``.

    Args:
        model: A PeftModel.
        dataloader: Yields batches; not needed with ``eva_state_dict``.
        eva_state_dict: Directions by layer, from `get_eva_state_dict`.
        forward_fn: See `get_eva_state_dict`.
        prepare_model_inputs_fn: See `get_eva_state_dict`.
        prepare_layer_inputs_fn: See `get_eva_state_dict`.
        adapter_name: The adapter.
        gather_distributed_inputs: See `get_eva_state_dict`.
        show_progress_bar: See `get_eva_state_dict`.

    Raises:
        ConfigError: If the adapter has another initialisation, or there is neither data nor directions.
        LoadMismatchError: If the directions do not fit the model.
        MergeError: If the adapter is merged. The model is as it was in each case.
    """
    layers = layers_to_start(model, adapter_name)
    adjust = options(model.peft_config[adapter_name], "eva", EvaConfig).adjust_scaling_factors
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("pass a dataloader, or an eva_state_dict that was measured before")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn,
            adapter_name, gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    directions = {name.removeprefix(PREFIX): rows for name, rows in eva_state_dict.items()}
    _check_directions(layers, directions)
    changes = {
        path: _start(layers[path], rows, adapter_name, adjust)
        for path, rows in directions.items()
        if rows.shape[0]
    }
    _commit(model, layers, directions, changes, adapter_name)


def _check_directions(layers: Mapping[str, LoraLayer], given: Mapping[str, Tensor]) -> None:
    problems = [f"{name}: the adapter has no such layer" for name in given if name not in layers]
    for path, rows in given.items():
        if path in layers:
            width = _width(layers[path])
            if rows.dim() != 2 or rows.shape[1] != width:
                problems.append(f"{path}: shape {tuple(rows.shape)}, (rank, {width}) is needed")
    if not problems and not any(rows.shape[0] for rows in given.values()):
        problems.append("no layer gets a rank")
    if problems:
        raise LoadMismatchError(bullets("the EVA directions do not fit:", problems, 10))
    if absent := [path for path in layers if path not in given]:
        warn(
            f"{len(absent)} layers keep their default start, for they are not among the EVA directions: "
            f"{', '.join(absent[:3])}"
        )


def _start(layer: LoraLayer, rows: Tensor, adapter: str, adjust: bool) -> Prepared:
    spec = layer.specs[adapter]
    rank = rows.shape[0]
    alpha = spec.lora_alpha
    if rank != spec.r and adjust:
        alpha *= rank / spec.r
    new = replace(spec, r=rank, lora_alpha=alpha, init="eva")
    inits.note_statistics(layer.get_base_layer(), rows)
    try:
        start = initialise(layer, new, 0)
    finally:
        inits.forget_statistics(layer.get_base_layer())
    return layer.prepared(
        new,
        start,
        dtype=layer.factors(adapter)[0].dtype,
        strength=new.scaling * layer.scaling[adapter] / spec.scaling,
        training=layer.lora_dropout[adapter].training,
    )


def _commit(
    model: PeftModel,
    layers: Mapping[str, LoraLayer],
    given: Mapping[str, Tensor],
    changes: Mapping[str, Prepared],
    adapter: str,
) -> None:
    for path in given:
        layer = layers[path]
        trains = any(p.requires_grad for p in layer.adapter_parameters(adapter))
        layer.drop_adapter(adapter)
        if path in changes:
            layer.put_adapter(changes[path])
            for parameter in layer.adapter_parameters(adapter):
                parameter.requires_grad_(trains)
        layer.adapters_changed()
    config = model.peft_config[adapter]
    specs = {path: x.specs[adapter] for path, x in layers.items() if adapter in x.held_adapters}
    config.rank_pattern = {f"^{p}$": s.r for p, s in specs.items() if s.r != config.r}
    config.alpha_pattern = {
        f"^{p}$": s.lora_alpha for p, s in specs.items() if s.lora_alpha != config.lora_alpha
    }
    others = set(sites(model.base_model.model)) - set(specs)
    config.target_modules = module_names.portable_targets(specs, others)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None

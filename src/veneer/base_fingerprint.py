"""Whether the base model under an adapter is the one that the adapter was made on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from veneer import backends, sharded
from veneer.adapters import base_names, walk
from veneer.errors import BaseMismatchError, Hint
from veneer.files.fingerprint import compare_fingerprints, fingerprint
from veneer.files.keys import PREFIX, without_wrappers
from veneer.files.match import match
from veneer.inject.replication import is_replicated
from veneer.layers import LoraLayer
from veneer.wording import warn

#: Key of the base's fingerprint in the metadata of an adapter's tensors.
FINGERPRINT = "veneer_base"
#: Sizes of an architecture, as transformers' configurations call them.
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
#: A path into one of several blocks that are alike.
BLOCK = re.compile(r"(^|\.)\d+\.")


def base_fingerprint(
    model: nn.Module,
    targets: Mapping[str, LoraLayer] | None = None,
    others: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What tells the base model of an adapter from another one of the same shape.

    Args:
        model: The base model, adapted or about to be.
        targets: The adapted layers by path; None looks them up.
        others: Samples of weights that are not adapted, of a fingerprint that this one is compared with: the
            same weights are taken here. None takes some of the present model's.
    """
    if targets is None:
        targets = {path: m for path, m in walk(model) if isinstance(m, LoraLayer)}
    weights: dict[str, Tensor | Callable[[], Tensor]] = {}
    storages = set()
    for path, layer in targets.items():
        base = layer.get_base_layer()
        backend = backends.quantised(base)
        weight = getattr(base, layer.weight_name, None)
        if backend is not None and layer.weight_name == "weight":
            storages.add(str(backend.quantization))
            if backend.readable and not layer.merged_for_good:
                weights[without_wrappers(path)] = partial(_original_weight, layer)
        elif isinstance(weight, Tensor):
            unknown = sharded.in_pieces(weight) or layer.merged_for_good  # counted all the same
            weights[without_wrappers(path)] = torch.empty(0, device="meta") if unknown else weight.detach()
            if layer.merged and not unknown and type(weight) in (Tensor, nn.Parameter) and not weight.is_meta:
                weights[without_wrappers(path)] = partial(
                    _original_weight, layer
                )  # only a few of them are sampled
    size, sizes = sizes_of(model)
    beside = _other_weights(model, {without_wrappers(path) for path in targets}, others)
    return fingerprint(type(model).__name__, size, weights, storages, others=beside, sizes=sizes)


def sizes_of(model: nn.Module) -> tuple[int | None, dict[str, int]]:
    """(size of the vocabulary, other sizes of the architecture), as the model's configuration has them."""
    config = getattr(model, "config", None)
    found = {
        name: config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
        for name in ("vocab_size", *SIZES)
    }
    sizes = {
        name: size for name, size in found.items() if isinstance(size, int) and not isinstance(size, bool)
    }
    size = sizes.pop("vocab_size", None)
    if is_replicated(model):
        sizes.pop("num_hidden_layers", None)
    return size, sizes


def _other_weights(
    model: nn.Module, adapted: Container[str], samples: Mapping[str, Any] | None
) -> dict[str, Tensor | Callable[[], Tensor]]:
    """Matrices in the base's repeated blocks: those that are not adapted, or those that ``samples`` names.

    Heads and embeddings are left out: they are made anew for a task, or resized.
    """
    found: dict[str, Tensor | Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, place in base_names(model).items():
        path, _, attribute = name.rpartition(".")
        path = without_wrappers(path)
        if attribute != "weight" or BLOCK.search(path) is None:
            continue
        if samples is None and (path in adapted or place.holder is not None):
            continue
        layer = place.holder if isinstance(place.holder, LoraLayer) else None
        weight = model.get_submodule(place.name.rpartition(".")[0])._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        merged = layer is not None and layer.merged and not weight.is_meta
        found[path] = partial(_original_weight, layer) if merged and layer is not None else weight.detach()
        shapes[path] = tuple(weight.shape)
    if samples is None:
        return found
    try:
        wanted = {path: tuple(sample["shape"]) for path, sample in samples.items()}
        return {path: found[path] for path in match(shapes, wanted).renamed.values()}
    except (LookupError, TypeError, AttributeError):  # the comparison says that it is unreadable
        return {}


def _original_weight(layer: LoraLayer) -> Tensor:
    base = layer.original_base()
    return backends.find(base, layer.weight_name).read(base, layer.weight_name)


def check_base(
    model: nn.Module,
    metadata: Mapping[str, str],
    where: object,
    targets: Mapping[str, LoraLayer] | None = None,
    carried: Container[str] = (),
) -> None:
    """Compare the base that an adapter was made on with the one it is about to be put on.

    Args:
        model: The base model, adapted or about to be.
        metadata: That of the adapter's file.
        where: What to call the file in messages.
        targets: The adapted layers by path; None looks them up.
        carried: Names in the adapter's file. Base weights among them (embeddings, resized perhaps) need not
            be those that the adapter was made on: they are replaced.

    Raises:
        BaseMismatchError: If they are plainly different models.
    """
    text = metadata.get(FINGERPRINT)
    if text is None:
        return
    try:
        saved = json.loads(text)
        kept = {k: v for k, v in saved["samples"].items() if f"{PREFIX}{k}.base_layer.weight" not in carried}
        saved = {**saved, "samples": kept}
        others = saved.get("others", {})
    except (ValueError, LookupError, TypeError, AttributeError):  # the comparison says that it is unreadable
        saved = others = {}
    result = compare_fingerprints(saved, base_fingerprint(model, targets, others))
    if result.severity == "none":
        return
    problems = "; ".join(result.problems)
    if result.severity == "wrong":
        raise BaseMismatchError(
            f"{where} was made on another base model: {problems}. Load the base that its adapter_config.json "
            "names",
            Hint("check_base", False, "; {} loads it all the same"),
        )
    warn(f"{where}: the base model is not exactly the one it was made on: {problems}")


def check_base_files(
    reader: Callable[[str], Callable[[], Tensor] | None],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
    where: object,
    base: object,
) -> None:
    """The same as `check_base` for a base of which no model is made; smaller differences are passed over.

    Args:
        reader: Gives what reads the weight of a module by its path; None where there is none.
        config: The base's configuration.
        metadata: That of the adapter's file.
        where: What to call the adapter in messages.
        base: What to call the base.

    Raises:
        BaseMismatchError: If they are plainly different models.
    """
    try:
        saved = json.loads(metadata[FINGERPRINT])
        paths = (list(saved["samples"]), list(saved.get("others", {})))
    except (LookupError, ValueError, TypeError):  # an adapter of another library has none
        return
    adapted, others = (
        {path: read for path in sampled if (read := reader(path)) is not None} for sampled in paths
    )
    sizes = {name: config[name] for name in SIZES if isinstance(config.get(name), int)}
    present = fingerprint(None, saved.get("vocab_size"), adapted, others=others, sizes=sizes)
    compared = compare_fingerprints(saved, present)
    if compared.severity == "wrong":
        raise BaseMismatchError(
            f"{where} was made on another base model than {base}: {'; '.join(compared.problems)}"
        )

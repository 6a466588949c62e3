"""Loading adapters: from a directory or the hub onto a model, with every tensor accounted for."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from veneer.adapters import walk
from veneer.base_fingerprint import check_base
from veneer.config import LoraConfig, PeftConfig
from veneer.config.residual import marked_config
from veneer.errors import ConfigError, Hint, LoadMismatchError, MergeError, show
from veneer.expert_layouts.standard import standard
from veneer.files.keys import PREFIX
from veneer.files.match import match
from veneer.files.read import AdapterFile, open_adapter
from veneer.files.report import LoadReport
from veneer.files.residual import PARTS, layers_of, parted
from veneer.files.values import check_values
from veneer.hub import adapter_directory
from veneer.inject.base_tensors import merged_over
from veneer.inject.experts import stacked
from veneer.inject.injection import Injection
from veneer.inject.sites import model_type
from veneer.layers.start import initialise
from veneer.lora_model import LoraModel
from veneer.spec import specs_under
from veneer.state_dict import set_adapter_state_dict
from veneer.wording import some, warn

KeyMapping = Mapping[str, str] | Callable[[str], str]


@dataclass(frozen=True)
class Checks:
    """What is refused while an adapter is loaded.

    Attributes:
        strict: Tensors of the file that nothing takes, and expected ones that it lacks.
        base: A plainly different base model.
        finite: NaN and infinity; False warns.
    """

    strict: bool = True
    base: bool = True
    finite: bool = True


class StoredTensors(NamedTuple):
    """The tensors of a file under the names that the model is asked for; they are read when wanted."""

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Iterable[str]], Mapping[str, Tensor]]


def load(
    model: nn.Module,
    lora: LoraModel,
    file: AdapterFile,
    config: PeftConfig,
    adapter_name: str,
    *,
    rename: Callable[[str], str],
    is_trainable: bool,
    autocast_adapter_dtype: bool,
    checks: Checks,
) -> LoadReport:
    """Put an adapter whose file is open into a model, or into its adapter of that name.

    Args:
        model: The `PeftModel`.
        lora: What it holds.
        file: The tensors.
        config: Their configuration.
        adapter_name: The adapter's name in the model.
        rename: Gives keys of the file other names.
        is_trainable: Whether its parameters require gradients once active.
        autocast_adapter_dtype: Keep the factors beside 16-bit weights in float32.
        checks: What is refused.

    Returns:
        The account of every tensor.

    Raises:
        ConfigError, AdapterFileError, LoadMismatchError, BaseMismatchError, TargetError: The model is then
            as it was.
    """
    where = file.path.parent
    config = copy.deepcopy(config)
    config.inference_mode = not is_trainable
    if isinstance(config, LoraConfig):
        config, file, told = standard(file, config, {"model_type": model_type(lora.get_base_model())})
        if (line := told.remark()) is not None:
            warn(f"{where}: {line}")
        config = marked_config(config, file.metadata, where)
        tensors = _stored(file, rename)
        if (experts := stacked(lora.get_base_model(), config, tensors.shapes)) is not None:
            config = experts.config
            tensors = StoredTensors(experts.shapes, partial(experts.tensors, read=tensors.read))
    else:
        tensors = _stored(file, rename)
    if adapter_name in lora.peft_config:
        _check_reload(lora, config, adapter_name, where)
        if checks.base:
            check_base(lora.get_base_model(), file.metadata, where, carried=file.shapes)
        report = set_adapter_state_dict(
            model,
            tensors.read(tensors.shapes),
            adapter_name,
            strict=checks.strict,
            check_finite=checks.finite,
            where=where,
        )
        lora.note_start(adapter_name, config)  # type: ignore[arg-type]
    else:
        injection = lora.prepare(
            config,  # type: ignore[arg-type]
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            stored=tensors.shapes,
        )
        report = _fill(injection, tensors, file, checks)
        first = not lora.peft_config
        lora.commit(injection, activate=first, trainable=is_trainable)
        if first and is_trainable:
            model.training = lora.training = True
    if not report.ok:
        warn(report.message(where))
    # A pass over all adapters, only where it changes something.
    if not is_trainable and any(module.training for _, module in walk(model)):
        model.eval()
    return report


def _stored(file: AdapterFile, rename: Callable[[str], str]) -> StoredTensors:
    names = _renamed(file.shapes, rename)

    def read(keys: Iterable[str]) -> dict[str, Tensor]:
        wanted = list(keys)
        found = file.tensors(names[key] for key in wanted)
        return {key: found[names[key]] for key in wanted}

    return StoredTensors({new: file.shapes[key] for new, key in names.items()}, read)


def _check_reload(lora: LoraModel, config: PeftConfig, adapter_name: str, where: Path) -> None:
    """Refuse to fill an adapter from a file where the tensors alone do not make it the file's.

    Raises:
        MergeError: The adapter is merged.
        LoadMismatchError: Its strength, its variant or its tokens are not the file's.
    """
    layers = {path: layer for path, layer in lora.layers().items() if adapter_name in layer.held_adapters}
    if any(adapter_name in layer.merged_adapters for layer in layers.values()):
        raise MergeError(f"the adapter {adapter_name!r} is merged: unmerge_adapter() before loading into it")
    present = [layer.specs[adapter_name] for layer in layers.values()]
    differing = [
        f"{path}: {here.scaling:g} here, {wanted.scaling:g} in the file"
        for path, here, wanted in zip(layers, present, specs_under(config, present), strict=True)  # type: ignore[arg-type]
        if (wanted.scaling, wanted.variant) != (here.scaling, here.variant)
    ]
    for name in ("trainable_token_indices", "alora_invocation_tokens"):
        here, wanted = (getattr(c, name, None) for c in (lora.peft_config[adapter_name], config))
        if here and wanted and _tokens(here) != _tokens(wanted):
            differing.append(f"{name}: {show(here)} here, {show(wanted)} in the file")
    if differing:
        raise LoadMismatchError(
            f"{where} cannot be loaded into the adapter {adapter_name!r} that is here, whose strength, kind "
            f"or tokens are others: {'; '.join(differing[:3])}. Load it under another name, or delete_adapter"
            f"({adapter_name!r}) first"
        )


def _tokens(given: Sequence[int] | Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Tokens by module, whose names may be written in several ways."""
    return sorted(map(list, given.values())) if isinstance(given, Mapping) else [list(given)]


def _fill(injection: Injection, tensors: StoredTensors, file: AdapterFile, checks: Checks) -> LoadReport:
    """Give a prepared adapter the values of its file, after accounting for all of them.

    Raises:
        LoadMismatchError: With ``strict``; or always when no tensor at all fits.
        BaseMismatchError: The adapter was made on another base model.
        MergeError: The file brings base weights along into which another adapter is merged.
    """
    where = file.path.parent
    shapes, read = tensors
    optional = {f"{PREFIX}{k}": v for k, v in injection.optional().items()}
    expected = {f"{PREFIX}{k}": v for k, v in injection.expected().items()}
    if layers_of(expected):
        whole = _with_start(injection, parted(read(list(shapes)), expected), where)
        shapes = {name: tuple(tensor.shape) for name, tensor in whole.items()}
        read = lambda keys: {key: whole[key] for key in keys}  # noqa: E731
    report = match({**expected, **optional}, shapes, optional=optional)
    if checks.strict or not report.renamed:
        report.raise_for(where)
    values = read(list(report.renamed))
    check_values(values, where, check_finite=checks.finite)
    injection.fill({report.renamed[k].removeprefix(PREFIX): t for k, t in values.items()})
    changed = injection.changed_embeddings()
    if under := [name for name in changed if merged_over(injection.model, name)]:
        raise MergeError(
            f"{where} carries its own {' and '.join(under)}, into which an adapter is merged here: "
            "unmerge_adapter() before loading it"
        )
    # After the account of tensors: where names or shapes differ, that says more.
    if checks.base:
        check_base(injection.model, file.metadata, where, injection.targets, carried=file.shapes)
    if report.ok and report.notice:
        warn(f"{where}: {report.notice}")
    if changed:
        warn(
            f"{where} carries its own {' and '.join(changed)}: the base's values are replaced by them, "
            "for every adapter on this model"
        )
    return report


def _with_start(injection: Injection, tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    """The tensors of a file, with the frozen terms that other libraries leave in the base.

    Raises:
        LoadMismatchError: If they cannot be worked out from the base alone.
    """
    result, names = dict(tensors), {}
    for addition in injection.additions:
        path = f"{PREFIX}{addition.site.path}."
        keys = [f"{path}{part}" for part in PARTS]
        if not any(key in result for key in keys) and any(key.startswith(f"{path}lora_") for key in result):
            names[path] = addition
    if not names:
        return result
    spec = next(iter(names.values())).spec
    init = Hint("init_lora_weights", spec.init)
    try:
        for path, addition in names.items():
            start = initialise(addition.layer, addition.spec, 0)
            assert start.residual is not None
            result.update({f"{path}{part}": t for part, t in zip(PARTS, start.residual, strict=True)})
    except ConfigError as error:
        raise LoadMismatchError(
            f"{where} holds the trained factors of ",
            init,
            " alone, as the peft library saves them: they fit a base from which their start was subtracted, "
            "and that start is not in the file (",
            error.message,
            "). Convert it where it was trained (its save_pretrained takes "
            "path_initial_model_for_weight_conversion), or pass config= with ",
            Hint("init_lora_weights", True),
            " for a base that has its start subtracted already",
        ) from error
    about = "" if spec.init in ("pissa", "olora") else ", up to what its random or measured parts differ"
    warn(
        f"{where} holds the trained factors of ",
        init,
        " alone, as the peft library saves them: they fit a base from which their start was subtracted. "
        f"The start was worked out again from this base{about}; it must be the original base",
    )
    return result


def renamer(mapping: KeyMapping | None) -> Callable[[str], str]:
    """A function that renames keys as PEFT's ``key_mapping`` does: without the saved prefix.

    Its expressions are the caller's own code, never a file's: they may refer to groups, as replacements do,
    and Python's matcher takes whatever time they need.

    Raises:
        ConfigError: If it is neither a mapping nor a function, or a pattern is no regular expression.
    """
    if mapping is None:
        return lambda key: key
    if callable(mapping):
        return mapping
    if not isinstance(mapping, Mapping):
        raise ConfigError(
            "key_mapping: a mapping of regular expressions to replacements, or a function, is needed; got "
            f"{type(mapping).__name__}"
        )
    patterns = []
    for source, replacement in mapping.items():
        try:
            patterns.append((re.compile(source), replacement))
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"key_mapping: {source!r} is not a valid regular expression ({error})"
            ) from error

    def rename(key: str) -> str:
        has_prefix = key.startswith(PREFIX)
        name = key.removeprefix(PREFIX)
        for pattern, replacement in patterns:
            try:
                name, count = pattern.subn(replacement, name)
            except (re.error, IndexError, TypeError) as error:
                raise ConfigError(
                    f"key_mapping: {replacement!r} is not a valid replacement for "
                    f"{pattern.pattern!r} ({error})"
                ) from error
            if count:
                break
        return f"{PREFIX}{name}" if has_prefix else name

    return rename


def _renamed(keys: Iterable[str], rename: Callable[[str], str]) -> dict[str, str]:
    """New key -> key of the file.

    Raises:
        ConfigError: Two keys would get one name, and one tensor would be lost.
    """
    names: dict[str, str] = {}
    met = []
    for key in keys:
        new = rename(key)
        if new in names:
            met.append(f"{names[new]} and {key} -> {new}")
        names.setdefault(new, key)
    if met:
        raise ConfigError(
            Hint("key_mapping"), f" gives several keys of the file one name: {'; '.join(some(met, 3))}"
        )
    return names


def load_peft_weights(
    model_id: str | os.PathLike[str],
    device: str | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Read the tensors of a saved adapter, local or on the hub, under their names on disk.

    Args:
        model_id: A directory or a repository id.
        device: Where to put them; the CPU by default.
        key_mapping: Regular expressions to replacements, applied to the names.
        **hf_hub_download_kwargs: ``subfolder``, ``revision``, ``token`` and the like.
    """
    file = open_adapter(adapter_directory(model_id, **hf_hub_download_kwargs))
    shapes, read = _stored(file, renamer(key_mapping))
    return {name: tensor.to(device or "cpu") for name, tensor in read(shapes).items()}

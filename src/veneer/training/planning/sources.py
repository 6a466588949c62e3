"""Models on the meta device, without weights: from a configuration, or as a copy of a real model."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import TrainingError
from ...integrations.auto import AUTO_CLASSES
from ...wording import did_you_mean, first_line
from ..libraries import quiet_libraries, require
from ..models import load_config
from ..paths import check_model


def empty_model(
    source: str | os.PathLike[str],
    task: str | None = None,
    *,
    dtype: str | None = None,
    num_labels: int | None = None,
) -> Any:
    """A transformers model on the meta device, from its configuration; no weights are read.

    Args:
        source: The directory of a model, a configuration file, or a hub id.
        task: A `TaskType`; if None, the model is of the architecture that the configuration names, or of
            the task in that name where transformers has no such class.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the configuration's if None or ``auto``.
        num_labels: Number of classes of a classifier.

    Raises:
        TrainingError: There is no such configuration, or transformers knows no such model.
        MissingExtraError: transformers is not installed.
    """
    require("transformers", "hf", "planning for a language model")
    import transformers

    config = _read(source)
    if num_labels is not None:
        config.num_labels = num_labels
    named = None if task is not None else getattr(transformers, _architecture(config), None)
    if task is None:
        task = task_of(config)
    if task not in AUTO_CLASSES:
        raise TrainingError(f"no model class for the task {task!r}; there are {', '.join(AUTO_CLASSES)}")
    wanted = _dtype(dtype) or _dtype(getattr(config, "dtype", None)) or torch.float32
    loader = getattr(transformers, AUTO_CLASSES[task])
    try:
        with quiet_libraries(), torch.device("meta"):
            made = loader.from_config if named is None else named._from_config
            model = made(config, dtype=wanted)
    except Exception as error:  # each architecture fails in its own way on values that make no sense
        reason = first_line(error)
        if "Unrecognized configuration class" in reason:
            reason = f"transformers has no {AUTO_CLASSES[task]} of the type {config.model_type!r}"
        raise TrainingError(
            f"no model can be built from the configuration {str(source)!r}: {reason}"
        ) from error
    return model


def task_of(config: Any) -> str:
    """The task in the name of a configuration's architecture; CAUSAL_LM if there is none."""
    return named_task(config) or "CAUSAL_LM"


def named_task(config: Any) -> str | None:
    """The task in the name of a configuration's architecture, if there is one."""
    name = _architecture(config)
    for ending, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
        ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
        ("CausalLM", "CAUSAL_LM"),
        ("LMHeadModel", "CAUSAL_LM"),
        ("Model", "FEATURE_EXTRACTION"),
    ):
        if name.endswith(ending):
            return task
    return None


def _architecture(config: Any) -> str:
    return str((getattr(config, "architectures", None) or [""])[0])


def _read(source: str | os.PathLike[str]) -> Any:
    check_model(source, config_file=True)
    place = Path(source)
    if not place.exists():
        return load_config(source)
    return _from_file(place / "config.json" if place.is_dir() else place)


def _from_file(place: Path) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        values = json.loads(place.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrainingError(f"{place} is not a model configuration: {error}") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise TrainingError(
            f"{place} is not the configuration of a transformers model: it has no model_type. Plan models of "
            "other libraries in Python: veneer.plan(model, config)"
        )
    if kind not in CONFIG_MAPPING:
        hint = did_you_mean(kind, CONFIG_MAPPING) or ", or it needs code of its own, which is not run here"
        raise TrainingError(f"{place}: transformers does not know the model_type {kind!r}{hint}")
    with quiet_libraries():
        try:
            options = {key: value for key, value in values.items() if key != "model_type"}
            return AutoConfig.for_model(kind, **options)
        except Exception as error:  # a configuration may hold anything
            raise TrainingError(f"{place} is not a valid configuration of a {kind}: {error}") from error


def _dtype(value: Any) -> torch.dtype | None:
    if isinstance(value, torch.dtype):
        return value
    found = getattr(torch, str(value).removeprefix("torch."), None) if value else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


def shadow(model: nn.Module) -> nn.Module:
    """Copy a model to the meta device without reading its weights, which are plain tensors."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, module.__dict__)
        for value in (value for group in groups for value in group.values()):
            if isinstance(value, Tensor) and id(value) not in memo:
                empty = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
                if isinstance(value, nn.Parameter):
                    empty = nn.Parameter(empty, requires_grad=value.requires_grad)
                memo[id(value)] = empty
    return copy.deepcopy(model, memo)

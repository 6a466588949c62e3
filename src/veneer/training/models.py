"""Load base models and tokenizers from a directory or the hub."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import Hint, TrainingError
from ..hub import cached_if_unreachable, is_local
from ..wording import first_line
from .data.batch import pad_token
from .launcher import own_gpu
from .libraries import quiet_libraries, require
from .paths import check_model
from .progress import Progress, waiting
from .saved_adapter import PlainModel

#: An adapter may name any base, so code in its repository is not run. By default transformers would ask.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """The tokenizer of a model in a directory or on the hub.

    Raises:
        TrainingError: There is no model, or none with a tokenizer.
    """
    check_model(source)
    require("transformers", "hf", "loading a language model")
    from transformers import AutoTokenizer

    with loading_model(source):
        return AutoTokenizer.from_pretrained(source, **NO_CODE)


def load_config(source: str | os.PathLike[str]) -> Any:
    """The configuration of a model in a directory or on the hub, as transformers understands it."""
    require("transformers", "hf", "loading a language model")
    from transformers import AutoConfig

    with loading_model(source):
        return AutoConfig.from_pretrained(source, **NO_CODE)


def read_plain(source: str | os.PathLike[str]) -> PlainModel:
    """What the configuration of a model says of it."""
    config = load_config(source)
    named = getattr(config, "architectures", None) or ()
    classifies = any(name.endswith("ForSequenceClassification") for name in named)
    names = [str(name) for _, name in sorted(config.id2label.items())] if classifies else None
    return PlainModel(os.fspath(source), names)


def load_base(
    source: str | os.PathLike[str],
    dtype: str = "auto",
    *,
    quantize: str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    label_names: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Any, Any]:
    """Load a language model and its tokenizer; code in its repository is not run.

    Args:
        source: A directory, or a repository id of the hub.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        quantize: Keep the weights as ``nf4``, ``fp4``, ``int8`` or ``int4``, see `quantization`.
        device_map: As in transformers. Without one the model is loaded onto the CPU, a quantised one onto
            this process's GPU if there is one.
        attn_implementation: As in transformers.
        label_names: Load the model as a classifier with these classes.
        progress: Where to report.

    Returns:
        (model, tokenizer).

    Raises:
        TrainingError: The model is missing, is no language model, or needs code of its own.
        MissingExtraError: The library of a quantisation is not installed.
    """
    tokenizer = load_tokenizer(source)
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    more: dict[str, Any] = {} if quantize is None else quantization(quantize, dtype)
    if device_map is not None:
        more["device_map"] = device_map
    if attn_implementation is not None:
        more["attn_implementation"] = attn_implementation
    kind = AutoModelForCausalLM
    if label_names is not None:
        kind = AutoModelForSequenceClassification
        named = dict(enumerate(label_names))
        more |= {"id2label": named, "label2id": {name: number for number, name in named.items()}}
    with loading_model(source, progress):
        model = kind.from_pretrained(source, dtype=dtype, **NO_CODE, **more)
    if label_names is not None and getattr(model.config, "pad_token_id", None) is None:
        # Otherwise models that classify by the last token would take a padding token for it.
        model.config.pad_token_id = pad_token(tokenizer)
    return model, tokenizer


@contextlib.contextmanager
def loading_model(source: str | os.PathLike[str], progress: Progress | None = None) -> Iterator[None]:
    """Load from a directory or the hub, where a first request shows whether it answers.

    Raises:
        TrainingError: What is loaded in the block is missing or broken, or the hub does not answer.
    """
    with contextlib.ExitStack() as stack:
        unreachable = ""
        if is_local(source):
            stack.enter_context(quiet_libraries())
            stack.enter_context(waiting(progress, "Loading the model"))
        else:
            with waiting(progress, "Asking the Hugging Face hub"):
                unreachable = stack.enter_context(cached_if_unreachable())
            stack.enter_context(quiet_libraries(downloads=progress is not None))
        try:
            yield
        except (OSError, ValueError, KeyError) as error:
            reason = first_line(error)
            if unreachable and isinstance(error, OSError):
                reason = f"there is no such directory, the cache does not have it whole, and {unreachable}"
            raise TrainingError(f"the model {str(source)!r} cannot be loaded: {reason}") from error


def quantization(name: str, dtype: str = "auto") -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise the weights of a model.

    Args:
        name: ``nf4``, ``fp4`` (4 bits) or ``int8`` of bitsandbytes, or ``int4`` of torchao.
        dtype: Type that products are computed in; bfloat16 for ``auto``.

    Raises:
        MissingExtraError: The library is not installed.
        TrainingError: Its kernels do not run on this machine.
    """
    import torch

    asked = Hint("quantize", name)
    if name == "int4":
        if not torch.cuda.is_available():
            raise TrainingError(
                asked,
                " needs a GPU: torchao has 4-bit kernels for GPUs only. nf4, fp4 and int8 run on the CPU too",
            )
        require("torchao", "quant", asked)
        from torchao.quantization import Int4WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int4WeightOnlyConfig(group_size=128))
    else:
        require("bitsandbytes", "quant", asked)
        from transformers import BitsAndBytesConfig

        four_bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": name,
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        }
        config = BitsAndBytesConfig(**({"load_in_8bit": True} if name == "int8" else four_bits))
    place = own_gpu() if torch.cuda.is_available() else "cpu"
    return {"quantization_config": config, "device_map": {"": place}}


def directory_bytes(place: str | os.PathLike[str], pattern: str = "*") -> int:
    """Bytes of the files of a directory whose names match."""
    return sum(file.stat().st_size for file in Path(place).glob(pattern) if file.is_file())

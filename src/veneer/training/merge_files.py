"""Merge an adapter into the files of its base, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base_files import WEIGHTS, BaseFiles, opened
from ..base_fingerprint import check_base_files
from ..config import LoraConfig
from ..errors import CheckpointError, Hint, MergeError, Text
from ..files.overwrite import check_room, replacing
from ..files.read import AdapterFile
from ..files.rope import write_older_names
from ..files.values import check_values
from ..lora_file import factor_names, open_lora
from ..merge_report import MergeReport
from ..ops.merging import merge_into_, shared_buffers
from ..spec import LoraSpec, variant_name
from ..wording import bullets
from .model_files import model_directory
from .progress import Progress, Silent
from .resuming import write_json
from .saved_adapter import SavedAdapter, base_name, read_adapter

INDEX = f"{WEIGHTS}.index.json"
#: The names of types in a safetensors header; only these types can be merged into.
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TYPES = {name: dtype for dtype, name in NAMES.items()}
#: Files that are copied beside the weights; all others are left out.
_OF_MODEL = re.compile(
    r"(config|generation_config|(image_|video_)?(pre)?processor_config)\.json"
    r"|(configuration|modeling|tokenization|processing|image_processing)_\w+\.py"
    r"|(LICENSE|LICENCE|NOTICE|USE_POLICY)(\.txt|\.md)?"
)
OF_TOKENIZER = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|normalizer|tekken|chat_template)\.json"
    r"|(vocab|merges)\.(txt|bpe)|[\w.-]+\.(tiktoken|spm)|(tokenizer|spiece|sentencepiece(\.bpe)?)\.model(\.v\d+)?"
    r"|(additional_chat_templates/[\w.-]+|chat_template)\.jinja"
)
WAY_OUT = Text(
    "Merge it with the whole model in memory instead", Hint("low_memory", ..., " (without {})"), "."
)


@dataclass(frozen=True)
class _Update:
    path: str
    a: str
    b: str
    scaling: float
    transpose: bool


def merge_files(
    adapter: str | os.PathLike[str],
    base: str | os.PathLike[str],
    place: Path,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge an adapter into a base model's safetensors files, shard by shard, into a new directory.

    No model is made. For each adapted tensor ``W`` of a shard, ``W + s·B A`` is computed in float32, rounded
    once and written; only the largest tensor has to fit into memory. Configuration, tokenizer, chat templates
    and licence are copied if they have known names; links to files elsewhere are not followed.

    Args:
        adapter: Directory of the adapter.
        base: Directory of the base model, as transformers saves it.
        place: The directory; it appears when it is complete.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        overwrite: Replace the model in a directory that is not empty.
        progress: Told of each tensor that is written.

    Returns:
        For each module, the share of the update that its type could hold.

    Raises:
        AdapterFileError: The adapter is missing, broken, or no LoRA.
        MergeError: The merge needs a model (variants other than the plain one, modules saved whole, biases,
            convolutions, quantised bases, shared weights, names the files lack), the update is not
            finite or leaves the range of a weight's type, or a file to copy is a link to another directory.
        BaseMismatchError: The adapter was made on another base model.
    """
    base = Path(base)
    config, file, specs, _ = open_lora(adapter)
    try:
        files = BaseFiles(base)
    except CheckpointError as error:
        raise MergeError(f"{error}. Merging file to file needs them. ", WAY_OUT) from error
    settings = json.loads((base / "config.json").read_text(encoding="utf-8"))
    updates = _updates(settings, config, file, specs, files)
    check_values(file.tensors(n for u in updates.values() for n in (u.a, u.b)), file.path)
    target = None if dtype == "auto" else getattr(torch, dtype)
    layouts = {shard: _layout(header, target) for shard, header in files.headers.items()}
    total = sum(size for _, size in layouts.values())
    check_base_files(
        lambda path: files.reader(f"{path}.weight"), settings, file.metadata, file.path.parent, base
    )
    beside = _companions(base, Path(adapter))
    check_room(place, total)
    kept: dict[str, float] = {}
    bar = (progress or Silent()).bar("tensors", len(files))
    with replacing(place, overwrite) as made, shared_buffers(), bar as advance:
        for shard, header in files.headers.items():
            with opened(shard) as source, (made / shard.name).open("wb") as out:
                out.write(_packed(layouts[shard][0]))
                for name in header:
                    tensor = source.get_tensor(name)
                    if name in updates:
                        tensor, kept[updates[name].path] = _merged(tensor, updates[name], file, target)
                    elif target is not None and tensor.is_floating_point():
                        tensor = tensor.to(target)
                    out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
                    advance(1, "")
        _write_companions(beside, base, made, target, total if (base / INDEX).is_file() else None)
    return MergeReport({path: kept[path] for path in specs})


def base_directory(
    adapter: str | os.PathLike[str] | SavedAdapter, model: str | None = None, progress: Progress | None = None
) -> Path:
    """The directory of an adapter's base model; a base of the hub is fetched, with its safetensors files.

    Args:
        adapter: Directory of the adapter, or the result of `read_adapter`.
        model: Directory or hub id of the base; by default the one that the adapter names.
        progress: Reports a base of the hub before it is fetched.

    Raises:
        AdapterFileError: No base is named.
        TrainingError: The base is missing, or cannot be loaded.
    """
    return model_directory(base_name(read_adapter(adapter), model, progress))


def _merged(
    tensor: Tensor, update: _Update, file: AdapterFile, target: torch.dtype | None
) -> tuple[Tensor, float]:
    factors = file.tensors([update.a, update.b])
    # A copy, as the tensor may be memory-mapped.
    weight = tensor.to(target or tensor.dtype, copy=True)
    terms = [(factors[update.b], factors[update.a], update.scaling)]
    try:
        return weight, merge_into_(weight, terms, transpose=update.transpose)
    except MergeError as error:
        raise MergeError(f"{update.path}: {error}") from error


def _updates(
    settings: Mapping[str, Any],
    config: LoraConfig,
    file: AdapterFile,
    specs: Mapping[str, LoraSpec],
    files: BaseFiles,
) -> dict[str, _Update]:
    """Name of a stored tensor -> its update.

    Raises:
        MergeError: Something cannot be merged; lists everything.
    """
    keys, others = factor_names(file)
    problems = _unmergeable(settings, config, others, files)
    found: dict[str, _Update] = {}
    for path, roles in keys.items():
        lookup = "lora_embedding_A" in roles["A"]
        name = files.stored_name(f"{path}.weight")
        if name is None:
            problems.append(
                f"{path}: the base's files have no such weight (its name changes on loading, or it is shared)"
            )
            continue
        kind, shape = files.entry(name)
        a, b = file.shapes[roles["A"]], file.shapes[roles["B"]]
        transpose = lookup or config.fan_in_fan_out
        if len(a) != 2 or len(shape) != 2 or shape != ((a[1], b[0]) if transpose else (b[0], a[1])):
            problems.append(f"{path}: factors {a} and {b} do not make an update of the stored shape {shape}")
        elif kind not in TYPES:
            problems.append(f"{path}: its weight is stored as {kind}")
        elif settings.get("tie_word_embeddings") and "embed" in name and "lm_head.weight" not in files:
            problems.append(f"{path}: the output layer may share its weight")
        else:
            found[name] = _Update(path, roles["A"], roles["B"], specs[path].scaling, transpose)
    if problems:
        head = f"{file.path.parent} cannot be merged file to file:"
        raise MergeError(bullets(head, problems, 5), "\n", WAY_OUT)
    return found


def _unmergeable(
    settings: Mapping[str, Any], config: LoraConfig, others: Sequence[str], files: BaseFiles
) -> list[str]:
    """What about an adapter or a base cannot be merged file to file, whatever the module."""
    problems = []
    if variant_name(config) != "plain":
        problems.append(
            f"the adapter is a {variant_name(config)}, whose update is not a product of two factors"
        )
    if others:
        problems.append(f"it contains {len(others)} tensors besides its factors, such as {others[0]}")
    if config.target_parameters or config.layer_replication:
        problems.append("it adapts bare parameters or replicated layers")
    if settings.get("quantization_config") or settings.get("compression_config"):
        problems.append("the base is stored quantised")
    for key in files:
        if len(files.entry(key)[1]) > 1 and (why := files.codes(key)) is not None:
            problems.append(f"{key.rpartition('.')[0]}: {why}")
    return problems


def _layout(
    header: Mapping[str, tuple[str, tuple[int, ...]]], target: torch.dtype | None
) -> tuple[dict[str, Any], int]:
    """(header of the new shard, bytes of its tensors)."""
    layout: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (kind, shape) in header.items():
        new = NAMES[target] if target is not None and kind in TYPES else kind
        end = at + math.prod(shape) * width(new)
        layout[name] = {"dtype": new, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return layout, at


def width(kind: str) -> int:
    if kind == "BOOL":
        return 1
    return int("".join(c for c in kind.split("_")[0] if c.isdigit())) // 8


def _packed(layout: Mapping[str, Any]) -> bytes:
    text = json.dumps(layout, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return struct.pack("<Q", len(text)) + text


def _companions(base: Path, adapter: Path) -> dict[str, Path]:
    """Name -> file to copy beside the weights; the tokenizer is the adapter's, if it has one.

    Raises:
        MergeError: Some are links to files elsewhere.
    """
    own = (adapter / "tokenizer_config.json").is_file()
    kinds = {base: [_OF_MODEL], adapter: [OF_TOKENIZER]} if own else {base: [_OF_MODEL, OF_TOKENIZER]}
    found, outside = companions(kinds)
    if outside:
        raise MergeError(bullets("links are not followed into other directories:", outside), "\n", WAY_OUT)
    return found


def companions(
    kinds: Mapping[Path, Sequence[re.Pattern[str]]],
) -> tuple[dict[str, Path], list[str]]:
    """Files to copy beside new weights: (name -> file, what is wrong with others).

    Args:
        kinds: Directory -> what the files are called.
    """
    found, outside = {}, []
    for source, patterns in kinds.items():
        root = source.resolve()
        # A snapshot in the hub's cache is links to the blobs beside the snapshots.
        inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
        for file in (*source.iterdir(), *source.glob("additional_chat_templates/*")):
            name = file.relative_to(source).as_posix()
            if not file.is_file() or not any(pattern.fullmatch(name) for pattern in patterns):
                continue
            if any(file.resolve().is_relative_to(place) for place in inside):
                found[name] = file
            else:
                outside.append(f"{file} leads out of {source}, to {file.resolve()}")
    return found, outside


def copy_files(files: Mapping[str, Path], made: Path) -> None:
    """Copy files into a new directory, by the names that they get there."""
    for name, file in files.items():
        (made / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, made / name)


def _write_companions(
    beside: Mapping[str, Path], base: Path, made: Path, target: torch.dtype | None, total: int | None
) -> None:
    copy_files(beside, made)
    if target is not None:
        config = json.loads((made / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(target).removeprefix("torch.")
        write_json(made / "config.json", dict(sorted(config.items())))
    write_older_names(made)
    if total is not None:
        index = json.loads((base / INDEX).read_text(encoding="utf-8"))
        index.setdefault("metadata", {})["total_size"] = total
        write_json(made / INDEX, index)

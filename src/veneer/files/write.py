"""Writing an adapter's directory: everything is written beside the old files, then moved into place."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from veneer.atomic import HalfMovedError, atomic_file, atomic_files, locked, new_directory
from veneer.errors import CheckpointError
from veneer.files.card import merge_card
from veneer.files.digest import DATA_DIGEST, data_digest
from veneer.files.header import BIN_METADATA, name_problem
from veneer.files.layout import (
    BIN_NAME,
    CARD_NAME,
    CONFIG_NAME,
    SAFETENSORS_NAME,
    finish_older_save,
    left_over,
    saved_metadata,
)
from veneer.ops.merging import is_finite
from veneer.wording import warn

#: Holds the place of the digest until the data lie in the file.
NO_DIGEST = "0" * 64


def write_adapter(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] | None = None,
    card: str | None = None,
    safe_serialization: bool = True,
) -> None:
    """Write ``adapter_config.json`` and the tensors, all or nothing.

    A save that fails or is killed leaves the old adapter or the new one, for whoever reads it with Veneer.
    Another library that reads between the two moves, or after a kill there, finds the new tensors with the
    old configuration. Writers into one directory take turns.

    Args:
        directory: made if it does not exist; other files in it are left alone.
        tensors: names on disk (see `to_disk`) to tensors, on any device; shared storage is fine.
        config: content of the configuration file, JSON values only.
        metadata: strings to keep in the file of tensors, beside the configuration.
        card: text of ``README.md``. Of a README that exists already only the front matter is updated.
        safe_serialization: False writes a pickled ``.bin`` instead of safetensors.

    Raises:
        CheckpointError: nothing to write, tensors that are no data (empty shards, meta tensors), or a disk
            that refuses; nothing has changed then.
    """
    check_tensors(tensors)
    root = Path(directory)
    text = _config_text(config)
    new, old = (SAFETENSORS_NAME, BIN_NAME) if safe_serialization else (BIN_NAME, SAFETENSORS_NAME)
    places = [root / new, root / CONFIG_NAME, *([] if card is None else [root / CARD_NAME])]
    try:
        with new_directory(root), locked(root):
            _tidy(root)
            metadata = {**(metadata or {}), **saved_metadata(root, text)}
            with atomic_files(*places, instead_of=root / old) as waiting:
                _write_tensors(waiting[0], _plain(tensors), metadata, safe_serialization)
                _write_text(waiting[1], text)
                if card is not None:
                    _write_text(waiting[2], _with_existing(root / CARD_NAME, card))
    except HalfMovedError as exc:
        raise CheckpointError(
            f"the adapter's tensors are in {root}, but not all other files could be moved into place: {exc}. "
            f"Veneer reads the directory correctly; save again for other readers."
        ) from exc
    except (OSError, SafetensorError, RuntimeError) as exc:
        raise CheckpointError(
            f"the adapter could not be written to {root}; nothing has changed: {exc}"
        ) from exc


def write_card(directory: str | os.PathLike[str], card: str) -> None:
    """Write ``README.md`` completely or not at all; only the front matter of an existing one is updated.

    Raises:
        CheckpointError: the directory cannot be made, or the card cannot be read or written.
    """
    root = Path(directory)
    try:
        with new_directory(root), atomic_file(root / CARD_NAME) as waiting:
            _write_text(waiting, _with_existing(root / CARD_NAME, card))
    except OSError as exc:
        raise CheckpointError(f"the card could not be written: {exc}") from exc


def check_tensors(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that `tensors` hold an adapter's data; warn of NaN and infinity.

    Raises:
        CheckpointError: listing everything that is wrong.
    """
    if not tensors:
        raise CheckpointError(
            "there are no tensors to save; is the adapter's name right, and was it injected?"
        )
    problems: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        problem = name_problem(name) or _tensor_problem(name, tensor)
        if problem:
            problems.setdefault(problem, []).append(
                f"{str(name)[:120]} {tuple(getattr(tensor, 'shape', ()))}"
            )
    if problems:
        lines = [f"  {len(names)} x {what}; e.g. {', '.join(names[:3])}" for what, names in problems.items()]
        raise CheckpointError("these tensors cannot be saved:\n" + "\n".join(lines))
    broken = [n for n, t in tensors.items() if not is_finite(t)]
    if broken:
        warn(f"{len(broken)} of {len(tensors)} tensors to save hold NaN or infinity: {', '.join(broken[:3])}")


def _tensor_problem(name: str, tensor: object) -> str | None:
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}, not a tensor"
    if hasattr(tensor, "full_tensor"):
        return "a sharded tensor: gather it first (DTensor.full_tensor())"
    if tensor.is_meta:
        return "a tensor on the meta device, without data: load the model's weights first"
    if tensor.layout is not torch.strided:
        return "a sparse tensor"
    leaf = name.rsplit(".", 2)
    factor = leaf[-1].startswith("lora_embedding_") or (
        leaf[-1] == "weight" and leaf[-2:-1] in (["lora_A"], ["lora_B"])
    )
    if tensor.numel() == 0 or (factor and tensor.ndim < 2):
        return (
            "an empty or flattened tensor, a shard of FSDP or ZeRO: gather the parameters first "
            "(FSDP.summon_full_params, deepspeed.zero.GatheredParameters) and save on every rank or the first"
        )
    return None


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Detached, contiguous tensors on the CPU, each with a storage of its own and no larger than itself."""
    seen: set[int] = set()
    plain = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _config_text(config: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(sorted(config.items())), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as exc:
        raise CheckpointError(f"the adapter's configuration cannot be written as JSON: {exc}") from exc


def _write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], safetensors: bool
) -> None:
    if safetensors:
        save_file(tensors, path, metadata={**metadata, "format": "pt", DATA_DIGEST: NO_DIGEST})
        _finish_metadata(path)
        return
    with path.open("wb") as file:
        torch.save(tensors, file)
    with zipfile.ZipFile(path, "a") as archive:
        inside = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{inside}/{BIN_METADATA}", json.dumps(metadata, sort_keys=True))


def _finish_metadata(path: Path) -> None:
    """Enter the digest of the data, and sort the metadata, whose order safetensors leaves to chance."""
    with path.open("rb+") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        memory = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        raw = file.read(length).replace(_entry(NO_DIGEST), _entry(data_digest(memory, 8 + length)), 1)
        header = json.loads(raw)
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length) if len(text) <= length else raw)


def _entry(digest: str) -> bytes:
    return f'"{DATA_DIGEST}":"{digest}"'.encode()


def _with_existing(path: Path, card: str) -> str:
    if not path.is_file():
        return card
    try:
        return merge_card(path.read_bytes().decode("utf-8", "surrogateescape"), card)
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read, and would be written over: {exc}") from exc


def _write_text(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


def _tidy(root: Path) -> None:
    """Remove what a killed save left; finish one of an earlier version first."""
    finish_older_save(root)
    for path in left_over(root):
        path.unlink(missing_ok=True)

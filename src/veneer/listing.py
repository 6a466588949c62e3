"""Every adapter under a directory, from configurations and headers alone: no tensor is read."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from veneer.config import LoraConfig, PeftConfig
from veneer.errors import AdapterFileError, VeneerError
from veneer.files.header import HeaderMemo, metadata_and_shapes
from veneer.files.layout import (
    BIN_NAME,
    CONFIG_NAME,
    SAFETENSORS_NAME,
    belonging_config,
    find_config,
    locate_tensors,
    together,
)
from veneer.wording import listed

Shapes = dict[str, tuple[int, ...]]

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<role>[AB])(\.weight)?")


@dataclass(frozen=True)
class AdapterEntry:
    """An adapter as it lies on disk.

    Attributes:
        path: Its directory, relative to where was looked.
        base: The base model that it names.
        peft_type: Its method.
        ranks: Of its factors, ascending.
        target_modules: As in the configuration.
        parameters: Numbers in all its tensors; None where they are not known without reading them.
        bytes: Of the file of tensors.
        modified: When that file was written, in ISO 8601 and UTC.
        problems: What is wrong with it; empty for a healthy one.
    """

    path: str
    base: str | None = None
    peft_type: str | None = None
    ranks: tuple[int, ...] = ()
    target_modules: str | tuple[str, ...] | None = None
    parameters: int | None = None
    bytes: int | None = None
    modified: str | None = None
    problems: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_adapters(directory: str | os.PathLike[str]) -> list[AdapterEntry]:
    """All adapters in a directory and below, healthy or not, by path.

    Links to directories are followed, each directory is looked into once; hidden ones are passed over.

    Raises:
        AdapterFileError: There is no such directory.
    """
    root = Path(directory)
    if not root.is_dir():
        what = "is a file, not a directory" if root.exists() else "does not exist"
        raise AdapterFileError(f"{root} {what}")
    headers: HeaderMemo = {}
    return sorted(
        (_entry(place, root, headers) for place in _adapter_directories(root)), key=lambda entry: entry.path
    )


def _adapter_directories(root: Path) -> Iterator[Path]:
    """Directories that hold an adapter, or half of one."""
    seen: set[tuple[int, int]] = set()
    for folder, inside, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        if {CONFIG_NAME, SAFETENSORS_NAME, BIN_NAME} & set(files):
            yield Path(folder)


def _entry(place: Path, root: Path, headers: HeaderMemo) -> AdapterEntry:
    found: dict[str, Any] = {}
    problems: list[str] = []
    config = functools.partial(find_config, place)
    shapes: Shapes | None = None
    with _collecting(problems):
        found |= _of_file(locate_tensors(place))
        (metadata, shapes), beside = together(place, functools.partial(metadata_and_shapes, memo=headers))
        config = functools.partial(belonging_config, place, metadata, beside)
    with _collecting(problems):
        belonging = config()
        if belonging.cut_short:
            problems.append("a save was cut short; Veneer reads its new state, other libraries a mixture")
        found |= _of_config(belonging.values)
    if shapes is not None:
        found["parameters"], found["ranks"], wrong = _of_shapes(tuple(shapes.items()))
        problems += wrong
    problems += found.pop("problems", ())
    name = place.relative_to(root).as_posix()
    return AdapterEntry(path=name, problems=tuple(_short(p, place) for p in problems), **found)


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except (VeneerError, OSError) as error:
        problems.append(str(error))


def _short(problem: str, place: Path) -> str:
    return problem.replace(f"{place}{os.sep}", "").replace(str(place), "the directory")


def _of_config(values: dict[str, Any]) -> dict[str, Any]:
    base, kind = values.get("base_model_name_or_path"), values.get("peft_type")
    found: dict[str, Any] = {
        "base": base if isinstance(base, str) and base else None,
        "peft_type": kind if isinstance(kind, str) else None,
    }
    try:
        config = PeftConfig.from_dict(values)
    except VeneerError as error:
        return {**found, "problems": [f"{CONFIG_NAME}: {error}"]}
    if not isinstance(config, LoraConfig):
        return {**found, "problems": [f"its method is {found['peft_type']}, which Veneer does not read"]}
    targets = config.target_modules
    found["target_modules"] = (
        targets if targets is None or isinstance(targets, str) else tuple(sorted(targets))
    )
    return found


def _of_file(path: Path) -> dict[str, Any]:
    status = path.stat()
    when = datetime.fromtimestamp(status.st_mtime, tz=timezone.utc).isoformat(timespec="seconds")
    return {"bytes": status.st_size, "modified": when}


@functools.lru_cache(maxsize=64)
def _of_shapes(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> tuple[int, tuple[int, ...], list[str]]:
    """(parameters, ranks, what is wrong) of an adapter's tensors."""
    parameters = sum(math.prod(shape) for _, shape in shapes)
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in shapes:
        if match := _FACTOR.fullmatch(key):
            layers.setdefault(match["path"], {})[match["role"]] = shape
    ranks = tuple(sorted({f["A"][0] for f in layers.values() if f.get("A")}))
    wrong = _wrong_factors(layers)
    if not layers:
        wrong.append(f"{SAFETENSORS_NAME} holds no factors of a LoRA")
    return parameters, ranks, wrong


def _wrong_factors(layers: dict[str, dict[str, tuple[int, ...]]]) -> list[str]:
    half = [path for path, factors in layers.items() if len(factors) < 2]
    apart = [
        path for path, f in layers.items() if len(f) == 2 and f["A"][:1] != f["B"][1:2] and f["A"] and f["B"]
    ]
    wrong = []
    if half:
        wrong.append(f"only one of the two factors of {listed(half, 1)} is there")
    if apart:
        wrong.append(f"the factors of {listed(apart, 1)} differ in rank")
    return wrong

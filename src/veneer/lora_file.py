"""A LoRA on disk as modules with factors: both of its files read together, and held against one another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from veneer.config import LoraConfig, PeftConfig
from veneer.errors import AdapterFileError
from veneer.expert_layouts.reading import find, stacks
from veneer.expert_layouts.standard import standard
from veneer.expert_layouts.telling import Told
from veneer.files.keys import PREFIX
from veneer.files.layout import CONFIG_NAME, blame_file
from veneer.files.read import AdapterFile, open_adapter
from veneer.spec import LoraSpec, resolve_all, variant_name
from veneer.wording import bullets

_FACTOR = re.compile(
    r"^base_model\.model\.(?P<path>.+)\.lora_(?P<role>A|B|embedding_A|embedding_B)(\.weight)?$"
)
#: Where the path of a wrapper ends, in that of an attention's output or a module's second parameter.
_WRAPPED = re.compile(r"\.base_layer(?=\.|$)")


class OpenLora(NamedTuple):
    """A LoRA on disk.

    Attributes:
        config: Its configuration.
        file: Its tensors, not read yet.
        specs: What each module got.
        experts: The layout in which the file has the factors of experts, and what told it; None without any.
    """

    config: LoraConfig
    file: AdapterFile
    specs: dict[str, LoraSpec]
    experts: Told | None = None


class FileUpdate(NamedTuple):
    """The update ``s·B A`` of one module, as it lies on disk.

    Attributes:
        path: The module.
        spec: What it got; inside a wrapper that of the wrapper, with the wrapper's path.
        names: Names of A and B in the file.
        a: A (r, in), of a convolution (r, in, k…); of E experts (E·r, in), one after the other.
        b: B (out, r), of a convolution (out, r, 1…); of E experts (out, r·E), interleaved.
    """

    path: str
    spec: LoraSpec
    names: tuple[str, str]
    a: Tensor
    b: Tensor

    def turned(self) -> FileUpdate:
        """That of the transposed matrix: an embedding's, as a head that shares its weight has it."""
        return self._replace(a=self.b.T.contiguous(), b=self.a.T.contiguous())

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """``(B: (out, r), A: (r, in·k…))`` of each of the experts that share the factors, mostly of one."""
        a, b, r = self.a.flatten(1), self.b.flatten(1), self.spec.r
        experts = a.shape[0] // r
        if experts == 1:
            return [(b, a)]
        rows, columns = a.reshape(experts, r, -1), b.reshape(-1, r, experts)
        return [(columns[:, :, e], rows[e]) for e in range(experts)]

    def with_pairs(self, pairs: Sequence[tuple[Tensor, Tensor]], spec: LoraSpec) -> FileUpdate:
        """The same module with another update: the inverse of `pairs`, for any rank, in the stored type."""
        b = torch.stack([b for b, _ in pairs], dim=-1).flatten(1)
        a = torch.cat([a for _, a in pairs])
        a = a.reshape(-1, *self.a.shape[1:]).to(self.a.dtype)
        b = b.reshape(self.b.shape[0], -1, *self.b.shape[2:]).to(self.b.dtype)
        return self._replace(spec=spec, a=a, b=b)

    def stored(self) -> dict[str, Tensor]:
        """The factors by their names in the file."""
        return dict(zip(self.names, (self.a, self.b), strict=True))


def updates(lora: OpenLora) -> Iterator[FileUpdate]:
    """The updates of an adapter, each read when it is asked for."""
    for path, roles in factor_names(lora.file)[0].items():
        names = (roles["A"], roles["B"])
        tensors = lora.file.tensors(names)
        yield FileUpdate(path, lora.specs[path], names, *(tensors[name] for name in names))


def open_lora(adapter: str | os.PathLike[str] | OpenLora, *, ambiguous: bool = False) -> OpenLora:
    """Open a LoRA, unless it is open already; experts in another layout are brought into PEFT's.

    Args:
        adapter: Its directory.
        ambiguous: Read experts of an ambiguous layout as PEFT does, for who only looks at them.

    Raises:
        AdapterFileError: It is missing or broken, is no LoRA, its two files disagree, or the layout of its
            experts is ambiguous; names the modules.
    """
    if isinstance(adapter, OpenLora):
        return adapter
    file = open_adapter(adapter)
    with blame_file(adapter):
        config = PeftConfig.from_belonging(file.belonging_config())
        variant_name(config)
    config, file, told = standard(file, config, ambiguous=ambiguous)
    factors = factor_names(file)[0]
    # What is adapted inside a wrapper takes the wrapper's rank and strength; stacks have their own.
    outer = {path: _WRAPPED.split(path, maxsplit=1)[0] for path in factors}
    for path, stack in stacks(find(file.shapes, config), config).items():
        if stack is not None:
            inner = path.removeprefix(PREFIX)
            outer[inner] = f"{inner.removesuffix('.base_layer')}.{stack}"
    with blame_file(adapter):
        resolved = resolve_all(config, "default", dict.fromkeys(outer.values(), ""))
    specs, wrong = {path: resolved[outer[path]] for path in factors}, []
    for path, roles in factors.items():
        spec = specs[path]
        a, b = file.shapes[roles["A"]], file.shapes[roles["B"]]
        flat = {1}.issuperset(b[2:]) and 0 not in (*a, *b)  # B of a convolution has kernels of one place
        flat = flat and ("lora_embedding" not in roles["A"] or len(a) == len(b) == 2)
        if len(a) < 2 or len(b) < 2 or a[0] != b[1] or not flat:
            wrong.append(f"{path}: factors of shapes {a} and {b} have no product")
        elif a[0] != spec.r and not (config.target_parameters and a[0] % spec.r == 0):
            wrong.append(f"{path}: the configuration gives it rank {spec.r}, its factors have rank {a[0]}")
    if not specs:
        raise AdapterFileError(
            f"{file.path} holds no factors of a LoRA, only: {', '.join(file.shapes) or 'nothing'}"
        )
    if wrong:
        raise AdapterFileError(bullets(f"{file.path} does not fit its {CONFIG_NAME}:", wrong, 5))
    return OpenLora(config, file, specs, told if told.layout else None)


def factor_names(file: AdapterFile) -> tuple[dict[str, dict[str, str]], list[str]]:
    """(module path -> the names of its factors "A" and "B" in the file, the names of all other tensors).

    Raises:
        AdapterFileError: A module has only one of the two.
    """
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in file.shapes:
        match = _FACTOR.match(key)
        if match is None:
            others.append(key)
        else:
            layers.setdefault(match["path"], {})[match["role"].removeprefix("embedding_")] = key
    half = [path for path, factors in layers.items() if factors.keys() != {"A", "B"}]
    if half:
        raise AdapterFileError(f"{file.path} holds only one of the two factors of {', '.join(half[:3])}")
    return layers, others

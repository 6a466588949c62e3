"""Export an adapter: check, fold, write, read back, then move the files into place."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base_fingerprint import check_base_files
from ...errors import ConfigError, ExportError, Hint
from ...files.overwrite import check_replaceable, replacing
from ...wording import listed
from .base import Part, Problem, Target, find, refuse, targets
from .base_model import BaseModel
from .dora import Lost
from .dora import dora_to_plain as make_plain
from .folding import fold
from .options import check_options, pipeline_parts
from .source import Source, read_source
from .verifying import Compared, compare


@dataclass(frozen=True)
class ExportReport:
    """What was written, and what reading it back gave.

    Attributes:
        target: Name of the target.
        directory: Where the files are.
        files: Their names.
        modules: Module path -> whether its update is exactly that of the source, and the relative norm of
            the difference; paths begin with the part of a pipeline where the target has parts.
        folded: What the target cannot say and was put into the factors, in words.
        left_out: What was not written because the reader has it from the base, in words.
        notes: What else the reader needs.
        dora_errors: Module path -> relative norm of what a DoRA's update lost on becoming plain; empty
            otherwise.
        dora_output_errors: The same as a share of the module's output, for inputs that prefer no direction.
        usage: What to do with the files.
    """

    target: str
    directory: Path
    files: tuple[str, ...]
    modules: Mapping[str, Compared]
    folded: tuple[str, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    dora_errors: Mapping[str, float]
    dora_output_errors: Mapping[str, float]
    usage: str

    @property
    def exact(self) -> bool:
        """Whether every update is exactly that of the source (of the converted one, after DoRA)."""
        return all(module.exact for module in self.modules.values())

    @property
    def worst(self) -> float:
        """The largest relative difference of an update, from rounding folded factors once."""
        return max((module.error for module in self.modules.values()), default=0.0)


def export_adapter(
    directory: str | os.PathLike[str],
    out: str | os.PathLike[str],
    target: str,
    *,
    base: str | os.PathLike[str] | nn.Module | None = None,
    dtype: str = "auto",
    dora_to_plain: bool = False,
    rank: int | None = None,
    component: str | None = None,
    overwrite: bool = False,
    tell: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write an adapter as another reader takes it, and verify it from what was written.

    What the reader's format cannot say is folded into the factors: a strength ``t = s·r`` other than the
    common T becomes ``(t / T)·B``, other ranks get zeros. The update ``s·B A`` of every module is read back
    and compared before the files appear.

    Args:
        directory: The adapter; for ``diffusers`` also a directory with one in each of ``unet``,
            ``transformer``, ``text_encoder`` and ``text_encoder_2`` that there is.
        out: Directory to write; it appears whole or not at all. The source is never written to.
        target: ``vllm``, ``sglang``, ``llama.cpp``, ``ollama``, ``mlx``, ``diffusers`` or ``plain``.
        base: The base model or the directory of its files, for ``dora_to_plain``, for folding ``lora_bias``
            into biases, and to make sure that it is the base which the adapter was made on, and that
            embeddings left out are its own.
        dtype: Type of the factors: ``auto`` (as they are), ``float32``, ``float16`` or ``bfloat16``.
        dora_to_plain: Make plain LoRA of DoRA by a truncated SVD.
        rank: Rank of the result of ``dora_to_plain``.
        component: Part of the pipeline that the adapter belongs to, for ``diffusers``.
        overwrite: Replace the adapter in a directory that holds files.
        tell: Called with (how many DoRA modules are converted, how many there are).

    Returns:
        What was folded, left out, and found on reading back.

    Raises:
        ConfigError: There is no such target, or options that cannot be right.
        ExportError: The target cannot express the adapter (with everything that stands in
            the way, and the ways out), or reading back found a difference. Nothing is written then.
        AdapterFileError: The adapter is missing, broken or no LoRA.
        BaseMismatchError: It was made on another base model than the one that is given.
        VeneerError: The output holds files already, or cannot be written.
    """
    check_options(target, base, dtype, dora_to_plain, rank, component)
    chosen, out, directory = find(target), Path(out), Path(directory)
    check_replaceable(out, overwrite, "adapter")
    if out.resolve() == directory.resolve():
        raise ExportError(f"{out} contains the adapter itself; choose another output directory")
    base_model = None if base is None else BaseModel(base)
    sources = {
        name: replace(source, base=base_model)
        for name, source in _sources(directory, chosen, component).items()
    }
    _check_base(sources, base_model)
    lost: dict[str, Lost] = {}
    if dora_to_plain:
        assert base_model is not None and rank is not None
        sources, lost = _made_plain(sources, base_model, rank, tell)
        if not lost:
            raise ExportError(
                f"{directory} is not a DoRA adapter, so there is nothing to convert: leave out ",
                Hint("dora_to_plain"),
            )
    biases: dict[str, dict[str, Tensor]] = {}
    problems: dict[str, list[Problem]] = {}
    for name, source in sources.items():
        sources[name], biases[name], problems[name] = chosen.prepared(source)
        problems[name] += chosen.problems(sources[name])
    refuse(problems, sources, chosen, directory)
    left_out = [line for source in sources.values() for line in _left_out(source, chosen)]
    kind = None if dtype == "auto" else getattr(torch, dtype)
    parts = [
        Part(source, fold(source.updates, chosen.rules, kind), name, biases[name])
        for name, source in sources.items()
    ]
    with replacing(out, overwrite, "adapter", _stale()) as made:
        chosen.write(parts, made)
        modules = _verified(chosen, parts, made)
        files = tuple(name for name in chosen.files if (made / name).is_file())
    return ExportReport(
        chosen.name,
        out,
        files,
        modules,
        tuple(line for part in parts for line in _in_words(part, chosen.rules.alpha)),
        tuple(left_out),
        tuple(line for source in sources.values() for line in chosen.notes(source)),
        {path: share.update for path, share in lost.items()},
        {path: share.output for path, share in lost.items()},
        chosen.usage(out, parts),
    )


def _sources(directory: Path, target: Target, component: str | None) -> dict[str, Source]:
    """The adapter, or that of each part of a pipeline, by the part's name."""
    inside = pipeline_parts(directory) if target.name == "diffusers" else []
    if inside:
        if component is not None:
            raise ConfigError(f"{directory} holds {', '.join(inside)}, so there is no component to choose")
        return {name: read_source(directory / name) for name in inside}
    source = read_source(directory)
    return {target.component(source, component): source}


def _check_base(sources: Mapping[str, Source], base: BaseModel | None) -> None:
    """Refuse another base than the adapter's. The parts of a pipeline have a base each, so none is theirs."""
    if base is not None and len(sources) == 1:
        (source,) = sources.values()
        where = base.place or "the one that was given"
        check_base_files(base.reader, base.config, source.metadata, source.directory, where)


def _made_plain(
    sources: dict[str, Source], base: BaseModel, rank: int, tell: Callable[[int, int], None] | None
) -> tuple[dict[str, Source], dict[str, Lost]]:
    """(the adapters without magnitudes, module path -> what it loses)."""
    made: dict[str, Source] = {}
    errors: dict[str, Lost] = {}
    for name, source in sources.items():
        made[name], lost = make_plain(source, base, rank, tell)
        errors |= lost
    return made, errors


def _left_out(source: Source, target: Target) -> list[str]:
    """The copies of the base's embeddings that a target does not take.

    Raises:
        ExportError: They are not those of the base that was given.
    """
    if target.takes_copies or not source.copies:
        return []
    changed = []
    for path, copy in source.copies.items():
        own = None if source.base is None else source.base.tensor(path)
        if own is not None and (own.shape != copy.shape or not torch.equal(own.to(copy.dtype), copy)):
            changed.append(path)
    if changed:
        raise ExportError(
            f"{source.directory} has embeddings of its own ({listed(changed)}), which are not the base's, "
            f"and {target.name} uses those of the base: `veneer merge` makes a plain model of both"
        )
    known = "they are equal" if source.base is not None else "if its vocabulary was extended, merge instead"
    return [f"the saved copy of {listed(source.copies)}: {target.name} takes the base's own ({known})"]


def _stale() -> re.Pattern[str]:
    """Files of any target, which are not to stay beside those of another."""
    names = {"adapter_model.bin", *(file for target in targets for file in target.files)}
    return re.compile("|".join(map(re.escape, sorted(names))))


def _verified(target: Target, parts: list[Part], made: Path) -> dict[str, Compared]:
    read = target.read(made)
    if read.keys() != {part.component for part in parts}:
        raise ExportError(f"what was written reads back as {listed(read)}, so it was removed")
    found: dict[str, Compared] = {}
    for part in parts:
        start = f"{part.component}." if part.component else ""
        compared = compare(part.source.updates, read[part.component])
        found |= {f"{start}{path}": result for path, result in compared.items()}
        if changed := target.changed_others(part, made):
            raise ExportError(f"what was written does not read back, so it was removed: {listed(changed)}")
    return found


def _in_words(part: Part, alpha: str) -> list[str]:
    folded, start = part.folded, f"{part.component}: " if part.component else ""
    lines = []
    meaning = {"rank": "a scale of 1", "any": f"a scale of {folded.alpha / folded.r:g}"}
    common = meaning.get(alpha, f"lora_alpha = {folded.alpha:g}")
    total = len(folded.updates)
    if folded.padded:
        lines.append(
            f"{start}{len(folded.padded)} of {total} modules padded with zeros to the rank {folded.r}"
        )
    if folded.scaled:
        lines.append(
            f"{start}the strength of {len(folded.scaled)} of {total} modules multiplied into B; "
            f"{common} for all"
        )
    elif part.source.config.use_rslora and not folded.use_rslora:
        lines.append(f"{start}use_rslora written as {common}")
    if part.biases:
        lines.append(f"{start}the bias of B of {len(part.biases)} modules added to the layers' own biases")
    return lines

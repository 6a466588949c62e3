"""Check a saved adapter: its files, its values, and what it does on its base."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..base_fingerprint import FINGERPRINT, check_base
from ..errors import MergeError, VeneerError, VeneerWarning
from ..files.digest import DATA_DIGEST
from ..files.read import AdapterFile, open_adapter
from ..files.values import check_values
from ..lora_file import OpenLora, open_lora
from ..peft_model import PeftModel
from ..testing.tolerances import BY_DTYPE
from ..training.adapters import load_plain, own_tokenizer, sample_logits
from ..training.loading import Loading
from ..training.progress import Progress
from ..training.saved_adapter import PlainModel, base_name, read_adapter
from ..wording import first_line, listed
from .check import Check


def verify_adapter(
    directory: str | os.PathLike[str],
    model: str | None = None,
    loading: Loading | None = None,
    progress: Progress | None = None,
) -> Iterator[Check]:
    """Check a saved adapter; each check is yielded when it is done.

    From its files: configuration and tensors belong together, the tensors are those that were saved, every
    value is finite. With a base: names and shapes fit, it is the base that the adapter was made on, how far
    the adapter moves its outputs on a sample text, saving gives the same tensors bit for bit, and merged
    equals unmerged within rounding. Where a check fails on which others depend, those are not made.

    Args:
        directory: The adapter.
        model: Directory or hub id of the base to try it on; it is loaded in float32 unless ``loading`` says
            otherwise. None checks the files alone.
        loading: How to load the base.
        progress: Told what is loaded.

    Raises:
        TrainingError: The base cannot be loaded.
    """
    check, lora = _tried("files", lambda: open_lora(directory), _described)
    yield check
    if lora is None:
        return
    check, values = _tried("digest", lora.file.tensors, lambda _: "the tensors are those that were saved")
    if values is not None and DATA_DIGEST not in lora.file.metadata:
        check = Check("digest", None, "the file has none, as those of other libraries and of older versions")
    yield check
    if values is None:
        return
    count = f"all {sum(t.numel() for t in values.values()):,} numbers of {len(values)} tensors are finite"
    check, _ = _tried("values", partial(check_values, values, lora.file.path), lambda _: count)
    yield check
    if model is not None and check.passed:
        yield from _on_base(lora, model, loading or Loading("float32"), progress)


def _on_base(lora: OpenLora, model: str, loading: Loading, progress: Progress | None) -> Iterator[Check]:
    saved = read_adapter(lora.file.path.parent)
    base, tokenizer = load_plain(PlainModel(base_name(saved, model), saved.classes()), loading, progress)
    tokenizer = own_tokenizer(saved.directory) or tokenizer
    check, adapted = _tried(
        "names and shapes",
        lambda: PeftModel.from_pretrained(base, saved.directory, check_base=False),
        lambda _: f"all {len(lora.file.shapes)} tensors are used, and no factor is missing",
    )
    yield check
    if adapted is None:
        return
    if FINGERPRINT in lora.file.metadata:
        metadata, where = lora.file.metadata, saved.directory
        yield _tried(
            "base",
            partial(check_base, adapted.get_base_model(), metadata, where, carried=lora.file.shapes),
            lambda _: "sampled weights are those of the base that it was made on",
        )[0]
    else:
        yield Check("base", None, "the file has no fingerprint of its base")
    before = sample_logits(adapted, tokenizer, base=True)
    after = sample_logits(adapted, tokenizer)
    yield _moved(before, after)
    yield _reloaded(adapted, lora.file)
    yield _merged(adapted, tokenizer, after)


def _tried(name: str, act: Callable[[], Any], said: Callable[[Any], str]) -> tuple[Check, Any]:
    """(whether something can be done, its result), with what Veneer warned of."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            result = act()
        except VeneerError as error:
            # Ways out are options of loading, which nobody has here.
            return Check(name, False, error.message.written(lambda hint: None)), None
    remarks = [str(warning.message) for warning in heard if issubclass(warning.category, VeneerWarning)]
    return Check(name, True, "; ".join([said(result), *remarks])), result


def _described(lora: OpenLora) -> str:
    ranks = sorted({spec.r for spec in lora.specs.values()})
    return (
        f"{len(lora.specs)} modules of rank {', '.join(map(str, ranks))}, {len(lora.file.shapes)} tensors, "
        "as the configuration has it"
    )


def _moved(before: torch.Tensor, after: torch.Tensor) -> Check:
    name = "outputs"
    if not bool(after.isfinite().all()):
        return Check(name, False, "on a sample text they are not finite")
    share = float((after - before).norm() / before.norm().clamp(min=1e-30))
    changed = int((after.argmax(-1) != before.argmax(-1)).sum())
    if not share:
        return Check(name, None, "on a sample text the adapter changes nothing")
    return Check(
        name,
        True,
        f"on a sample text the adapter moves them by {share:.1%}, and the likeliest at {changed} of "
        f"{after.argmax(-1).numel()} places",
    )


def _reloaded(adapted: Any, file: AdapterFile) -> Check:
    """Whether saving the loaded adapter gives the tensors of its file again, in the types of the file."""
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", VeneerWarning)
        whole = any(".lora_" not in name for name in file.shapes)
        adapted.save_pretrained(place, save_embedding_layers="auto" if whole else False)
        theirs, ours = file.tensors(), open_adapter(place).tensors()
        apart = [
            name
            for name in sorted(theirs.keys() | ours.keys())
            if name not in theirs
            or name not in ours
            or not torch.equal(theirs[name], ours[name].to(theirs[name].dtype))
        ]
    if apart:
        return Check("reload", False, f"saved again, {len(apart)} tensors are not the same: {listed(apart)}")
    return Check("reload", True, f"saved again, its {len(theirs)} tensors are the same, bit for bit")


def _merged(adapted: Any, tokenizer: Any, unmerged: torch.Tensor) -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VeneerWarning)
            adapted.merge_adapter()
    except MergeError as error:
        return Check("merge", None, f"it cannot be merged: {first_line(error)}")
    allowed = BY_DTYPE[adapted.get_base_model().dtype].rtol
    apart = float((sample_logits(adapted, tokenizer) - unmerged).norm() / unmerged.norm().clamp(min=1e-30))
    return Check(
        "merge", apart <= allowed, f"merged, the outputs differ by {apart:.1e} (rounding: {allowed:g})"
    )

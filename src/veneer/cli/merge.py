"""``veneer merge``: an adapter and its base become one plain model."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files.overwrite import check_replaceable
from ..training.loading import Loading
from ..training.paths import check_model, check_not_a_source
from ..training.progress import Terminal
from ..training.saved_adapter import SavedAdapter, base_name, read_adapter
from ..wording import size
from .asking import Adapter, Device
from .common import app, by_kind, console, load_libraries, show, show_json, table

if TYPE_CHECKING:
    from ..merge_report import MergeReport
    from ..training.adapters import Drift

#: Share of the update below which losing the rest is worth a warning.
WORTH_SAYING = 0.9


@app.command()
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="Directory for the merged model; a failure writes nothing.")],
    base: Annotated[
        str | None,
        typer.Option("--model", help="Base model to use instead of the one that the adapter names."),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the merged weights: auto (as the base is saved), float32, bfloat16 or float16. "
            "float32 loses nothing."
        ),
    ] = "auto",
    device: Device = "auto",
    quantize: Annotated[
        str, typer.Option(help="Merge into a base quantised to nf4, fp4, int8 or int4, and save it so.")
    ] = "none",
    untie: Annotated[
        bool,
        typer.Option(
            "--untie", help="Where two modules share an adapted weight, change only that of the adapted one."
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite-output-dir", help="Replace the model in a directory that is not empty."),
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="Merge file by file, with one tensor in memory at a time; for plain adapters.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON, with the share kept in each module.")
    ] = False,
) -> None:
    """Merge an adapter into its base model; the result loads with transformers alone.

    Tokenizer, chat template and generation settings are copied. 16-bit weights cannot hold a small update
    exactly: the share of it that they keep is shown for each kind of module.
    """
    loading = Loading(dtype, device, quantize)
    in_memory = {"--untie": untie, "--quantize": quantize != "none", "--device": device != "auto"}
    if low_memory and (given := [flag for flag, used in in_memory.items() if used]):
        raise typer.BadParameter(f"{', '.join(given)}: not with --low-memory, which loads no model")
    progress = Terminal()
    check_not_a_source(output, adapter)
    check_replaceable(output, overwrite)
    saved = read_adapter(adapter, progress)
    named = base_name(saved, base)
    check_model(named)
    check_not_a_source(output, named)
    load_libraries("torch", *([] if low_memory else ["transformers"]))
    from ..training.models import directory_bytes

    drift: Drift | None = None
    if low_memory:
        report, stored = _from_file_to_file(saved, output, base, dtype, overwrite, progress)
    else:
        report, drift, stored = _in_memory(saved, output, base, loading, overwrite, untie, progress)
    weights = directory_bytes(output, "*.safetensors")
    if report.undefined:
        progress.say(f"warning: {report}; so do those of the base")
    elif report.mean < WORTH_SAYING:
        measured = "" if drift is None else f": {drift}"
        if low_memory:
            measured = " (by how much is not measured, as --low-memory loads no model)"
        progress.say(
            f"warning: only {report.mean:.0%} of the update survived rounding to {stored}, so the merged "
            f"model answers differently from the adapter{measured}. --dtype float32 keeps all of it; "
            f"veneer eval, of {output} and of the adapter, measures both on your data"
        )
    if as_json:
        modules = {path: _defined(share) for path, share in report.kept.items()}
        kept = {"mean": _defined(report.mean), "worst": _defined(report.worst), "modules": modules}
        found = {"output": str(output), "bytes": weights, "dtype": stored, "kept": kept}
        show_json(found if drift is None else found | {"outputs": asdict(drift)})
        return
    _show(report, stored)
    show(f"model ({size(weights)}): {output}")


def _in_memory(
    saved: SavedAdapter,
    output: Path,
    base: str | None,
    loading: Loading,
    overwrite: bool,
    untie: bool,
    progress: Terminal,
) -> tuple[MergeReport, Drift | None, str]:
    """What was kept, what it does to the outputs, and the type of the merged weights."""
    from ..training.adapters import load_adapted, save_merged

    adapted, tokenizer = load_adapted(saved, base, loading, progress=progress)
    progress.say(f"Merging {saved.name} and writing {output}")
    stored = str(adapted.dtype).removeprefix("torch.") if loading.quantize == "none" else loading.quantize
    return *save_merged(adapted, tokenizer, output, untie=untie, overwrite=overwrite), stored


def _from_file_to_file(
    saved: SavedAdapter, output: Path, base: str | None, dtype: str, overwrite: bool, progress: Terminal
) -> tuple[MergeReport, str]:
    """What was kept, and the type of the merged weights."""
    from ..training.merge_files import base_directory, merge_files

    found = base_directory(saved, base, progress)
    progress.say(f"Merging {saved.name} into the files of {found} and writing {output}")
    report = merge_files(saved.directory, found, output, dtype, overwrite, progress)
    return report, "the stored types" if dtype == "auto" else dtype


def _show(report: MergeReport, stored: str) -> None:
    shown = table("module", "count", "kept", "least", "in")
    shown.columns[-1].justify = "left"
    for kind, paths in by_kind(report.kept).items():
        shares = [(report.kept[path], path) for path in paths]
        least, path = min(shares, key=_least_first)
        mean = sum(share for share, _ in shares) / len(shares)
        shown.add_row(kind, str(len(shares)), _percent(mean), _percent(least), path)
    console().print(shown)
    _, path = min(((share, path) for path, share in report.kept.items()), key=_least_first)
    kept = "not all of them are finite"
    if not report.undefined:
        kept = f"{report.mean:.1%} of the update kept, least {report.worst:.1%} in {path}"
    show()
    show(f"{len(report.kept)} modules merged into {stored}; {kept}")


def _least_first(found: tuple[float, str]) -> tuple[bool, float]:
    return (not math.isnan(found[0]), found[0])


def _percent(share: float) -> str:
    return "undefined" if math.isnan(share) else f"{share:.1%}"


def _defined(share: float) -> float | None:
    return None if math.isnan(share) else share

"""``veneer export``: write an adapter for another program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files.overwrite import check_replaceable
from ..integrations.export.options import check_options, pipeline_parts
from ..training.paths import check_model
from ..training.progress import Terminal
from ..training.saved_adapter import SavedAdapter, base_name, read_adapter
from ..wording import size
from .asking import Adapter, Overwrite
from .common import app, load_libraries, show, show_json
from .plain_lora import module_bar

if TYPE_CHECKING:
    from ..integrations.export import ExportReport

#: A larger relative error is that of rounding to a 16-bit type.
HALF = 1e-6


@app.command()
def export(
    adapter: Adapter,
    target: Annotated[
        str,
        typer.Option(help="Program to export for: vllm, sglang, llama.cpp, ollama, mlx, diffusers or plain."),
    ],
    output: Annotated[
        Path | None,
        typer.Argument(help="Directory for the files; a failure writes nothing. Default: ADAPTER-TARGET."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--model", help="Directory or hub id of the base model, where its weights are needed."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the factors: auto (as saved), float32, bfloat16 or float16.")
    ] = "auto",
    dora_to_plain: Annotated[
        bool,
        typer.Option(
            "--dora-to-plain",
            help="Convert DoRA to the closest plain LoRA of --rank, and report what is lost. Needs the base.",
        ),
    ] = False,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank for --dora-to-plain.")] = None,
    component: Annotated[
        str | None,
        typer.Option(
            help="Part of the pipeline, for diffusers: unet, transformer, text_encoder or text_encoder_2."
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export an adapter for vLLM, SGLang, llama.cpp, Ollama, mlx-lm, diffusers, or any reader of plain LoRA.

    What the format cannot express is folded into the factors where possible; otherwise the export is
    refused, with a list of everything in the way. The files are read back, and every module's update is
    compared, before they appear.
    """
    check_options(target, base or "BASE", dtype, dora_to_plain, rank, component)
    place, progress = Path(adapter).expanduser(), Terminal()
    parts = pipeline_parts(place) if target == "diffusers" else []
    adapters = [read_adapter(place / part) for part in parts] or [read_adapter(adapter, progress)]
    if base is None and dora_to_plain:
        base = base_name(adapters[0])
    if base is not None and not Path(base).expanduser().is_dir():
        check_model(base)
    if output is None:
        output = _default_output(place if place.exists() else Path(place.name), target)
    check_replaceable(output, overwrite, "adapter")
    load_libraries("torch")
    from ..integrations.export import export_adapter, targets

    base_model = None if base is None else _base(adapters[0], base, progress)
    with module_bar(progress, dora_to_plain) as tell:
        report = export_adapter(
            place if parts else adapters[0].directory,
            output,
            target,
            base=base_model,
            dtype=dtype,
            dora_to_plain=dora_to_plain,
            rank=rank,
            component=component,
            overwrite=overwrite,
            tell=tell,
        )
    if as_json:
        _as_json(report)
    else:
        _show(report, targets.get(target).reader)  # type: ignore[union-attr]


def _default_output(place: Path, target: str) -> Path:
    """Where the files go when nobody says: beside the adapter, or here for one of the hub."""
    place = place.resolve() if place.name in ("", "..") else place
    return place.with_name(f"{place.name}-{target}")


def _base(saved: SavedAdapter, base: str, progress: Terminal) -> Path:
    from ..training.merge_files import base_directory

    place = Path(base).expanduser()
    return place if place.is_dir() else base_directory(saved, base, progress)


def _as_json(report: ExportReport) -> None:
    show_json(
        {
            "target": report.target,
            "output": str(report.directory),
            "files": list(report.files),
            "exact": report.exact,
            "worst_error": report.worst,
            "modules": {
                path: {"exact": found.exact, "error": found.error} for path, found in report.modules.items()
            },
            "folded": list(report.folded),
            "left_out": list(report.left_out),
            "notes": list(report.notes),
            "dora_errors": dict(report.dora_errors),
            "dora_output_errors": dict(report.dora_output_errors),
            "usage": report.usage,
        }
    )


def _show(report: ExportReport, reader: str) -> None:
    count = len(report.modules)
    show(f"{count} module{'s' * (count != 1)} for {reader}: {report.directory}")
    for name in report.files:
        show(f"  {name} ({size((report.directory / name).stat().st_size)})")
    for label, lines in (("folded", report.folded), ("left out", report.left_out), ("note", report.notes)):
        for line in lines:
            show(f"{label}: {line}")
    if report.dora_errors:
        show(
            f"DoRA made plain: {_mean_and_most(report.dora_errors, 'of an update is missed')}; that is "
            f"{_mean_and_most(report.dora_output_errors, 'of an output')}, for inputs that prefer no "
            "direction. A higher --rank misses less"
        )
    show(f"read back: {_verdict(report)}")
    show(f"use it: {report.usage}")


def _mean_and_most(errors: Mapping[str, float], words: str) -> str:
    most = max(errors, key=lambda path: errors[path])
    return f"{sum(errors.values()) / len(errors):.2%} {words} on average, at most {errors[most]:.2%} ({most})"


def _verdict(report: ExportReport) -> str:
    source = "the converted adapter" if report.dora_errors else "the adapter"
    if report.exact:
        return f"every update equals that of {source} exactly"
    rounded = [path for path, found in report.modules.items() if not found.exact]
    worst = max(rounded, key=lambda path: report.modules[path].error)
    hint = "; --dtype float32 rounds less" if report.worst > HALF else ""
    same, count = len(report.modules) - len(rounded), len(report.modules)
    return (
        f"{same} of {count} updates equal those of {source} exactly, the others up to one rounding of their "
        f"factors, at most {report.worst:.1e} of an update ({worst}){hint}"
    )

"""``veneer convert --plain``: plain LoRA of an adapter with options that other programs do not know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..training.paths import check_model
from ..training.progress import Terminal
from ..training.saved_adapter import SavedAdapter, base_name
from .common import by_kind, console, load_libraries, show, show_json, show_written, table

if TYPE_CHECKING:
    from ..integrations.export import ExportReport


def make_plain(
    saved: SavedAdapter, output: Path, base: str | None, rank: int | None, overwrite: bool, as_json: bool
) -> None:
    """Write an adapter as plain LoRA, and say for each module what that misses."""
    dora = saved.config.use_dora
    if dora and rank is None:
        raise typer.BadParameter(f"{saved.name} is a DoRA: --plain needs the rank of the result, --rank N")
    if rank is not None and not dora:
        raise typer.BadParameter(f"{saved.name} is no DoRA, so every rank stays: leave out --rank")
    if dora:
        base = base_name(saved, base)
        check_model(base)
    load_libraries("torch")
    from ..integrations.export import export_adapter
    from ..training.model_files import model_directory

    progress = Terminal()
    with module_bar(progress, dora) as tell:
        report = export_adapter(
            saved.directory,
            output,
            "plain",
            base=None if base is None else model_directory(base, progress),
            dora_to_plain=dora,
            rank=rank,
            overwrite=overwrite,
            tell=tell,
        )
    if as_json:
        show_json(_plain(report))
        return
    if report.dora_errors:
        _show_lost(report.dora_errors, report.dora_output_errors)
    for line in (*report.folded, *report.notes):
        show(f"note: {line}")
    show(f"{len(report.modules)} modules of plain LoRA{_in_words(report)}")
    show_written(output)


@contextlib.contextmanager
def module_bar(progress: Terminal, wanted: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar for the modules of a DoRA that are made plain, the only long work."""
    if not wanted:
        yield None
        return
    with contextlib.ExitStack() as stack:
        bars: list[Callable[[int, str], None]] = []

        def tell(count: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(progress.bar("modules made plain", total)))
            bars[0](1, "")

        yield tell


def _show_lost(updates: Mapping[str, float], outputs: Mapping[str, float]) -> None:
    shown = table("module", "count", "of the\nupdate", "most", "of the\noutput", "most")
    for kind, paths in by_kind(updates).items():
        own = [[errors[path] for path in paths] for errors in (updates, outputs)]
        shown.add_row(
            kind,
            str(len(paths)),
            *(text for e in own for text in (f"{sum(e) / len(e):.2%}", f"{max(e):.2%}")),
        )
    console().print(shown)
    show()


def _in_words(report: ExportReport) -> str:
    if not report.dora_errors:
        return f": {'every update is the same' if report.exact else f'updates differ by {report.worst:.1e}'}"
    most = max(report.dora_errors, key=report.dora_errors.__getitem__)
    return (
        f": at most {report.dora_errors[most]:.2%} of an update is missed ({most}), and "
        f"{max(report.dora_output_errors.values()):.2%} of an output"
    )


def _plain(report: ExportReport) -> dict[str, object]:
    modules = {
        path: {
            "update_error": report.dora_errors.get(path, found.error),
            "output_error": report.dora_output_errors.get(path),
        }
        for path, found in report.modules.items()
    }
    return {
        "output": str(report.directory),
        "modules": modules,
        "folded": list(report.folded),
        "notes": list(report.notes),
    }

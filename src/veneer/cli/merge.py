"""``veneer merge``: an adapter and its base become one plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import app, show_json, size
from .train import check_dtype

#: Share of the update below which losing the rest is worth a warning.
WORTH_SAYING = 0.9


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(help="Directory of the adapter.")],
    output: Annotated[Path, typer.Option(help="Directory for the merged model.")],
    model: Annotated[
        str | None, typer.Option(help="Base model, instead of the one that the adapter names.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bfloat16 or float16: type of the merged weights. float32 loses nothing."
        ),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Merge an adapter into its base model; the result loads with transformers alone."""
    check_dtype(dtype)
    from ..training import Terminal
    from ..training.adapters import check_not_a_source, load_adapted, save_merged
    from ..training.models import check_output, directory_bytes, refuse_file

    progress = Terminal()
    refuse_file(output)
    check_not_a_source(output, adapter)
    adapted, tokenizer = load_adapted(adapter, model, dtype)
    check_not_a_source(output, getattr(adapted.config, "_name_or_path", ""))
    check_output(output)
    progress.say(f"Merging {adapter} and writing {output}")
    report = save_merged(adapted, tokenizer, output)
    weights = directory_bytes(output, "*.safetensors")
    if report.mean < WORTH_SAYING:
        progress.say(
            f"warning: only {report.mean:.0%} of the update survived rounding to the weights' type, so the "
            "merged model answers differently from the adapter; --dtype float32 keeps all of it"
        )
    worst = sorted(report.kept.items(), key=lambda pair: pair[1])[:3]
    if as_json:
        show_json(
            {
                "output": str(output),
                "bytes": weights,
                "kept": {"mean": report.mean, "worst": report.worst, "modules": dict(report.kept)},
            }
        )
        return
    print(f"{len(report.kept)} modules merged; {report.mean:.1%} of the update kept")
    print("least kept: " + ", ".join(f"{path} {share:.1%}" for path, share in worst))
    print(f"model ({size(weights)}): {output}")

"""``veneer env``: what a report of a bug needs."""

from __future__ import annotations

from typing import Annotated

import typer

from .common import app, show, show_json, size


@app.command()
def env(
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show versions, processor, devices, threads and cache directories: paste it into a bug report."""
    from ..training.environment import environment

    found = environment()
    if as_json:
        show_json(found)
        return
    lines: dict[str, str] = {
        **{name: version or "not installed" for name, version in found["versions"].items()},
        "python": f"{found['python']} ({found['executable']})",
        "system": found["system"],
        "processor": f"{found['processor']}, {found['cores']} cores",
        "cpu features": " ".join(found["cpu_features"]) or "not known",
        "torch uses": f"{found['cpu_capability']}, {found['threads']} threads",
        "memory": "not known" if found["memory"] is None else size(found["memory"]),
        "cuda": found["cuda"] or "this torch has none",
        "devices": "; ".join(found["devices"]),
        **{f"{name} cache": place for name, place in found["caches"].items()},
        **found["variables"],
    }
    width = max(map(len, lines))
    for name, value in lines.items():
        show(f"{name:<{width}}  {value}")

"""``veneer verify``: whether an adapter is whole, and does on its base what it says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import AdapterFileError
from ..tools.check import Check
from ..training.loading import Loading
from ..training.paths import check_model
from ..training.progress import Terminal
from ..training.saved_adapter import read_adapter
from .asking import Adapter, AsJson, Device
from .common import DONE, FAILED, app, load_libraries, show, show_json


@app.command()
def verify(
    adapter: Adapter,
    model: Annotated[
        str | None, typer.Option(help="Base model to try the adapter on; without it only files are read.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Type of the base: float32, so that errors do not hide in rounding, bfloat16, …"),
    ] = "float32",
    device: Device = "auto",
    as_json: AsJson = False,
) -> int:
    """Check an adapter, one line a check; exit with 1 if one fails.

    The files: configuration and tensors belong together, the tensors are those that were saved, all values
    are finite. With --model: names and shapes fit, it is the base that the adapter was made on, what the
    adapter does to the outputs on a sample text, saving gives the same tensors, merged equals unmerged within
    rounding.
    """
    loading = Loading(dtype, device)
    if model is not None:
        check_model(model)
    progress = Terminal()
    found: list[Check] = []
    try:
        directory = read_adapter(adapter, progress).directory
    except AdapterFileError as error:
        if not Path(adapter).expanduser().is_dir():
            raise
        found.append(Check("files", False, str(error)))
        if not as_json:
            show(str(found[0]))
    else:
        load_libraries("torch", *([] if model is None else ["transformers"]))
        from ..tools import verify_adapter

        for check in verify_adapter(directory, model, loading, progress):
            found.append(check)
            if not as_json:
                show(str(check))
    passed = all(check.passed is not False for check in found)
    if as_json:
        show_json({"adapter": adapter, "passed": passed, "checks": [asdict(check) for check in found]})
    return DONE if passed else FAILED

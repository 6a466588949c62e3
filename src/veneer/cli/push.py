"""``veneer push``: a saved adapter becomes a repository of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..wording import size
from .asking import AsJson
from .common import app, show, show_json
from .messages import say


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(help="Directory of the adapter.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO", help="owner/name; created if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    commit_message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload adapter",
    revision: Annotated[
        str | None, typer.Option(help="Branch, created if it does not exist; by default the main branch.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Upload an adapter to the Hugging Face hub: its files and its model card, and no other files.

    The adapter is read before anything is sent. The token is that of `hf auth login`, or HF_TOKEN.
    """
    from ..hub import adapter_files, push_to_hub
    from ..training.saved_adapter import read_adapter

    files = adapter_files(adapter)
    for name in files:
        if name.endswith("adapter_config.json"):
            read_adapter((adapter / name).parent)
    to = f"{repo_id}, branch {revision}" if revision else repo_id
    say(f"Pushing {adapter} to {to}: " + ", ".join(f"{name} ({size(n)})" for name, n in files.items()))
    url = push_to_hub(
        adapter, repo_id, private=private or None, commit_message=commit_message, revision=revision
    )
    if as_json:
        show_json({"adapter_path": str(adapter), "url": url, "files": files})
    else:
        show(f"pushed: {url}")

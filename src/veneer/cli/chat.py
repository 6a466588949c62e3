"""``veneer chat``: talk to an adapted model, and switch adapters while talking."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from veneer.wording import did_you_mean

from ..training.loading import Loading
from ..training.paths import check_model
from ..training.progress import Terminal
from ..training.sampling import Sampling
from ..training.saved_adapter import base_name, read_adapter
from .asking import Adapter, Model, Seed, in_flags, require_language_model
from .common import DONE, FAILED, app, load_libraries, show, show_text
from .messages import say

COMMANDS = {
    "/adapter": "list the adapters; /adapter NAME switches to one",
    "/base": "turn the adapter off: the base model answers",
    "/again": "answer the last question again, with the current adapter",
    "/clear": "forget the conversation",
    "/help": "show this list",
    "/exit": "leave, like Ctrl-D, or Ctrl-C twice; Ctrl-C stops an answer",
}


@app.command()
@in_flags
def chat(
    adapter: Adapter,
    model: Model = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter", metavar="NAME=PATH", help="Another adapter of the same base; may be repeated."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    sampling: Sampling = Sampling(512),
    seed: Seed = 0,
    loading: Loading = Loading(quantize="auto"),
) -> int:
    """Chat with an adapted model; /adapter NAME switches adapters, /base turns them off."""
    paths = _paths_by_name(more or [])
    progress = Terminal()
    saved = read_adapter(adapter, progress)
    require_language_model(saved)
    others = {name: read_adapter(path, progress) for name, path in paths.items()}
    check_model(base_name(saved, model))
    load_libraries("torch", "transformers")
    import torch

    from ..training import Chat
    from ..training.adapters import load_adapted

    adapted, tokenizer = load_adapted(saved, model, loading, others, progress)
    torch.manual_seed(seed)
    talk = Chat(adapted, tokenizer, sampling, system)
    alone = sys.stdin.isatty()
    if alone:
        base = getattr(adapted.get_base_model().config, "_name_or_path", "") or "its base"
        say(f"{adapter} on {base}. /base turns the adapter off, /help shows all commands.")
    if not talk.remembers:
        say("This model has no chat template: it continues each line by itself, without the lines before.")
    return _talk(talk, alone)


def _paths_by_name(pairs: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for pair in pairs:
        name, sign, path = pair.partition("=")
        if not (name and sign and path):
            raise typer.BadParameter(f"--adapter takes NAME=PATH, not {pair!r}")
        if name in found or name == "default":
            taken = "is the adapter given first" if name == "default" else "is used twice"
            raise typer.BadParameter(f"--adapter: the name {name!r} {taken}")
        found[name] = path
    return found


def _talk(talk: Any, alone: bool) -> int:
    """Run one turn after the other until the input ends.

    Returns:
        1 if a turn of a script failed; at a terminal the user has seen it.
    """
    from ..errors import VeneerError

    if alone:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its line editing
    code, warned = DONE, False
    while True:
        try:
            line = _line(talk, alone)
        except KeyboardInterrupt:
            if not alone or warned:
                raise
            show()
            say("The conversation goes on; Ctrl-C once more, or Ctrl-D, leaves.")
            warned = True
            continue
        warned = False
        if line is None:
            break
        if not line:
            continue
        try:
            if line.startswith("/"):
                if not _command(talk, line):
                    break
            else:
                talk.ask(line, _write)
                show()
        except VeneerError as error:
            say(f"error: {error}")
            code = DONE if alone else FAILED
    return code


def _line(talk: Any, alone: bool) -> str | None:
    """The user's next line, or None at the end."""
    try:
        if alone:
            return input(f"{talk.adapter or 'base'}> ").strip()
        line = sys.stdin.readline()
    except EOFError:
        show()
        return None
    return line.strip() if line else None


def _write(text: str) -> None:
    show_text(text, end="")


def _command(talk: Any, line: str) -> bool:
    """Run a slash command; False to leave."""
    from ..errors import VeneerError

    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word in ("/exit", "/quit"):
        return False
    if word == "/help":
        for name, what in COMMANDS.items():
            say(f"  {name:<9} {what}")
    elif word == "/clear":
        talk.clear()
        say("forgotten")
    elif word == "/base":
        talk.use(None)
        say("the base model answers")
    elif word == "/adapter" and rest:
        talk.use(rest)
        say(f"{rest} answers")
    elif word == "/adapter":
        for name in talk.adapters:
            say(f"  {'*' if name == talk.adapter else ' '} {name}")
        say(f"  {' ' if talk.adapter else '*'} base model (/base)")
    elif word == "/again":
        talk.again(_write)
        show()
    else:
        raise VeneerError(f"no command {word}{did_you_mean(word, COMMANDS)}; there are {', '.join(COMMANDS)}")
    return True

"""``veneer generate``: ask an adapted model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .common import app, show_json
from .fields import check_dtype


@app.command()
def generate(
    adapter: Annotated[str, typer.Argument(help="Directory of the adapter.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; standard input where it is left out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model, instead of the one that the adapter names.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token at each step.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[
        str, typer.Option(help="auto, float32, bfloat16 or float16: type of the base.")
    ] = "auto",
    base: Annotated[
        bool, typer.Option("--base", help="Turn the adapter off: what the base model answers.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt and answer as JSON.")] = False,
) -> None:
    """Ask an adapted model; the answer goes to standard output."""
    check_dtype(dtype)
    if max_new_tokens < 1:
        raise typer.BadParameter(f"--max-new-tokens must be above 0, not {max_new_tokens}")
    if temperature < 0:
        raise typer.BadParameter(f"--temperature must be 0 or more, not {temperature}")
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one in: veneer generate ADAPTER < question.txt")
        prompt = sys.stdin.read().strip()
    if not prompt:
        raise typer.BadParameter("the prompt is empty")
    import torch

    from ..training import generate_answers, prompt_ids
    from ..training.adapters import load_adapted

    adapted, tokenizer = load_adapted(adapter, model, dtype)
    torch.manual_seed(seed)
    if base:
        adapted = adapted.unload()
    ids = prompt_ids(prompt, tokenizer)
    answer = generate_answers(
        adapted, tokenizer, [ids], max_new_tokens=max_new_tokens, temperature=temperature
    )[0]
    if as_json:
        show_json({"prompt": prompt, "answer": answer})
    else:
        print(answer)

"""``veneer generate``: ask an adapted model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..training.data.sources import read_records
from ..training.loading import Loading
from ..training.paths import check_answer_file, check_model
from ..training.progress import Terminal
from ..training.sampling import Sampling
from ..training.saved_adapter import base_name, read_adapter
from .asking import Adapter, AsJson, Model, Seed, in_flags, require_language_model
from .common import app, load_libraries, show, show_json, show_text


@app.command()
@in_flags
def generate(
    adapter: Adapter,
    prompt: Annotated[
        str | None, typer.Argument(help="The prompt; read from standard input if left out.")
    ] = None,
    model: Model = None,
    data: Annotated[
        str | None,
        typer.Option(help="Answer every record of a file: prompt, messages, instruction or conversations."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With --data: JSONL file for the records with their answers; by default standard output."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: prompts in a batch.")] = 8,
    sampling: Sampling = Sampling(128),
    seed: Seed = 0,
    loading: Loading = Loading(quantize="auto"),
    base: Annotated[
        bool, typer.Option("--base", help="Turn the adapter off: the base model answers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Generate answers with an adapted model, to one prompt or to a file of them."""
    prompt = _prompt(prompt, data, output)
    progress = Terminal()
    saved = read_adapter(adapter, progress)
    require_language_model(saved)
    check_model(base_name(saved, model))
    if output is not None:
        check_answer_file(output)
    records = None
    if data is not None:
        with progress.waiting("Reading the data"):
            records = read_records(data, "prompt")
        progress.say(records.line())
    load_libraries("torch", "transformers")
    import torch

    from ..training import prompt_ids
    from ..training.adapters import load_adapted
    from ..training.forward import evaluating
    from ..training.generation import ANSWER, answer_file, generate_answers, prompts_of

    adapted, tokenizer = load_adapted(saved, model, loading, progress=progress)
    with evaluating(adapted, base):
        if records is None:
            torch.manual_seed(seed)
            ids = [prompt_ids(str(prompt), tokenizer)]
            (answer,) = generate_answers(adapted, tokenizer, ids, sampling=sampling)
            if as_json:
                show_json({"prompt": prompt, "generated_text": answer})
            else:
                show_text(answer)
        elif output is None:
            prompts = prompts_of(records, tokenizer)
            torch.manual_seed(seed)
            answers = generate_answers(
                adapted, tokenizer, prompts, sampling=sampling, batch_size=batch_size, progress=progress
            )
            for record, answer in zip(records, answers, strict=True):
                show_text(json.dumps({**record, ANSWER: answer}, ensure_ascii=False, default=str))
        else:
            made_by = {"adapter": str(saved.directory.resolve()), "bytes": _stamp(saved.path),
                       "base": base, "model": model, "dtype": loading.dtype,
                       "quantize": loading.quantize}  # fmt: skip
            try:
                answer_file(
                    adapted,
                    tokenizer,
                    records,
                    output,
                    sampling,
                    seed=seed,
                    batch_size=batch_size,
                    made_by=made_by,
                    progress=progress,
                )
            except KeyboardInterrupt:
                progress.say("Stopped; run the same command again to continue from here")
                raise
            show(f"{len(records)} answers: {output}")


def _prompt(prompt: str | None, data: str | None, output: Path | None) -> str | None:
    """The prompt from the argument or standard input; None where a file is asked."""
    if data is not None:
        if prompt is not None:
            raise typer.BadParameter("give either a prompt or --data, not both")
        return None
    if output is not None:
        raise typer.BadParameter(
            "--output goes with --data; the answer to one prompt goes to standard output"
        )
    if prompt is None:
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one in: veneer generate ADAPTER < question.txt")
        prompt = sys.stdin.read().strip()
    if not prompt.strip():
        raise typer.BadParameter("the prompt is empty")
    return prompt


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
